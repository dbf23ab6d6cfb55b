import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.quant import (
    nupes_beta,
    nupes_codes,
    nupes_exponent,
    nupes_hard,
    nupes_init,
    nupes_soft,
    power_dequantize,
    power_fake_quantize,
    soft_round,
)

soft = jax.jit(nupes_soft, static_argnames="bits")


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.mark.parametrize("bits", [2, 4])
def test_starts_at_the_weights_and_sharpens_to_the_power_quantizer(bits):
    w = draw((5, 8)).at[1, 2].set(0).at[3].set(0)
    params = nupes_init(w, bits=bits, axis=1, exponent=0.6)
    np.testing.assert_allclose(soft(params, 0.0, bits=bits), w, rtol=0, atol=2e-6)
    np.testing.assert_allclose(soft(params, 1e-2, bits=bits), w, rtol=0, atol=1e-4)
    power = power_fake_quantize(w, nupes_exponent(params), bits=bits, axis=1)
    np.testing.assert_allclose(soft(params, 1e4, bits=bits), power, rtol=0, atol=2e-6)
    np.testing.assert_allclose(nupes_hard(params, bits=bits), power, rtol=0, atol=2e-6)
    codes, scale, exponent = nupes_codes(params, bits=bits)
    np.testing.assert_array_equal(power_dequantize(codes, scale, exponent, bits=bits), nupes_hard(params, bits=bits))


def test_the_staircase_rises_and_keeps_integers():
    x = jnp.linspace(-3, 3, 601)
    stairs = jax.jit(soft_round)
    for beta in (0.0, 0.5, 5.0, 40.0):
        y = stairs(x, beta)
        assert (jnp.diff(y) >= 0).all()
        np.testing.assert_allclose(y[::100], np.arange(-3, 4), atol=1e-5)
    np.testing.assert_allclose(soft_round(x, 0.01), x, atol=1e-4)
    slope = jax.vmap(jax.grad(soft_round), (0, None))(jnp.array([0.25, 0.5]), 4.0)
    assert slope[1] > 1 > slope[0]


def test_adaround_is_the_case_of_neighbouring_levels():
    fraction = jnp.linspace(0.0, 0.99, 12)
    np.testing.assert_allclose(soft_round(3 + fraction, 7.0), 3 + soft_round(fraction, 7.0), atol=1e-6)


def test_gradients_are_finite_with_exact_zeros():
    w = draw((4, 6)).at[0, :3].set(0).at[2].set(0)
    slopes = jax.jit(jax.grad(lambda p, beta: jnp.sum(soft(p, beta, bits=4) ** 2)))
    for exponent in (0.3, 1.0, 1.15):
        params = nupes_init(w, bits=4, axis=1, exponent=exponent)
        for beta in (0.0, 1.0, 40.0):
            gradient = slopes(params, beta)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert float(jnp.abs(gradient.rho)) > 0


def test_the_exponents_gradient_is_the_slope():
    with jax.enable_x64():
        w = jnp.asarray(np.random.default_rng(0).standard_normal(20))
        params = nupes_init(w, bits=4, axis=None, exponent=0.5)
        assert params.codes.dtype == jnp.float64

        def total(rho):
            return nupes_soft(params._replace(rho=rho), 3.0, bits=4).sum()

        run = jax.jit(jax.value_and_grad(total))
        slope = (run(params.rho + 1e-6)[0] - run(params.rho - 1e-6)[0]) / 2e-6
        np.testing.assert_allclose(run(params.rho)[1], slope, rtol=1e-6)


def test_the_exponent_is_searched_and_stays_in_its_range():
    w = draw(3000) ** 3
    searched = nupes_init(w, bits=4, axis=None)
    assert 0.2 < float(nupes_exponent(searched)) < 0.5
    assert abs(float(nupes_exponent(nupes_init(w, bits=4, axis=None, exponent=9.0))) - 1.199) < 1e-5
    for rho, end in ((-50.0, 0.2), (50.0, 1.2)):
        assert abs(float(nupes_exponent(searched._replace(rho=jnp.float32(rho)))) - end) < 1e-6


def test_bad_input_is_refused():
    w = jnp.ones((2, 3))
    for message, call in {
        r"bits must be in \[2, 8\]": lambda: nupes_init(w, bits=9, axis=None, exponent=0.5),
        "w must be finite": lambda: nupes_init(w / 0, bits=4, axis=None, exponent=0.5),
        r"a must lie in \(0, inf\)": lambda: nupes_init(w, bits=4, axis=None, exponent=-1.0),
        "beta must lie in": lambda: soft_round(w, -1.0),
        "start must lie in": lambda: nupes_beta(1, 10, 0.0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
