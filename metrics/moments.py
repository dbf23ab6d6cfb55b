"""Mean and covariance of features, at once or over a stream of batches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, DTypeLike, Float, Int

from poise.metrics.features import check_features, check_values


class Moments(NamedTuple):
    """Mean and unbiased covariance; unpacks into the arguments of :func:`frechet`.

    Attributes:
      mean: of shape ``[dim]``.
      cov: of shape ``[dim, dim]``, symmetric.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.metrics import Moments, frechet
      >>> unit = Moments(jnp.zeros(2), jnp.eye(2))
      >>> float(frechet(*unit, *unit))
      0.0
    """

    mean: Float[Array, " dim"]
    cov: Float[Array, "dim dim"]


class RunningMoments(NamedTuple):
    """What is known of the features after some batches; see :func:`update_moments`.

    Attributes:
      count: the number of samples so far.
      mean: their mean.
      scatter: the sum of outer products of their deviations from the mean.

    Example:
      >>> from poise.metrics import init_moments
      >>> init_moments(dim=3)._fields
      ('count', 'mean', 'scatter')
    """

    count: Int[Array, ""]
    mean: Float[Array, " dim"]
    scatter: Float[Array, "dim dim"]


def moments(features: Float[ArrayLike, "n dim"]) -> Moments:
    r"""Mean and unbiased covariance of a set of samples.

    $$\mu = \tfrac1n \textstyle\sum_i x_i, \qquad C = \tfrac1{n-1} \sum_i (x_i-\mu)(x_i-\mu)^\top,$$

    in two passes, in the dtype of the samples (float32 for 16-bit ones).

    Args:
      features: samples, one a row.

    Returns:
      The mean ``[dim]`` and the covariance ``[dim, dim]``.

    Raises:
      TypeError: if `features` does not hold real floating numbers.
      ValueError: if `features` is not a matrix, holds fewer than 2 samples or a value that is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.metrics import moments
      >>> mean, cov = moments(jnp.array([[0.0, 1.0], [2.0, 3.0]]))
      >>> mean.tolist(), cov.tolist()
      ([1.0, 2.0], [[2.0, 2.0], [2.0, 2.0]])
    """
    features = check_features("features", features)
    mean, scatter = _mean_and_scatter(features)
    return Moments(mean, scatter / (len(features) - 1))


def init_moments(dim: int, dtype: DTypeLike = jnp.float32) -> RunningMoments:
    """The running moments of no samples at all.

    Args:
      dim: the number of features.
      dtype: what to accumulate in; float64 needs ``jax.enable_x64()``, here and in the updates.

    Returns:
      Running moments with count 0.

    Raises:
      TypeError: if `dtype` is not float32 or float64.
      ValueError: if `dim` is below 1, or if `dtype` is float64 and 64-bit numbers are not enabled.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.metrics import init_moments
      >>> with jax.enable_x64():
      ...     print(init_moments(dim=2, dtype=jnp.float64).mean.dtype)
      float64
    """
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    if dtype == jnp.float64 and not jax.config.jax_enable_x64:
        raise ValueError("dtype float64 needs 64-bit numbers; wrap the call and the updates in jax.enable_x64()")
    return RunningMoments(jnp.zeros((), jnp.int32), jnp.zeros(dim, dtype), jnp.zeros((dim, dim), dtype))


def update_moments(running: RunningMoments, features: Float[ArrayLike, "n dim"]) -> RunningMoments:
    """Adds a batch of samples, so that moments of any number of them fit in memory.

    The batch's own mean and scatter are merged into the running ones; unlike sums of squares, this loses nothing where
    the mean is large beside the spread. See :func:`merge_moments`. A scan over batches works.

    Args:
      running: the moments so far, from :func:`init_moments`.
      features: at least one sample, one a row; cast to the dtype of `running`.

    Returns:
      The moments of all samples so far, in the dtype of `running`.

    Raises:
      TypeError: if `features` does not hold real floating numbers.
      ValueError: if `features` is not a matrix with at least one row, has another number of features than `running`,
        or holds a value that is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.metrics import finalize_moments, init_moments, update_moments
      >>> running = init_moments(dim=1)
      >>> for batch in (jnp.array([[1.0], [2.0]]), jnp.array([[6.0]])):
      ...     running = update_moments(running, batch)
      >>> mean, cov = finalize_moments(running)
      >>> mean.tolist(), cov.tolist()
      ([3.0], [[7.0]])
    """
    features = check_features("features", features, min_samples=1)
    if features.shape[1:] != running.mean.shape:
        raise ValueError(f"features must have {len(running.mean)} columns, as running has, got shape {features.shape}")
    mean, scatter = _mean_and_scatter(features.astype(running.mean.dtype))
    return merge_moments(running, RunningMoments(jnp.full((), len(features), jnp.int32), mean, scatter))


def merge_moments(first: RunningMoments, second: RunningMoments) -> RunningMoments:
    r"""The running moments of two disjoint sets of samples together, as from two hosts.

    With $n = n_1 + n_2$ and $\delta = \mu_2 - \mu_1$,

    $$\mu = \mu_1 + \tfrac{n_2}{n} \delta, \qquad S = S_1 + S_2 + \tfrac{n_1 n_2}{n} \delta \delta^\top.$$

    Args:
      first: moments of some samples, or of none.
      second: moments of others with the same number of features, or of none.

    Returns:
      The moments of all of them.

    Raises:
      ValueError: if the numbers of features differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.metrics import init_moments, merge_moments, update_moments
      >>> a = update_moments(init_moments(dim=1), jnp.array([[1.0]]))
      >>> b = update_moments(init_moments(dim=1), jnp.array([[3.0]]))
      >>> merged = merge_moments(a, b)
      >>> int(merged.count), merged.mean.tolist(), merged.scatter.tolist()
      (2, [2.0], [[2.0]])

    References:
      Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", COMPSTAT 1982,
      https://doi.org/10.1007/978-3-642-51461-6_3.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"first and second must have the same number of features, got means of shapes {first.mean.shape} and "
            f"{second.mean.shape}"
        )
    return _merge(first, second)


def finalize_moments(running: RunningMoments) -> Moments:
    """Mean and unbiased covariance of the samples that were accumulated.

    Args:
      running: the moments of at least 2 samples.

    Returns:
      The same as :func:`moments` of all samples at once. With a traced count below 2 the covariance is 0.

    Raises:
      ValueError: if a concrete count is below 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.metrics import finalize_moments, init_moments, update_moments
      >>> finalize_moments(update_moments(init_moments(dim=1), jnp.array([[1.0], [3.0]]))).cov.tolist()
      [[2.0]]
    """
    check_values("running.count", running.count, lambda count: count >= 2, "at least 2")
    return Moments(running.mean, running.scatter / jnp.maximum(running.count - 1, 1).astype(running.mean.dtype))


@jax.jit
def _mean_and_scatter(features: Array) -> tuple[Array, Array]:
    mean = features.mean(axis=0)
    centered = features - mean
    return mean, jnp.matmul(centered.T, centered, precision="highest")


@jax.jit
def _merge(first: RunningMoments, second: RunningMoments) -> RunningMoments:
    count = first.count + second.count
    dtype = jnp.result_type(first.mean, second.mean)
    share = second.count.astype(dtype) / jnp.maximum(count, 1).astype(dtype)
    delta = second.mean - first.mean
    return RunningMoments(
        count,
        first.mean + share * delta,
        first.scatter + second.scatter + (first.count.astype(dtype) * share) * jnp.outer(delta, delta),
    )
