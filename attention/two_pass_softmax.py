"""Softmax, its logarithm and its normalizer from two passes over the input and no maximum."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from poise.attention.ext_float import (
    ExtFloat,
    ext_add,
    ext_exp,
    ext_log,
    ext_psum,
    ext_sum,
    floating,
    power_of_two,
    subtract_log2_multiple,
)
from poise.attention.two_pass_pallas import pallas_normalize, pallas_sums
from poise.core.arguments import check_choice, check_count
from poise.core.collectives import sum_over

IMPLEMENTATIONS = ("xla", "xla_blocked", "pallas", "pallas_interpret")
BLOCK = 1024


class _Options(NamedTuple):
    axes: tuple[int, ...]
    implementation: str
    axis_name: str | None
    block_size: int


def _rows(x: Array, axes: tuple[int, ...]) -> Array:
    """The axes flattened into a last one, the others into a first one."""
    last = tuple(range(x.ndim - len(axes), x.ndim))
    moved = jnp.moveaxis(x, axes, last)
    return moved.reshape(-1, functools.reduce(lambda a, b: a * b, (x.shape[a] for a in axes), 1))


def _unrows(rows: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """The inverse of :func:`_rows`."""
    last = tuple(range(len(shape) - len(axes), len(shape)))
    others = tuple(size for a, size in enumerate(shape) if a not in axes)
    return jnp.moveaxis(rows.reshape(*others, *(shape[a] for a in axes)), last, axes)


def blocked_sums(x: Float[Array, "rows columns"], block_size: int) -> ExtFloat:
    """Each row's sum of exponentials ``[rows, 1]``, in one pass over blocks of columns with an accumulator per lane."""
    rows, columns = x.shape
    size = min(block_size, columns)
    blocks = -(-columns // size)
    x = jnp.pad(x, [(0, 0), (0, blocks * size - columns)], constant_values=-jnp.inf)

    def add(block, total):
        return ext_add(total, ext_exp(jax.lax.dynamic_slice_in_dim(x, block * size, size, axis=1)))

    lanes = ext_exp(jnp.full((rows, size), -jnp.inf, x.dtype))
    return ext_sum(jax.lax.fori_loop(0, blocks, add, lanes), 1, keepdims=True)


def _sums(x: Array, options: _Options) -> ExtFloat:
    """The first pass: the sums of exponentials over the axes, which stay with length 1."""
    if options.implementation == "xla":
        total = ext_sum(ext_exp(x), options.axes, keepdims=True)
    else:
        rows = _rows(x, options.axes)
        if options.implementation == "xla_blocked":
            total = blocked_sums(rows, options.block_size)
        else:
            total = pallas_sums(rows, options.block_size, interpret=options.implementation == "pallas_interpret")
        shape = tuple(1 if a in options.axes else size for a, size in enumerate(x.shape))
        total = jax.tree.map(lambda part: part.reshape(shape), total)
    return total if options.axis_name is None else ext_psum(total, options.axis_name)


def normalized(x: Array, total: ExtFloat) -> Array:
    """The second pass: ``exp(x) / total``, with 0 for a total of 0."""
    part = ext_exp(x)
    empty = total.mantissa == 0
    inverse = jnp.where(empty, 0, 1 / jnp.where(empty, 1, total.mantissa))
    return part.mantissa * inverse * power_of_two(part.exponent - total.exponent)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _softmax(x: Array, options: _Options) -> Array:
    total = _sums(x, options)
    if options.implementation not in ("pallas", "pallas_interpret"):
        return normalized(x, total)
    interpret = options.implementation == "pallas_interpret"
    total = jax.tree.map(lambda part: _rows(part, options.axes), total)
    out = pallas_normalize(_rows(x, options.axes), total, options.block_size, interpret=interpret)
    return _unrows(out, x.shape, options.axes)


def _mean_tangent(y: Array, tangent: Array, options: _Options) -> Array:
    return sum_over(options.axis_name, jnp.sum(y * tangent, options.axes, keepdims=True))


@_softmax.defjvp
def _softmax_jvp(options, primals, tangents):
    y = _softmax(*primals, options)
    return y, y * (tangents[0] - _mean_tangent(y, tangents[0], options))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _logsumexp(x: Array, options: _Options) -> Array:
    return ext_log(_sums(x, options))


@_logsumexp.defjvp
def _logsumexp_jvp(options, primals, tangents):
    y = _softmax(*primals, options)
    return _logsumexp(*primals, options), _mean_tangent(y, tangents[0], options)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _log_softmax(x: Array, options: _Options) -> Array:
    total = _sums(x, options)
    empty = total.mantissa == 0
    exponent = jnp.where(empty, 0, total.exponent)
    return subtract_log2_multiple(x, exponent) - jnp.log(jnp.where(empty, 1, total.mantissa))


@_log_softmax.defjvp
def _log_softmax_jvp(options, primals, tangents):
    y = _softmax(*primals, options)
    return _log_softmax(*primals, options), tangents[0] - _mean_tangent(y, tangents[0], options)


def _checked(
    x: Any, axis: Any, where: Any, implementation: Any, axis_name: str | None, block_size: Any
) -> tuple[Array, _Options]:
    x = floating("x", x)
    axes = axis if isinstance(axis, tuple | list) else (axis,)
    if not axes or any(not -x.ndim <= a < x.ndim for a in axes) or len({a % x.ndim for a in axes}) < len(axes):
        raise ValueError(f"axis must name different axes of x, which has {x.ndim}, got {axis}")
    axes = tuple(sorted(a % x.ndim for a in axes))
    if any(x.shape[a] == 0 for a in axes):
        raise ValueError(f"axis must not be empty, got {axis} of x with shape {x.shape}")
    implementation = "xla" if implementation is None else implementation
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if block_size is not None and implementation == "xla":
        raise ValueError("block_size is not for implementation='xla', which takes all columns at once")
    check_count("block_size", block_size)
    if where is not None:
        where = jnp.asarray(where)
        if where.dtype != jnp.bool_:
            raise TypeError(f"where must be boolean, True where an entry counts, got {where.dtype}")
        if where.ndim > x.ndim or any(a not in (1, b) for a, b in zip(where.shape[::-1], x.shape[::-1], strict=False)):
            raise ValueError(f"where must broadcast to x of shape {x.shape}, got {where.shape}")
        x = jnp.where(where, x, -jnp.inf)
    return x, _Options(axes, implementation, axis_name, BLOCK if block_size is None else int(block_size))


def two_pass_softmax(
    x: Float[Array, "..."],
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    implementation: str | None = None,
    axis_name: str | None = None,
    block_size: int | None = None,
) -> Float[Array, "..."]:
    r"""Softmax, $y_i = e^{x_i}/\sum_j e^{x_j}$, that reads its input twice, writes once, and needs no maximum.

    The first pass adds up $(M, E) = \bigoplus_j (m_j, n_j)$ with $e^{x_j} = m_j 2^{n_j}$, the second computes
    $y_i = m_i M^{-1}\,2^{n_i-E}$. Small outputs are about seven times as accurate as those of :func:`jax.nn.softmax`,
    which rounds $x - \max x$; values below the normal numbers become 0. On a CPU it is not faster.

    Args:
      x: floating numbers of any size; minus infinity gets a weight of exactly 0, plus infinity or NaN make their row
        NaN. bfloat16 and float16 are computed in float32.
      axis: one axis or several.
      where: booleans that broadcast to x; entries that are False count nothing and get 0. A row of them is all zeros.
      implementation: ``"xla"`` (None) in one reduction; ``"xla_blocked"`` in blocks of columns with an accumulator per
        lane; ``"pallas"`` as kernels for a GPU or TPU, ``"pallas_interpret"`` the same kernels interpreted anywhere.
      axis_name: an axis of an enclosing ``shard_map``, over which x is spread along ``axis``.
      block_size: columns at a time for the blocked forms.

    Returns:
      An array like x.

    Raises:
      ValueError: if an axis is empty or doesn't exist, ``where`` doesn't broadcast, or an implementation is unknown or
        not available on this platform.
      TypeError: if x is not floating or ``where`` not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.attention import two_pass_softmax
      >>> two_pass_softmax(jnp.array([1000.0, 1000.0, -jnp.inf])).tolist()
      [0.5, 0.5, 0.0]

    References:
      Dukhan and Ablavatski, *The Two-Pass Softmax Algorithm*, https://arxiv.org/abs/2001.04438. The official AVX2
      kernel gives NaN for minus infinity; here it has weight 0.
    """
    values, options = _checked(x, axis, where, implementation, axis_name, block_size)
    return _softmax(values, options).astype(x.dtype)


def two_pass_log_softmax(
    x: Float[Array, "..."],
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    implementation: str | None = None,
    axis_name: str | None = None,
    block_size: int | None = None,
) -> Float[Array, "..."]:
    r"""The logarithm of :func:`two_pass_softmax`: $x_i - E\log 2 - \log M$.

    Args:
      x: as there.
      axis: as there.
      where: as there; entries that are False get minus infinity.
      implementation: as there.
      axis_name: as there.
      block_size: as there.

    Returns:
      An array like x; minus infinity where the weight is 0.

    Raises:
      ValueError: as there.
      TypeError: as there.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.attention import two_pass_log_softmax
      >>> [round(float(y), 4) for y in two_pass_log_softmax(jnp.array([1000.0, 1000.0]))]
      [-0.6931, -0.6931]

    References:
      Dukhan and Ablavatski, *The Two-Pass Softmax Algorithm*, https://arxiv.org/abs/2001.04438
    """
    values, options = _checked(x, axis, where, implementation, axis_name, block_size)
    return _log_softmax(values, options).astype(x.dtype)


def two_pass_logsumexp(
    x: Float[Array, "..."],
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    keepdims: bool = False,
    implementation: str | None = None,
    axis_name: str | None = None,
    block_size: int | None = None,
) -> Float[Array, "..."]:
    r"""$\log\sum_i e^{x_i} = \log M + E\log 2$ in one pass over the input.

    Args:
      x: as for :func:`two_pass_softmax`.
      axis: as there.
      where: as there; minus infinity where nothing counts.
      keepdims: whether the axes stay with length 1.
      implementation: as there.
      axis_name: as there.
      block_size: as there.

    Returns:
      An array without the axes, in the dtype of x.

    Raises:
      ValueError: as there.
      TypeError: as there.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.attention import two_pass_logsumexp
      >>> round(float(two_pass_logsumexp(jnp.array([1000.0, 1000.0]))), 3)
      1000.693

    References:
      Dukhan and Ablavatski, *The Two-Pass Softmax Algorithm*, https://arxiv.org/abs/2001.04438
    """
    values, options = _checked(x, axis, where, implementation, axis_name, block_size)
    out = _logsumexp(values, options).astype(x.dtype)
    return out if keepdims else jnp.squeeze(out, options.axes)
