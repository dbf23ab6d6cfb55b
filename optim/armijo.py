"""Gradient descent whose step sizes come from Armijo's condition, as one compiled loop."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from poise.core.arguments import check_count, check_range
from poise.optim.leaves import sum_dtype


class Armijo(NamedTuple):
    r"""Options of the backtracking search.

    Attributes:
      c: the part in (0, 1) of the decrease predicted by the slope that a step must bring.
      shrink: the factor in (0, 1) of one backtracking.
      expand: the factor, at least 1, by which the step is tried larger than the last one.
      initial_step: the step before the first expansion.
      max_backtracks: how many trials one step has.
      min_step: no trial below this step.
      tolerance: descent stops after a step whose gradient had at most this norm.
    """

    c: ArrayLike = 0.1
    shrink: ArrayLike = 0.9
    expand: ArrayLike = 2.0
    initial_step: ArrayLike = 10.0
    max_backtracks: int = 100
    min_step: ArrayLike = 1e-6
    tolerance: ArrayLike = 1e-6


DEFAULT_ARMIJO = Armijo()


class ArmijoInfo(NamedTuple):
    """What the descent did.

    Attributes:
      step_size: the last step size.
      grad_norm: the norm of the last gradient used, at the point before the last step.
      num_steps: the number of steps made.
      num_trials: the number of trial points evaluated.
    """

    step_size: Float[Array, ""]
    grad_norm: Float[Array, ""]
    num_steps: Int[Array, ""]
    num_trials: Int[Array, ""]


def check_armijo(options: Armijo) -> None:
    """Raises a ValueError for options out of range; tracers pass."""
    check_range("c", options.c, 0.0, 1.0, open_low=True, open_high=True)
    check_range("shrink", options.shrink, 0.0, 1.0, open_low=True, open_high=True)
    check_range("expand", options.expand, 1.0)
    check_range("initial_step", options.initial_step, 0.0, open_low=True)
    check_range("min_step", options.min_step, 0.0)
    check_range("tolerance", options.tolerance, 0.0)
    check_count("max_backtracks", options.max_backtracks)


def squared_norm(tree: PyTree) -> Array:
    """The sum of squares over all leaves, in float32 at least."""
    squares = [jnp.sum(jnp.square(leaf.astype(sum_dtype(leaf)))) for leaf in jax.tree.leaves(tree)]
    return functools.reduce(jnp.add, squares)


def _stepped(x: PyTree, grad: PyTree, step: Array) -> PyTree:
    return jax.tree.map(lambda a, g: a - (step * g).astype(a.dtype), x, grad)


def armijo_gradient_descent(
    fun: Callable[[PyTree], Array], x: PyTree[Float[Array, "..."]], num_steps: int, options: Armijo = DEFAULT_ARMIJO
) -> tuple[PyTree[Float[Array, "..."]], ArmijoInfo]:
    r"""Gradient descent with Armijo's backtracking line search.

    Every step starts from the last step size times ``expand`` and shrinks it until

    $$f(x - \alpha\nabla f(x)) \le f(x) - c\,\alpha\|\nabla f(x)\|^2.$$

    If ``max_backtracks`` trials or steps down to ``min_step`` don't satisfy it, the last, untried step is taken. A
    trial whose value is NaN does not satisfy it.

    Args:
      fun: a function from a tree to a scalar.
      x: where to start, a tree of real arrays.
      num_steps: the number of steps, at least 1.
      options: see :class:`Armijo`.

    Returns:
      The last point, and a record of the search. Loops of unknown length are inside, so the result can be
      differentiated forwards, but not backwards.

    Raises:
      ValueError: if ``num_steps`` or an option is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import armijo_gradient_descent
      >>> x, info = armijo_gradient_descent(lambda x: jnp.sum((x - 3.0) ** 2), jnp.zeros(2), num_steps=50)
      >>> bool(jnp.allclose(x, 3.0, atol=1e-3)), bool(info.grad_norm < 1e-3)
      (True, True)

    References:
      Armijo, Minimization of functions having Lipschitz continuous first partial derivatives, 1966. The defaults are
      those of the official code of https://arxiv.org/abs/2302.02607.
    """
    check_count("num_steps", num_steps)
    check_armijo(options)
    dtype = sum_dtype(*jax.tree.leaves(x))
    c, shrink, expand, initial, smallest, tolerance = (
        jnp.asarray(number, dtype)
        for number in (
            options.c,
            options.shrink,
            options.expand,
            options.initial_step,
            options.min_step,
            options.tolerance,
        )
    )

    def descend(carry: Any) -> Any:
        x, info, _ = carry
        value, grad = jax.value_and_grad(fun)(x)
        square = squared_norm(grad).astype(dtype)

        def searching(trial):
            step, tries, found = trial
            return jnp.logical_not(found) & (tries < options.max_backtracks) & ((tries == 0) | (step >= smallest))

        def search(trial):
            step, tries, _ = trial
            found = fun(_stepped(x, grad, step)) - (value - c * step * square) <= 0
            return jnp.where(found, step, step * shrink), tries + 1, found

        start = (expand * info.step_size, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
        step, tries, _ = jax.lax.while_loop(searching, search, start)
        norm = jnp.sqrt(square)
        record = ArmijoInfo(step, norm, info.num_steps + 1, info.num_trials + tries)
        return _stepped(x, grad, step), record, norm <= tolerance

    zero = jnp.zeros((), jnp.int32)
    start = (x, ArmijoInfo(initial, jnp.asarray(jnp.inf, dtype), zero, zero), jnp.zeros((), bool))
    x, info, _ = jax.lax.while_loop(
        lambda carry: (carry[1].num_steps < num_steps) & jnp.logical_not(carry[2]), descend, start
    )
    return x, info
