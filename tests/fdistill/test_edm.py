"""EDM's losses and noise levels."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.fdistill import (
    edm2_loss,
    edm_coefficients,
    edm_loss,
    estimate_sigma_data,
    karras_levels,
    karras_sigmas,
    loss_weight,
    sample_karras_sigma,
    sample_sigma,
    sample_ve_sigma,
    sample_vp_sigma,
)


def _toy_denoiser(sigma_data):
    """The golden files' network, 0.9 tanh(0.8u + 0.3c) + 0.1u, preconditioned."""

    def denoise(x, sigma):
        skip, out, into, label = (c.reshape(-1, *[1] * (x.ndim - 1)) for c in edm_coefficients(sigma, sigma_data))
        u = into * x
        return skip * x + out * (0.9 * jnp.tanh(0.8 * u + 0.3 * label) + 0.1 * u)

    return denoise


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "edm_loss_*.npz")
def test_losses(golden_file):
    data = np.load(golden_file)
    sigma_data = float(data["sigma_data"])
    images, noise, sigma = (jnp.asarray(data[key]) for key in ("images", "eps", "sigma"))
    weighting = "edm" if golden_file.stem.startswith("edm_loss_edm") else "inverse_variance"
    loss = edm_loss(_toy_denoiser(sigma_data), images, sigma.reshape(-1), noise, sigma_data, weighting)
    np.testing.assert_allclose(loss, data["loss"], rtol=2e-5, atol=1e-7)


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "edm_loss_*.npz")
def test_levels_of_the_draws(golden_file, monkeypatch):
    data = np.load(golden_file)
    draw = jnp.asarray(data["rnd"]).reshape(-1)
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype: draw)
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype: draw)
    sample = {
        "edm": lambda key, shape: sample_sigma(key, shape, float(data["P_mean"]), float(data["P_std"])),
        "vp": sample_vp_sigma,
        "ve": sample_ve_sigma,
    }[golden_file.stem.split("_")[2]]
    np.testing.assert_allclose(sample(jax.random.key(0), draw.shape), data["sigma"].reshape(-1), rtol=2e-5)


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "fastgen_edm_schedule*.npz")
def test_levels_of_fastgen(golden_file):
    data = np.load(golden_file)
    low, high = int(data["min_step"]), int(data["max_step"])
    with jax.enable_x64():
        ends = float(data["sigmas"][0]), float(data["sigmas"][-1])
        levels = karras_levels(len(data["sigmas"]), *ends)
        np.testing.assert_allclose(levels, data["sigmas"], rtol=1e-12)
        place = np.abs(np.log(data["sampled_t"][:, None] / np.asarray(levels))).argmin(axis=1)
        np.testing.assert_allclose(data["sampled_t"], levels[place], rtol=1e-12)
        assert place.min() >= low
        assert place.max() <= high
        drawn = sample_karras_sigma(
            jax.random.key(0), (5000,), *ends, num_levels=len(levels), min_level=low, max_level=high
        )
        index = jnp.searchsorted(levels, drawn)
        np.testing.assert_array_equal(levels[index], drawn)  # exactly on the grid
        assert int(index.min()) >= low
        assert int(index.max()) <= high


def test_both_ends_of_the_index_range_are_drawn():
    drawn = sample_karras_sigma(jax.random.key(1), (400,), num_levels=10, min_level=3, max_level=6)
    grid = karras_levels(10)
    counts = [int((drawn == level).sum()) for level in grid]
    assert sum(counts) == 400
    assert counts[:3] == counts[7:] == [0, 0, 0]
    assert min(counts[3:7]) > 60


def test_weight_makes_the_output_scale_one():
    sigma = jnp.exp(jnp.linspace(-6.0, 4.0, 21))
    for sigma_data in (0.5, 1.3):
        c = edm_coefficients(sigma, sigma_data)
        np.testing.assert_allclose(c.c_out**2 * loss_weight(sigma, sigma_data), 1.0, rtol=1e-5)
        np.testing.assert_allclose(c.c_in**2 * (sigma**2 + sigma_data**2), 1.0, rtol=1e-5)
        skip_error = (1 - c.c_skip) ** 2 * sigma_data**2 + c.c_skip**2 * sigma**2
        np.testing.assert_allclose(skip_error, c.c_out**2, rtol=1e-4)  # c_out is the size of what F must predict


def test_loss_of_the_exact_denoiser_of_gaussian_data():
    # data N(0, s^2): E err^2 = s^2 sigma^2 / (s^2 + sigma^2), so with sigma_data = s the expected loss is 1.
    keys = jax.random.split(jax.random.key(0), 3)
    images = 0.7 * jax.random.normal(keys[0], (4000, 4))
    sigma = sample_sigma(keys[1], (4000,))
    noise = jax.random.normal(keys[2], images.shape)

    def denoise(x, sigma):
        return x * (0.49 / (0.49 + sigma[:, None] ** 2))

    loss = edm_loss(denoise, images, sigma, noise, 0.7)
    np.testing.assert_allclose(loss.mean(), 1.0, atol=4 * math.sqrt(2 / 16000))
    # EDM2's uncertainty: u = 0 changes nothing, and the best constant u is the log of the mean loss
    np.testing.assert_allclose(
        edm2_loss(lambda x, s: (denoise(x, s), jnp.zeros_like(s)), images, sigma, noise, 0.7), loss, rtol=1e-5
    )

    def with_uncertainty(u):
        return edm2_loss(lambda x, s: (2 * denoise(x, s), u + 0 * s), images, sigma, noise, 0.7).mean()

    worse = edm_loss(lambda x, s: 2 * denoise(x, s), images, sigma, noise, 0.7).mean()
    best = jnp.log(worse)
    np.testing.assert_allclose(jax.grad(with_uncertainty)(best), 0.0, atol=1e-4)
    np.testing.assert_allclose(with_uncertainty(best), 1 + best, rtol=1e-4)


