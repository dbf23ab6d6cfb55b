"""One gradient step on a batch of transitions, shared by the online and the offline agent."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from poise.rl.bellman import conservative_penalty, q_learning_target
from poise.rl.n_step import Transition
from poise.rl.value_transform import ValueTransform, action_outputs


class LearnerState(NamedTuple):
    """What learning changes.

    Attributes:
      params: the parameters that act and learn.
      target_params: the older copy that targets are made from.
      opt_state: the optimizer's state.
      updates: how many updates were made.
    """

    params: PyTree
    target_params: PyTree
    opt_state: PyTree
    updates: Int[Array, ""]


def q_values(net: nn.Module, transform: ValueTransform, params: PyTree, observation: Array) -> Array:
    """The values ``[batch, actions]`` of a batch of observations."""
    return transform.decode(cast(Any, net).apply(params, observation))


class Targets(NamedTuple):
    """What a batch of transitions is trained towards.

    Attributes:
      loss: the targets of the loss.
      values: the values that they stand for, before any clipping.
      best: the greatest value of each next state, of the network that chooses the action.
    """

    loss: Array
    values: Array
    best: Array


def td_targets(
    net: nn.Module, transform: ValueTransform, state: LearnerState, batch: Transition, double: bool
) -> Targets:
    """The targets of a batch. Of the target network only the chosen action's outputs are decoded."""
    outputs = cast(Any, net).apply(state.target_params, batch.next_observation)
    if double:
        selector = q_values(net, transform, state.params, batch.next_observation)
    else:
        selector = transform.decode(outputs)
    chosen = action_outputs(outputs, jnp.argmax(selector, axis=-1))
    values = q_learning_target(batch.reward, batch.discount, transform.decode(chosen)[..., None])
    if transform.project is None:
        targets = transform.encode(values)
    else:
        targets = transform.project(batch.reward, batch.discount, chosen)
    return Targets(jax.lax.stop_gradient(targets), values, jnp.max(selector, axis=-1))


def _entropy(probs: Array) -> Array:
    return -jnp.sum(jax.scipy.special.xlogy(probs, probs), axis=-1)


def make_update(
    net: nn.Module,
    transform: ValueTransform,
    optimizer: optax.GradientTransformation,
    *,
    double: bool,
    target_period: int,
    conservative_weight: float = 0.0,
    td_weight: float = 1.0,
) -> Callable[[LearnerState, Transition], tuple[LearnerState, dict[str, Array]]]:
    """A function that makes one update and reports on it."""

    def update(state: LearnerState, batch: Transition) -> tuple[LearnerState, dict[str, Array]]:
        targets, values, best = td_targets(net, transform, state, batch, double)

        def objective(params):
            outputs = cast(Any, net).apply(params, batch.observation)
            td = transform.loss(action_outputs(outputs, batch.action), targets)
            penalty = jnp.zeros_like(td)
            if conservative_weight:
                penalty = conservative_penalty(transform.decode(outputs), batch.action)
            return jnp.mean(td_weight * td + conservative_weight * penalty), (jnp.mean(td), jnp.mean(penalty))

        (loss, (td, penalty)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        count = state.updates + 1
        renew = count % target_period == 0
        target_params = jax.tree.map(lambda new, old: jnp.where(renew, new, old), params, state.target_params)
        alive = batch.discount > 0  # of a state that ends an episode nothing is learned
        metrics = {
            "loss": loss,
            "td_loss": td,
            "q_max": jnp.sum(best * alive) / jnp.maximum(jnp.sum(alive), 1),
            "target_mean": jnp.mean(values),
        }
        if conservative_weight:
            metrics["conservative_penalty"] = penalty
        if transform.support is not None:
            outside = (values < transform.support[0]) | (values > transform.support[-1])
            metrics["target_out_of_support"] = jnp.mean(outside, dtype=loss.dtype)
            if targets.shape[-1] == transform.num_outputs:  # distributions, and not the values themselves
                metrics["target_entropy"] = jnp.mean(_entropy(targets))
                metrics["excess_loss"] = td - metrics["target_entropy"]
        metrics["target_not_finite"] = jnp.mean(~jnp.isfinite(values), dtype=loss.dtype)
        return LearnerState(params, target_params, opt_state, count), metrics

    return update
