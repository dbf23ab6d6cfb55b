"""Tokens drawn with a cache are those that whole passes would give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.attention import dot_product_attention, softplus_attention
from poise.nets import Transformer, generate


@pytest.fixture(scope="module", params=["softmax", "lssar"])
def model(request):
    attention = {"softmax": dot_product_attention, "lssar": functools.partial(softplus_attention, power=3.0)}
    return Transformer(12, num_layers=1, num_heads=1, width=8, attention=attention[request.param])


@pytest.fixture(scope="module")
def variables(model):
    noisy = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    return jax.tree.map(lambda leaf: 2.0 * leaf, noisy)  # likelier tokens stand out


def test_the_likeliest_tokens_are_those_of_whole_passes(model, variables):
    prompt = jnp.array([[1, 2, 3], [4, 5, 6]])
    drawn = jax.jit(functools.partial(generate, model, num_tokens=5, temperature=0.0))(
        variables, prompt, key=jax.random.key(0)
    )
    tokens = np.asarray(prompt)
    logits = jax.jit(model.apply)
    for _ in range(5):
        padded = np.pad(tokens, ((0, 0), (0, 8 - tokens.shape[1])))  # causal: what follows changes nothing
        following = np.asarray(logits(variables, padded))[:, tokens.shape[1] - 1].argmax(-1)
        tokens = np.concatenate([tokens, following[:, None]], 1)
    np.testing.assert_array_equal(drawn, tokens[:, 3:])


@pytest.mark.slow
def test_draws_follow_the_distribution_and_the_key(model, variables):
    prompt = jnp.tile(jnp.array([[7, 1]]), (2000, 1))
    draw = jax.jit(functools.partial(generate, model, num_tokens=1))
    first, again, other = (draw(variables, prompt, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    expected = jax.nn.softmax(model.apply(variables, prompt[:1])[0, -1])
    np.testing.assert_allclose(np.bincount(first[:, 0], minlength=12) / 2000, expected, atol=0.05)


@pytest.mark.parametrize("cold", [np.float32(0), jnp.zeros(())])
def test_no_temperature_of_any_type(model, variables, cold):
    prompt, key = jnp.array([[1, 2, 3]]), jax.random.key(0)
    draw = jax.jit(lambda variables, heat: generate(model, variables, prompt, 3, key, temperature=heat))
    np.testing.assert_array_equal(draw(variables, cold), draw(variables, 0.0))


def test_bad_arguments(model, variables):
    prompt, key = jnp.zeros((1, 2), jnp.int32), jax.random.key(0)
    with pytest.raises(ValueError, match="num_tokens must be at least 1, got 0"):
        generate(model, variables, prompt, 0, key)
    with pytest.raises(ValueError, match="temperature must lie in"):
        generate(model, variables, prompt, 1, key, temperature=-1.0)
    with pytest.raises(ValueError, match="prompt must hold at least one token"):
        generate(model, variables, prompt[:, :0], 1, key)
