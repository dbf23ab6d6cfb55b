"""Presets: the numbers of the codes that they come from, overrides, optimizers, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.fdistill import (
    PRESETS,
    FDistillConfig,
    divergence,
    fastgen_weight,
    init_ratio_bins,
    preset,
    preset_optimizers,
    scale,
)
from poise.fdistill.distill_state import Optimizers
from poise.fdistill.networks import Networks
from poise.fdistill.student import _weight


def test_dmd2_numbers():
    config = preset("dmd2")
    assert config.resolved_divergence.name == "reverse_kl"
    assert (config.gan_weight, config.discriminator_weight) == (3e-3, 1e-2)
    assert (config.min_level, config.max_level) == (int(0.02 * 1000), int(0.98 * 1000))
    assert (config.fake_min_level, config.fake_max_level) == (0, 999)
    assert (config.fake_updates, config.critics_on_student_step) == (5, True)
    assert PRESETS["dmd2"].batch_size == 7 * 40
    assert preset("dmd2_no_gan").discriminator_weight == 0
    assert PRESETS["dmd2_finetune"].learning_rate == 5e-7


def test_codes_and_paper_differ_where_they_do():
    code, paper = preset("fastgen"), preset("paper_cifar10")
    changed = {
        field.name
        for field in dataclasses.fields(FDistillConfig)
        if getattr(code, field.name) != getattr(paper, field.name)
    }
    assert changed == {"fake_updates", "r1_weight"}
    assert preset("fastgen_imagenet64").bins_decay == 0.5
    assert PRESETS["fastgen"].feature_levels == (0, 1, 2)
    assert all(recipe.source for recipe in PRESETS.values())
    assert all(np.isclose(d ** (1 / 5), [0.9999, 0.99995, 0.9996]).any() for d in code.ema_decays)


def test_stable_diffusion_levels():
    """Its first and last noise-to-signal ratios, as they are known."""
    config = preset("fastgen_sd15")
    assert len(config.levels) == 1000
    assert config.levels[0] == pytest.approx(0.0291672, rel=1e-5)
    assert config.levels[-1] == pytest.approx(14.6146, rel=1e-5)
    assert config.sigma_init == config.sigma_max == config.levels[-1]


def test_levels_are_drawn_from_the_grid_within_the_bounds():
    config = FDistillConfig(levels=(0.1, 0.2, 0.7, 1.5), min_level=1, max_level=2, fake_min_level=0, fake_max_level=3)
    networks = Networks(None, None, config, Optimizers(*[optax.sgd(0.1)] * 3), (-1,), None)
    keys = jax.random.split(jax.random.key(0), 200)
    drawn = jax.vmap(lambda key: networks.matching_level(key, jnp.float32))(keys)
    assert set(np.asarray(drawn, np.float64).round(3).tolist()) == {0.2, 0.7}
    drawn = jax.vmap(lambda key: networks.critic_level(key, jnp.float32))(keys)
    assert set(np.asarray(drawn, np.float64).round(3).tolist()) == {0.1, 0.2, 0.7, 1.5}


FASTGEN_NAMES = {
    "kl": divergence("forward_kl"),
    "js": divergence("jensen_shannon"),
    "sf": divergence("softened_reverse_kl"),
    "jf": divergence("jeffreys"),
    "sh": scale(divergence("squared_hellinger"), 4.0),  # that code leaves constant factors out
    "neyman": scale(divergence("neyman_chi2"), 0.5),
}


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "fastgen_h*.npz")
@pytest.mark.parametrize("name", FASTGEN_NAMES)
def test_the_update_weighs_as_the_official_code(golden_file, name):
    """Two calls of the weighting that the student's update uses, with the preset's settings."""
    data = np.load(golden_file)
    for kind, changes in {"binema": {"bins_decay": float(data["ratio_ema_rate"])}, "raw": {"bins": "none"}}.items():
        config = preset(
            "fastgen",
            divergence=FASTGEN_NAMES[name],
            sigma_min=float(data["min_t"]),
            sigma_max=float(data["max_t"]),
            num_bins=int(data["bin_num"]),
            ratio_range=(float(data["ratio_lower"]), float(data["ratio_upper"])),
            **changes,
        )
        networks = Networks(None, None, config, Optimizers(*[optax.sgd(0.1)] * 3), (-1,), None)
        bins = init_ratio_bins(config.num_bins)
        for call in range(2):
            logits, sigma = jnp.asarray(data[f"logits{call}"]), jnp.asarray(data[f"t{call}"], jnp.float32)
            h, bins, _ = _weight(networks, logits, sigma, bins)
            np.testing.assert_allclose(h, data[f"{name}_{kind}_h{call}"], rtol=5e-6)
            direct, _ = fastgen_weight(
                config.resolved_divergence, logits, eps=config.weight_eps, ratio_range=config.ratio_range
            )
            if kind == "raw":
                np.testing.assert_array_equal(direct, h)
            else:
                np.testing.assert_allclose(jnp.exp(bins.log_mean), data[f"bins_after{call}_ema"], rtol=5e-6)


def test_optimizers_warm_up_and_clip():
    params, grads = jnp.zeros(2), jnp.array([30.0, 40.0])
    for name, clipped_critics in (("dmd2", True), ("fastgen", False)):
        optimizers = preset_optimizers(name, learning_rate=optax.constant_schedule(1.0))
        for network, clipped in (("student", True), ("fake", clipped_critics), ("head", clipped_critics)):
            optimizer = getattr(optimizers, network)
            _, state = optimizer.update(grads, optimizer.init(params), params)
            mu = optax.tree.get(state, "mu")
            np.testing.assert_allclose(mu, 0.1 * grads * (10 / 50 if clipped else 1.0), rtol=1e-5)
    optimizer = preset_optimizers("dmd2").student
    state, sizes = optimizer.init(params), []
    for _ in range(3):
        updates, state = optimizer.update(grads, state, params)
        sizes.append(float(jnp.abs(updates[0])))
    np.testing.assert_allclose(sizes, [0.0, 2e-6 / 500, 2 * 2e-6 / 500], rtol=1e-4)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"name must be one of dmd2, .*fastgen.*paper_cifar10.*, got 'dmd3'"):
        preset("dmd3")
    with pytest.raises(ValueError, match="name must be one of dmd2"):
        preset_optimizers("edm")
    with pytest.raises(
        TypeError, match=r"overrides must be fields of FDistillConfig \(bins, .*\), got 'learning_rate'"
    ):
        preset("dmd2", learning_rate=1e-4)
    with pytest.raises(ValueError, match="fake_updates"):
        preset("dmd2", fake_updates=0)
    with pytest.raises(ValueError, match="clip_student"):
        preset_optimizers("dmd2", clip_student=-1.0)
    with pytest.raises(ValueError, match="warmup_steps"):
        preset_optimizers("dmd2", warmup_steps=-1)
