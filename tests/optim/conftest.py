"""What the reference trajectories need: kappas built from the numbers in their file, and parameter trees."""

import numpy as np
import pytest

from poise.optim import kappas


def reference_kappas(hparams: dict) -> dict[str, kappas.Kappa]:
    eps, slope, groups = hparams["eps_kappa"], hparams["slope"], hparams["groups"]
    return {
        "sign": kappas.sign(),
        "l2_norm": kappas.lp(2.0),
        "lp_1p5": kappas.lp(1.5),
        "lp_4": kappas.lp(4.0),
        "squared_l2": kappas.squared_l2(),
        "linf_max_coordinate": kappas.linf(),
        "soft_dead_zone": kappas.dead_zone(eps),
        "topk_sign": kappas.top_k(hparams["k"]),
        "huber": kappas.huber(eps),
        "relativistic": kappas.relativistic(eps),
        "tanh": kappas.tanh(slope),
        "softsign": kappas.softsign(eps),
        "arctan": kappas.arctan(slope),
        "group_l2": kappas.group_l2(group_ids=np.repeat(range(len(groups)), [stop - start for start, stop in groups])),
        "nuclear": kappas.nuclear(),
        "spectral": kappas.spectral(),
    }


@pytest.fixture(name="reference_kappas")
def reference_kappas_fixture():
    return reference_kappas


def both_layouts(data, key, count, lead):
    """A tree with every other weight as Flax's kernel (*window, in, out), the rest as a table in PyTorch's layout."""
    out = {}
    for i in range(count):
        x = data[f"p{i}_{key}"]
        rank = x.ndim - lead
        order = (*range(2, rank), 1, 0) if rank > 1 else range(rank)
        flax = x.transpose((*range(lead), *(lead + axis for axis in order)))
        out[f"layer{i}"] = {"kernel": flax} if i % 2 == 0 else {"embedding": x}
    return out


@pytest.fixture(name="both_layouts")
def both_layouts_fixture():
    return both_layouts