def test_lognormal_levels():
    sigma = sample_sigma(jax.random.key(0), (20000,), -0.4, 1.0)
    logs = np.log(np.asarray(sigma))
    np.testing.assert_allclose(logs.mean(), -0.4, atol=4 / math.sqrt(20000))
    np.testing.assert_allclose(logs.std(), 1.0, atol=4 / math.sqrt(40000))
    assert sample_sigma(jax.random.key(0), (), dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_ranges_of_the_other_levels():
    ve = sample_ve_sigma(jax.random.key(0), (5000,))
    assert 0.02 <= float(ve.min()) < 0.021
    assert 98 < float(ve.max()) <= 100.001
    vp = sample_vp_sigma(jax.random.key(0), (5000,))
    assert 0 < float(vp.min()) < 0.02
    assert 100 < float(vp.max()) < 153


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_karras_grid(dtype):
    with jax.enable_x64(dtype == "float64"):
        sigmas = karras_sigmas(40, 0.01, 50, 5)
        assert sigmas.dtype == dtype
        np.testing.assert_allclose(sigmas[jnp.array([0, -1])], [50.0, 0.01], rtol=1e-7)
        assert np.all(np.diff(sigmas) < 0)
        even = np.asarray(sigmas, np.float64) ** (1 / 5)
        np.testing.assert_allclose(np.diff(even), (even[-1] - even[0]) / 39, rtol=1e-5)
        np.testing.assert_array_equal(karras_levels(40, 0.01, 50, 5), sigmas[::-1])
        traced = jax.jit(lambda low, high: karras_sigmas(40, low, high, 5))(0.01, 50.0)
        np.testing.assert_allclose(traced, sigmas, rtol=1e-4)
    np.testing.assert_allclose(karras_sigmas(3, 1, 5, 1), [5.0, 3.0, 1.0])


def test_sigma_data():
    images = 0.3 + 2 * jax.random.normal(jax.random.key(0), (800, 5, 5))
    np.testing.assert_allclose(estimate_sigma_data(images), np.asarray(images).std(), rtol=1e-5)
    np.testing.assert_allclose(
        estimate_sigma_data(images, center=False), np.sqrt((np.asarray(images) ** 2).mean()), rtol=1e-5
    )
    spread = jax.vmap(lambda x: estimate_sigma_data(x, axis_name="data"), axis_name="data")
    np.testing.assert_allclose(spread(images.reshape(8, 100, 5, 5)), estimate_sigma_data(images), rtol=1e-5)
    offset = 1e4 + jnp.array([[0.0, 2.0]])  # no cancellation
    np.testing.assert_allclose(estimate_sigma_data(offset), 1.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("event", [(), (2, 3)])
def test_shapes_dtypes_and_transformations(event, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    images, noise = (jax.random.normal(key, (3, *event), dtype) for key in keys[:2])
    sigma = sample_sigma(keys[2], (3,), dtype=jnp.dtype(dtype))

    def loss_of(images, sigma, noise):
        return edm_loss(_toy_denoiser(0.5), images, sigma, noise)

    loss = loss_of(images, sigma, noise)
    assert loss.shape == images.shape
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(loss_of)(images, sigma, noise), loss, rtol=1e-4, atol=1e-5)
    each = jax.vmap(lambda *one: loss_of(*(x[None] for x in one))[0])(images, sigma, noise)
    np.testing.assert_allclose(each, loss, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda x: loss_of(x, sigma, noise).sum())(images)
    assert gradient.dtype == dtype
    assert np.all(np.isfinite(gradient.astype(jnp.float32)))


X = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss_weight(jnp.array([1.0, 0.0])), "sigma must lie"),
        (lambda: loss_weight(jnp.array([1.0]), 0), "sigma_data must lie"),
        (lambda: edm_loss(lambda x, s: x, X, jnp.zeros(2), X), "sigma must lie"),
        (lambda: edm_loss(lambda x, s: x, X, jnp.ones(2), X, weighting="vp"), "weighting must be one of"),
        (lambda: inspect.unwrap(edm_loss)(lambda x, s: x, X, jnp.ones(3), X), "sigma must have shape"),
        (
            lambda: inspect.unwrap(edm_loss)(lambda x, s: x, X, jnp.ones(2), X[:, :1]),
            "noise must have the images' shape",
        ),
        (lambda: edm2_loss(lambda x, s: (x, s[:, None]), X, jnp.ones(2), X), "uncertainty of shape"),
        (lambda: sample_sigma(jax.random.key(0), (), 0.0, -1.0), "p_std must lie"),
        (lambda: sample_ve_sigma(jax.random.key(0), (), 2.0, 1.0), "sigma_max must lie"),
        (lambda: sample_vp_sigma(jax.random.key(0), epsilon_t=0.0), "epsilon_t must lie"),
        (lambda: karras_sigmas(1), "num must be at least 2"),
        (lambda: karras_sigmas(4, 0.0), "sigma_min must lie"),
        (lambda: karras_sigmas(4, 1.0, 1.0), "sigma_max must lie"),
        (lambda: karras_sigmas(4, rho=0), "rho must lie"),
        (lambda: sample_karras_sigma(jax.random.key(0), min_level=5, max_level=4), "min_level and max_level"),
        (lambda: sample_karras_sigma(jax.random.key(0), max_level=1000), "min_level and max_level"),
        (lambda: estimate_sigma_data(jnp.ones((0, 3))), "images must have elements"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
