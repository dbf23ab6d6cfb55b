import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poise.attention import dot_product_attention, reweight_attention, softplus_attention

IMPLEMENTATIONS = {"xla": {}, "xla_chunked": {"block_size": (5, 7)}, "pallas_interpret": {"block_size": (5, 7)}}
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def attend(implementation, **options):
    return functools.partial(
        softplus_attention, implementation=implementation, **IMPLEMENTATIONS[implementation], **options
    )


@pytest.fixture
def compiled(quick_jit):
    return lambda implementation, **options: quick_jit(attend(implementation, **options))


@pytest.mark.golden
@pytest.mark.golden_pattern("attention", "lssar_*.npz")
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@every_implementation
def test_outputs_and_gradients_of_an_independent_implementation(golden_file, implementation, dtype, quick_jit):
    z = np.load(golden_file)
    cases = {"lssa": {"reweight": False}} | {f"lssar_p{p}": {"power": float(p)} for p in z["powers"]}
    with jax.enable_x64(dtype is np.float64):
        query, key, value, cotangent = (
            jnp.asarray(z[name].transpose(0, 2, 1, 3), dtype) for name in ("q", "k", "v", "cotangent")
        )
        for case, options in cases.items():
            function = attend(implementation, is_causal=True, **options)

            def both(cotangent, *arrays, function=function):
                out, pull = jax.vjp(function, *arrays)
                return out, *pull(cotangent)

            results = quick_jit(both)(cotangent, query, key, value)
            for name, result in zip(("out", "dq", "dk", "dv"), results, strict=True):
                expected = z[f"{case}_{name}"].transpose(0, 2, 1, 3)
                # relative to the largest entry; p = 15 amplifies what float32 rounds
                # (rounding only the inputs to float32 moves the gradients by 3e-6)
                single = 3e-5 if name in ("dq", "dk") else 1e-5
                tolerance = (1e-12 if dtype is np.float64 else single) * np.abs(expected).max()
                np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance, err_msg=f"{case} {name}")


@pytest.mark.slow
@every_implementation
def test_gradients_are_those_of_finite_differences(implementation, draw, quick_jit):
    with jax.enable_x64():
        arrays = draw(batch=1, queries=9, keys=9, dtype=np.float64)
        directions = draw(batch=1, queries=9, keys=9, dtype=np.float64, seed=1)
        for options in ({"reweight": False}, {"power": 1.0}, {"power": 1.5}, {"power": 15.0}):
            function = attend(implementation, is_causal=True, **options)

            run = quick_jit(jax.value_and_grad(lambda arrays, f=function: jnp.sum(jnp.sin(f(*arrays)))))
            _, gradients = run(arrays)
            slope = sum(float(jnp.vdot(g, d)) for g, d in zip(gradients, directions, strict=True))
            step = 1e-6
            ends = [
                float(run(tuple(x + sign * step * d for x, d in zip(arrays, directions, strict=True)))[0])
                for sign in (1, -1)
            ]
            np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, err_msg=str(options))


@every_implementation
def test_power_one_without_offset_is_plain_softplus_attention(implementation, draw, compiled):
    arrays = draw()
    plain = compiled(implementation, is_causal=True, reweight=False)(*arrays)
    linear = compiled(implementation, is_causal=True, power=1, offset_min_keys=100)(*arrays)
    np.testing.assert_allclose(linear, plain, rtol=1e-5, atol=1e-6)


def test_without_offset_weights_are_powers_of_softplus(draw):
    query, key, value = draw(heads=2)
    out = jax.jit(functools.partial(softplus_attention, power=3, offset_min_keys=100))(query, key, value)
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    scores = np.log(4) * np.log(7) * jnp.einsum("btnd,bsnd->bnts", q, k)
    weights = jax.nn.softmax(3 * jnp.log(jax.nn.softplus(scores)))
    np.testing.assert_allclose(out, jnp.einsum("bnts,bsnh->btnh", weights, value), rtol=1e-5, atol=1e-6)


