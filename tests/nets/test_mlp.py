"""Perceptrons: shapes, starts, features, labels, transformations, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.nets import MLP, AffineGenerator, EDMPrecond, MLPHead, edm_coefficients

SIGMA = jnp.array([0.05, 0.7, 20.0])


def shaken(variables, seed=0):
    leaves, structure = jax.tree.flatten(variables)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [leaf + 0.2 * rng.standard_normal(leaf.shape) for leaf in leaves])


@settings(max_examples=5, deadline=None)
@given(st.sampled_from([(2,), (2, 3, 1), (1,)]), st.sampled_from([0, 3]), st.sampled_from([(4,), (4, 6)]))
def test_shapes_starts_and_features(event, label_dim, hidden):
    denoiser = EDMPrecond(MLP(hidden, label_dim, 4))
    x = jax.random.normal(jax.random.key(0), (3, *event))
    labels = jnp.array([0, 2, 1]) if label_dim else None
    variables = denoiser.init(jax.random.key(1), x, SIGMA, labels)
    skip = edm_coefficients(SIGMA).c_skip.reshape(-1, *(1,) * len(event))
    np.testing.assert_allclose(denoiser.apply(variables, x, SIGMA, labels), skip * x, rtol=1e-6)
    variables = shaken(variables)
    levels = tuple(range(len(hidden)))
    out, features = denoiser.apply(variables, x, SIGMA, labels, feature_levels=levels)
    only = denoiser.apply(variables, x, SIGMA, labels, feature_levels=(-1,), features_only=True)
    assert out.shape == x.shape
    assert [f.shape for f in features] == [(3, width) for width in hidden]
    np.testing.assert_array_equal(features[-1], only[0])


def test_every_input_matters():
    net, x, labels = MLP((8,), 3, 4), jax.random.normal(jax.random.key(0), (3, 2)), jnp.array([0, 2, 1])
    c = jnp.log(SIGMA) / 4
    variables = shaken(net.init(jax.random.key(1), x, c, labels))
    base = net.apply(variables, x, c, labels)
    for other in ((x + 1, c, labels), (x, c + 0.3, labels), (x, c, (labels + 1) % 3), (x, c, None)):
        assert float(jnp.abs(net.apply(variables, *other) - base).min()) > 1e-5
    np.testing.assert_allclose(net.apply(variables, x, c, jax.nn.one_hot(labels, 3)), base, rtol=1e-6)
    head = MLPHead((8,), 3)
    variables = head.init(jax.random.key(1), x, SIGMA, labels)
    assert float(jnp.abs(head.apply(variables, x, SIGMA, labels)).max()) < 1.0  # ratios near 1
    base = head.apply(shaken(variables), x, SIGMA, labels)
    for other in ((x + 1, SIGMA, labels), (x, 2 * SIGMA, labels), (x, SIGMA, (labels + 1) % 3)):
        assert float(jnp.abs(head.apply(shaken(variables), *other) - base).min()) > 1e-5


def test_affine_generator_is_a_gaussian():
    net = AffineGenerator(0.5, (1.0, -2.0))
    z = jax.random.normal(jax.random.key(0), (4000, 2))
    variables = net.init(jax.random.key(1), z, jnp.ones(1))
    a = jnp.array([[1.0, 0.3], [-0.2, 0.7]])
    variables = {"params": {**variables["params"], "kernel": a}}
    x = net.apply(variables, 80.0 * z, jnp.full(len(z), 80.0))
    np.testing.assert_allclose(x, z @ a + jnp.array([1.0, -2.0]), atol=1e-5)
    np.testing.assert_allclose(jnp.cov(x.T), a.T @ a, atol=0.08)
    assert np.all(np.asarray(AffineGenerator().init(jax.random.key(0), z, jnp.ones(1))["params"]["bias"]) == 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtypes(dtype):
    with jax.enable_x64():
        x, sigma = jnp.ones((3, 2), dtype), SIGMA.astype(dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        net, head = MLP((4,), noise_channels=4), MLPHead((4,), noise_channels=4)
        assert net.init_with_output(jax.random.key(0), x, sigma)[0].dtype == dtype
        assert head.init_with_output(jax.random.key(0), x, sigma)[0].dtype == wide
        generator = AffineGenerator()
        assert generator.init_with_output(jax.random.key(0), x, sigma)[0].dtype == dtype


def test_transformations():
    head, x = MLPHead((4,), noise_channels=4), jax.random.normal(jax.random.key(0), (3, 2))
    variables = shaken(head.init(jax.random.key(1), x, SIGMA))
    logits = head.apply(variables, x, SIGMA)
    np.testing.assert_allclose(jax.jit(head.apply)(variables, x, SIGMA), logits, rtol=1e-5)
    each = jax.vmap(lambda x, s: head.apply(variables, x[None], s[None])[0])(x, SIGMA)
    np.testing.assert_allclose(each, logits, rtol=1e-5)
    grads = jax.grad(lambda v: head.apply(v, x, SIGMA).sum())(variables)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


X, C = jnp.ones((3, 2)), jnp.zeros(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MLP(()).init(jax.random.key(0), X, C), "hidden must hold"),
        (lambda: MLPHead((0,)).init(jax.random.key(0), X, SIGMA), "hidden must hold"),
        (lambda: MLP((4,)).init(jax.random.key(0), X, C, feature_levels=(1,)), "feature_levels must be"),
        (lambda: MLP((4,)).init(jax.random.key(0), X, C, jnp.zeros(3, jnp.int32)), "class_labels must be None"),
        (lambda: MLP((4,), noise_channels=3).init(jax.random.key(0), X, C), "num_channels must be even"),
        (lambda: AffineGenerator(1.0, (1.0,)).init(jax.random.key(0), X, C), "shift must have 2 entries"),
        (lambda: AffineGenerator(label_dim=2).init(jax.random.key(0), X, C), "class_labels must be None"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
