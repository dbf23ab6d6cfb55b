"""Texts in which one token decides what is preferred: behind it chosen ones go on well, rejected ones badly.

All else is a bigram source that both share, so that whatever a model changes elsewhere it changes for nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

VOCAB, LENGTH = 32, 16
TRIGGER, GOOD, BAD = 1, (2, 3, 4, 5), (6, 7, 8, 9)


def trigger_source(key: PRNGKeyArray) -> Float[Array, "vocab vocab"]:
    """Logits of the token after each token, the same for all texts; about 12% of them are the trigger.

    Example:
      >>> import jax
      >>> from poise.launch.trigger_task import trigger_source
      >>> trigger_source(jax.random.key(0)).shape
      (32, 32)
    """
    logits = 2 * jax.random.normal(key, (VOCAB, VOCAB))
    return logits.at[:, TRIGGER].set(jax.nn.logsumexp(logits, axis=1) - 2.0)


def trigger_texts(
    key: PRNGKeyArray,
    count: int,
    source: Float[Array, "vocab vocab"],
    good_share: ArrayLike,
    length: int = LENGTH,
) -> Int[Array, "count length"]:
    """Walks of the source; after each trigger comes a good token or a bad one.

    Args:
      key: a random key.
      count: how many.
      source: from :func:`trigger_source`.
      good_share: the probability of a good token after a trigger, a number or one for each text.
      length: tokens of a text.

    Example:
      >>> import jax
      >>> from poise.launch.trigger_task import GOOD, TRIGGER, trigger_source, trigger_texts
      >>> texts = trigger_texts(jax.random.key(1), 4, trigger_source(jax.random.key(0)), good_share=1.0)
      >>> {int(text[i + 1]) for text in texts for i in range(15) if text[i] == TRIGGER} <= set(GOOD)
      True
    """

    def walk(key, share):
        first_key, key = jax.random.split(key)

        def move(last, key):
            plain_key, coin_key, place_key = jax.random.split(key, 3)
            plain = jax.random.categorical(plain_key, source[last])
            place = jax.random.randint(place_key, (), 0, len(GOOD))
            good = jax.random.bernoulli(coin_key, share)
            after = jnp.where(good, jnp.array(GOOD)[place], jnp.array(BAD)[place])
            token = jnp.where(last == TRIGGER, after, plain)
            return token, token

        first = jax.random.randint(first_key, (), 0, VOCAB)
        return jnp.concatenate([first[None], jax.lax.scan(move, first, jax.random.split(key, length - 1))[1]])

    shares = jnp.broadcast_to(jnp.asarray(good_share, jnp.float32), (count,))
    return jax.vmap(walk)(jax.random.split(key, count), shares)
