import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.attention import attend_with_cache, dot_product_attention, init_cache, softplus_attention


@pytest.mark.parametrize("attention", [softplus_attention, dot_product_attention])
def test_token_by_token_is_the_causal_call(attention, draw):
    query, key, value = draw(queries=9, keys=9)
    whole = jax.jit(functools.partial(attention, is_causal=True))(query, key, value)

    def step(cache, token):
        out, cache = attend_with_cache(*(x[:, None] for x in token), cache, attention=attention)
        return cache, out[:, 0]

    steps = tuple(jnp.moveaxis(x, 1, 0) for x in (query, key, value))
    cache, rows = jax.jit(lambda steps: jax.lax.scan(step, init_cache(2, 12, 2, 4, 3), steps))(steps)
    np.testing.assert_allclose(jnp.moveaxis(rows, 0, 1), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache.num_keys, [9, 9])


def test_prompts_of_different_lengths(draw):
    query, key, value = draw(queries=6, keys=6)
    append = jax.jit(attend_with_cache)
    cache = init_cache(2, 10, 2, 4, 3)
    _, cache = append(query[:, :4], key[:, :4], value[:, :4], cache, new_lengths=jnp.array([4, 2]))
    out, cache = append(query[:, 4:], key[:, 4:], value[:, 4:], cache)
    np.testing.assert_array_equal(cache.num_keys, [6, 4])
    attend = jax.jit(functools.partial(softplus_attention, is_causal=True))
    np.testing.assert_allclose(out[0], attend(query, key, value)[0, 4:], rtol=1e-4, atol=1e-5)
    short = [jnp.concatenate([x[1:, :2], x[1:, 4:]], 1) for x in (query, key, value)]
    np.testing.assert_allclose(out[1], attend(*short)[0, 2:], rtol=1e-4, atol=1e-5)


def test_a_full_cache_says_so(draw):
    query, key, value = draw(queries=5, keys=5)
    out, _ = jax.jit(attend_with_cache)(query, key, value, init_cache(2, 4, 2, 4, 3))
    assert np.isfinite(out[:, :4]).all()
    assert np.isnan(out[:, 4]).all()


def test_bad_input(draw):
    query, key, value = draw()
    with pytest.raises(ValueError, match="value must fit the cache of shape"):
        attend_with_cache(query, key, value, init_cache(2, 9, 2, 4, 2))
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        init_cache(2, 0, 2, 4)


@pytest.mark.parametrize("bound", [False, True])
def test_a_window_counts_from_each_entry_s_own_place(draw, bound):
    query, key, value = draw(queries=7, keys=7)
    whole = jax.jit(functools.partial(softplus_attention, is_causal=True, local_window_size=(2, 0)))(query, key, value)
    attention, options = softplus_attention, {"local_window_size": (2, 0)}
    if bound:
        attention, options = functools.partial(softplus_attention, local_window_size=(2, 0)), {}
    cache, parts = init_cache(2, 8, 2, 4, 3), []
    for piece in (slice(0, 4), slice(4, 6), slice(6, 7)):
        inputs = (x[:, piece] for x in (query, key, value))
        out, cache = jax.jit(functools.partial(attend_with_cache, attention=attention, **options))(*inputs, cache)
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="is_causal must not be given"):
        attend_with_cache(query, key, value, cache, is_causal=True)
