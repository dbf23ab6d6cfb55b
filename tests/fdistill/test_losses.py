"""The losses: parity with the official codes, exact gradients, constants, errors."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.fdistill import (
    approx_r1,
    divergence,
    fake_score_loss,
    gan_losses,
    guided,
    matching_gradient,
    normalized_weight,
    surrogate_loss,
)


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "dmd2_dm_loss*.npz")
@pytest.mark.parametrize("name", ["reverse_kl", None])
def test_dmd2_matching(golden_file, name):
    # Reverse KL with its weights, and no weights at all: both are DMD2.
    data = np.load(golden_file)
    with jax.enable_x64():
        x, real, fake = (jnp.asarray(data[key]) for key in ("latents", "x0_real", "x0_fake"))
        weight = None
        if name is not None:
            weight = normalized_weight(divergence(name), jax.random.normal(jax.random.key(0), x.shape[:1]))
        grad = matching_gradient(x, real, fake, weight, eps=0.0, nan_to_num=True)
        loss, gradient = jax.value_and_grad(surrogate_loss)(x, grad)
        np.testing.assert_allclose(grad, data["grad"], rtol=1e-9)
        np.testing.assert_allclose(loss, data["loss"], rtol=1e-9)
        np.testing.assert_allclose(gradient, data["dloss_dlatents"], rtol=1e-9)


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "dmd2_fake_loss*.npz")
def test_dmd2_fake_score(golden_file):
    data = np.load(golden_file)
    with jax.enable_x64():
        sigma = jnp.asarray(data["karras_sigmas"][data["timesteps"]])
        loss = fake_score_loss(
            jnp.asarray(data["x0_fake"]), jnp.asarray(data["latents"]), sigma, float(data["sigma_data"])
        )
        np.testing.assert_allclose(loss, data["loss"], rtol=1e-9)


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "dmd2_gan_loss*.npz")
def test_dmd2_gan(golden_file):
    data = np.load(golden_file)
    with jax.enable_x64():
        losses = gan_losses(jnp.asarray(data["logits_real"]), jnp.asarray(data["logits_fake"]))
        np.testing.assert_allclose(losses.discriminator, data["loss_disc"], rtol=1e-10)
        np.testing.assert_allclose(losses.generator, data["loss_gen"], rtol=1e-10)


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "fastgen_vsd*.npz")
def test_fastgen_matching(golden_file):
    data = np.load(golden_file)
    with jax.enable_x64():
        x, real, fake, h = (jnp.asarray(data[key]) for key in ("gen", "teacher_x0", "fake_x0", "h"))
        for weight, suffix in [(None, ""), (h, "_h")]:
            loss, gradient = jax.value_and_grad(surrogate_loss)(x, matching_gradient(x, real, fake, weight))
            np.testing.assert_allclose(loss, data[f"loss{suffix}"], rtol=1e-6)
            np.testing.assert_allclose(gradient, data[f"grad{suffix}"], rtol=1e-6)


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "fastgen_gan*.npz")
def test_fastgen_gan(golden_file):
    data = np.load(golden_file)
    real, fake, perturbed = (jnp.asarray(data[key]) for key in ("logits_real", "logits_fake", "logits_real_perturbed"))
    losses = gan_losses(real, fake)
    np.testing.assert_allclose(losses.discriminator, data["loss_disc"], rtol=1e-6)
    np.testing.assert_allclose(losses.generator, data["loss_gen"], rtol=1e-6)
    np.testing.assert_allclose(approx_r1(real, perturbed), data["approx_r1"], rtol=1e-6)


def _images(seed=0, batch=4, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(key, (batch, 3, 2), dtype) for key in keys]


def test_surrogate_gradient_is_exact():
    x, grad, _ = _images()
    x = 1e4 * x  # where x - g would lose g's digits
    np.testing.assert_array_equal(jax.grad(surrogate_loss)(x, grad), (grad / x.size).astype(np.float32))
    np.testing.assert_allclose(surrogate_loss(x, grad), 0.5 * jnp.mean(grad**2), rtol=1e-6)


def test_no_gradient_reaches_teacher_fake_score_or_weights():
    x, real, fake = _images()

    def loss(constants, x):
        return surrogate_loss(x, matching_gradient(x, *constants))

    constants = (real, fake, jnp.ones(4))
    gradients, gradient = jax.grad(loss, argnums=(0, 1))(constants, x)
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(gradients))
    np.testing.assert_array_equal(gradient, matching_gradient(x, *constants) / x.size)


def test_matching_gradient_formula():
    x, real, fake = _images()
    h = jnp.array([0.5, 1.0, 2.0, 0.0])
    scale = jnp.abs(x - real).mean(axis=(1, 2), keepdims=True) + 1e-6
    expected = h[:, None, None] * (fake - real) / scale
    np.testing.assert_allclose(matching_gradient(x, real, fake, h), expected, rtol=1e-5)
    # FastGen's small number changes DMD2's direction by about 1e-6
    np.testing.assert_allclose(matching_gradient(x, real, fake), matching_gradient(x, real, fake, eps=0.0), rtol=1e-5)
    # with the variance of the noise it is the difference of the scores
    sigma = jnp.array([0.1, 0.5, 1.0, 3.0])
    expected = h[:, None, None] * (fake - real) / sigma[:, None, None] ** 2
    np.testing.assert_allclose(matching_gradient(x, real, fake, h, normalizer=sigma**2), expected, rtol=1e-5)
    # at p = q nothing moves
    assert np.all(np.asarray(matching_gradient(x, real, real, h)) == 0)


def test_image_equal_to_the_prediction():
    x, real, _ = _images()
    assert np.all(np.isfinite(matching_gradient(real, real, x)))
    assert np.all(np.isfinite(matching_gradient(real, real, x, eps=0.0)))  # huge, as DMD2's, but finite
    assert np.all(np.asarray(matching_gradient(real, real, real, eps=0.0)) == 0)
    assert not np.all(np.isfinite(matching_gradient(real, real, x, eps=0.0, nan_to_num=False)))


def test_half_precision_images_are_weighted_in_float32():
    x, real, fake = _images(dtype=jnp.bfloat16)
    grad = matching_gradient(x, real, fake, jnp.ones(4))
    assert grad.dtype == jnp.float32
    loss, gradient = jax.value_and_grad(surrogate_loss)(x, grad)
    assert loss.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    assert fake_score_loss(x, real, jnp.ones(4)).dtype == jnp.float32
    assert gan_losses(x, real).generator.dtype == jnp.float32


def test_guidance():
    cond, uncond, _ = _images()
    np.testing.assert_array_equal(guided(cond, uncond, 1.0), cond)
    np.testing.assert_allclose(guided(cond, uncond, 0), uncond, atol=1e-6)
    np.testing.assert_allclose(guided(cond, uncond, 2.5), uncond + 2.5 * (cond - uncond), atol=1e-5)
    np.testing.assert_array_equal(guided(cond, cond, 7.0), cond)


def test_fake_score_weighting():
    pred, x0, _ = _images()
    sigma = jnp.array([0.01, 0.5, 3.0, 80.0])
    np.testing.assert_allclose(
        fake_score_loss(pred, x0, sigma, weighting="none"), jnp.mean((pred - x0) ** 2), rtol=1e-6
    )
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2  # EDM's own form of the same weight
    expected = jnp.mean(weight[:, None, None] * (pred - x0) ** 2)
    np.testing.assert_allclose(fake_score_loss(pred, x0, sigma), expected, rtol=1e-5)
    noise_error = jnp.mean(((x0 - pred) / sigma[:, None, None]) ** 2)  # x_t = x0 + sigma noise
    np.testing.assert_allclose(fake_score_loss(pred, x0, sigma, weighting="epsilon"), noise_error, rtol=1e-5)
    gradients = jax.grad(lambda x0: fake_score_loss(pred, x0, sigma))(x0)
    assert np.all(np.asarray(gradients) == 0)


def test_gan_losses_are_finite_and_optimal_at_the_log_ratio():
    extreme = gan_losses(jnp.array([-1e4]), jnp.array([1e4]))
    assert np.isfinite(float(extreme.discriminator))
    # over p = (.7, .3) and q = (.2, .8) the best logits are log p/q
    real, fake = jnp.array([0] * 7 + [1] * 3), jnp.array([0] * 2 + [1] * 8)
    best = jnp.log(jnp.array([0.7 / 0.2, 0.3 / 0.8]))
    gradient = jax.grad(lambda l: gan_losses(l[real], l[fake]).discriminator)
    np.testing.assert_allclose(gradient(best), 0.0, atol=1e-6)
    assert np.all(np.abs(gradient(best + 0.1)) > 1e-3)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 2), st.sampled_from([(), (2, 1, 3)]), st.integers(0, 100))
def test_shapes_and_transformations(batch, event, seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    x, real, fake = (jax.random.normal(key, (batch, *event)) for key in keys[:3])
    h = jax.random.uniform(keys[3], (batch,))
    grad = matching_gradient(x, real, fake, h)
    assert grad.shape == x.shape
    np.testing.assert_allclose(jax.jit(matching_gradient)(x, real, fake, h), grad, rtol=1e-4)
    each = jax.vmap(lambda *a: matching_gradient(*(v[None] for v in a))[0])(x, real, fake, h)
    np.testing.assert_allclose(each, grad, rtol=1e-4)
    np.testing.assert_allclose(jax.grad(surrogate_loss)(x, grad), grad / x.size, rtol=1e-5)


X, Y = jnp.ones((2, 3)), jnp.ones((2, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inspect.unwrap(guided)(X, Y, 1.0), "x0_cond and x0_uncond must have one shape"),
        (lambda: inspect.unwrap(matching_gradient)(X, X, Y), "x and x0_real and x0_fake must have one shape"),
        (lambda: inspect.unwrap(matching_gradient)(X, X, X, jnp.ones(3)), "weight must have shape"),
        (lambda: matching_gradient(X, X, X, eps=-1e-6), "eps must lie"),
        (lambda: inspect.unwrap(matching_gradient)(X, X, X, normalizer=jnp.ones(3)), "normalizer must have shape"),
        (lambda: inspect.unwrap(surrogate_loss)(X, Y), "x and grad must have one shape"),
        (lambda: inspect.unwrap(fake_score_loss)(X, Y, jnp.ones(2)), "x0_pred and x0 must have one shape"),
        (lambda: inspect.unwrap(fake_score_loss)(X, X, jnp.ones(3)), "sigma must have shape"),
        (lambda: fake_score_loss(X, X, jnp.ones(2), weighting="snr"), "weighting must be one of edm, epsilon, none"),
        (lambda: fake_score_loss(X, X, jnp.ones(2), sigma_data=0.0), "sigma_data must lie"),
        (lambda: inspect.unwrap(approx_r1)(X, Y), "logits and logits_perturbed must have one shape"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
