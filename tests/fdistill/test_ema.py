"""Moving averages: parity, profiles, reconstruction."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.fdistill import (
    ema_decay,
    inverse_sqrt_learning_rate,
    power_ema_decay,
    power_function_beta,
    solve_posthoc_coefficients,
    std_to_exp,
    update_ema,
)


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "fastgen_ema*.npz")
def test_fastgen(golden_file):
    data = np.load(golden_file)
    with jax.enable_x64():
        step, batch = jnp.asarray(data["iteration"]), int(data["batch_size"])
        decay = ema_decay(
            (step - 1) * batch, batch, 1e3 * float(data["halflife_kimg"]), float(data["rampup_ratio"]), True
        )
        np.testing.assert_allclose(decay, data["beta_halflife"], rtol=1e-12)
        np.testing.assert_allclose(power_ema_decay(step, float(data["gamma"])), data["beta_power"], rtol=1e-12)


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "edm2_phema*.npz")
def test_edm2(golden_file):
    data = np.load(golden_file)
    with jax.enable_x64():
        np.testing.assert_allclose(std_to_exp(data["std"]), data["exp"], rtol=1e-7)
        beta = power_function_beta(data["std"][:, None], data["t_next"][None], float(data["t_delta"]))
        np.testing.assert_allclose(beta, data["beta"], rtol=1e-8)
        coefficients = solve_posthoc_coefficients(
            data["in_ofs"], data["in_std"], float(data["out_ofs"]), float(data["out_std"])
        )
        np.testing.assert_allclose(coefficients, data["coeffs"], rtol=1e-8)
        rate = inverse_sqrt_learning_rate(
            jnp.asarray(data["lr_nimg"]),
            int(data["lr_batch"]),
            float(data["lr_ref"]),
            float(data["lr_ref_batches"]),
            1e6 * float(data["lr_rampup_Mimg"]),
        )
        np.testing.assert_allclose(rate, data["lr"], rtol=1e-8)


def test_halflife_means_what_it_says():
    # without ramp-up, H/B steps halve an average of zeros
    decay = ema_decay(0, 100, 1000, rampup=None)
    np.testing.assert_allclose(decay**10, 0.5, rtol=1e-6)
    # with it, the half-life is 5% of what was seen, until the cap
    np.testing.assert_allclose(ema_decay(40_000, 100, 1e6), 0.5 ** (100 / 2000), rtol=1e-6)
    np.testing.assert_allclose(ema_decay(10**8, 100, 1e6), 0.5 ** (100 / 1e6), rtol=1e-6)
    assert float(ema_decay(0, 512, 500_000)) == 0.0  # the first update copies
    assert 0 < float(ema_decay(0, 512, 500_000, count_current=True)) < 1e-5


def test_power_average_has_the_profile_it_promises():
    # weights of the recursion are proportional to the increments of (t/T)^(gamma+1)
    with jax.enable_x64():
        gamma, steps = 3.0, 50
        weights = np.zeros(steps)
        for t in range(1, steps + 1):
            beta = float(power_ema_decay(t, gamma))
            weights = beta * weights
            weights[t - 1] += 1 - beta
        edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
        np.testing.assert_allclose(weights, np.diff(edges), rtol=1e-10)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2, math.sqrt(1 / 12)])
def test_width_and_exponent_are_inverse(std):
    gamma = std_to_exp(std)
    back = np.sqrt((gamma + 1) / (gamma + 2) ** 2 / (gamma + 3))
    np.testing.assert_allclose(back, std, rtol=1e-10)
    grid = (np.arange(20000) + 0.5) / 20000
    profile = (gamma + 1) * grid**gamma / 20000
    mean = (profile * grid).sum()
    np.testing.assert_allclose(np.sqrt((profile * (grid - mean) ** 2).sum()), std, rtol=1e-3)


def test_reconstruction_of_an_average_that_was_not_stored():
    # Two averages are tracked and stored four times; a third width is rebuilt from them and compared with tracking it.
    with jax.enable_x64():
        rng = np.random.default_rng(0)
        path = np.cumsum(rng.normal(size=(400, 3)), axis=0) / 10
        tracked = {std: np.zeros(3) for std in (0.05, 0.10, 0.07)}
        stored, times, stds = [], [], []
        for t in range(1, 401):
            for std in tracked:
                beta = float(power_function_beta(std, t, 1))
                tracked[std] = beta * tracked[std] + (1 - beta) * path[t - 1]
            if t % 50 == 0:
                for std in (0.05, 0.10):
                    stored.append(tracked[std])
                    times.append(t)
                    stds.append(std)
        x = solve_posthoc_coefficients(times, stds, 400, [0.07, 0.05])
        assert x.shape == (16, 2)
        np.testing.assert_allclose(x.sum(axis=0), 1.0, rtol=1e-9)
        rebuilt = x.T @ np.stack(stored)
        np.testing.assert_allclose(rebuilt[0], tracked[0.07], atol=0.01)
        np.testing.assert_allclose(rebuilt[1], tracked[0.05], atol=1e-7)


def test_update():
    params = {"w": jnp.array([1.0, 2.0]), "b": jnp.array(4.0, jnp.bfloat16), "count": jnp.array(7)}
    ema = {"w": jnp.array([3.0, 2.0]), "b": jnp.array(0.0), "count": jnp.array(1)}
    new = update_ema(ema, params, 0.5)
    np.testing.assert_allclose(new["w"], [2.0, 2.0])
    assert float(new["b"]) == 2.0
    assert new["b"].dtype == jnp.float32
    assert int(new["count"]) == 7
    same = update_ema(ema, params, 0)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True))
    kept = update_ema(ema, ema, 0.999)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(ema), strict=True))


def test_transformations():
    steps = jnp.arange(1, 6)
    np.testing.assert_allclose(
        jax.vmap(lambda t: power_ema_decay(t, 2.0))(steps), power_ema_decay(steps, 2.0), rtol=1e-6
    )
    np.testing.assert_allclose(
        jax.jit(lambda n: ema_decay(n, 8, 100))(steps * 100), ema_decay(steps * 100, 8, 100), rtol=1e-6
    )

    def body(ema, t):
        return update_ema(ema, t.astype(jnp.float32), power_ema_decay(t, 0.0)), None

    mean, _ = jax.lax.scan(body, jnp.array(99.0), jnp.arange(1, 11))  # exponent 0 is the plain mean
    np.testing.assert_allclose(mean, 5.5, rtol=1e-6)
    assert np.isfinite(float(jax.grad(lambda g: power_ema_decay(1, g))(2.0)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ema_decay(-1, 8, 100), "images_seen must lie"),
        (lambda: ema_decay(1, 0, 100), "batch_size must lie"),
        (lambda: ema_decay(1, 8, 0), "halflife must lie"),
        (lambda: ema_decay(1, 8, 100, rampup=-0.1), "rampup must lie"),
        (lambda: power_ema_decay(0, 1.0), "step must lie"),
        (lambda: power_ema_decay(1, -1.0), "gamma must lie"),
        (lambda: update_ema({"a": jnp.ones(1)}, {"a": jnp.ones(1)}, 1.5), "decay must lie"),
        (lambda: update_ema({"a": jnp.ones(1)}, {"b": jnp.ones(1)}, 0.5), "key"),
        (lambda: std_to_exp(0.3), "std must lie"),
        (lambda: std_to_exp(0.0), "std must lie"),
        (lambda: power_function_beta(0.1, 10, 20), "t_next must lie"),
        (lambda: solve_posthoc_coefficients([0.0], 0.1, 1.0, 0.1), "in_ofs must lie"),
        (lambda: inverse_sqrt_learning_rate(1.0, 0), "batch_size must lie"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
