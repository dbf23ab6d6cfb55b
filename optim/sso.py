"""Surrogate optimization in the space of a model's outputs: one gradient of the loss, many steps of the model."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from poise.core.arguments import check_choice, check_count, check_range
from poise.optim.armijo import DEFAULT_ARMIJO, Armijo, armijo_gradient_descent, check_armijo, squared_norm
from poise.optim.leaves import next_count, sum_dtype

SCHEDULES = ("constant", "stochastic", "exponential")


class TargetLineSearch(NamedTuple):
    r"""Options of the search for the step size in the space of outputs.

    Attributes:
      c: the part in (0, 1) of the decrease predicted by the slope that a step must bring.
      shrink: the factor in (0, 1) of one backtracking.
      expand: the factor, at least 1, by which the step is tried larger than the last one.
      max_backtracks: how many trials there are.
      min_inverse: the least inverse step that is used.
      max_inverse: the greatest.
    """

    c: ArrayLike = 0.5
    shrink: ArrayLike = 0.9
    expand: ArrayLike = 1.8
    max_backtracks: int = 100
    min_inverse: ArrayLike = 1e-4
    max_inverse: ArrayLike = 1e4


DEFAULT_LINE_SEARCH = TargetLineSearch()


class SSOState(NamedTuple):
    r"""State of :func:`sso`.

    Attributes:
      count: the number of outer steps made.
      inverse_step: the inverse of the base step $2\eta$; changes only under a line search.
    """

    count: Int[Array, ""]
    inverse_step: Float[Array, ""]


class SSOInfo(NamedTuple):
    r"""What one outer step did.

    Attributes:
      loss: the loss at the parameters before the step.
      eta: the step size $\eta$ in the space of outputs.
      target_grad_norm: the norm of the loss's gradient with respect to the outputs.
      surrogate_change: the surrogate after the inner steps minus before; below 0 unless they failed. If $\eta\le1/L$,
        the loss on this batch falls by at least as much.
      inner_steps: the number of inner steps made.
      inner_step_size: the last step size of the inner search, 0 under an inner optimizer.
    """

    loss: Float[Array, ""]
    eta: Float[Array, ""]
    target_grad_norm: Float[Array, ""]
    surrogate_change: Float[Array, ""]
    inner_steps: Int[Array, ""]
    inner_step_size: Float[Array, ""]


class SSO(NamedTuple):
    """A training procedure on surrogates; see :func:`sso`.

    Attributes:
      init: ``params -> state``.
      step: ``(params, state, batch) -> (params, state, info)``.
    """

    init: Callable[[PyTree], SSOState]
    step: Callable[[PyTree, SSOState, PyTree], tuple[PyTree, SSOState, SSOInfo]]


def _inner(a: PyTree, b: PyTree) -> Array:
    products = [
        jnp.sum(x.astype(sum_dtype(x, y)) * y.astype(sum_dtype(x, y)))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return functools.reduce(jnp.add, products)


def target_surrogate(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    outputs: PyTree[Float[Array, "..."]],
    target_grads: PyTree[Float[Array, "..."]],
    eta: ArrayLike,
    loss: ArrayLike = 0.0,
) -> Callable[[PyTree, PyTree], Float[Array, ""]]:
    r"""The surrogate of a loss around given outputs, which needs the model alone.

    With outputs $z_t$ and the loss's gradient $G_t$ there,

    $$g_t(\theta) = \ell(z_t) + \langle G_t, z(\theta)-z_t\rangle + \frac1{2\eta}\|z(\theta)-z_t\|^2
    = \frac1{2\eta}\|z(\theta) - (z_t - \eta G_t)\|^2 + \text{const}:$$

    least squares towards the outputs after one gradient step. Its gradient at $\theta_t$ is the loss's. If
    $\eta \le 1/L$ for a loss that is $L$-smooth in the outputs, it lies above the loss everywhere and touches it at
    $\theta_t$. Neither $z_t$ nor $G_t$ is differentiated.

    Args:
      model_fn: ``(params, batch) -> outputs``, a tree of arrays.
      outputs: $z_t$.
      target_grads: $G_t$, in the structure and shapes of the outputs.
      eta: $\eta > 0$.
      loss: $\ell(z_t)$, a constant; 0 leaves it out.

    Returns:
      ``(params, batch) -> scalar``.

    Raises:
      ValueError: if ``eta`` is not positive or the trees or shapes differ.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.optim import target_surrogate
      >>> model = lambda w, x: x @ w
      >>> x, y, w = jnp.eye(2), jnp.array([1.0, -1.0]), jnp.zeros(2)
      >>> surrogate = target_surrogate(model, model(w, x), model(w, x) - y, eta=1.0)
      >>> jax.grad(surrogate)(w, x).tolist(), float(surrogate(y, x))
      ([-1.0, 1.0], -1.0)

    References:
      Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, Target-based Surrogates for Stochastic Optimization, ICML 2023,
      https://arxiv.org/abs/2302.02607. The official code has no factor 1/2: its step is $2\eta$.
    """
    check_range("eta", eta, 0.0, open_low=True)
    if jax.tree.map(jnp.shape, outputs) != jax.tree.map(jnp.shape, target_grads):
        raise ValueError(
            "target_grads must have the structure and shapes of outputs, got "
            f"{jax.tree.map(jnp.shape, target_grads)} for {jax.tree.map(jnp.shape, outputs)}"
        )
    outputs, target_grads = jax.lax.stop_gradient((outputs, target_grads))

    def surrogate(params: PyTree, batch: PyTree) -> Array:
        moved = jax.tree.map(jnp.subtract, model_fn(params, batch), outputs)
        return jnp.asarray(loss + _inner(target_grads, moved) + squared_norm(moved) / (2 * eta))

    return surrogate


def sso_step(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss_fn: Callable[[PyTree, PyTree], Float[Array, ""]],
    params: PyTree,
    batch: PyTree,
    *,
    eta: ArrayLike,
    inner_steps: int,
    inner_optimizer: optax.GradientTransformation | None = None,
    armijo: Armijo = DEFAULT_ARMIJO,
) -> tuple[PyTree, SSOInfo]:
    r"""One outer step: the loss is asked once, the model is trained on the surrogate for many steps.

    Args:
      model_fn: ``(params, batch) -> outputs``, a tree of arrays; cheap.
      loss_fn: ``(outputs, batch) -> scalar``, summed over the batch; its gradient with respect to the outputs is taken
        exactly once.
      params: the parameters.
      batch: whatever both functions need.
      eta: the step $\eta > 0$ in the space of outputs. $1/L$ is 1 for half the squared error, 1/2 for the squared
        error, 4 for the logistic loss and at least 2 for the cross-entropy, whatever the data.
      inner_steps: the number of steps on the surrogate, at least 1.
      inner_optimizer: an optax optimizer that makes them, from a fresh state, on :func:`target_surrogate`. One step of
        ``optax.sgd(lr)`` is a step of gradient descent on the loss.
      armijo: without an inner optimizer, the options of :func:`armijo_gradient_descent` on the surrogate times $2\eta$
        over the number of output values, which is the official code's, so that its step sizes mean the same there.

    Returns:
      The new parameters and a record of the step. With Armijo's search the step can't be differentiated backwards.

    Raises:
      ValueError: if ``eta``, ``inner_steps`` or an option is out of range.

    Example:
      A linear model under half the squared error is solved in one outer step:

      >>> import jax.numpy as jnp
      >>> from poise.optim import sso_step
      >>> x, y = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([1.0, 3.0])
      >>> w, info = sso_step(
      ...     lambda w, batch: batch[0] @ w, lambda z, batch: 0.5 * jnp.sum((z - batch[1]) ** 2),
      ...     jnp.zeros(2), (x, y), eta=1.0, inner_steps=100)
      >>> w.round(2).tolist(), float(info.loss)
      ([1.0, 2.0], 5.0)

    References:
      Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, Target-based Surrogates for Stochastic Optimization, ICML 2023,
      https://arxiv.org/abs/2302.02607. Follows the official code (class ``SGD_FMDOpt``) up to the factor 2 in the step.
    """
    check_count("inner_steps", inner_steps)
    check_range("eta", eta, 0.0, open_low=True)
    outputs = model_fn(params, batch)
    loss, grads = jax.value_and_grad(loss_fn)(jax.lax.stop_gradient(outputs), batch)
    return _inner_solve(model_fn, params, batch, outputs, loss, grads, eta, inner_steps, inner_optimizer, armijo)


def _inner_solve(model_fn, params, batch, outputs, loss, grads, eta, inner_steps, inner_optimizer, armijo):
    """The inner steps from given outputs, loss and gradient with respect to the outputs."""
    surrogate = target_surrogate(model_fn, outputs, grads, eta)
    dtype = jnp.result_type(loss)
    if inner_optimizer is None:
        size = sum(leaf.size for leaf in jax.tree.leaves(outputs))
        scale = 2 * jnp.asarray(eta, dtype) / size
        new, search = armijo_gradient_descent(lambda p: scale * surrogate(p, batch), params, inner_steps, armijo)
        made, inner_step_size = search.num_steps, search.step_size
    else:

        def step(carry: Any, _: None) -> tuple[Any, None]:
            p, state = carry
            updates, state = inner_optimizer.update(jax.grad(surrogate)(p, batch), state, p)
            return (optax.apply_updates(p, updates), state), None

        (new, _), _ = jax.lax.scan(step, (params, inner_optimizer.init(params)), length=inner_steps)
        made, inner_step_size = jnp.asarray(inner_steps, jnp.int32), jnp.zeros((), dtype)
    info = SSOInfo(
        loss=loss,
        eta=jnp.asarray(eta, dtype),
        target_grad_norm=jnp.sqrt(squared_norm(grads)).astype(dtype),
        surrogate_change=surrogate(new, batch).astype(dtype),
        inner_steps=made,
        inner_step_size=inner_step_size.astype(dtype),
    )
    return new, info


def target_line_search(
    loss_of_outputs: Callable[[PyTree], Float[Array, ""]],
    outputs: PyTree[Float[Array, "..."]],
    target_grads: PyTree[Float[Array, "..."]],
    inverse_step: ArrayLike,
    options: TargetLineSearch = DEFAULT_LINE_SEARCH,
) -> Float[Array, ""]:
    r"""Searches a step size for gradient descent on the outputs themselves; the model is not asked.

    From ``inverse_step / expand`` on, the inverse step $\rho$ is divided by ``shrink`` while
    $\ell(z - G/\rho) > \ell(z) - \frac c\rho\|G\|^2$, and clipped in the end.

    Args:
      loss_of_outputs: $\ell$, summed over the batch.
      outputs: $z$.
      target_grads: $G = \nabla\ell(z)$.
      inverse_step: the inverse step that the last search returned.
      options: see :class:`TargetLineSearch`.

    Returns:
      The inverse step $\rho$.

    Raises:
      ValueError: if ``inverse_step`` is not positive or an option out of range.

    Example:
      Half the squared error is 1-smooth, so with ``c=0.5`` exactly the steps up to 1 pass:

      >>> import jax.numpy as jnp
      >>> from poise.optim import target_line_search
      >>> z = jnp.array([3.0, 4.0])
      >>> inverse = target_line_search(lambda z: 0.5 * jnp.sum(z**2), z, z, inverse_step=1.0)
      >>> bool(1.0 <= inverse < 1 / 0.9)
      True
    """
    _check_line_search(options)
    check_range("inverse_step", inverse_step, 0.0, open_low=True)
    value, square = loss_of_outputs(outputs), squared_norm(target_grads)
    dtype = jnp.result_type(value)

    def search(carry):
        inverse, tries, _ = carry
        moved = jax.tree.map(lambda z, g: z - (g / inverse).astype(z.dtype), outputs, target_grads)
        found = loss_of_outputs(moved) <= value - options.c / inverse * square
        return jnp.where(found, inverse, inverse / options.shrink).astype(dtype), tries + 1, found

    start = (jnp.asarray(inverse_step / options.expand, dtype), jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    inverse, _, _ = jax.lax.while_loop(
        lambda carry: jnp.logical_not(carry[2]) & (carry[1] < options.max_backtracks), search, start
    )
    return jnp.clip(inverse, options.min_inverse, options.max_inverse).astype(dtype)


def _check_line_search(options: TargetLineSearch) -> None:
    check_range("c", options.c, 0.0, 1.0, open_low=True, open_high=True)
    check_range("shrink", options.shrink, 0.0, 1.0, open_low=True, open_high=True)
    check_range("expand", options.expand, 1.0)
    check_count("max_backtracks", options.max_backtracks)
    check_range("min_inverse", options.min_inverse, 0.0, open_low=True)
    check_range("max_inverse", options.max_inverse, 0.0, open_low=True)


def _decay(schedule: str | optax.Schedule, num_steps: int | None) -> optax.Schedule:
    """The factor of the step size at a count from 0."""
    if callable(schedule):
        return schedule
    if schedule == "exponential" and num_steps is not None:
        return lambda count: jnp.exp(-jnp.log(float(num_steps)) * (count + 1.0) / num_steps)
    if schedule == "stochastic":
        return lambda count: 1 / jnp.sqrt(count + 1.0)
    return lambda count: jnp.ones(())


def sso(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss_fn: Callable[[PyTree, PyTree], Float[Array, ""]],
    *,
    eta: ArrayLike,
    inner_steps: int,
    schedule: str | optax.Schedule = "constant",
    num_steps: int | None = None,
    line_search: TargetLineSearch | None = None,
    inner_optimizer: optax.GradientTransformation | None = None,
    armijo: Armijo = DEFAULT_ARMIJO,
) -> SSO:
    r"""Training on target-based surrogates, with step sizes that decay or are searched for.

    The step size of outer step $t = 1, 2, \dots$ is the base $\eta$ times 1, $1/\sqrt t$ or $T^{-t/T}$ for the
    schedules ``constant``, ``stochastic`` and ``exponential``. With a line search the base is
    $\eta = 1/(2\rho)$ with the inverse step $\rho$ of :func:`target_line_search`, kept from step to step.

    Args:
      model_fn: as in :func:`sso_step`.
      loss_fn: as in :func:`sso_step`.
      eta: the base step, or where the line search starts.
      inner_steps: the number of steps on each surrogate, at least 1.
      schedule: a name, or a function from the count (from 0) to the factor of $\eta$.
      num_steps: $T$, needed by ``exponential`` alone.
      line_search: options of the search in the space of outputs; None for no search.
      inner_optimizer: as in :func:`sso_step`.
      armijo: as in :func:`sso_step`.

    Returns:
      ``init`` and ``step``, pure functions that work under ``jit`` and ``scan``.

    Raises:
      ValueError: if an argument is out of range, or ``num_steps`` is missing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.optim import sso
      >>> x, y = jnp.array([[1.0, 2.0], [3.0, -1.0], [0.5, 1.0]]), jnp.array([1.0, 0.0, 1.0])
      >>> logistic = lambda z, batch: jnp.sum(jnp.logaddexp(0, z) - batch[1] * z)
      >>> algorithm = sso(lambda w, batch: batch[0] @ w, logistic, eta=4.0, inner_steps=10)
      >>> w = jnp.zeros(2)
      >>> state = algorithm.init(w)
      >>> for _ in range(5):
      ...     w, state, info = jax.jit(algorithm.step)(w, state, (x, y))
      >>> bool(logistic(x @ w, (x, y)) < info.loss < 0.7)
      True

    References:
      Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, Target-based Surrogates for Stochastic Optimization, ICML 2023,
      https://arxiv.org/abs/2302.02607. Follows the official code (classes ``SGD_FMDOpt`` and ``SLS_FMDOpt``), which
      searches for a full step and then moves the target by half of it.
    """
    check_range("eta", eta, 0.0, open_low=True)
    check_count("inner_steps", inner_steps)
    check_armijo(armijo)
    if line_search is not None:
        _check_line_search(line_search)
    if not callable(schedule):
        check_choice("schedule", schedule, SCHEDULES)
        if schedule == "exponential" and num_steps is None:
            raise ValueError("num_steps must be given for schedule='exponential', got None")
    if num_steps is not None:
        check_count("num_steps", num_steps)
    decay = _decay(schedule, num_steps)

    def init(params: PyTree) -> SSOState:
        dtype = sum_dtype(*jax.tree.leaves(params))
        return SSOState(jnp.zeros((), jnp.int32), jnp.asarray(1 / (2 * eta), dtype))

    def step(params: PyTree, state: SSOState, batch: PyTree) -> tuple[PyTree, SSOState, SSOInfo]:
        outputs = model_fn(params, batch)
        loss, grads = jax.value_and_grad(loss_fn)(jax.lax.stop_gradient(outputs), batch)
        inverse = state.inverse_step
        if line_search is not None:
            found = target_line_search(lambda z: loss_fn(z, batch), outputs, grads, inverse, line_search)
            inverse = found.astype(inverse.dtype)
        eta_t = (decay(state.count) / (2 * inverse)).astype(inverse.dtype)
        params, info = _inner_solve(
            model_fn, params, batch, outputs, loss, grads, eta_t, inner_steps, inner_optimizer, armijo
        )
        return params, SSOState(next_count(state.count), inverse), info

    return SSO(init, step)
