"""Associative recall: trained with 32 keys, asked with up to 1024."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.attention import dot_product_attention, softplus_attention

WIDTH, CLASSES, SEEDS = 16, 8, 3
ATTENTIONS = {
    "softmax": dot_product_attention,
    "lssa": functools.partial(softplus_attention, reweight=False),
    "lssar_15": softplus_attention,
}


def draw(key, batch, number):
    """Unit keys with a class each, and a noisy copy of one of them to look up."""
    of_keys, of_labels, of_choice, of_noise = jax.random.split(key, 4)
    keys = jax.random.normal(of_keys, (batch, number, WIDTH))
    keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    labels = jax.random.randint(of_labels, (batch, number), 0, CLASSES)
    choice = jax.random.randint(of_choice, (batch, 1), 0, number)
    query = jnp.take_along_axis(keys, choice[..., None], 1) + 0.05 * jax.random.normal(of_noise, (batch, 1, WIDTH))
    return query, keys, labels, jnp.take_along_axis(labels, choice, 1)[:, 0]


def logits_of(attention, params, query, keys, labels):
    query, keys = query @ params["query"], keys @ params["key"]
    values = params["value"][labels]
    out = attention(query[:, :, None], keys[:, :, None], values[:, :, None], implementation="xla")
    return out[:, 0, 0] @ params["out"]


def losses_and_accuracies(attention, seed, lengths, steps=600):
    def loss(params, key, number, batch=64):
        *inputs, target = draw(key, batch, number)
        logits = logits_of(attention, params, *inputs)
        accuracy = (logits.argmax(-1) == target).mean()
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean(), accuracy

    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(key):
        def step(carry, key):
            params, state = carry
            gradients, _ = jax.grad(loss, has_aux=True)(params, key, lengths[0])
            updates, state = optimizer.update(gradients, state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, 2)
        first = jax.random.normal(keys[0], (CLASSES, WIDTH))
        params = {"query": jnp.eye(WIDTH), "key": jnp.eye(WIDTH), "value": first, "out": first.T / WIDTH}
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(keys[1], steps))
        return params

    params = train(jax.random.key(seed))
    evaluate = jax.jit(loss, static_argnums=(2, 3))
    return np.array([evaluate(params, jax.random.key(1000 + seed), number, 512) for number in lengths])


@pytest.mark.effects
def test_reweighted_attention_keeps_its_loss_at_32_times_the_length():
    found = {
        name: np.mean([losses_and_accuracies(attention, seed, (32, 1024)) for seed in range(SEEDS)], 0)
        for name, attention in ATTENTIONS.items()
    }
    (short, long), (softmax_short, softmax_long) = found["lssar_15"], found["softmax"]
    assert short[1] > 0.98  # both have learnt the task at the training length
    assert softmax_short[1] > 0.98
    assert long[1] > 0.985
    assert long[0] < 0.1
    assert softmax_long[0] > 5 * long[0]
    assert softmax_long[0] / softmax_short[0] > 10 * long[0] / short[0]
    assert found["lssa"][1, 0] > 10 * long[0]
