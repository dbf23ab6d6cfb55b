import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.quant import (
    FlexRoundParams,
    fake_quantize,
    flexround,
    flexround_codes,
    flexround_init,
    lrq,
    lrq_codes,
    lrq_init,
    lsq,
    minmax_qparams,
)

flex = jax.jit(flexround, static_argnames="bits")


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def perturbed(w, bits, axis, seed=1, symmetric=False):
    """Factors away from where they start."""
    params = flexround_init(w, bits=bits, axis=axis, symmetric=symmetric, channel_axis=0)
    rng = np.random.default_rng(seed)
    shift = lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32)  # noqa: E731
    return params._replace(log_s1=shift(params.log_s1), log_s2=shift(params.log_s2), log_s3=shift(params.log_s3))


def cases(z):
    return sorted({name.removesuffix("_w_hat") for name in z if name.endswith("_w_hat")})


def column(x):
    """One scale per row, or one alone, as an array of two axes."""
    return jnp.asarray(x).reshape(-1, 1)


@pytest.mark.golden
@pytest.mark.golden_pattern("quant", "flexround[!_]*npz")
def test_outputs_and_gradients_of_the_official_code(golden_file):
    z = np.load(golden_file)
    w = jnp.asarray(z["w"])
    for case in cases(z):
        bits, channel, symmetry, search = case.split("_")
        bits, symmetric = int(bits[1:]), symmetry == "sym"
        axis = 1 if channel == "ch" else None
        get = lambda name: z[f"{case}_{name}"]  # noqa: E731
        if search == "mm" or (bits <= 4 and not symmetric):
            start = flexround_init(w, bits=bits, axis=axis, symmetric=symmetric, search=search == "mse", channel_axis=0)
            np.testing.assert_allclose(jnp.exp(start.log_s1), column(get("delta")), rtol=2e-6, err_msg=case)
            # the official code takes the logarithm of the scale first, which may move ties; ours are those of the scale
            ties = np.abs(np.abs(w / column(get("delta"))) % 1 - 0.5) < 1e-4
            nearest = np.where(ties, get("rtn"), flexround(w, start, bits=bits))
            np.testing.assert_allclose(nearest, get("rtn"), rtol=1e-6, atol=1e-6, err_msg=case)
            assert ties.sum() <= w.shape[0]
            if not symmetric:
                np.testing.assert_array_equal(start.zero_point, column(get("zero_point")))
        params = FlexRoundParams(
            column(get("log_s1")),
            jnp.asarray(get("log_s2")),
            column(get("log_s3")),
            zero_point=None if symmetric else column(get("zero_point")),
        )
        w_hat, pull = jax.vjp(lambda w, p, bits=bits: flexround(w, p, bits=bits), w, params)
        np.testing.assert_allclose(w_hat, get("w_hat"), rtol=0, atol=1e-6 * np.abs(get("w_hat")).max(), err_msg=case)
        dw, gradients = pull(jnp.asarray(get("g")))
        for name, result in {
            "dw": dw,
            **{f"d_{k}": v for k, v in gradients._asdict().items() if v is not None},
        }.items():
            if name == "d_zero_point":
                np.testing.assert_array_equal(result, 0)
                continue
            expected = get(name)
            tolerance = (1e-4 if name == "d_log_s1" else 1e-6) * np.abs(expected).max()
            np.testing.assert_allclose(
                result, expected.reshape(result.shape), rtol=0, atol=tolerance, err_msg=f"{case} {name}"
            )


@pytest.mark.parametrize(("bits", "dtype"), [(2, jnp.bfloat16), (4, jnp.float32)])
def test_starts_as_round_to_nearest_bit_for_bit(bits, dtype):
    w = draw((7, 9)).astype(dtype)
    for axis in (0, None):
        scale, zero_point = minmax_qparams(w.astype(jnp.float32), bits, axis)
        nearest = fake_quantize(w, scale, zero_point, bits=bits, signed=False)
        start = flexround_init(w, bits=bits, axis=axis)
        got = flexround(w, start, bits=bits)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, nearest)
        np.testing.assert_array_equal(flex(w, start, bits=bits), nearest)
    low_rank = lrq_init(w, bits=bits, axis=0, rank=3, key=jax.random.key(0))
    np.testing.assert_array_equal(
        lrq(w, low_rank, bits=bits), flexround(w, flexround_init(w, bits=bits, axis=0), bits=bits)
    )


def test_gradients_in_closed_form():
    w, g = draw((5, 8)), draw((5, 8), 2)
    params = perturbed(w, 3, 1)
    _, pull = jax.vjp(lambda p: flex(w, p, bits=3), params)
    (got,) = pull(g)
    s1 = jnp.exp(params.log_s1)
    ratio = w / (s1 * jnp.exp(params.log_s2 + params.log_s3))
    low, high = -params.zero_point, 7 - params.zero_point
    inside = (jnp.round(ratio) >= low) & (jnp.round(ratio) <= high)
    codes = jnp.clip(jnp.round(ratio), low, high)
    log_s2 = -g * s1 * ratio * inside
    np.testing.assert_allclose(got.log_s2, log_s2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.log_s3, log_s2.sum(1, keepdims=True), rtol=1e-5, atol=1e-6)
    log_s1 = jnp.sum(g * s1 * (codes - inside * ratio), 1, keepdims=True)
    np.testing.assert_allclose(got.log_s1, log_s1, rtol=1e-4, atol=1e-5)


