"""The Fréchet distance against official code, closed forms, and its derivative by optimal transport."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.metrics import frechet, frechet_distance, moments


def gaussian(rng, dim, rank=None):
    factor = rng.normal(size=(dim, rank or dim + 3)) / np.sqrt(dim)
    return jnp.asarray(rng.normal(size=dim)), jnp.asarray(factor @ factor.T)


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "metric_fid*.npz")
def test_golden_moments(golden_file):
    data = np.load(golden_file)
    with jax.enable_x64():
        first = jnp.asarray(data["mu"]), jnp.asarray(data["cov"])
        second = jnp.asarray(data["mu_ref"]), jnp.asarray(data["cov_ref"])
        np.testing.assert_allclose(frechet(*first, *second), data["fid"], rtol=1e-10)
        scale = float(jnp.trace(first[1]))
        np.testing.assert_allclose(frechet(*first, *first), data["fid_self"], atol=1e-13 * scale)


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "metric_fid*.npz")
@pytest.mark.parametrize("x64", [False, True])
def test_golden_features(golden_file, x64):
    data = np.load(golden_file)
    with jax.enable_x64(x64):
        dtype = jnp.float64 if x64 else jnp.float32
        features = [jnp.asarray(data[name], dtype) for name in ("feats", "feats_ref")]
        # The file's features are float32 copies of those behind its moments.
        np.testing.assert_allclose(frechet_distance(*features), data["fid"], rtol=3e-6)
        for values, mean, cov in zip(features, ("mu", "mu_ref"), ("cov", "cov_ref"), strict=True):
            own = moments(values)
            np.testing.assert_allclose(own.mean, data[mean], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(own.cov, data[cov], rtol=1e-5, atol=1e-5 * np.abs(data[cov]).max())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), dim=st.sampled_from([1, 2, 7]))
def test_equals_the_matrix_square_root(seed, dim):
    rng = np.random.default_rng(seed)
    with jax.enable_x64():
        (mu1, cov1), (mu2, cov2) = gaussian(rng, dim), gaussian(rng, dim)
        root = scipy.linalg.sqrtm(np.asarray(cov1) @ np.asarray(cov2)).real
        expected = ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)
        np.testing.assert_allclose(frechet(mu1, cov1, mu2, cov2), expected, rtol=1e-8, atol=1e-10)


def test_commuting_covariances():
    with jax.enable_x64():
        std1, std2 = jnp.array([1.0, 2.0, 0.0, 3.0]), jnp.array([4.0, 0.5, 2.0, 3.0])
        rotation = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0])
        cov1, cov2 = (rotation * std**2 @ rotation.T for std in (std1, std2))
        mu = jnp.array([1.0, -1.0, 2.0, 0.0])
        expected = float((mu**2).sum() + ((std1 - std2) ** 2).sum())
        np.testing.assert_allclose(frechet(mu, cov1, jnp.zeros(4), cov2), expected, rtol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("samples", [2, 17])
def test_fewer_samples_than_features(samples, dtype):
    rng = np.random.default_rng(samples)
    with jax.enable_x64():
        x, y = (jnp.asarray(rng.normal(size=(samples, 24)) * scale) for scale in (1.0, 1.5))
        # The trace of the root is the nuclear norm of the product of the centered samples, which needs no covariance.
        centered = [(z - z.mean(0)) / np.sqrt(samples - 1) for z in (x, y)]
        nuclear = np.linalg.norm(centered[0] @ centered[1].T, ord="nuc")
        expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + sum((z**2).sum() for z in centered) - 2 * nuclear
        x, y = x.astype(dtype), y.astype(dtype)
        np.testing.assert_allclose(frechet_distance(x, y), expected, rtol={"float32": 1e-4, "float64": 1e-9}[dtype])
        assert frechet_distance(x, x) < {"float32": 1e-4, "float64": 1e-12}[dtype]
        for gradient in jax.grad(frechet_distance, argnums=(0, 1))(x, y):
            assert np.isfinite(gradient).all()


def test_no_variance_at_all():
    zero = jnp.zeros((3, 3))
    assert frechet(jnp.zeros(3), zero, jnp.ones(3), zero) == 3.0
    gradients = jax.grad(frechet, argnums=(0, 1, 2, 3))(jnp.zeros(3), zero, jnp.ones(3), zero)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_gradients_against_finite_differences(dim):
    rng = np.random.default_rng(dim)
    with jax.enable_x64():
        arguments = (*gaussian(rng, dim), *gaussian(rng, dim))
        gradients = jax.grad(frechet, argnums=(0, 1, 2, 3))(*arguments)
        for place, gradient in enumerate(gradients):
            direction = rng.normal(size=arguments[place].shape)
            direction = direction + direction.T if direction.ndim == 2 else direction

            def along(step, place=place, direction=direction):
                moved = [a + step * direction if i == place else a for i, a in enumerate(arguments)]
                return float(frechet(*moved))

            numeric = (along(1e-6) - along(-1e-6)) / 2e-6
            np.testing.assert_allclose((gradient * direction).sum(), numeric, rtol=1e-6, atol=1e-7)


def test_gradients_with_repeated_eigenvalues():
    with jax.enable_x64():
        eye = jnp.eye(3)
        arguments = (jnp.zeros(3), 4.0 * eye, jnp.ones(3), 9.0 * eye)
        in_cov1, in_cov2 = jax.grad(frechet, argnums=(1, 3))(*arguments)
        np.testing.assert_allclose(in_cov1, (1 - 3 / 2) * eye, atol=1e-12)  # 1 - sqrt(c2 / c1)
        np.testing.assert_allclose(in_cov2, (1 - 2 / 3) * eye, atol=1e-12)


def test_gradient_of_singular_covariances_lives_on_the_shared_directions():
    with jax.enable_x64():
        cov1, cov2 = jnp.diag(jnp.array([4.0, 1.0, 0.0, 0.0])), jnp.diag(jnp.array([9.0, 0.0, 1.0, 0.0]))
        zero = jnp.zeros(4)
        in_cov1, in_cov2 = jax.grad(frechet, argnums=(1, 3))(zero, cov1, zero, cov2)
        np.testing.assert_allclose(in_cov1, jnp.diag(jnp.array([1 - 3 / 2, 1, 1, 1])), atol=1e-12)
        np.testing.assert_allclose(in_cov2, jnp.diag(jnp.array([1 - 2 / 3, 1, 1, 1])), atol=1e-12)


def test_forward_and_reverse_derivatives_agree():
    rng = np.random.default_rng(0)
    with jax.enable_x64():
        x, y = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(4, 3)))
        reverse = jax.grad(frechet_distance)(x, y)
        forward = jax.jacfwd(frechet_distance)(x, y)
        np.testing.assert_allclose(forward, reverse, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (0, "mu1", jnp.zeros((3, 1))),
        (1, "cov1", jnp.eye(2)),
        (1, "cov1", jnp.zeros(3)),
        (2, "mu2", jnp.zeros(2)),
        (3, "cov2", jnp.zeros((3, 2))),
        (3, "cov2", jnp.full((3, 3), jnp.nan)),
        (2, "mu2", jnp.array([0.0, jnp.inf, 0.0])),
    ],
)
def test_bad_moments_are_named(place, name, value, without_shape_checks):
    arguments = [jnp.zeros(3), jnp.eye(3), jnp.zeros(3), jnp.eye(3)]
    arguments[place] = value
    with pytest.raises(ValueError, match=name):
        frechet(*arguments)


@pytest.mark.parametrize("seed", range(2))
def test_grows_with_the_damage(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    real, fake, noise = (jax.random.normal(key, (500, 8)) for key in keys)
    distances = [float(frechet_distance(real, fake + amount * noise)) for amount in (0.0, 0.5, 1.0, 2.0)]
    assert distances == sorted(distances)
    assert distances[-1] > 20 * distances[0]
