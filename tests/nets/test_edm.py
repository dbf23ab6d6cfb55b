import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.nets import (
    EDMPrecond,
    edm_coefficients,
    iddpm_coefficients,
    iddpm_levels,
    ve_coefficients,
    vp_coefficients,
)

COEFFICIENTS = (edm_coefficients, vp_coefficients, ve_coefficients, iddpm_coefficients)
LEVELS = st.floats(2**-10, 2**10, width=32)


class Toy(nn.Module):
    """The toy network of the golden file; it shows what a network must offer."""

    @nn.compact
    def __call__(
        self,
        x,
        noise_labels,
        class_labels=None,
        augment_labels=None,
        *,
        train=False,
        feature_levels=(),
        features_only=False,
    ):
        c = noise_labels.reshape(-1, *(1,) * (x.ndim - 1))
        out = 0.9 * jnp.tanh(0.8 * x + 0.3 * c) + 0.1 * x
        return (out, [c]) if feature_levels else out


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "edm_precond*.npz")
def test_official_preconditionings(golden_file):
    z = np.load(golden_file)
    x = jnp.asarray(z["x"].transpose(0, 2, 3, 1))
    for name, sigma in (("edm", z["sigma"]), ("vp", z["sigma_clamped"]), ("ve", z["sigma_clamped"])):
        module = EDMPrecond(Toy(), sigma_data=z["sigma_data"].item(), preconditioning=name)
        denoised = module.apply({}, x, jnp.asarray(sigma))
        np.testing.assert_allclose(denoised.transpose(0, 3, 1, 2), z[f"D_{name}"], rtol=0, atol=1e-5)


def test_limits():
    for sigma, skip, out in ((1e-6, 1, 1e-6), (1e6, 0, 0.7)):
        c = edm_coefficients(jnp.array(sigma), sigma_data=0.7)
        np.testing.assert_allclose([c.c_skip, c.c_out], [skip, out], rtol=1e-6, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(sigma=LEVELS, sigma_data=st.floats(0.05, 5))
def test_edm_identities(sigma, sigma_data):
    c = edm_coefficients(jnp.array(sigma), sigma_data)
    np.testing.assert_allclose(c.c_in**2 * (sigma**2 + sigma_data**2), 1, rtol=1e-5)
    # the training target (clean - c_skip * noisy) / c_out has unit variance, and c_skip makes c_out as small as can be
    variance = ((1 - c.c_skip) ** 2 * sigma_data**2 + c.c_skip**2 * sigma**2) / c.c_out**2
    np.testing.assert_allclose(variance, 1, rtol=1e-4)
    np.testing.assert_allclose(c.c_noise, np.log(sigma) / 4, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(sigma=LEVELS)
def test_vp_and_ve_identities(sigma):
    vp, ve = vp_coefficients(jnp.array(sigma)), ve_coefficients(jnp.array(sigma))
    np.testing.assert_allclose(ve.c_noise, np.log(sigma) - np.log(2), rtol=1e-5, atol=1e-6)
    time = float(vp.c_noise) / 999
    back = np.sqrt(np.expm1(0.5 * 19.9 * time**2 + 0.1 * time))  # sigma(t) of the schedule
    np.testing.assert_allclose(back, sigma, rtol=1e-3)
    np.testing.assert_allclose(vp.c_in * np.sqrt(sigma**2 + 1), 1, rtol=1e-5)
    assert (vp.c_skip, ve.c_skip, ve.c_in) == (1, 1, 1)
    np.testing.assert_allclose([vp.c_out, ve.c_out], [-sigma, sigma])


def test_iddpm_takes_the_nearest_level():
    levels = iddpm_levels()
    rng = np.random.default_rng(0)
    sigma = np.exp(rng.uniform(np.log(1e-3), np.log(5e4), 200)).astype(np.float32)
    nearest = np.abs(levels[None] - sigma[:, None]).argmin(1)
    np.testing.assert_array_equal(iddpm_coefficients(jnp.asarray(sigma)).c_noise, 999 - nearest)
    np.testing.assert_array_equal(iddpm_coefficients(jnp.asarray(levels)).c_noise, 999.0 - np.arange(1001))


def test_iddpm_uses_the_first_half_of_the_channels():
    class Doubled(Toy):
        def __call__(self, x, *args, **kwargs):
            return jnp.concatenate([jnp.ones_like(x), jnp.full_like(x, jnp.nan)], -1)

    denoised = EDMPrecond(Doubled(), preconditioning="iddpm").apply({}, jnp.ones((2, 3)), jnp.array([0.5, 2.0]))
    np.testing.assert_allclose(denoised, [[0.5] * 3, [-1.0] * 3])


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_shapes_dtypes_and_transformations(coefficients):
    sigma = jnp.array([[0.1, 0.5], [2.0, 30.0]])
    c = coefficients(sigma)
    assert all(value.shape == (2, 2) and value.dtype == jnp.float32 for value in c)
    assert all(value.dtype == jnp.float32 for value in coefficients(sigma.astype(jnp.bfloat16)))
    with jax.enable_x64():
        assert all(value.dtype == jnp.float64 for value in coefficients(jnp.asarray(sigma, jnp.float64)))
    for one, other in zip(jax.vmap(jax.jit(coefficients))(sigma), c, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    gradients = jax.vmap(jax.grad(lambda s: sum(coefficients(s))))(sigma.ravel())
    assert np.isfinite(gradients).all()


def test_level_zero_with_a_floor_returns_the_input():
    x = jnp.linspace(-2, 2, 6).reshape(2, 3)
    module = EDMPrecond(Toy(), sigma_min=0.002)
    np.testing.assert_array_equal(module.apply({}, x, jnp.zeros(2)), x)
    np.testing.assert_array_equal(EDMPrecond(Toy(), sigma_min=1e-3, preconditioning="ve").apply({}, x, 0.0), x)
    floor = edm_coefficients(jnp.array(0.0), sigma_min=0.002).c_noise
    np.testing.assert_allclose(floor, np.log(0.002) / 4, rtol=1e-6)
    assert edm_coefficients(jnp.array(0.0)).c_noise == -np.inf


def test_vectors_and_any_other_network():
    x, sigma = jnp.ones((4, 2)), jnp.linspace(0.1, 3, 4)
    denoised, (noise_labels,) = EDMPrecond(Toy()).apply({}, x, sigma, feature_levels=(0,))
    assert denoised.shape == (4, 2)
    np.testing.assert_allclose(noise_labels[:, 0], jnp.log(sigma) / 4, rtol=1e-6)


def test_bfloat16_input_gives_float32():
    x = jnp.ones((4, 2), jnp.bfloat16)
    denoised = EDMPrecond(Toy()).apply({}, x, jnp.linspace(0.1, 3, 4))
    assert denoised.dtype == jnp.float32


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"sigma_data": 0.0}, "sigma_data must be positive, got 0.0"),
        ({"sigma_data": -1.0}, "sigma_data must be positive, got -1.0"),
        ({"sigma_min": -1.0}, "sigma_min must be at least 0, got -1.0"),
    ],
)
def test_bad_coefficients(keywords, message):
    with pytest.raises(ValueError, match=message):
        edm_coefficients(jnp.ones(2), **keywords)


def test_traced_sigma_data_passes():
    c = jax.jit(edm_coefficients)(jnp.ones(2), 0.5)
    np.testing.assert_allclose(c.c_skip, 0.2, rtol=1e-6)


def test_bad_schedule():
    with pytest.raises(ValueError, match="num_levels must be at least 1, got 0"):
        iddpm_levels(num_levels=0)
