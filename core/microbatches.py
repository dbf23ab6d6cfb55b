"""A network applied to a batch part by part, so that activations of one part alone are in memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from poise.core.arguments import check_count


def in_microbatches(apply: Callable[..., PyTree], num_microbatches: int) -> Callable[..., PyTree]:
    r"""Calls a network on one part of its batch after the other, and computes each part again in the backward pass.

    The loss that is taken of the outputs sees the whole batch, so it is the same loss whatever it is: one with
    statistics over the batch, such as the normalized weights of a distillation, or one of pairs of examples.
    Gradients are those of the whole batch up to rounding, and up to what dropout draws. What is saved is the
    memory of activations, of which one part's are there at a time; what it costs is a second forward pass, a third more
    arithmetic.

    Args:
      apply: ``(variables, *examples, rngs=None, **options) -> outputs``, where each example's outputs depend on that
        example alone (no BatchNorm). Examples and outputs are pytrees of arrays that count examples along their first
        axis; None stays None.
      num_microbatches: the number of parts, at least 1, which must divide the number of examples. Part $j$ of $k$ takes
        the examples $j, j + k, j + 2k, \dots$, so that a batch which is split over devices stays where it is.

    Returns:
      A function with the same arguments; for one part it is ``apply`` itself. Keys in ``rngs`` are folded with the
      part's number, so that parts don't share their dropout.

    Raises:
      ValueError: if ``num_microbatches`` is below 1; at the call, if the examples can't be shared evenly, or outputs
        don't count them.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.core import in_microbatches
      >>> def apply(w, x):
      ...     return jnp.tanh(x @ w)
      >>> def loss(w, x, apply):
      ...     return jnp.std(apply(w, x))  # which no mean over parts would give
      >>> w, x = jnp.ones((3, 2)), jnp.arange(12.0).reshape(4, 3) / 12
      >>> whole, parts = (jax.grad(loss)(w, x, f) for f in (apply, in_microbatches(apply, 2)))
      >>> bool(jnp.allclose(whole, parts))
      True

    References:
      Gao et al., *Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup*,
      https://arxiv.org/abs/2101.06983.
    """
    check_count("num_microbatches", num_microbatches)
    if num_microbatches == 1:
        return apply

    def applied(variables: PyTree, *examples: PyTree, rngs: dict[str, PRNGKeyArray] | None = None, **options: Any):
        sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(examples)}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(f"examples must be counted by the first axis of all arrays, got lengths {sorted(sizes)}")
        (size,) = sizes.pop()
        if size % num_microbatches:
            raise ValueError(f"num_microbatches must divide the {size} examples of a batch, got {num_microbatches}")

        @jax.checkpoint
        def one(variables: PyTree, part: PyTree, index: jax.Array) -> PyTree:
            own = {} if rngs is None else {"rngs": {name: jax.random.fold_in(rngs[name], index) for name in rngs}}
            outputs = apply(variables, *part, **own, **options)
            for path, leaf in jax.tree.leaves_with_path(outputs):
                if jnp.shape(leaf)[:1] != (size // num_microbatches,):
                    raise ValueError(
                        "apply must give outputs that count examples by their first axis, "
                        f"{size // num_microbatches} in each part, got shape {jnp.shape(leaf)} "
                        f"at {jax.tree_util.keystr(path) or 'the output'}"
                    )
            return outputs

        parts = jax.tree.map(
            lambda leaf: jnp.moveaxis(jnp.reshape(leaf, (-1, num_microbatches, *jnp.shape(leaf)[1:])), 1, 0), examples
        )
        # A loop keeps the parts from being computed at once. XLA's CPU backend is slow at convolutions in loops, and
        # without one computes programs in an order that suits their memory.
        unroll = num_microbatches if jax.default_backend() == "cpu" else 1
        _, outputs = jax.lax.scan(
            lambda _, part: (None, one(variables, *part)), None, (parts, jnp.arange(num_microbatches)), unroll=unroll
        )
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(size, *leaf.shape[2:]), outputs)

    return applied


class Microbatched:
    """A Flax module whose ``apply`` is that of another one :func:`in_microbatches`; everything else is the other's.

    Args:
      module: the module.
      num_microbatches: the number of parts.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from poise.core import Microbatched
      >>> net = Microbatched(nn.Dense(3), 2)
      >>> variables = net.init(jax.random.key(0), jnp.ones((1, 5)))
      >>> net.apply(variables, jnp.ones((4, 5))).shape, net.features
      ((4, 3), 3)
    """

    def __init__(self, module: Any, num_microbatches: int):
        self.module = module
        self.apply = in_microbatches(module.apply, num_microbatches)

    def __getattr__(self, name: str) -> Any:
        if name == "module":  # not there yet, as in a copy being made
            raise AttributeError(name)
        return getattr(self.module, name)
