"""How often quantized weights jump back and forth, and the freezing of those that do."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Int8, Shaped

from poise.core.arguments import check_range


class OscillationState(NamedTuple):
    """What is known of a tensor of codes.

    Attributes:
      codes: the last codes.
      direction: the sign of each code's last change, negated; 0 before the first one.
      frequency: running mean of "changed against the direction of its last change".
      total: how often that happened.
      mean_codes: running mean of the codes.
    """

    codes: Shaped[Array, "*shape"]
    direction: Int8[Array, "*shape"]
    frequency: Float[Array, "*shape"]
    total: Int[Array, "*shape"]
    mean_codes: Float[Array, "*shape"]


class FreezingState(NamedTuple):
    """Codes that were stopped for good.

    Attributes:
      oscillation: see :class:`OscillationState`.
      frozen: which codes are stopped.
      frozen_codes: where, for those.
    """

    oscillation: OscillationState
    frozen: Bool[Array, "*shape"]
    frozen_codes: Shaped[Array, "*shape"]


def oscillation_init(codes: Shaped[ArrayLike, "*shape"]) -> OscillationState:
    """The state after the first codes.

    Args:
      codes: whole numbers of any shape, as integers or floats.

    Returns:
      The state for :func:`oscillation_update`.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import oscillation_init
      >>> oscillation_init(jnp.array([1, -2], jnp.int8)).frequency.tolist()
      [0.0, 0.0]
    """
    codes = jnp.asarray(codes)
    zeros = jnp.zeros(codes.shape, jnp.float32)
    return OscillationState(
        codes, zeros.astype(jnp.int8), zeros, zeros.astype(jnp.int32), jax.lax.stop_gradient(codes).astype(jnp.float32)
    )


def oscillation_update(
    state: OscillationState, codes: Shaped[ArrayLike, "*shape"], momentum: ArrayLike = 0.01
) -> OscillationState:
    r"""Takes one more step of codes into account.

    With $\Delta_t = c_{t-1} - c_t$, an entry oscillates where it changes against the direction of its last change,
    however long ago that was: $o_t = 1[\mathrm{sign}\,\Delta_t = -d_{t-1}\ne0]$. Then

    $$f_t = m\,o_t + (1-m)f_{t-1},\qquad d_t = \mathrm{sign}\,\Delta_t\text{ if }\Delta_t\ne0\text{ else }d_{t-1}.$$

    Args:
      state: of :func:`oscillation_init` or of the step before.
      codes: whole numbers in the shape of the first ones.
      momentum: $m$, from 0 to 1.

    Returns:
      The next state, of the same shapes and dtypes, so that ``jax.lax.scan`` may carry it.

    Raises:
      ValueError: if the shape differs or the momentum is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import oscillation_init, oscillation_update
      >>> state = oscillation_init(jnp.array([0, 0, 0]))
      >>> for codes in ([1, 1, 0], [0, 2, 0], [1, 3, 0]):
      ...     state = oscillation_update(state, jnp.array(codes))
      >>> state.total.tolist()
      [2, 0, 0]

    References:
      Nagel et al., *Overcoming Oscillations in Quantization-Aware Training*, https://arxiv.org/abs/2203.11086
    """
    check_range("momentum", momentum, 0.0, 1.0)
    codes = jnp.asarray(codes)
    if codes.shape != state.codes.shape:
        raise ValueError(f"codes must have the shape {state.codes.shape} of the first ones, got {codes.shape}")
    wide, m = codes.astype(jnp.float32), jnp.asarray(momentum, jnp.float32)
    direction = jnp.sign(jnp.round(state.codes.astype(jnp.float32) - wide)).astype(jnp.int8)
    oscillated = state.direction * direction == -1
    return OscillationState(
        codes.astype(state.codes.dtype),
        jnp.where(direction != 0, direction, state.direction),
        m * oscillated.astype(jnp.float32) + (1 - m) * state.frequency,
        state.total + oscillated,
        m * wide + (1 - m) * state.mean_codes,
    )


def oscillating_fraction(state: OscillationState, threshold: ArrayLike = 0.005) -> Float[Array, ""]:
    """The share of entries whose frequency of oscillation exceeds a threshold.

    Args:
      state: see :func:`oscillation_update`.
      threshold: of the frequency, from 0 to 1.

    Returns:
      A number from 0 to 1; 0 for no entries.

    Raises:
      ValueError: if the threshold is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import oscillating_fraction, oscillation_init, oscillation_update
      >>> state = oscillation_init(jnp.array([0, 0]))
      >>> for codes in ([1, 1], [0, 2]):
      ...     state = oscillation_update(state, jnp.array(codes))
      >>> float(oscillating_fraction(state))
      0.5

    References:
      Nagel et al., https://arxiv.org/abs/2203.11086
    """
    check_range("threshold", threshold, 0.0, 1.0)
    return jnp.sum(state.frequency > threshold, dtype=jnp.float32) / max(state.frequency.size, 1)


def freezing_init(codes: Shaped[ArrayLike, "*shape"]) -> FreezingState:
    """The state of :func:`freezing_update` after the first codes: nothing is frozen.

    Args:
      codes: whole numbers of any shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import freezing_init
      >>> freezing_init(jnp.array([1, -2], jnp.int8)).frozen.tolist()
      [False, False]
    """
    state = oscillation_init(codes)
    return FreezingState(state, jnp.zeros(state.codes.shape, bool), state.codes)


def freezing_update(
    state: FreezingState,
    codes: Shaped[ArrayLike, "*shape"],
    *,
    threshold: ArrayLike,
    momentum: ArrayLike = 0.01,
) -> tuple[Shaped[Array, "*shape"], FreezingState]:
    """Iterative freezing: codes that oscillate more often than a threshold stop where they were on average.

    An entry whose frequency exceeds the threshold keeps, from the next step on and for ever, the rounded running mean
    that its codes have then. It is what annealing by confidence is compared to.

    Args:
      state: of :func:`freezing_init` or of the step before.
      codes: whole numbers in the shape of the first ones, as quantizing the weights gives them.
      threshold: of the frequency, from 0 to 1.
      momentum: as for :func:`oscillation_update`.

    Returns:
      The codes to be used, and the next state.

    Raises:
      ValueError: if the shape differs or an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import freezing_init, freezing_update
      >>> state = freezing_init(jnp.array([0]))
      >>> used = []
      >>> for code in (1, 0, 1, 0, 1, 0, 1):
      ...     codes, state = freezing_update(state, jnp.array([code]), threshold=0.1, momentum=0.05)
      ...     used.append(int(codes[0]))
      >>> used
      [1, 0, 1, 0, 0, 0, 0]

    References:
      Nagel et al., *Overcoming Oscillations in Quantization-Aware Training*, https://arxiv.org/abs/2203.11086
    """
    check_range("threshold", threshold, 0.0, 1.0)
    codes = jnp.where(state.frozen, state.frozen_codes, jnp.asarray(codes, state.frozen_codes.dtype))
    oscillation = oscillation_update(state.oscillation, codes, momentum)
    restless = (oscillation.frequency > threshold) & ~state.frozen
    place = jnp.round(state.oscillation.mean_codes).astype(state.frozen_codes.dtype)
    return codes, FreezingState(oscillation, state.frozen | restless, jnp.where(restless, place, state.frozen_codes))