@every_implementation
def test_lengths_of_queries_and_keys_do_not_matter(implementation, draw, compiled):
    with jax.enable_x64():
        query, key, value = draw(dtype=np.float64)
        function = compiled(implementation, is_causal=True)
        scaled = function(query * 123.0, key * 1e-4, value)
        np.testing.assert_allclose(scaled, function(query, key, value), rtol=1e-12, atol=1e-13)


def test_rotating_before_or_after_normalizing_is_the_same(draw):
    query, key, value = draw(heads=2)
    angles = np.arange(7)[:, None, None] * np.array([1.0, 0.1])

    def rotate(x):
        a, b = x[..., :2], x[..., 2:]
        return jnp.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], -1)

    def normalize(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    before = jax.jit(functools.partial(softplus_attention, is_causal=True))(rotate(query), rotate(key), value)
    scale = jnp.log(4.0) * jnp.log(jnp.arange(1.0, 8.0))[:, None, None]
    given = jax.jit(functools.partial(softplus_attention, is_causal=True, qk_norm=False, scale=1.0))
    after = given(scale * rotate(normalize(query)), rotate(normalize(key)), value)
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-5)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 99), implementation=st.sampled_from(["xla", "xla_chunked"]))
def test_order_of_keys_and_hidden_ones_change_nothing(draw, compiled, seed, implementation):
    query, key, value = draw(seed=seed)
    function = compiled(implementation)
    out = function(query, key, value)
    order = np.random.default_rng(seed).permutation(7)
    np.testing.assert_allclose(function(query, key[:, order], value[:, order]), out, rtol=1e-4, atol=1e-5)
    more = jnp.concatenate([key, 9 + key[:, :3]], 1), jnp.concatenate([value, value[:, :3]], 1)
    hidden = function(query, *more, mask=(np.arange(10) < 7)[None, None, None])
    np.testing.assert_allclose(hidden, out, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(function(query, *more, key_value_seq_lengths=7), out, rtol=1e-4, atol=1e-5)


@every_implementation
def test_a_single_key_takes_all(implementation, draw, compiled):
    query, key, value = draw(keys=1, heads=2)
    out = compiled(implementation)(query, key, value)
    np.testing.assert_allclose(out, np.broadcast_to(value, out.shape), rtol=1e-6)


@every_implementation
def test_linear_in_values_with_weights_that_sum_to_one(implementation, draw, compiled):
    query, key, value = draw()
    function = compiled(implementation, is_causal=True)
    np.testing.assert_allclose(function(query, key, jnp.ones_like(value)), 1, rtol=1e-5)
    double = function(query, key, 2 * value - 1)
    np.testing.assert_allclose(double, 2 * function(query, key, value) - 1, rtol=1e-4, atol=1e-5)


@every_implementation
def test_a_prefix_gives_the_last_row(implementation, draw, compiled):
    query, key, value = draw(queries=9, keys=9)
    whole = compiled(implementation, is_causal=True)(query, key, value)
    for length in (1, 3, 4, 8):
        one = compiled(implementation)(query[:, length - 1 : length], key[:, :length], value[:, :length])
        np.testing.assert_allclose(one[:, 0], whole[:, length - 1], rtol=1e-4, atol=1e-5)


@every_implementation
def test_equal_keys_share_equally_with_finite_gradients(implementation, draw, quick_jit):
    query, key, value = draw(queries=12, keys=12)
    flat = jnp.broadcast_to(key[:, :1], key.shape)

    def total(query, key, value):
        out = attend(implementation)(query, key, value)
        return jnp.sum(out**2), out

    gradients, out = quick_jit(jax.grad(total, (0, 1, 2), has_aux=True))(query, flat, value)
    mean = jnp.repeat(value.mean(1, keepdims=True), 2, axis=2)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), rtol=1e-4, atol=1e-5)
    plain = quick_jit(jax.grad(lambda *x: jnp.sum(attend(implementation, reweight=False)(*x) ** 2), (0, 1, 2)))(
        query, flat, value
    )
    for gradient, other in zip(gradients, plain, strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-3, atol=1e-4)


