"""The kappas of the reference trajectories, built from the numbers in their file."""

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
