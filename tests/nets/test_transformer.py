import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.attention import dot_product_attention, softplus_attention
from poise.nets import Transformer

ATTENTIONS = {
    "softmax": dot_product_attention,
    "control": functools.partial(dot_product_attention, qk_norm=True, scale="length"),
    "lssa": functools.partial(softplus_attention, reweight=False),
    "lssar": softplus_attention,
}


def small(name, **options):
    return Transformer(
        **{"vocab_size": 11, "num_layers": 2, "num_heads": 2, "width": 8, **options}, attention=ATTENTIONS[name]
    )


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 7)))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_no_token_sees_a_later_one_and_the_cache_agrees(name, tokens, quick_jit):
    model = small(name, key_heads=1)
    variables = quick_jit(model.init)(jax.random.key(0), tokens)
    apply = quick_jit(model.apply)
    logits = apply(variables, tokens)
    assert logits.shape == (2, 7, 11)
    changed = apply(variables, tokens.at[:, 4].set((tokens[:, 4] + 1) % 11))
    np.testing.assert_allclose(changed[:, :4], logits[:, :4], rtol=1e-5, atol=1e-5)
    assert np.abs(changed[:, 4:] - logits[:, 4:]).max() > 1e-3

    def step(cache, token):
        out, cache = model.apply(variables, token[:, None], cache=cache)
        return cache, out[:, 0]

    _, rows = quick_jit(lambda tokens: jax.lax.scan(step, model.init_cache(2, 9), tokens.T))(tokens)
    np.testing.assert_allclose(jnp.moveaxis(rows, 0, 1), logits, rtol=1e-3, atol=1e-4)


def test_segments_are_texts_of_their_own(tokens, quick_jit):
    model = small("lssar")
    variables = quick_jit(model.init)(jax.random.key(0), tokens)
    segments = jnp.array([[0, 0, 0, 0, 1, 1, 1]] * 2)
    packed = quick_jit(model.apply)(variables, tokens, segments)
    # positions only matter as distances
    alone = quick_jit(model.apply)(variables, tokens[:, 4:])
    np.testing.assert_allclose(packed[:, 4:], alone, rtol=1e-3, atol=1e-4)


def test_initial_logits_are_of_order_one_and_tokens_are_tied():
    model = Transformer(40, 3, 4, 64)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 40, (2, 12)))
    logits, variables = jax.jit(model.init_with_output)(jax.random.key(0), tokens)
    assert 0.5 < float(logits.std()) < 2
    shapes = [leaf.shape for leaf in jax.tree.leaves(variables)]
    assert shapes.count((40, 64)) == 1
    assert not [shape for shape in shapes if 40 in shape and shape != (40, 64)]


def test_computation_in_bfloat16_with_float32_parameters(tokens, quick_jit):
    model = small("lssar", dtype=jnp.bfloat16)
    logits, variables = quick_jit(model.init_with_output)(jax.random.key(0), tokens)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert model.init_cache(1, 4)[0].key.dtype == jnp.bfloat16
    exact = quick_jit(small("lssar").apply)(variables, tokens)
    assert np.abs(logits - exact).max() < 0.5


@pytest.mark.slow
def test_learns_to_copy():
    model = small("lssar", width=32, vocab_size=9)
    rng = np.random.default_rng(2)
    half = rng.integers(0, 8, (32, 6))
    tokens = jnp.asarray(np.concatenate([half, np.full((32, 1), 8), half], 1))
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = model.apply(params, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])[:, 6:].mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(100):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[0] > 1.5
    assert losses[-1] < 0.5


def test_bad_input(tokens):
    for options, message in (
        ({"width": 10}, "width must be an even multiple of num_heads=2, got 10"),
        ({"key_heads": 3}, "key_heads must divide num_heads=2, got 3"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"rope_base": 0.0}, "rope_base must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            small("lssar", **options).init(jax.random.key(0), tokens)
    model = small("lssar")
    with pytest.raises(ValueError, match="segment_ids must be None with a cache"):
        model.init(jax.random.key(0), tokens, jnp.zeros_like(tokens), model.init_cache(2, 9))
