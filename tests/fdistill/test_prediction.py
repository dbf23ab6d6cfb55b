"""Predictions and their conversions."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.fdistill import denoising_loss, prediction_target, x0_from_prediction
from poise.fdistill.prediction import PREDICTIONS


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "fastgen_dsm*.npz")
def test_fastgen(golden_file):
    data = np.load(golden_file)
    with jax.enable_x64():
        x0, noise, t, predicted = (jnp.asarray(data[key]) for key in ("x0", "eps", "t", "net_pred"))
        for prediction in PREDICTIONS:
            loss = denoising_loss(predicted, x0, noise, prediction, 1 - t, t)
            np.testing.assert_allclose(loss, data[f"loss_{prediction}"], rtol=1e-10)
        expand = t.reshape(-1, *[1] * (x0.ndim - 1))
        x_t = (1 - expand) * x0 + expand * noise
        np.testing.assert_allclose(x_t, data["xt_rf"], rtol=1e-10)
        for prediction in ("flow", "eps"):
            implied = x0_from_prediction(x_t, predicted, prediction, 1 - t, t)
            np.testing.assert_allclose(implied, data[f"rf_x0_from_{prediction}"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_and_conversion_are_inverse(prediction):
    keys = jax.random.split(jax.random.key(0), 4)
    x0, noise = jax.random.normal(keys[0], (5, 2, 3)), jax.random.normal(keys[1], (5, 2, 3))
    alpha, sigma = jax.random.uniform(keys[2], (5,), minval=0.2), jax.random.uniform(keys[3], (5,), maxval=3.0)
    x_t = alpha[:, None, None] * x0 + sigma[:, None, None] * noise
    target = prediction_target(x0, noise, prediction, alpha, sigma)
    convert = jax.jit(lambda *a: x0_from_prediction(a[0], a[1], prediction, a[2], a[3]))
    np.testing.assert_allclose(convert(x_t, target, alpha, sigma), x0, atol=1e-4)
    assert float(denoising_loss(target, x0, noise, prediction, alpha, sigma)) == 0.0
    assert denoising_loss(target.astype(jnp.bfloat16), x0, noise, prediction, alpha, sigma).dtype == jnp.float32


def test_scalar_coefficients_serve_all_examples():
    x0, noise = jnp.ones((3, 2)), jnp.full((3, 2), 2.0)
    scalar = prediction_target(x0, noise, "v", jnp.array(0.6), jnp.array(0.8))
    np.testing.assert_array_equal(scalar, prediction_target(x0, noise, "v", jnp.full(3, 0.6), jnp.full(3, 0.8)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: prediction_target(x, x, "score"), "prediction must be one of x0, eps, v, flow, got 'score'"),
        (lambda x: x0_from_prediction(x, x, "score", jnp.ones(2), jnp.ones(2)), "prediction must be one of"),
        (lambda x: prediction_target(x, x, "v"), "alpha and sigma must be given"),
        (
            lambda x: inspect.unwrap(prediction_target)(x, x, "v", jnp.ones(3), jnp.ones(3)),
            "alpha must be a scalar or have shape",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, 3)))
