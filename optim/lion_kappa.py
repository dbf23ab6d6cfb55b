"""Lion-kappa: one momentum, a direction that a convex function makes of it, and weight decay as a constraint."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, DTypeLike, PyTree

from poise.core.arguments import check_range, check_real, concrete
from poise.optim import kappas
from poise.optim.kappas import Kappa
from poise.optim.kappas.kappa import Number
from poise.optim.leaves import sum_dtype

_SIGN = kappas.sign()
_BY_NAME = {
    function.__name__: function
    for function in (kappas.linf, kappas.log_sum_exp, kappas.nuclear, kappas.sign, kappas.spectral, kappas.squared_l2)
}


def scale_by_lion_kappa(
    kappa: Kappa | str = _SIGN,
    b1: Number = 0.9,
    b2: Number = 0.99,
    mu_dtype: DTypeLike | None = None,
    *,
    cautious_factor: Number | None = None,
) -> optax.GradientTransformation:
    r"""Replaces gradients by the direction that a convex function gives to their momentum.

    With the gradient $g_t$ and $\mu_0 = 0$,

    $$c_t = b_1\mu_t + (1-b_1)g_t, \qquad u_t = -\nabla K(-c_t), \qquad \mu_{t+1} = b_2\mu_t + (1-b_2)g_t.$$

    $u_t = \nabla K(c_t)$ for every even $K$. There is no bias correction.

    Args:
      kappa: the convex function; one of :mod:`poise.optim.kappas`, its name if it takes no arguments, or your own.
      b1: how much of the momentum the direction sees, in [0, 1).
      b2: decay rate of the momentum, in [0, 1).
      mu_dtype: dtype in which the momentum is kept; None for the parameter's.
      cautious_factor: if given, entries of the direction whose sign disagrees with the gradient's are multiplied by
        this number in [0, 1], and then all by one over the mean multiplier of the leaf. The weights may then leave the
        set that $K$ would keep them to.

    Returns:
      A gradient transformation whose state is an ``optax.ScaleByLionState``. Updates have the gradient's dtype.
      Gradients that are None pass through and leave the momentum alone.

    Raises:
      ValueError: if a rate or the factor is out of range, or no kappa has that name.
      TypeError: if ``kappa`` is neither a kappa nor a name, or, at ``init`` and ``update``, if a leaf is complex.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from poise.optim import kappas, scale_by_lion_kappa
      >>> tx = optax.chain(scale_by_lion_kappa(kappas.huber(0.5)), optax.scale_by_learning_rate(0.1))
      >>> params = jnp.array([1.0, 1.0])
      >>> updates, state = tx.update(jnp.array([10.0, -1.0]), tx.init(params))
      >>> [f"{update:.3f}" for update in updates]
      ['-0.100', '0.020']

    References:
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898. The paper analyses the step with the decay of the *new* weights; this is Lion's
      own, with the decay of the old ones. They are the same for learning rates $\eta$ and $\eta/(1+\eta\lambda)$.
      Liang et al., Cautious Optimizers, 2024, https://arxiv.org/abs/2411.16085.
    """
    kappa = resolve_kappa(kappa)
    check_range("b1", b1, 0.0, 1.0, open_high=True)
    check_range("b2", b2, 0.0, 1.0, open_high=True)
    check_range("cautious_factor", cautious_factor, 0.0, 1.0)

    def init(params: PyTree) -> optax.ScaleByLionState:
        check_real("params", params)
        return optax.ScaleByLionState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=mu_dtype))

    def direction(g: Any, mu: Any) -> Array | None:
        if g is None:
            return None
        u = -kappa.grad(-((1.0 - b1) * g + b1 * mu))
        if cautious_factor is not None:
            multiplier = jnp.where(jnp.sign(u) * jnp.sign(g) > 0, 1, cautious_factor).astype(sum_dtype(u))
            u = u * (multiplier / jnp.maximum(jnp.mean(multiplier), 1e-5))
        return u.astype(g.dtype)

    def momentum(g: Any, mu: Any) -> Any:
        return mu if g is None else ((1 - b2) * g + b2 * mu).astype(mu.dtype)

    def update(updates: PyTree, state: Any, params: PyTree = None):
        del params
        check_real("updates", updates)
        return (
            jax.tree.map(direction, updates, state.mu, is_leaf=lambda g: g is None),
            optax.ScaleByLionState(
                optax.safe_increment(state.count),
                jax.tree.map(momentum, updates, state.mu, is_leaf=lambda g: g is None),
            ),
        )

    return optax.GradientTransformation(init, update)


def lion_kappa(
    learning_rate: Number | optax.Schedule,
    kappa: Kappa | str = _SIGN,
    b1: Number = 0.9,
    b2: Number = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Number | optax.Schedule = 1e-3,
    mask: Any | Callable[[Any], Any] | None = None,
    *,
    cautious_factor: Number | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion and its family: the weight decay is an exact constraint or penalty, chosen by a convex function.

    $$x_{t+1} = x_t - \eta\,(u_t + \lambda x_t)$$

    with the direction $u_t$ of :func:`scale_by_lion_kappa` solves, for a loss $f$,

    $$\min_x f(x) + \tfrac1\lambda K^*(\lambda x).$$

    With the default, $K = \|\cdot\|_1$, this is Lion, bit for bit ``optax.lion``, and the problem is to minimize the
    loss in the box $|x_i| \le 1/\lambda$. From outside, the distance to the set where $K^*(\lambda x)$ is finite
    shrinks by $1 - \eta\lambda$ a step, whatever the loss; inside, :func:`lion_kappa_lyapunov` falls.

    The direction and the new momentum both read the old momentum. On a CPU, in a step whose buffers are donated, XLA
    copies it for that reason, unless the step is compiled with
    ``jax.jit(step, compiler_options={"xla_cpu_copy_insertion_use_region_analysis": True})``. The numbers are the same,
    and steps on large leaves take a fraction of the time. This holds for ``optax.lion`` likewise.

    Args:
      learning_rate: $\eta$, or a schedule of it; 3 to 10 times smaller than Adam's for Lion.
      kappa: the convex function; one of :mod:`poise.optim.kappas`, its name if it takes no arguments, or your own.
      b1: how much of the momentum the direction sees, in [0, 1).
      b2: decay rate of the momentum, in [0, 1).
      mu_dtype: dtype in which the momentum is kept; None for the parameter's.
      weight_decay: $\lambda \ge 0$, or a schedule of it; multiplied by the learning rate, and the inverse size of the
        constraint.
      mask: which leaves decay: None for all, a tree of booleans (or a prefix of one), or a function from the parameters
        to one. The others are not constrained.
      cautious_factor: see :func:`scale_by_lion_kappa`.

    Returns:
      A gradient transformation whose ``update`` needs ``params``. Updates have the parameter's dtype.

    Raises:
      ValueError: if an argument is out of range or no kappa has that name; at ``update``, if ``params`` is None.
      TypeError: if ``kappa`` is neither a kappa nor a name, or, at ``init`` and ``update``, if a leaf is complex.

    Warns:
      UserWarning: if the learning rate times the weight decay is 1 or more, where a step no longer mixes the old
        weights with a point of the set.

    Example:
      A quadratic whose minimum lies outside of the box $|x_i| \le 1/2$:

      >>> import jax, jax.numpy as jnp, optax
      >>> from poise.optim import lion_kappa
      >>> optimizer = lion_kappa(0.01, weight_decay=2.0)
      >>> def step(carry, _):
      ...     params, state = carry
      ...     updates, state = optimizer.update(params - jnp.array([3.0, 0.25]), state, params)
      ...     return (optax.apply_updates(params, updates), state), None
      >>> params = jnp.array([2.0, -2.0])
      >>> (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=1000)
      >>> f"{params[0]:.3f}"
      '0.500'

    References:
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898; Chen et al., Symbolic Discovery of Optimization Algorithms, 2023,
      https://arxiv.org/abs/2302.06675. Lion's official code has no weight decay by default; this follows
      ``optax.lion``, whose default is 1e-3.
    """
    check_range("learning_rate", learning_rate, 0.0)
    check_range("weight_decay", weight_decay, 0.0)
    rate, decay = concrete(learning_rate), concrete(weight_decay)
    if rate is not None and decay is not None and (rate * decay >= 1).any():
        warnings.warn(
            f"learning_rate * weight_decay should be below 1, got {learning_rate} * {weight_decay}: the steps overshoot"
            " the set that the weight decay stands for",
            stacklevel=2,
        )
    inner = optax.chain(
        scale_by_lion_kappa(kappa, b1, b2, mu_dtype, cautious_factor=cautious_factor),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any):
        del extra_args
        if params is None:
            raise ValueError("lion_kappa needs the parameters: call update(grads, state, params), got params=None")
        updates, state = inner.update(updates, state, params)
        # A schedule or an injected hyper-parameter is an array, which promotes narrower leaves.
        cast = lambda u, p: None if u is None else u.astype(jnp.result_type(p))  # noqa: E731
        return jax.tree.map(cast, updates, params, is_leaf=lambda u: u is None), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def resolve_kappa(kappa: Kappa | str) -> Kappa:
    """The kappa itself, or the one of that name.

    Raises:
      ValueError: if no kappa without arguments has that name.
      TypeError: if it is neither a kappa nor a name.
    """
    if isinstance(kappa, str):
        if kappa not in _BY_NAME:
            raise ValueError(
                f"kappa must be one of {', '.join(map(repr, _BY_NAME))} or made by poise.optim.kappas, got {kappa!r}"
            )
        return _BY_NAME[kappa]()
    if not isinstance(kappa, Kappa):
        raise TypeError(
            f"kappa must be a Kappa, such as poise.optim.kappas.sign(), or the name of one, got {kappa!r}; "
            "optax.inject_hyperparams would take a bare function for a schedule"
        )
    return kappa
