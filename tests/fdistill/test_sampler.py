"""Samplers against the official ones, closed forms, and across devices."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.fdistill import (
    ChurnConfig,
    GaussianMixture,
    ablation_sampler,
    heun_sampler,
    karras_sigmas,
    noise_schedule,
    sigma_steps,
    vp_betas,
)


def _load(golden_file):
    data = np.load(golden_file)
    gm = GaussianMixture(*(jnp.asarray(data[key]) for key in ("weights", "means", "stds")))
    return data, gm.denoise, jnp.asarray(data["latents"])


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "edm_sampler*.npz")
def test_edm_sampler(golden_file):
    with jax.enable_x64():
        data, denoise, latents = _load(golden_file)
        sigmas = karras_sigmas(int(data["num_steps"]))
        np.testing.assert_allclose(sigmas, data["t_steps"][:-1], rtol=1e-12)
        np.testing.assert_allclose(heun_sampler(denoise, latents, sigmas), data["x_det"], rtol=0, atol=1e-9)
        churn = ChurnConfig(*(float(data[key]) for key in ("S_churn", "S_min", "S_max", "S_noise")))
        churned = heun_sampler(denoise, latents, sigmas, churn=churn, noise=jnp.asarray(data["churn_eps"]))
        np.testing.assert_allclose(churned, data["x_churn"], rtol=0, atol=1e-9)


# The official code evaluates improved DDPM's cosine in float32, here it is float64: levels differ by about 1e-7.
@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "edm_sampler*.npz")
@pytest.mark.parametrize(("discretization", "atol"), [("vp", 1e-9), ("ve", 1e-9), ("iddpm", 4e-6), ("edm", 1e-9)])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_ablation_sampler(golden_file, discretization, atol, solver):
    with jax.enable_x64():
        data, denoise, latents = _load(golden_file)
        sigmas = sigma_steps(discretization, int(data["num_steps"]))
        schedule = None
        if discretization == "vp":
            schedule = noise_schedule("vp", "vp", *vp_betas(float(sigmas[-1]), float(sigmas[0])))
        elif discretization == "ve":
            schedule = noise_schedule("ve")
        x = ablation_sampler(denoise, latents, sigmas, schedule=schedule, solver=solver)
        np.testing.assert_allclose(x, data[f"abl_{discretization}_{solver}"], rtol=0, atol=atol)


MEAN, STD = 0.3, 0.5


def _gaussian(x, sigma):
    gain = STD**2 / (STD**2 + sigma[:, None] ** 2)
    return MEAN + gain * (x - MEAN)


def _error(num, **options):
    """Against the exact solution for Gaussian data: mu + (x - mu) s / sqrt(s^2 + sigma_0^2)."""
    sigmas = karras_sigmas(num, 1e-4, 80.0)
    z = jnp.linspace(-2.0, 2.0, 9)[:, None]
    exact = MEAN + (80.0 * z - MEAN) * STD / math.sqrt(STD**2 + 80.0**2)
    solve = jax.jit(lambda z, sigmas: ablation_sampler(_gaussian, z, sigmas, **options))
    return float(jnp.abs(solve(z, sigmas) - exact).max())


@pytest.mark.parametrize(
    ("options", "low", "high", "bound"),
    [
        ({}, 1.9, 2.3, 4e-3),
        ({"alpha": 0.5}, 1.9, 3.3, 1e-4),  # the midpoint method's second-order term vanishes here
        ({"solver": "euler"}, 0.9, 1.1, 5e-2),
    ],
)
def test_order_of_convergence(options, low, high, bound):
    with jax.enable_x64():
        coarse, fine = _error(40, **options), _error(80, **options)
        assert low < math.log2(coarse / fine) < high
        assert fine < bound


def test_schedules_solve_the_same_equation():
    with jax.enable_x64():
        assert _error(400) < 2e-4
        assert _error(400, schedule=noise_schedule("vp", "vp", *vp_betas(1e-4, 80.0))) < 2e-4
        assert _error(400, schedule=noise_schedule("ve")) < 2e-3


def test_churn_keeps_the_distribution():
    z = jax.random.normal(jax.random.key(0), (4000, 1))
    sigmas = karras_sigmas(32, 0.01, 20.0)
    churn = ChurnConfig(s_churn=20.0, s_min=0.05, s_max=10.0)
    x = jax.jit(lambda z, key: heun_sampler(_gaussian, z, sigmas, key=key, churn=churn))(z, jax.random.key(1))
    np.testing.assert_allclose(x.mean(), MEAN, atol=4 * STD / math.sqrt(4000))
    np.testing.assert_allclose(x.std(), STD, rtol=4 / math.sqrt(8000) + 0.02)
    deterministic = heun_sampler(_gaussian, z, sigmas)
    assert float(jnp.abs(x - deterministic).max()) > 0.5
    # outside its range of levels churn does nothing
    idle = heun_sampler(_gaussian, z, sigmas, key=jax.random.key(1), churn=churn._replace(s_min=30.0, s_max=50.0))
    np.testing.assert_allclose(idle, deterministic, atol=1e-6)


def test_each_example_has_its_own_noise_however_the_batch_is_spread():
    z = jax.random.normal(jax.random.key(0), (8, 3))
    sigmas, churn = karras_sigmas(5), ChurnConfig(s_churn=10.0)

    def draw(z, axis_name=None):
        return heun_sampler(_gaussian, z, sigmas, key=jax.random.key(7), churn=churn, axis_name=axis_name)

    one = draw(z)
    spread = jax.pmap(lambda z: draw(z, "data"), axis_name="data")(z.reshape(4, 2, 3))
    np.testing.assert_allclose(spread.reshape(8, 3), one, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(draw(z[:3]), one[:3], rtol=1e-5, atol=1e-6)


def test_number_of_evaluations_and_types():
    calls = []

    def denoise(x, sigma):
        jax.debug.callback(lambda s: calls.append(float(s[0])), sigma)
        assert sigma.shape == (2,)
        assert sigma.dtype == x.dtype
        return 0.5 * x

    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            x = heun_sampler(denoise, jnp.ones((2, 3), dtype), karras_sigmas(6))
            assert x.dtype == dtype
            jax.effects_barrier()
    assert len(calls) == 2 * (2 * 6 - 1)
    assert sorted(set(np.round(calls, 4)), reverse=True) == sorted(
        set(np.round(np.asarray(karras_sigmas(6), np.float64), 4)), reverse=True
    )


def test_transformations():
    z = jax.random.normal(jax.random.key(0), (4, 2, 3))
    sigmas = karras_sigmas(4)

    def denoise(x, sigma):
        return 0.1 * jnp.tanh(x / (1 + sigma[:, None, None]))

    x = heun_sampler(denoise, z, sigmas)
    jitted = jax.jit(lambda z, s: heun_sampler(denoise, z, s))(z, sigmas)
    np.testing.assert_allclose(jitted, x, rtol=1e-4, atol=1e-5)
    mapped = jax.vmap(lambda one: heun_sampler(denoise, one[None], sigmas)[0])(z)
    np.testing.assert_allclose(mapped, x, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda z: heun_sampler(denoise, z, sigmas).sum())(z)
    assert np.all(np.isfinite(gradient))


Z = jnp.ones((2, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heun_sampler(_gaussian, Z, jnp.array([1.0])), "at least 2 steps"),
        (lambda: heun_sampler(_gaussian, Z, jnp.array([1.0, 0.0])), "without the final 0"),
        (lambda: heun_sampler(_gaussian, Z, jnp.array([1.0, 2.0])), "strictly descending"),
        (lambda: heun_sampler(_gaussian, Z, karras_sigmas(3), churn=ChurnConfig(1.0)), "key .or noise. must be given"),
        (lambda: heun_sampler(_gaussian, Z, karras_sigmas(3), churn=ChurnConfig(-1.0)), "churn.s_churn must lie"),
        (
            lambda: inspect.unwrap(ablation_sampler)(
                _gaussian, Z, karras_sigmas(3), churn=ChurnConfig(1.0), noise=jnp.ones((2, 2, 1))
            ),
            "noise must have shape",
        ),
        (lambda: ablation_sampler(_gaussian, Z, karras_sigmas(3), solver="rk4"), "solver must be one of heun, euler"),
        (lambda: ablation_sampler(_gaussian, Z, karras_sigmas(3), alpha=0.0), "alpha must lie"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