@every_implementation
def test_one_dominant_key_among_many_is_finite(implementation, quick_jit):
    # the published formula raises (n a)^15 to infinity here
    key = jnp.full((1, 1024, 1, 64), -1.0).at[0, 5].set(1.0)
    query, value = jnp.ones((1, 2, 1, 64)), jnp.arange(1024.0)[None, :, None, None]
    options = {} if implementation == "xla" else {"block_size": (2, 256)}
    function = functools.partial(softplus_attention, implementation=implementation, **options)
    gradients, out = quick_jit(jax.grad(lambda *x: ((out := function(*x)).sum(), out), (0, 1, 2), has_aux=True))(
        query, key, value
    )
    np.testing.assert_allclose(out, 5.0, rtol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_high_powers_pick_the_best_key(draw):
    query, key, value = draw(heads=2)
    out = jax.jit(functools.partial(softplus_attention, power=1001.0))(query, key, value)
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    scores = jnp.einsum("btnd,bsnd->bnts", q, k)
    ranked = jnp.sort(scores, -1)
    clear = np.asarray(ranked[..., -1] - ranked[..., -2] > 0.05).transpose(0, 2, 1)
    assert clear.sum() > 10
    best = jnp.take_along_axis(value, jnp.argmax(scores, -1).transpose(0, 2, 1)[..., None], 1)
    np.testing.assert_allclose(out[clear], best[clear], rtol=1e-3, atol=1e-3)  # a power of 1001


def test_default_implementation_holds_no_large_matrix():
    def largest(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        text = jax.jit(jax.grad(lambda q: softplus_attention(q, q, q, is_causal=True).sum())).lower(x).as_text()
        return f"x{length}x{length}x" in text

    assert largest(1024)
    assert not largest(2048)


def test_chunked_memory_is_linear():
    def temporary(length, implementation):
        x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        function = functools.partial(softplus_attention, is_causal=True, implementation=implementation)
        compiled = jax.jit(jax.grad(lambda q, k, v: function(q, k, v).sum(), (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunked = [temporary(length, "xla_chunked") for length in (2048, 4096)]
    dense = temporary(2048, "xla")
    assert chunked[1] < 2.1 * chunked[0]
    assert chunked[0] < dense / 5


def test_bfloat16_gradients_are_close_to_those_of_the_dense_form(draw, quick_jit):
    arrays = tuple(x.astype(jnp.bfloat16) for x in draw(queries=16, keys=16))

    def gradients(name):
        function = attend(name, is_causal=True)
        return quick_jit(jax.grad(lambda *x: function(*x).astype(jnp.float32).sum(), (0, 1, 2)))(*arrays)

    found = [gradients(name) for name in IMPLEMENTATIONS]
    for a, b in [pair for other in found[1:] for pair in zip(found[0], other, strict=True)]:
        # all are sums in float32, rounded once
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=2**-7, atol=1e-5)


def test_softmax_is_that_of_jax(draw, quick_jit):
    arrays = draw()
    arrays = (*arrays[:2], jnp.concatenate([arrays[2], arrays[2][..., :1]], -1))
    for arguments in (
        {},
        {"is_causal": True},
        {"local_window_size": (2, 1)},
        {"mask": np.tril(np.ones((1, 1, 7, 7), bool), 1)},
        {"bias": np.random.default_rng(0).standard_normal((1, 4, 7, 7)).astype(np.float32)},
    ):
        expected = jax.nn.dot_product_attention(*arrays, **arguments)
        for options in ({"implementation": "xla"}, {"block_size": (3, 4)}):
            out = quick_jit(functools.partial(dot_product_attention, **arguments, **options))(*arrays)
            np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_softmax_may_be_reweighted_too(draw):
    query, key, value = draw()
    out = jax.jit(functools.partial(dot_product_attention, reweight=True, power=3))(query, key, value)
    scores = jnp.einsum("btnd,bsnd->bnts", query, jnp.repeat(key, 2, 2)) / 2
    weights = reweight_attention(jax.nn.softmax(scores), power=3)
    np.testing.assert_allclose(
        out, jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(value, 2, 2)), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="reweight=True is not for implementation='xla_chunked'"):
        dot_product_attention(query, key, value, reweight=True, implementation="xla_chunked")
