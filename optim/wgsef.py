"""The weighted group sparse envelope: the convex function closest to "squares, and at most k groups"."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from poise.core.arguments import check_count, check_range
from poise.optim.capped_shares import capped_shares
from poise.optim.groups import Groups, Partition, group_squares, group_weights, partition, spread
from poise.optim.leaves import find_rule, path_names, sum_dtype
from poise.optim.radial import positive_root


def _prepare(x: Array, groups: Groups, k: ArrayLike, weights: Any) -> tuple[Partition, Array, Array]:
    """Partition, weights and squared norms; raises for a k out of range."""
    parts = partition(x.shape, groups)
    check_count("k", k, 1, parts.count)
    return parts, group_weights(weights, parts, sum_dtype(x)), group_squares(x, parts)


def wgsef(x: Float[Array, "..."], groups: Groups, k: int | Int[Array, ""], weights: Any = None) -> Float[Array, ""]:
    r"""The weighted group sparse envelope function.

    The largest convex function below $\frac12\sum_j d_j\|x_j\|^2$ + (0 if at most $k$ groups are nonzero, else
    $\infty$), where $x_j$ is the part of $x$ in group $j$:

    $$GS_k(x) = \frac12\min\Big\{\sum_j\frac{d_j\|x_j\|^2}{u_j} : 0\le u_j\le1,\ \sum_ju_j\le k\Big\}.$$

    It equals $\frac12\sum_jd_j\|x_j\|^2$ where at most $k$ groups are nonzero, and exceeds it elsewhere. For $k=1$ and
    single weights it is half the squared $\ell_1$ norm. Its gradient with respect to $x_j$ is $d_jx_j/u_j$; at a kink
    and at zero it is a subgradient.

    Args:
      x: any array.
      groups: ``filters``, ``channels``, ``rows`` or ``weights`` of a Flax kernel, a tuple of the axes that number the
        groups, or an array of group numbers from 0 on in the shape of ``x``.
      k: how many groups are free, from 1 to their number. May be traced.
      weights: $d_j > 0$: None for 1, ``size`` or ``sqrt_size`` of the groups, a number, or one for each group.

    Returns:
      $GS_k(x)$, in the dtype of ``x`` (float32 for bfloat16 and float16).

    Raises:
      ValueError: if ``k`` is out of range, a weight not positive, or the groups don't partition ``x``.
      TypeError: if ``k`` is no integer or the groups are of no known form.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import wgsef
      >>> x = jnp.array([3.0, -4.0])
      >>> f"{wgsef(x, 'weights', k=1):.3f}", f"{wgsef(x, 'weights', k=2):.3f}"
      ('24.500', '12.500')

    References:
      Refael, Arbel, Huleihel, Learning k-Level Structured Sparse Neural Networks Using Group Envelope Regularization,
      https://arxiv.org/abs/2212.12921. There is no official code; the formulas are derived from the definition.
    """
    _, d, squares = _prepare(x, groups, k, weights)
    shares = jax.lax.stop_gradient(capped_shares(positive_root(d * squares), jnp.zeros_like(d), k))
    present = shares > 0
    return 0.5 * jnp.sum(jnp.where(present, d * squares / jnp.where(present, shares, 1), 0))


def wgsef_conjugate(y: Float[Array, "..."], groups: Groups, k: int, weights: Any = None) -> Float[Array, ""]:
    r"""The convex conjugate $GS_k^*(y)$: half the sum of the $k$ largest $\|y_j\|^2/d_j$.

    Args:
      y: any array.
      groups: as in :func:`wgsef`.
      k: how many groups count; not traced.
      weights: as in :func:`wgsef`.

    Returns:
      The value, in the dtype of ``y`` (float32 for bfloat16 and float16). $GS_k(x) + GS_k^*(y) \ge \langle x,y\rangle$
      with equality where $y$ is a subgradient at $x$.

    Raises:
      ValueError: as :func:`wgsef`.
      TypeError: as :func:`wgsef`.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import wgsef_conjugate
      >>> float(wgsef_conjugate(jnp.array([3.0, -4.0]), "weights", k=1))
      8.0
    """
    _, d, squares = _prepare(y, groups, k, weights)
    return 0.5 * jnp.sum(jax.lax.top_k((squares / d).reshape(-1), int(k))[0])


def prox_wgsef(
    t: Float[Array, "..."],
    lam: ArrayLike,
    groups: Groups,
    k: int | Int[Array, ""],
    weights: Any = None,
) -> Float[Array, "..."]:
    r"""The proximal map $\arg\min_x \frac12\|x-t\|^2 + \lambda\,GS_k(x)$, exact and in linear time.

    $$x_j = t_j\frac{u_j}{\lambda d_j+u_j}, \qquad u_j = \mathrm{clip}(\alpha\sqrt{d_j}\|t_j\| - \lambda d_j, 0, 1),
    \qquad \sum_ju_j = k,$$

    or $u_j = 1$ where $t_j\ne0$ if at most $k$ groups are. Weak groups become exactly zero; at least $k$ survive, and
    for $\lambda\to\infty$ just those with the largest $\|t_j\|/\sqrt{d_j}$. All-zero $t$ gives zero.

    Args:
      t: any array.
      lam: $\lambda \ge 0$; 0 gives ``t``.
      groups: as in :func:`wgsef`.
      k: how many groups are free, from 1 to their number. May be traced.
      weights: as in :func:`wgsef`.

    Returns:
      The minimizer, in the shape and dtype of ``t``; norms are taken in float32 for bfloat16 and float16.

    Raises:
      ValueError: if ``lam`` is negative, or as :func:`wgsef`.
      TypeError: as :func:`wgsef`.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import prox_wgsef
      >>> prox_wgsef(jnp.array([4.0, 0.5, -1.0]), lam=1.0, groups="weights", k=1).tolist()
      [2.0, 0.0, -0.0]

    References:
      Refael, Arbel, Huleihel, Learning k-Level Structured Sparse Neural Networks Using Group Envelope Regularization,
      https://arxiv.org/abs/2212.12921. The paper finds the root by selecting medians, here by a bracketed Newton's
      method; both take linear time, no sort.
    """
    check_range("lam", lam, 0.0)
    return _prox_and_shares(t, lam, groups, k, weights)[0]


def _prox_and_shares(t: Array, lam: ArrayLike, groups: Groups, k: ArrayLike, weights: Any) -> tuple[Array, Array]:
    parts, d, squares = _prepare(t, groups, k, weights)
    cost = jnp.asarray(lam, d.dtype) * d
    shares = capped_shares(positive_root(d * squares), cost, k)
    total = cost + shares
    positive = total > 0
    factor = jnp.where(positive, shares / jnp.where(positive, total, 1), 0)
    return (spread(factor, parts) * t.astype(d.dtype)).astype(t.dtype), shares


def wgsef_top_k_mask(x: Float[Array, "..."], groups: Groups, k: int, weights: Any = None) -> Bool[Array, "..."]:
    r"""True in the $k$ groups with the largest $\|x_j\|/\sqrt{d_j}$, which the penalty keeps in the end.

    Args:
      x: any array.
      groups: as in :func:`wgsef`.
      k: how many groups; not traced. Of equal ones the first are taken.
      weights: as in :func:`wgsef`.

    Returns:
      Booleans in the shape of ``x``.

    Raises:
      ValueError: as :func:`wgsef`.
      TypeError: as :func:`wgsef`.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import wgsef_top_k_mask
      >>> wgsef_top_k_mask(jnp.array([[1.0, 3.0], [1.0, 0.0]]), "filters", k=1).tolist()
      [[False, True], [False, True]]
    """
    parts, d, squares = _prepare(x, groups, k, weights)
    _, chosen = jax.lax.top_k((squares / d).reshape(-1), int(k))
    mask = jnp.zeros(parts.count, bool).at[chosen].set(True).reshape(parts.sizes.shape)
    return jnp.broadcast_to(spread(mask, parts), x.shape)


class WGSEFRule(NamedTuple):
    r"""What to do with the leaves that a pattern finds.

    Attributes:
      groups: as in :func:`wgsef`.
      k: how many groups are free.
      lam: the factor $\lambda$ of the penalty.
      weights: as in :func:`wgsef`.
    """

    groups: Groups
    k: int
    lam: ArrayLike = 1.0
    weights: Any = None


class WGSEFPenalty(NamedTuple):
    """The penalty over a parameter tree; see :func:`wgsef_penalty`.

    Attributes:
      value: ``params -> scalar``.
      prox: ``(params, step_size) -> params``, for :func:`apply_prox`.
      active_groups: ``params -> {path: number of nonzero groups}``.
      support: ``params -> booleans``, True where a weight belongs to one of the k strongest groups or to no rule.
    """

    value: Callable[[PyTree], Array]
    prox: Callable[[PyTree, ArrayLike], PyTree]
    active_groups: Callable[[PyTree], dict[str, Array]]
    support: Callable[[PyTree], PyTree]


def wgsef_penalty(rules: Mapping[str, WGSEFRule]) -> WGSEFPenalty:
    r"""The penalty $\sum_l\lambda_l\,GS_{k_l}(\theta_l)$ over the layers of a model, chosen by path.

    Args:
      rules: regular expressions, searched in ``"encoder/Dense_0/kernel"``, and what to do with the leaves found. The
        first that is found holds; leaves that none finds are left alone.

    Returns:
      Its value, proximal map, counts of nonzero groups and strongest groups, all pure functions of a parameter tree,
      linen or nnx. They raise a ValueError if a rule finds no leaf.

    Raises:
      TypeError: if a rule is not a :class:`WGSEFRule`.
      ValueError: if there is no rule, or a $\lambda_l$ is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import WGSEFRule, wgsef_penalty
      >>> penalty = wgsef_penalty({"Dense_0/kernel": WGSEFRule("filters", k=1, lam=0.5)})
      >>> params = {"Dense_0": {"kernel": jnp.array([[3.0, 0.1, 0.1], [4.0, 0.1, 0.1]]), "bias": jnp.ones(3)}}
      >>> shrunk = penalty.prox(params, 1.0)
      >>> {path: int(count) for path, count in penalty.active_groups(shrunk).items()}
      {'Dense_0/kernel': 1}
      >>> shrunk["Dense_0"]["bias"].tolist()
      [1.0, 1.0, 1.0]
    """
    if not rules:
        raise ValueError("rules must name at least one pattern, got none")
    for pattern, rule in rules.items():
        if not isinstance(rule, WGSEFRule):
            raise TypeError(f"rules must map patterns to WGSEFRule, got {rule!r} for {pattern!r}")
        check_range(f"lam of {pattern!r}", rule.lam, 0.0)

    def over_leaves(function: Callable[[Array, WGSEFRule | None, str], Any], params: PyTree) -> PyTree:
        used = set()

        def leaf(path, x):
            names = path_names(path)
            pattern = find_rule({p: p for p in rules}, names, None)
            used.add(pattern)
            return function(x, rules.get(pattern) if pattern is not None else None, "/".join(names))

        out = jax.tree_util.tree_map_with_path(leaf, params)
        missing = [pattern for pattern in rules if pattern not in used]
        if missing:
            raise ValueError(f"rules must each find a leaf, got none for {missing}")
        return out

    def value(params: PyTree) -> Array:
        parts = over_leaves(
            lambda x, r, _: r.lam * wgsef(x, r.groups, r.k, r.weights) if r is not None else jnp.zeros(()), params
        )
        return functools.reduce(jnp.add, jax.tree.leaves(parts))

    def prox(params: PyTree, step_size: ArrayLike) -> PyTree:
        return over_leaves(
            lambda x, r, _: prox_wgsef(x, step_size * r.lam, r.groups, r.k, r.weights) if r is not None else x, params
        )

    def active_groups(params: PyTree) -> dict[str, Array]:
        counts = {}

        def count(x, rule, name):
            if rule is not None:
                counts[name] = jnp.sum(group_squares(x, partition(x.shape, rule.groups)) > 0)

        over_leaves(count, params)
        return counts

    def support(params: PyTree) -> PyTree:
        return over_leaves(
            lambda x, r, _: wgsef_top_k_mask(x, r.groups, r.k, r.weights) if r is not None else jnp.ones(x.shape, bool),
            params,
        )

    return WGSEFPenalty(value, prox, active_groups, support)