def test_the_grid_sizes_gradient_is_the_one_of_lsq():
    w = draw((1, 400))
    params = flexround_init(w, bits=3, axis=None, symmetric=True)
    params = params._replace(log_s1=params.log_s1 - 0.3)
    scale = jnp.exp(params.log_s1)
    ratio = w / scale
    # in the outer half cells LSQ's mask is 0 and FlexRound's is still 1
    w = jnp.where(((ratio > 3) & (ratio < 3.5)) | ((ratio < -4) & (ratio > -4.5)), 0, w)
    ours = jax.grad(lambda a: flexround(w, params._replace(log_s1=a), bits=3).sum())(params.log_s1)
    theirs = jax.grad(lambda s: lsq(w, s, bits=3, axis=None, grad_scale=1.0).sum())(scale)
    np.testing.assert_allclose(ours, theirs * scale, rtol=1e-4)


def test_invariances():
    w = draw((6, 8)).at[2, 3].set(0)
    params = perturbed(w, 4, 1)
    moved = params._replace(log_s2=params.log_s2 + 0.25, log_s3=params.log_s3 - 0.25)
    np.testing.assert_allclose(flexround(w, moved, bits=4), flexround(w, params, bits=4), atol=1e-6)
    value = flexround(w, params, bits=4)
    assert value[2, 3] == 0
    assert ((jnp.sign(value) == jnp.sign(w)) | (value == 0)).all()
    assert jnp.abs(flexround(w, params, bits=4) - flexround(w, perturbed(w, 4, 1, 9), bits=4)).max() > 0.1


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, True), (8, False)])
def test_integers_times_scale_are_the_weights_exactly(bits, symmetric):
    w = draw((6, 8))
    params = perturbed(w, bits, 1, symmetric=symmetric)
    codes, scale, zero_point = flexround_codes(w, params, bits=bits)
    assert codes.dtype == jnp.int8
    assert -(2 ** (bits - 1)) <= codes.min() <= codes.max() <= 2 ** (bits - 1) - 1
    whole = codes.astype(jnp.float32) - (0 if zero_point is None else zero_point.astype(jnp.float32))
    np.testing.assert_array_equal(whole * scale, flexround(w, params, bits=bits))
    np.testing.assert_array_equal(whole * scale, flex(w, params, bits=bits))


def test_low_rank_factors_are_those_of_flexround():
    w = draw((6, 8))
    params = lrq_init(w, bits=3, axis=0, rank=2, key=jax.random.key(0))
    assert params.right.any() != params.left.any()
    params = params._replace(left=draw((6, 2), 1), right=0.1 * draw((2, 8), 2), row=0.1 * draw((6, 1), 3))
    start = flexround_init(w, bits=3, axis=0)
    full = start._replace(log_s2=params.left @ params.right + params.row + params.column)
    np.testing.assert_array_equal(lrq(w, params, bits=3), flexround(w, full, bits=3))
    np.testing.assert_array_equal(lrq_codes(w, params, bits=3)[0], flexround_codes(w, full, bits=3)[0])
    # the side of the output channels starts at zero, whichever it is
    assert not lrq_init(w, bits=3, axis=1, rank=2, key=jax.random.key(0)).left.any()
    assert not lrq_init(w, bits=3, axis=0, rank=2, key=jax.random.key(0)).right.any()


def test_convolutions_have_a_factor_for_inputs():
    flax, torch = draw((3, 2, 4, 5)), draw((5, 4, 3, 2))
    for w, axis, out, into in ((flax, (0, 1, 2), 3, 2), (torch, (1, 2, 3), 0, 1)):
        params = flexround_init(w, bits=4, axis=axis)
        shape = lambda kept: tuple(w.shape[i] if i == kept else 1 for i in range(4))  # noqa: E731
        assert params.log_s1.shape == shape(out)
        assert params.log_s3.shape == shape(out)
        assert params.log_s4.shape == shape(into)
        gradient = jax.jit(jax.grad(lambda p, w: flexround(w, p, bits=4).sum()))(params, w)
        sums = gradient.log_s2.sum(tuple(i for i in range(4) if i != into), keepdims=True)
        np.testing.assert_allclose(gradient.log_s4, sums, rtol=1e-4, atol=1e-5)


def test_zeros_and_vmap():
    w = draw((2, 3, 4)).at[0, 1].set(0)

    @jax.jit
    @jax.vmap
    def run(w):
        params = flexround_init(w, bits=3, axis=1)
        return jax.value_and_grad(lambda p: (lambda out: (out.sum(), out))(flexround(w, p, bits=3)), has_aux=True)(
            params
        )

    value, gradient = run(w)
    np.testing.assert_array_equal(value[1][0, 1], 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradient)))


def test_bad_input_is_refused():
    w = draw((3, 4))
    params = flexround_init(w, bits=3, axis=1)
    for message, call in {
        r"bits must be in \[2, 8\], got 1": lambda: flexround_init(w, bits=1, axis=1),
        "bits must be in": lambda: flexround(w, params, bits=9),
        "axis must lie in": lambda: flexround_init(w, bits=3, axis=2),
        "w must be finite": lambda: flexround_init(w * jnp.inf, bits=3, axis=1),
        "w must not be empty": lambda: flexround_init(jnp.zeros((0, 3)), bits=3, axis=1),
        "log_s2 must broadcast": lambda: flexround(w[:2], params, bits=3),
        "w must be a matrix": lambda: lrq_init(jnp.ones(3), bits=3, axis=0, rank=1, key=jax.random.key(0)),
        "rank must be at least 1": lambda: lrq_init(w, bits=3, axis=0, rank=0, key=jax.random.key(0)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
