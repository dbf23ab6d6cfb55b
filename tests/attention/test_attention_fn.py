import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from poise.attention import attention_fn, dot_product_attention, softplus_attention


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (2, 6, 8))


def test_softmax_in_linen_is_the_layer_of_linen(x):
    mask = nn.make_causal_mask(x[..., 0])
    own = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=attention_fn(dot_product_attention))
    expected, variables = nn.MultiHeadDotProductAttention(num_heads=2).init_with_output(jax.random.key(1), x, mask=mask)
    np.testing.assert_allclose(own.apply(variables, x, mask=mask), expected, rtol=1e-4, atol=1e-6)


def test_decoding_in_linen_is_the_causal_call(x):
    options = {"num_heads": 2, "attention_fn": attention_fn(softplus_attention, power=3.0)}
    layer, decoder = nn.MultiHeadDotProductAttention(**options), nn.MultiHeadDotProductAttention(**options, decode=True)
    whole, variables = layer.init_with_output(jax.random.key(1), x, mask=nn.make_causal_mask(x[..., 0]))
    cache = decoder.init(jax.random.key(1), jnp.zeros_like(x))["cache"]

    @jax.jit
    def step(cache, token):
        out, changed = decoder.apply({**variables, "cache": cache}, token[:, None], mutable="cache")
        return changed["cache"], out[:, 0]

    for t in range(6):
        cache, out = step(cache, x[:, t])
        np.testing.assert_allclose(out, whole[:, t], rtol=1e-4, atol=1e-5)


def test_nnx_gives_what_linen_gives(x):
    function = attention_fn(softplus_attention, power=3.0)
    layer = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, attention_fn=function, rngs=nnx.Rngs(0))
    mask = nn.make_causal_mask(x[..., 0])
    out = layer(x, mask=mask)
    part = {"kernel": "kernel", "bias": "bias"}
    params = {
        name: {key: getattr(getattr(layer, name), key)[...] for key in part}
        for name in ("query", "key", "value", "out")
    }
    linen = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=function)
    np.testing.assert_allclose(linen.apply({"params": params}, x, mask=mask), out, rtol=1e-4, atol=1e-6)

    @nnx.jit
    def train(layer, optimizer):
        loss, gradients = nnx.value_and_grad(lambda layer: jnp.mean((layer(x, mask=mask) - x) ** 2))(layer)
        optimizer.update(layer, gradients)
        return loss

    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)
    losses = [float(train(layer, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_any_number_of_batch_axes():
    query, key, value = (jax.random.normal(jax.random.key(i), (2, 3, 5, 2, 4)) for i in range(3))
    mask = jnp.tril(jnp.ones((2, 3, 1, 5, 5)))
    out = jax.jit(attention_fn(implementation="xla_chunked"))(query, key, value, mask=mask)
    expected = jax.jit(jax.vmap(functools.partial(softplus_attention, is_causal=True)))(query, key, value)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    single = jax.jit(functools.partial(attention_fn(), is_causal=True))(query[0, 0], key[0, 0], value[0, 0])
    np.testing.assert_allclose(single, expected[0, 0], rtol=1e-4, atol=1e-5)
    bias = jax.random.normal(jax.random.key(5), (1, 5, 5))
    biased = jax.jit(attention_fn(dot_product_attention))(query, key, value, bias=bias)
    np.testing.assert_allclose(biased, nn.dot_product_attention(query, key, value, bias=bias), rtol=1e-4, atol=1e-5)


def test_what_has_no_place_is_refused(x):
    with pytest.raises(TypeError, match="powers is no argument of the attention function"):
        attention_fn(powers=3.0)
    with pytest.raises(ValueError, match=r"dropout_rate must be 0: .*, got 0.5"):
        nn.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.5, attention_fn=attention_fn()).init_with_output(
            {"params": jax.random.key(0), "dropout": jax.random.key(1)}, x, deterministic=False
        )
    layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=attention_fn())
    with pytest.raises(ValueError, match="sow_weights must be False"):
        layer.init_with_output(jax.random.key(0), x, sow_weights=True)
    with pytest.raises(ValueError, match="precision must be None"):
        attention_fn()(*3 * (jnp.ones((1, 3, 1, 4)),), precision="highest")


def test_a_window_is_refused_in_decoding_where_it_cannot_know_its_place(x):
    attend = attention_fn(local_window_size=(2, 0))
    query = jnp.ones((1, 1, 2, 4))
    key = jnp.ones((1, 6, 2, 4))
    with pytest.raises(ValueError, match=r"local_window_size must be None .* 1 queries and 6 keys"):
        attend(query, key, key)
    assert attend(key, key, key).shape == key.shape
