"""Noise schedules and discretizations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.fdistill import karras_sigmas, noise_schedule, sigma_steps, vp_betas
from poise.nets import iddpm_levels


@pytest.mark.parametrize(("schedule", "scaling"), [("linear", "none"), ("vp", "vp"), ("vp", "none"), ("ve", "none")])
def test_derivatives_and_inverses(schedule, scaling):
    with jax.enable_x64():
        s = noise_schedule(schedule, scaling)
        t = jnp.linspace(0.01, 0.99, 12)
        np.testing.assert_allclose(s.sigma_inv(s.sigma(t)), t, rtol=1e-9)
        np.testing.assert_allclose(s.sigma_deriv(t), jax.vmap(jax.grad(lambda t: s.sigma(t)))(t), rtol=1e-9)
        log_scale = jax.vmap(jax.grad(lambda t: jnp.log(s.scale(t))))(t)
        np.testing.assert_allclose(s.log_scale_deriv(t), log_scale, rtol=1e-9)
        if scaling == "vp":
            np.testing.assert_allclose(s.scale(t) ** 2 * (1 + s.sigma(t) ** 2), 1.0, rtol=1e-12)


def test_betas_hit_the_ends():
    beta_d, beta_min = vp_betas(0.02, 90.0, 1e-3)
    with jax.enable_x64():
        s = noise_schedule("vp", "vp", beta_d, beta_min)
        np.testing.assert_allclose(s.sigma(jnp.array([1e-3, 1.0])), [0.02, 90.0], rtol=1e-10)


@pytest.mark.parametrize("discretization", ["edm", "vp", "ve", "iddpm"])
def test_steps_descend_between_their_ends(discretization):
    with jax.enable_x64():
        low, high = 0.03, 70.0
        levels = np.asarray(sigma_steps(discretization, 21, low, high))
        assert np.all(np.diff(levels) < 0)
        if discretization == "iddpm":
            known = iddpm_levels()
            assert set(levels) <= set(known)
            assert levels[0] == known[known <= high].max()
            assert levels[-1] == known[known >= low].min()
        else:
            np.testing.assert_allclose(levels[[0, -1]], [high, low], rtol=1e-9)
        default = np.asarray(sigma_steps(discretization, 18))
        low, high = {
            "edm": (0.002, 80),
            "ve": (0.02, 100),
            "vp": [math.sqrt(math.expm1(9.95 * t**2 + 0.1 * t)) for t in (1e-3, 1.0)],
            "iddpm": (0.002, 81),
        }[discretization]
        if discretization == "iddpm":
            assert low <= default[-1] < 0.01
            assert 79 < default[0] <= high
        else:
            np.testing.assert_allclose(default[[0, -1]], [high, low], rtol=1e-9)
    assert sigma_steps(discretization, 5).dtype == jnp.float32


def test_each_discretization_is_even_in_its_own_way():
    with jax.enable_x64():
        ve = np.log(sigma_steps("ve", 9))
        np.testing.assert_allclose(np.diff(ve), ve[1] - ve[0], rtol=1e-10)
        vp = noise_schedule("vp").sigma_inv(sigma_steps("vp", 9))
        np.testing.assert_allclose(vp, np.linspace(1.0, 1e-3, 9), rtol=1e-9)
        np.testing.assert_array_equal(sigma_steps("edm", 9), karras_sigmas(9))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise_schedule("cosine"), "schedule must be one of linear, vp, ve"),
        (lambda: noise_schedule("vp", "ve"), "scaling must be one of none, vp"),
        (lambda: sigma_steps("ddim", 5), "discretization must be one of edm, vp, ve, iddpm"),
        (lambda: sigma_steps("ve", 1), "num must be at least 2"),
        (lambda: sigma_steps("vp", 5, 2.0, 1.0), "sigma_max must lie"),
        (lambda: sigma_steps("iddpm", 2000), "num must be at most"),
        (lambda: vp_betas(0.0, 1.0), "sigma_min must lie"),
        (lambda: vp_betas(0.1, 1.0, 1.0), "epsilon_s must lie"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
