"""Text from a language model, token by token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, PRNGKeyArray, PyTree

from poise.core.arguments import check_count, check_range
from poise.nets.transformer import Transformer


def generate(
    model: Transformer,
    variables: PyTree,
    prompt: Int[Array, "batch length"],
    num_tokens: int,
    key: PRNGKeyArray,
    *,
    temperature: ArrayLike = 1.0,
) -> Int[Array, "batch num_tokens"]:
    r"""Draws tokens one after another, each from $\mathrm{softmax}(\mathrm{logits}/T)$ of all tokens before it.

    The prompt is read at once and its keys and values are kept, so every further token costs one row of attention. The
    whole is one ``lax.scan``: jit it with ``model`` and ``num_tokens`` static.

    Args:
      model: the language model.
      variables: its variables.
      prompt: at least one token per row; all rows are of one length.
      num_tokens: how many tokens to draw.
      key: of the draws.
      temperature: $T \ge 0$; 0 takes the likeliest token.

    Returns:
      The drawn tokens, without the prompt.

    Raises:
      ValueError: if the prompt is empty, ``num_tokens`` below 1 or the temperature negative.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import Transformer, generate
      >>> model = Transformer(vocab_size=11, num_layers=1, num_heads=1, width=8)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
      >>> generate(model, variables, jnp.array([[1, 2, 3]]), 4, jax.random.key(1)).shape
      (1, 4)
    """
    check_count("num_tokens", num_tokens)
    check_range("temperature", temperature, 0.0)
    batch, length = prompt.shape
    if not length:
        raise ValueError(f"prompt must hold at least one token, got shape {prompt.shape}")

    def draw(logits: Array, index: Array) -> Array:
        heat = jnp.asarray(temperature, logits.dtype)
        drawn = jax.random.categorical(jax.random.fold_in(key, index), logits / jnp.where(heat > 0, heat, 1))
        return jnp.where(heat > 0, drawn, logits.argmax(-1)).astype(prompt.dtype)

    def next_token(carry: tuple[Array, PyTree], index: Array) -> tuple[tuple[Array, PyTree], Array]:
        token, cache = carry
        logits, cache = model.apply(variables, token[:, None], cache=cache)
        following = draw(logits[:, -1], index)
        return (following, cache), following

    cache = model.init_cache(batch, length + num_tokens)
    logits, cache = model.apply(variables, prompt, cache=cache)
    first = draw(logits[:, -1], jnp.asarray(0))
    _, others = jax.lax.scan(next_token, (first, cache), jnp.arange(1, num_tokens))
    return jnp.concatenate([first[:, None], others.T], axis=1)
