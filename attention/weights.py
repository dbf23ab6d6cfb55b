"""The weights of softplus attention as dense matrices, from scores to re-weighted rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from poise.core.arguments import check_count, check_range, concrete
from poise.core.arrays import at_least_float32

DEGENERATE = 16  # times the machine epsilon: what is left above the mean is rounding error


def power_of(x: Array, power: ArrayLike) -> Array:
    """``x**power`` for x >= 0: by repeated squaring where the power is whole, with 0 and zero slope at 0 otherwise."""
    number = concrete(power)
    if number is not None and number.ndim == 0 and float(number).is_integer():
        return jax.lax.integer_pow(x, int(number))
    positive = x > 0
    return jnp.where(positive, jnp.exp(power * jnp.log(jnp.where(positive, x, 1))), 0)


def lssa_weights(
    scores: Float[Array, "*batch queries keys"], mask: ArrayLike | None = None
) -> Float[Array, "*batch queries keys"]:
    r"""Softplus attention: $a_{ij} = M_{ij}\,\mathrm{softplus}(s_{ij}) / \sum_k M_{ik}\,\mathrm{softplus}(s_{ik})$.

    No maximum is subtracted: scores of normalized queries and keys lie in $[-c, c]$ with $c = \log d\log n$.

    Args:
      scores: $s$, queries by keys, scale included (:func:`length_scale`).
      mask: $M$, broadcasts to the scores; None for all True.

    Returns:
      Weights that sum to one in each row, zeros in a row that sees nothing; at least float32.

    Raises:
      TypeError: if the mask is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.attention import lssa_weights
      >>> lssa_weights(jnp.zeros((2, 2)), jnp.array([[True, True], [False, False]])).tolist()
      [[0.5, 0.5], [0.0, 0.0]]

    References:
      *Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models*,
      https://arxiv.org/abs/2501.13428
    """
    values = jax.nn.softplus(at_least_float32(scores))
    values = values if mask is None else jnp.where(_boolean(mask), values, 0)
    total = values.sum(-1, keepdims=True)
    return values / jnp.where(total > 0, total, 1)


def reweight_attention(
    weights: Float[Array, "*batch queries keys"],
    mask: ArrayLike | None = None,
    *,
    power: ArrayLike = 15.0,
    offset_min_keys: int = 4,
    num_keys: ArrayLike | None = None,
) -> Float[Array, "*batch queries keys"]:
    r"""Sharpens each row: keeps the keys above the row's mean and raises what is above it to a power.

    With the row's mean $m_i$ over the $n_i$ keys that it sees and $o_i = 1$ (0 in rows of fewer than
    ``offset_min_keys`` keys),

    $$h_{ij} = M_{ij}\max(a_{ij} - o_i m_i, 0), \qquad w_{ij} = h_{ij}^p \Big/ \sum_k h_{ik}^p .$$

    This is the published $\max(n_i a_{ij} - o_i, 0)^p$, normalized, since the factor $n_i$ cancels. It is computed
    with $h_{ij}/\max_k h_{ik}$, which no power lets overflow. A row whose visible weights are all equal has nothing
    above its mean and keeps its weights.

    Args:
      weights: weights $a$ or any non-negative multiples, such as $\mathrm{softplus}(s)$.
      mask: $M$, broadcasts to the weights; None for all True.
      power: $p \ge 1$; 15 for contexts longer than in training, 3 is the best at the training length.
      offset_min_keys: rows that see fewer keys have no offset. 0 gives every row one.
      num_keys: $n_i$, ``[*batch, queries]`` or what broadcasts to it; None counts the mask.

    Returns:
      Weights that sum to one in each row, zeros in a row that sees nothing; at least float32.

    Raises:
      ValueError: if ``power`` is below 1 or ``offset_min_keys`` negative.
      TypeError: if the mask is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.attention import reweight_attention
      >>> reweight_attention(jnp.array([[0.5, 0.5, 0.0, 0.0]]), power=3.0).tolist()
      [[0.5, 0.5, 0.0, 0.0]]

    References:
      *Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models*,
      https://arxiv.org/abs/2501.13428
    """
    check_range("power", power, 1.0, open_high=True)
    check_count("offset_min_keys", offset_min_keys, 0)
    values = at_least_float32(weights)
    seen = jnp.ones((), bool) if mask is None else _boolean(mask)
    values = jnp.where(seen, values, 0)
    if num_keys is None:
        num_keys = jnp.broadcast_to(seen, values.shape).sum(-1)
    number = jnp.asarray(num_keys)[..., None].astype(values.dtype)
    total = values.sum(-1, keepdims=True)
    offset = jnp.where(number >= offset_min_keys, 1, 0)
    mean = total / jnp.maximum(number, 1)
    above = jnp.where(seen, jnp.maximum(values - offset * mean, 0), 0)
    highest, largest = jax.lax.stop_gradient((above.max(-1, keepdims=True), values.max(-1, keepdims=True)))
    flat = highest <= DEGENERATE * jnp.finfo(values.dtype).eps * largest
    raised = power_of(above / jnp.where(flat, 1, highest), power)
    plain = values / jnp.where(total > 0, total, 1)
    return jnp.where(flat, plain, raised / jnp.where(flat, 1, raised.sum(-1, keepdims=True)))


def attention_entropy(weights: Float[Array, "*batch keys"]) -> Float[Array, "*batch"]:
    r"""The entropy $-\sum_j w_j\log w_j$ of each row in nats; its exponential is the effective number of keys.

    Args:
      weights: rows that sum to one; zeros count nothing.

    Returns:
      One value per row, at least float32; 0 for a row of zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.attention import attention_entropy
      >>> jnp.exp(attention_entropy(jnp.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]))).round(4).tolist()
      [2.0, 1.0]
    """
    weights = at_least_float32(weights)
    positive = weights > 0
    return -jnp.where(positive, weights * jnp.log(jnp.where(positive, weights, 1)), 0).sum(-1)


def _boolean(mask: ArrayLike) -> Array:
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be boolean, True where a key is seen, got {mask.dtype}")
    return mask
