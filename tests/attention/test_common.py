"""What every attention function must do under every implementation."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.attention import dot_product_attention, softplus_attention

FUNCTIONS = {
    "softmax": functools.partial(dot_product_attention),
    "softmax_length": functools.partial(dot_product_attention, qk_norm=True, scale="length"),
    "lssa": functools.partial(softplus_attention, reweight=False),
    "lssar_1": functools.partial(softplus_attention, power=1),
    "lssar_3": functools.partial(softplus_attention, power=3.0),
    "lssar_2.5": functools.partial(softplus_attention, power=2.5),
    "lssar_15": softplus_attention,
}
ORACLE = {
    "softmax": {"kind": "softmax", "normalize": False, "scale": 0.5},
    "softmax_length": {"kind": "softmax", "normalize": True, "scale": "length"},
    "lssa": {"kind": "lssa", "normalize": True, "scale": "length"},
    "lssar_1": {"kind": "lssar", "normalize": True, "scale": "length", "power": 1.0},
    "lssar_3": {"kind": "lssar", "normalize": True, "scale": "length", "power": 3.0},
    "lssar_2.5": {"kind": "lssar", "normalize": True, "scale": "length", "power": 2.5},
    "lssar_15": {"kind": "lssar", "normalize": True, "scale": "length", "power": 15.0},
}
IMPLEMENTATIONS = {"xla": {}, "xla_chunked": {"block_size": (4, 3)}, "pallas_interpret": {"block_size": (4, 3)}}
OF_SOFTMAX = ("xla", "xla_chunked")
UNKNOWN = {"pallas_interpret": ("mask", "mask_broadcast", "bias")}
PAIRS = [
    (name, implementation)
    for name in ("softmax", "lssar_15")
    for implementation in IMPLEMENTATIONS
    if name != "softmax" or implementation in OF_SOFTMAX
]
every_pair = pytest.mark.parametrize(("name", "implementation"), PAIRS)


def attend(name, implementation):
    return functools.partial(FUNCTIONS[name], implementation=implementation, **IMPLEMENTATIONS[implementation])


def causal(queries, keys):
    return np.arange(keys)[None] <= np.arange(queries)[:, None]


def masks(which, batch=2, heads=4, queries=7, keys=7, seed=0):
    """Arguments that restrict who sees whom, and the same as a full matrix."""
    rng = np.random.default_rng(seed)
    full = np.ones((batch, heads, queries, keys), bool)
    i, j = np.arange(queries)[:, None], np.arange(keys)[None]
    if which == "all":
        return {}, full
    if which == "causal":
        return {"is_causal": True}, full & causal(queries, keys)
    if which == "window":
        return {"local_window_size": (2, 1)}, full & (j >= i - 2) & (j <= i + 1)
    if which == "causal_window":
        return {"local_window_size": 3, "is_causal": True}, full & (j >= i - 3) & (j <= i)
    if which == "lengths":
        of_queries, of_keys = np.array([queries, queries - 2])[:batch], np.array([keys - 3, keys])[:batch]
        visible = (i < of_queries[:, None, None]) & (j < of_keys[:, None, None])
        return {"query_seq_lengths": of_queries, "key_value_seq_lengths": of_keys}, full & visible[:, None]
    if which == "segments":
        ids = rng.integers(0, 3, (batch, queries)), rng.integers(0, 3, (batch, keys))
        return {"segment_ids": ids}, full & (ids[0][:, :, None] == ids[1][:, None])[:, None]
    if which == "mask":
        mask = rng.random((batch, heads, queries, keys)) < 0.5
        return {"mask": mask}, mask
    if which == "mask_broadcast":
        mask = rng.random((1, heads, 1, keys)) < 0.6
        return {"mask": mask, "is_causal": True}, full & mask & causal(queries, keys)
    raise AssertionError(which)


WHICH = ("all", "causal", "window", "causal_window", "lengths", "segments", "mask", "mask_broadcast")
STATIC = ("is_causal", "local_window_size")
IN_OTHERS = ("all", "causal", "window", "mask")  # what goes wrong with them does with the rest, too
THOROUGH = ("lssar_3",)  # the others differ from it in how a row is weighted, not in who sees whom
MASKED = [
    pytest.param(name, implementation, which, marks=[pytest.mark.slow] if which in IN_OTHERS else [])
    for name in FUNCTIONS
    for implementation in IMPLEMENTATIONS
    for which in (
        WHICH if name in THOROUGH else ("causal_window",) if name == "lssa" or implementation != "xla" else ()
    )
    if which not in UNKNOWN.get(implementation, ()) and (name[:7] != "softmax" or implementation in OF_SOFTMAX)
]


@pytest.fixture(scope="module")
def run(quick_jit):
    """The output of an attention function, and the gradients of its sum weighted by a cotangent."""

    @functools.cache
    def compiled(name, implementation, static, names):
        function = functools.partial(attend(name, implementation), **dict(static))

        def total(query, key, value, cotangent, *arguments):
            out = function(query, key, value, **dict(zip(names, arguments, strict=True)))
            return jnp.vdot(out.astype(jnp.promote_types(out.dtype, jnp.float32)), cotangent), out

        return quick_jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))

    def call(name, implementation, arrays, cotangent, arguments):
        static = tuple((k, v) for k, v in arguments.items() if k in STATIC)
        traced = {k: v for k, v in arguments.items() if k not in STATIC}
        compiled_call = compiled(name, implementation, static, tuple(traced))
        (_, out), gradients = compiled_call(*arrays, cotangent, *traced.values())
        return out, gradients

    return call


@pytest.fixture(scope="module")
def cotangent():
    return np.random.default_rng(9).standard_normal((2, 7, 4, 3)).astype(np.float32)


@pytest.mark.parametrize(("name", "implementation", "which"), MASKED)
def test_who_sees_whom(name, implementation, which, run, draw, reference, cotangent):
    arrays = draw()
    arguments, visible = masks(which)
    out, gradients = run(name, implementation, arrays, cotangent, arguments)
    expected = reference(*arrays, visible, **ORACLE[name])
    np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-5)
    empty = ~visible.any(-1).transpose(0, 2, 1)
    assert not np.asarray(out)[empty].any()
    assert not np.asarray(gradients[0])[empty].any()
    if implementation != "xla":
        _, dense = run(name, "xla", arrays, cotangent, arguments)
        for gradient, other in zip(gradients, dense, strict=True):
            np.testing.assert_allclose(gradient, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())


@every_pair
def test_nothing_leaks_from_padding(name, implementation, run, draw, cotangent):
    clean = [np.array(x) for x in draw()]
    arguments, _ = masks("lengths")
    dirty = [x.copy() for x in clean]
    for x, lengths in zip(
        dirty, [arguments["query_seq_lengths"], *2 * [arguments["key_value_seq_lengths"]]], strict=True
    ):
        for b, length in enumerate(lengths):
            x[b, length:] = np.nan
    out, gradients = run(name, implementation, dirty, cotangent, arguments)
    expected, expected_gradients = run(name, implementation, clean, cotangent, arguments)
    np.testing.assert_array_equal(out, expected)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_array_equal(gradient, other)


@every_pair
def test_a_broken_value_breaks_the_rows_that_see_it_alone(name, implementation, run, draw, cotangent):
    query, key, value = draw()
    for x in (key, value):
        broken = x.at[1, 4, 0].set(jnp.inf)
        arrays = (query, broken, value) if x is key else (query, key, broken)
        out, _ = run(name, implementation, arrays, cotangent, {"is_causal": True})
        whole, _ = run(name, implementation, (query, key, value), cotangent, {"is_causal": True})
        assert np.isnan(out[1, 4:, :2]).all()
        np.testing.assert_array_equal(out[0], whole[0])
        np.testing.assert_array_equal(out[1, :4], whole[1, :4])
        np.testing.assert_allclose(out[1, 4:, 2:], whole[1, 4:, 2:], rtol=1e-6)


@every_pair
def test_extreme_magnitudes_are_finite(name, implementation, run, draw, cotangent):
    arrays = draw()
    for query_scale, key_scale in ((0, 1), (1, 0), (1e18, 1e18), (1e-30, 1e-30)):
        scaled = (arrays[0] * np.float32(query_scale), arrays[1] * np.float32(key_scale), arrays[2])
        if name == "softmax" and query_scale == 1e18:
            continue  # the scores themselves overflow
        out, gradients = run(name, implementation, scaled, cotangent, {"is_causal": True})
        assert np.isfinite(out).all()
        if query_scale != 1e-30 or name == "softmax":  # the slope of a direction is the inverse of the length
            assert all(np.isfinite(gradient).all() for gradient in gradients)


@every_pair
def test_vmap_unbatched_and_remat(name, implementation, run, draw, cotangent, quick_jit):
    arrays = draw()
    function = functools.partial(attend(name, implementation), is_causal=True)
    out, gradients = run(name, implementation, arrays, cotangent, {"is_causal": True})
    mapped = jax.vmap(function)  # each example without a batch axis

    def total(arrays, cotangent):
        return jnp.vdot(jax.checkpoint(mapped)(*arrays), cotangent)

    np.testing.assert_allclose(quick_jit(mapped)(*arrays), out, rtol=1e-5, atol=1e-6)
    for gradient, other in zip(quick_jit(jax.grad(total))(arrays, cotangent), gradients, strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())
    with pytest.raises(ValueError, match=r"mask must have 4 axes \(3 without a batch\)"):
        function(*(x[0] for x in arrays), mask=np.ones((1, 1, 7, 7), bool))


@every_pair
def test_dtypes(name, implementation, run, draw, cotangent):
    arrays = draw()
    exact, exact_gradients = run(name, implementation, arrays, cotangent, {"is_causal": True})
    for dtype in (jnp.bfloat16, jnp.float16):
        half = tuple(jnp.asarray(x, dtype) for x in arrays)
        out, gradients = run(name, implementation, half, cotangent, {"is_causal": True})
        assert out.dtype == dtype
        assert all(gradient.dtype == dtype for gradient in gradients)
        rounded, _ = run(
            name, implementation, tuple(x.astype(jnp.float32) for x in half), cotangent, {"is_causal": True}
        )
        np.testing.assert_allclose(  # only the result is rounded
            out.astype(jnp.float32), rounded, rtol=float(jnp.finfo(dtype).eps), atol=1e-6
        )
        # The gradient at inputs that are off by a relative eps; sharp rows double the powers of that.
        for gradient, other in zip(gradients, exact_gradients, strict=True):
            assert np.isfinite(gradient.astype(jnp.float32)).all()
            np.testing.assert_allclose(gradient.astype(jnp.float32), other, atol=0.2 * np.abs(other).max())
    with jax.enable_x64():
        wide = tuple(jnp.asarray(x, jnp.float64) for x in arrays)
        out, gradients = run(name, implementation, wide, jnp.asarray(cotangent, jnp.float64), {"is_causal": True})
        assert {x.dtype for x in (out, *gradients)} == {jnp.dtype("float64")}
        np.testing.assert_allclose(out, exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("softmax", "xla_chunked"), *((n, i) for n in ("lssa", "lssar_15") for i in IMPLEMENTATIONS)],
)
def test_residuals(name, implementation, draw, quick_jit):
    arrays = draw()
    function = functools.partial(attend(name, implementation), is_causal=True, return_residual=True)
    dense = functools.partial(attend(name, "xla"), is_causal=True, return_residual=True)
    (out, statistics), (expected, others) = quick_jit(function)(*arrays), quick_jit(dense)(*arrays)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert len(statistics) == (2 if name == "lssar_15" else 1)
    for statistic, other in zip(statistics, others, strict=True):
        assert statistic.shape == (2, 7, 4)
        np.testing.assert_allclose(statistic, other, rtol=1e-5)


BIASED = [
    ("softmax", "xla", (2, 4, 7, 7)),
    ("softmax", "xla_chunked", (2, 4, 7, 7)),
    ("lssar_15", "xla", (1, 4, 1, 7)),
    ("lssar_15", "xla_chunked", (2, 4, 7, 7)),
    ("lssar_15", "xla_chunked", (1, 4, 1, 7)),
    ("lssar_15", "xla_chunked", (2, 1, 7, 1)),
]


@pytest.mark.parametrize(("name", "implementation", "shape"), BIASED)
def test_bias_and_its_gradient(name, implementation, shape, draw, reference, cotangent, quick_jit):
    arrays = draw()
    bias = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    arguments = {"is_causal": True, "qk_norm": False, "scale": 0.7}

    def total(bias, implementation):
        out = attend(name, implementation)(*arrays, bias=bias, **arguments)
        return jnp.vdot(out, cotangent), out

    def gradient_of(implementation):
        return quick_jit(jax.grad(functools.partial(total, implementation=implementation), has_aux=True))(bias)

    gradient, out = gradient_of(implementation)
    options = {**ORACLE[name], "normalize": False, "scale": 0.7}
    full = np.broadcast_to(bias, (2, 4, 7, 7))
    visible = np.broadcast_to(causal(7, 7), (2, 4, 7, 7))
    np.testing.assert_allclose(out, reference(*arrays, visible, bias=full, **options), rtol=2e-4, atol=2e-5)
    if implementation != "xla":
        np.testing.assert_allclose(gradient, gradient_of("xla")[0], rtol=1e-3, atol=1e-4)
    else:
        step = 1e-2
        direction = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
        ends = [float(total(bias + sign * step * direction, "xla")[0]) for sign in (1, -1)]
        # central differences of float32 values of order 1
        np.testing.assert_allclose(np.vdot(gradient, direction), (ends[0] - ends[1]) / (2 * step), rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "xla"])
@settings(max_examples=3, deadline=None)
@given(
    name=st.sampled_from(["lssar_3", "softmax"]),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    blocks=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    is_causal=st.booleans(),
    window=st.sampled_from([None, (1, 2)]),
)
def test_every_block_size(implementation, quick_jit, draw, name, queries, keys, blocks, is_causal, window):
    if name == "softmax" and implementation not in OF_SOFTMAX:
        name = "lssa"
    arrays = draw(batch=1, queries=queries, keys=keys, heads=2, key_heads=1)
    arguments = {"is_causal": is_causal, "local_window_size": window}

    def both(implementation, **more):
        def total(arrays):
            out = FUNCTIONS[name](*arrays, implementation=implementation, **arguments, **more)
            return jnp.sum(jnp.sin(3 * out)), out

        return quick_jit(jax.grad(total, has_aux=True))(arrays)

    (gradients, out), (others, expected) = both(implementation, block_size=blocks), both("xla")
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    for gradient, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-3, atol=1e-4 * max(1, np.abs(other).max()))


@pytest.mark.parametrize("function", [dot_product_attention, softplus_attention])
def test_bad_input(function, draw):
    function = inspect.unwrap(function)  # the annotations, checked here, would complain first
    query, key, value = draw()
    with pytest.raises(ValueError, match="the heads of query must be a multiple"):
        function(query[:, :, :3], key, value)
    with pytest.raises(ValueError, match="key must have the head width of query"):
        function(query[..., :3], key, value)
    with pytest.raises(ValueError, match="value must have the batch, length and heads of key"):
        function(query, key, value[:, :5])
    with pytest.raises(ValueError, match="key must have the batch of query"):
        function(query[:1], key, value)
    with pytest.raises(ValueError, match="query must not be empty"):
        function(query[:, :0], key, value)
    with pytest.raises(TypeError, match="query must have a floating dtype, got int32"):
        function(query.astype(np.int32), key, value)
    with pytest.raises(TypeError, match="value must have the dtype of query, float32, got bfloat16"):
        function(query, key, jnp.asarray(value, jnp.bfloat16))
    with pytest.raises(ValueError, match=r"mask must have 4 axes .* that broadcast to"):
        function(query, key, value, mask=np.ones((2, 4, 7, 6), bool))
    with pytest.raises(TypeError, match="mask must be boolean, True where a key is seen, got float32"):
        function(query, key, value, mask=np.ones((2, 4, 7, 7), np.float32))
    with pytest.raises(ValueError, match="segment_ids must have shape"):
        function(query, key, value, segment_ids=np.zeros((2, 6), int))
    with pytest.raises(TypeError, match="segment_ids must be integers"):
        function(query, key, value, segment_ids=np.zeros((2, 7)))
    with pytest.raises(ValueError, match=r"key_value_seq_lengths must be in \[0, 7\]"):
        function(query, key, value, key_value_seq_lengths=np.array([3, 8]))
    with pytest.raises(ValueError, match=r"query_seq_lengths must have shape \(2,\)"):
        function(query, key, value, query_seq_lengths=np.array([3, 3, 3]))
    with pytest.raises(ValueError, match="local_window_size must be at least 0"):
        function(query, key, value, local_window_size=(-1, 0))
    with pytest.raises(TypeError, match="local_window_size must be an integer or a pair"):
        function(query, key, value, local_window_size=1.5)
    with pytest.raises(TypeError, match="is_causal must be True or False"):
        function(query, key, value, is_causal=1)
    with pytest.raises(ValueError, match="bias takes the scores out of the range"):
        function(query, key, value, bias=np.zeros((1, 1, 7, 7)), qk_norm=True)
    with pytest.raises(ValueError, match=r"scale must lie in \(0, inf\)"):
        function(query, key, value, scale=-1.0)
    with pytest.raises(ValueError, match="scale must be a number or 'length'"):
        function(query, key, value, scale="width")
    with pytest.raises(ValueError, match="scale must be a single number"):
        function(query, key, value, scale=np.ones(7))
    with pytest.raises(ValueError, match="the head width must be at least 2"):
        function(query[..., :1], key[..., :1], value, scale="length")
    with pytest.raises(ValueError, match=r"power must lie in \[1, inf\)"):
        function(query, key, value, power=0.5)
    with pytest.raises(TypeError, match="power and offset_min_keys must be known"):
        jax.jit(lambda power: function(query, key, value, power=power))(2.0)
    with pytest.raises(ValueError, match="offset_min_keys must be at least 0"):
        function(query, key, value, offset_min_keys=-1)
    with pytest.raises(TypeError, match="reweight must be True or False"):
        function(query, key, value, reweight="no")
    with pytest.raises(ValueError, match=r"implementation must be one of xla, xla_chunked.*, got 'cudnn'"):
        function(query, key, value, implementation="cudnn")
    with pytest.raises(ValueError, match="block_size is not for implementation='xla'"):
        function(query, key, value, implementation="xla", block_size=4)
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        function(query, key, value, block_size=0)
    with pytest.raises(ValueError, match="block_size must be one number or a pair"):
        function(query, key, value, block_size=(1, 2, 3))


def test_kernels_say_what_they_do_not_know(draw):
    arrays = draw()
    for implementation in ("pallas", "pallas_interpret"):
        attend = functools.partial(softplus_attention, *arrays, implementation=implementation)
        with pytest.raises(ValueError, match="mask is not for implementation='pallas': use 'xla_chunked'"):
            attend(mask=np.ones((1, 1, 7, 7), bool))
        with pytest.raises(ValueError, match="bias is not for implementation='pallas': use 'xla_chunked'"):
            attend(bias=np.zeros((1, 1, 7, 7), np.float32), qk_norm=False)
    if jax.default_backend() == "cpu":
        with pytest.raises(
            ValueError, match="implementation='pallas' needs a GPU or TPU, this is cpu: use 'xla_chunked'"
        ):
            softplus_attention(*arrays, implementation="pallas")
