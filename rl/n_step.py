"""Transitions over several steps, and the window of steps that they are made from."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from poise.core.arguments import check_range


class Transition(NamedTuple):
    r"""What a temporal difference is learned from; leading axes are those of the batch.

    Attributes:
      observation: where the agent was.
      action: what it did.
      reward: $\sum_{k<n}\gamma^kr_k$, up to the episode's end.
      discount: $\gamma^n$, or 0 where the episode terminated; not where it was truncated.
      next_observation: where it was after $n$ steps, or the episode's true last observation.
    """

    observation: Array
    action: Int[Array, "..."]
    reward: Float[Array, "..."]
    discount: Float[Array, "..."]
    next_observation: Array


class StepRecord(NamedTuple):
    """One step of the agent, as it is kept until its transition is complete.

    Attributes:
      observation: where the agent was.
      action: what it did.
      reward: what it got.
      terminated: whether the episode terminated there.
      truncated: whether it was cut short there.
      final_observation: where the step led, before any new start.
    """

    observation: Array
    action: Int[Array, "..."]
    reward: Float[Array, "..."]
    terminated: Bool[Array, "..."]
    truncated: Bool[Array, "..."]
    final_observation: Array


def n_step_transition(window: StepRecord, gamma: ArrayLike) -> Transition:
    r"""The transition that begins with the first of $n$ consecutive steps.

    $R = \sum_{k=0}^{m}\gamma^kr_k$ and the discount $\gamma^{m+1}(1-\text{terminated}_m)$, $m$ the first step that
    ends the episode, or $n-1$ if none does. What belongs to the next episode is not looked at.

    Args:
      window: the steps ``[n, ...]``, oldest first; axes after the first are batch and event.
      gamma: $\gamma$ in $[0, 1]$.

    Returns:
      The transition.

    Raises:
      ValueError: if ``gamma`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import StepRecord, n_step_transition
      >>> no, place = jnp.zeros(3, bool), jnp.arange(3.0)
      >>> window = StepRecord(place, jnp.zeros(3, int), jnp.ones(3), no, no, place + 1)
      >>> out = n_step_transition(window, 0.5)
      >>> float(out.reward), float(out.discount), float(out.next_observation)
      (1.75, 0.125, 3.0)
      >>> out = n_step_transition(window._replace(truncated=no.at[1].set(True)), 0.5)
      >>> float(out.reward), float(out.discount), float(out.next_observation)
      (1.5, 0.25, 2.0)
    """
    check_range("gamma", gamma, 0.0, 1.0)
    done = window.terminated | window.truncated
    steps = len(done)
    ended = jnp.cumsum(done, axis=0)
    alive = jnp.concatenate([jnp.ones_like(ended[:1], bool), ended[:-1] == 0])  # the step belongs to the episode
    last = jnp.sum(alive, axis=0) - 1
    powers = jnp.asarray(gamma, window.reward.dtype) ** jnp.arange(steps + 1, dtype=window.reward.dtype)
    weights = powers[:-1].reshape(-1, *(1,) * (done.ndim - 1))
    reward = jnp.sum(jnp.where(alive, weights * window.reward, 0), axis=0)

    def at_last(leaf):
        index = last.reshape(1, *last.shape, *(1,) * (leaf.ndim - done.ndim))
        return jnp.take_along_axis(leaf, index, axis=0)[0]

    discount = jnp.where(at_last(window.terminated), 0, powers[last + 1])
    first: PyTree = jax.tree.map(lambda leaf: leaf[0], (window.observation, window.action))
    return Transition(first[0], first[1], reward, discount, at_last(window.final_observation))


def push_step(window: StepRecord, record: StepRecord) -> StepRecord:
    """The window with its oldest step dropped and a new one at its end."""
    return jax.tree.map(lambda old, new: jnp.concatenate([old[1:], new[None].astype(old.dtype)]), window, record)
