import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.quant import (
    adaround_beta,
    adaround_codes,
    adaround_hard,
    adaround_init,
    adaround_regularizer,
    adaround_rounding,
    adaround_soft,
    mse_qparams,
    reconstruction_loss,
)

soft = jax.jit(adaround_soft, static_argnames="bits")


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def column(x):
    return jnp.asarray(x).reshape(-1, 1)


@pytest.mark.golden
@pytest.mark.golden_pattern("quant", "adaround*.npz")
def test_outputs_and_gradients_of_the_reference_code(golden_file):
    z = np.load(golden_file)
    w = jnp.asarray(z["w"])
    for case in sorted({name.removesuffix("_soft_init") for name in z if name.endswith("_soft_init")}):
        bits, get = int(case[1]), lambda name, case=case: z[f"{case}_{name}"]
        scale, zero = column(get("delta")), column(get("zero_point"))
        v = adaround_init(w, scale)
        np.testing.assert_allclose(v, get("alpha_init"), rtol=0, atol=5e-6, err_msg=case)
        np.testing.assert_allclose(soft(w, v, scale, zero, bits=bits), get("soft_init"), atol=1e-6, err_msg=case)
        v = jnp.asarray(get("alpha"))
        np.testing.assert_allclose(adaround_rounding(v), get("h"), rtol=0, atol=1e-6)
        value, pull = jax.vjp(lambda v, s=scale, z0=zero, b=bits: soft(w, v, s, z0, bits=b), v)
        np.testing.assert_allclose(value, get("soft"), rtol=0, atol=1e-6, err_msg=case)
        np.testing.assert_allclose(pull(jnp.asarray(get("g")))[0], get("d_alpha"), rtol=0, atol=1e-6, err_msg=case)
        np.testing.assert_allclose(adaround_hard(w, v, scale, zero, bits=bits), get("hard"), rtol=0, atol=1e-6)
        if case.endswith("sym_max") and not case.endswith("asym_max"):
            np.testing.assert_array_equal(soft(w, v, scale, bits=bits), soft(w, v, scale, zero, bits=bits))


@pytest.mark.golden
@pytest.mark.golden_pattern("quant", "adaround*.npz")
def test_loss_and_schedule_of_the_reference_code(golden_file):
    z = np.load(golden_file)
    total, warmup, strength = int(z["reg_iters"]), float(z["reg_warmup"]), float(z["reg_weight"])
    v, error = jnp.asarray(z["reg_alpha"]), reconstruction_loss(jnp.asarray(z["reg_pred"]), jnp.asarray(z["reg_tgt"]))
    penalty = jax.jit(jax.value_and_grad(lambda v, beta: strength * adaround_regularizer(v, beta)))
    for step in range(1, total + 1):
        beta = adaround_beta(step, total, warmup)
        np.testing.assert_allclose(beta, z["reg_b"][step - 1], rtol=1e-6)
        value, gradient = penalty(v, beta)
        on = step >= warmup * total
        np.testing.assert_allclose(error + on * value, z["reg_total"][step - 1], rtol=2e-6)
        np.testing.assert_allclose(on * gradient, z["reg_dalpha"][step - 1], rtol=0, atol=1e-6)


def test_starts_at_the_clipped_weights_and_ends_on_neighbouring_levels():
    w = draw((4, 9))
    scale, zero = mse_qparams(w, 3, 1)
    v = adaround_init(w, scale)
    start = soft(w, v, scale, zero, bits=3)
    np.testing.assert_allclose(start, jnp.clip(w, -scale * zero, scale * (7 - zero)), atol=1e-6)
    for seed in range(3):
        codes = adaround_hard(w, draw(w.shape, seed), scale, zero, bits=3) / scale + zero
        below = jnp.floor(w / scale) + zero
        allowed = [jnp.clip(below, 0, 7), jnp.clip(below + 1, 0, 7)]
        assert (np.isclose(codes, allowed[0], atol=1e-5) | np.isclose(codes, allowed[1], atol=1e-5)).all()


def test_hard_rounding_at_the_start_is_to_the_nearest_with_ties_up():
    w = jnp.array([-1.5, -0.7, 0.2, 0.5, 1.5, 2.4])
    np.testing.assert_array_equal(adaround_hard(w, adaround_init(w, 1.0), 1.0, bits=4), [-1, -1, 0, 1, 2, 2])


def test_the_penalty_vanishes_only_when_everything_is_decided():
    for beta in (2.0, 20.0):
        assert float(adaround_regularizer(jnp.array([-9.0, 9.0]), beta)) == 0
        assert float(adaround_regularizer(jnp.array([-9.0, 1.0]), beta)) > 0
        gradient = jax.grad(adaround_regularizer)(jnp.array([-9.0, 0.0, 1.0]), beta)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_integers_times_scale_are_the_weights_exactly(dtype):
    w, v = draw((4, 9)).astype(dtype), draw((4, 9), 1)
    scale, zero = mse_qparams(w.astype(jnp.float32), 3, 1)
    codes, shifted = adaround_codes(w, v, scale, zero, bits=3)
    value = ((codes.astype(jnp.float32) - shifted.astype(jnp.float32)) * scale).astype(dtype)
    np.testing.assert_array_equal(value, adaround_hard(w, v, scale, zero, bits=3))


def test_rows_of_zeros_and_bad_input():
    w, v = jnp.zeros((2, 3)), jnp.zeros((2, 3))
    value, gradient = jax.value_and_grad(lambda v: adaround_soft(w, v, jnp.zeros((2, 1)), bits=4).sum())(v)
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, 0)
    for message, call in {
        r"bits must be in \[2, 8\]": lambda: adaround_soft(w, v, 1.0, bits=1),
        "v must have the shape of w": lambda: adaround_soft(w, v[:1], 1.0, bits=4),
        "scale must broadcast": lambda: adaround_init(w, jnp.ones(2)),
        "w must be finite": lambda: adaround_init(w / 0, 1.0),
        "total must be at least 1": lambda: adaround_beta(1, 0),
        r"warmup must lie in \[0, 1\)": lambda: adaround_beta(1, 5, 1.0),
        r"beta must lie in \(0": lambda: adaround_regularizer(v, 0.0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
