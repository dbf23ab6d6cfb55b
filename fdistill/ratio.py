"""Density ratios from a discriminator's logits, and the weights of mean one that they give.

Nothing here lets a gradient through: ratios and weights are constants of the distillation loss. All of it works with
log-ratios, in float32 at least.
"""

import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from poise.core import sum_over
from poise.core.arguments import check_choice, check_range
from poise.core.arrays import at_least_float32
from poise.fdistill.divergence_type import FDivergence


def _constant(x: Array) -> Array:
    return jax.lax.stop_gradient(at_least_float32(x))


def _max_over(axis_name: str | None, x: Array) -> Array:
    return x if axis_name is None else jax.lax.pmax(x, axis_name)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def log_ratio(
    logits: Float[Array, "batch heads"],
    clip: float | int | None = 10.0,
    ratio_range: tuple[float | int, float | int] | None = None,
) -> Float[Array, " batch"]:
    r"""The log density ratio $\ell = \log p/q$ that a discriminator's heads estimate.

    It is the mean of their logits, clipped. A discriminator trained with the logistic loss on equally many samples of
    the teacher $p$ ("real") and the student $q$ ("fake") has the optimal logit $\log p - \log q$, so the ratio is its
    exponential, without a sigmoid.

    Args:
      logits: one logit per example and head; higher is more real.
      clip: bound on $|\ell|$; None for none.
      ratio_range: bounds on the ratio $e^\ell$ itself, for instance FastGen's (0.1, 20); None for none.

    Returns:
      $\ell$, without a gradient.

    Raises:
      ValueError: if ``logits`` isn't of rank 2 or has no heads, ``clip`` isn't positive, or ``ratio_range`` isn't
        ``0 < low < high``.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import log_ratio
      >>> log_ratio(jnp.array([[1.0, 3.0], [50.0, 50.0]])).tolist()
      [2.0, 10.0]

    References:
      arXiv 2502.15681, section 3.3, https://arxiv.org/abs/2502.15681; clipping as in NVlabs/FastGen.
    """
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must have shape [batch, heads] with at least one head, got {logits.shape}")
    ell = jnp.mean(_constant(logits), axis=1)
    if clip is not None:
        check_range("clip", clip, low=0.0, open_low=True)
        ell = jnp.clip(ell, -clip, clip)
    if ratio_range is not None:
        low, high = ratio_range
        check_range("ratio_range[0]", low, low=0.0, open_low=True)
        check_range("ratio_range[1]", high, low=float(low), open_low=True)
        ell = jnp.clip(ell, math.log(low), math.log(high))
    return ell


class RatioBins(NamedTuple):
    r"""Running mean ratios per bin of noise levels.

    Attributes:
      log_mean: $\log \bar r_b$, one for each bin.
    """

    log_mean: Float[Array, " bins"]


def init_ratio_bins(num_bins: int = 10) -> RatioBins:
    r"""Bins that all hold the mean ratio 1.

    Args:
      num_bins: how many.

    Returns:
      The bins.

    Raises:
      ValueError: if there is less than one bin.

    Example:
      >>> from poise.fdistill import init_ratio_bins
      >>> init_ratio_bins(3).log_mean.tolist()
      [0.0, 0.0, 0.0]
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    return RatioBins(jnp.zeros(num_bins, jnp.float32))


def bin_index(
    sigma: Float[Array, " batch"],
    sigma_range: tuple[float | int, float | int] = (0.002, 80.0),
    num_bins: int = 10,
    kind: str = "karras",
    rho: float | int = 7.0,
) -> Int[Array, " batch"]:
    r"""The bin of each noise level.

    ``"karras"`` cuts $\sigma^{1/\rho}$ evenly, so levels drawn uniformly from the Karras grid fall into all bins
    equally often; ``"linear"`` cuts $\sigma$ evenly, which puts 64% of such levels into the first of ten bins.

    Args:
      sigma: noise levels; those outside the range belong to the nearest bin.
      sigma_range: lowest and highest level.
      num_bins: how many bins.
      kind: ``"karras"`` or ``"linear"``.
      rho: curvature of the Karras grid.

    Returns:
      Indices from 0 (the lowest levels) to ``num_bins - 1``.

    Raises:
      ValueError: if the range isn't ``0 <= low < high``, ``num_bins`` is below 1, ``kind`` is unknown or ``rho`` isn't
        positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import bin_index
      >>> sigma = jnp.array([0.002, 0.5, 40.0, 80.0])
      >>> bin_index(sigma).tolist(), bin_index(sigma, kind="linear").tolist()
      ([0, 3, 8, 9], [0, 0, 4, 9])

    References:
      arXiv 2502.15681; NVlabs/FastGen bins linearly in sigma, the default here is even in the Karras index.
    """
    low, high = sigma_range
    check_range("sigma_range[0]", low, low=0.0)
    check_range("sigma_range[1]", high, low=float(low), high=math.inf, open_low=True, open_high=True)
    check_range("rho", rho, low=0.0, open_low=True)
    check_choice("kind", kind, ("karras", "linear"))
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    sigma = _constant(sigma)
    if kind == "karras":
        power = 1.0 / rho
        sigma, low, high = jnp.maximum(sigma, 0.0) ** power, low**power, high**power
    index = jnp.floor((sigma - low) / ((high - low) / num_bins))
    return jnp.clip(index, 0, num_bins - 1).astype(jnp.int32)


def normalize_log_ratio(
    log_ratio: Float[Array, " batch"],
    index: Int[Array, " batch"],
    bins: RatioBins,
    decay: float | int | Float[Array, ""] = 0.9,
    axis_name: str | None = None,
    eps: float | int = 0.0,
) -> tuple[Float[Array, " batch"], RatioBins, Float[Array, " bins"]]:
    r"""Divides ratios by the running mean of their bin, which re-imposes $E_{q_t}[r_t] = 1$ at every noise level.

    With $m_b$ the mean ratio of bin $b$ over the global batch, every bin that is not empty moves to
    $\bar r_b \leftarrow \beta \bar r_b + (1-\beta) m_b$, and then $\ell_i \leftarrow \ell_i - \log \bar r_{b(i)}$.

    Args:
      log_ratio: $\ell$ of each example.
      index: each example's bin, from :func:`bin_index`.
      bins: the running means.
      decay: $\beta$ in [0, 1); 0 uses the batch alone, so that an example alone in its bin gets ratio 1.
      axis_name: the mapped device axis over which the batch is spread, or None.
      eps: added to counts and means, as FastGen does with 1e-6.

    Returns:
      The normalised log-ratios, the new bins, and the calibration: the global batch's mean ratio of every bin before
      normalisation (1 for a perfect head; 1 for empty bins).

    Raises:
      ValueError: if shapes differ, ``decay`` isn't in [0, 1), or ``eps`` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import init_ratio_bins, normalize_log_ratio
      >>> ell, bins, calibration = normalize_log_ratio(
      ...     jnp.log(jnp.array([1.0, 3.0, 5.0])), jnp.array([0, 0, 2]), init_ratio_bins(3), decay=0.0
      ... )
      >>> jnp.exp(ell).round(4).tolist(), calibration.round(4).tolist()
      ([0.5, 1.5, 1.0], [2.0, 1.0, 5.0])

    References:
      arXiv 2502.15681, section 3.4; NVlabs/FastGen works with ratios and has decay 0 (0.5 for ImageNet-64).
    """
    if log_ratio.shape != index.shape or log_ratio.ndim != 1:
        raise ValueError(f"log_ratio and index must both have shape [batch], got {log_ratio.shape} and {index.shape}")
    check_range("decay", decay, low=0.0, high=1.0, open_high=True)
    check_range("eps", eps, low=0.0)
    ell = _constant(log_ratio)
    log_mean = _constant(bins.log_mean)
    num_bins = log_mean.shape[0]

    peak = _max_over(axis_name, jax.ops.segment_max(ell, index, num_bins))
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)  # empty bins
    total = jax.ops.segment_sum(jnp.exp(ell - peak[index]), index, num_bins)
    count = jax.ops.segment_sum(jnp.ones_like(ell), index, num_bins)
    total, count = sum_over(axis_name, (total, count))
    filled = count > 0
    batch_log_mean = peak + jnp.log(jnp.where(filled, total, 1.0)) - jnp.log(jnp.where(filled, count + eps, 1.0))

    decay = jnp.asarray(decay, log_mean.dtype)
    moved = jnp.logaddexp(jnp.log(decay) + log_mean, jnp.log1p(-decay) + batch_log_mean)
    log_mean = jnp.where(filled, moved, log_mean)
    normalized = ell - jnp.logaddexp(log_mean, _log(eps))[index]
    return normalized, RatioBins(log_mean.astype(bins.log_mean.dtype)), jnp.exp(batch_log_mean)


def normalized_weight(
    div: FDivergence,
    log_ratio: Float[Array, " batch"],
    axis_name: str | None = None,
    eps: float | int = 0.0,
) -> Float[Array, " batch"]:
    r"""The weights $h(r_i)$ divided by their mean over the global batch.

    $$h_i = \frac{e^{\log h(\ell_i) - m}}{\frac1B \sum_j e^{\log h(\ell_j) - m}}, \qquad m = \max_j \log h(\ell_j)$$

    so the mean is 1 to rounding and nothing overflows. Reverse KL gives exactly 1 everywhere. A global
    batch of one example gets weight 1 under every divergence, which is a warning.

    Args:
      div: the divergence.
      log_ratio: $\ell$ of each example.
      axis_name: the mapped device axis over which the batch is spread, or None.
      eps: added to the mean of the weights, as FastGen does with 1e-6; then the mean is a little below 1.

    Returns:
      The weights, without a gradient.

    Raises:
      ValueError: if ``log_ratio`` isn't of rank 1 or ``eps`` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import divergence, normalized_weight
      >>> normalized_weight(divergence("forward_kl"), jnp.log(jnp.array([1.0, 3.0]))).round(4).tolist()
      [0.5, 1.5]
      >>> normalized_weight(divergence("pearson_chi2"), jnp.array([80.0, -80.0])).tolist()
      [2.0, 0.0]

    References:
      arXiv 2502.15681, section 3.4, https://arxiv.org/abs/2502.15681
    """
    if log_ratio.ndim != 1:
        raise ValueError(f"log_ratio must have shape [batch], got {log_ratio.shape}")
    check_range("eps", eps, low=0.0)
    batch = log_ratio.shape[0] * (1 if axis_name is None else jax.lax.psum(1, axis_name))
    if batch < 2 and div.name != "reverse_kl":
        warnings.warn(
            f"a global batch of {batch} makes every weight 1, so {div.name} is plain reverse-KL matching", stacklevel=2
        )
    log_h = jax.lax.stop_gradient(div.log_weight(_constant(log_ratio)))
    peak = _max_over(axis_name, jnp.max(log_h, initial=-jnp.inf))
    # Relative to the largest weight, so that rounding doesn't grow with |log h|.
    relative = jnp.exp(log_h - peak)
    mean = sum_over(axis_name, jnp.sum(relative)) / batch
    return relative / (mean + eps * jnp.exp(-peak) if eps > 0 else mean)


def fastgen_weight(
    div: FDivergence,
    logits: Float[Array, "batch heads"],
    sigma: Float[Array, " batch"] | None = None,
    bins: RatioBins | None = None,
    *,
    sigma_range: tuple[float | int, float | int] = (0.002, 80.0),
    ratio_range: tuple[float | int, float | int] = (0.1, 20.0),
    decay: float | int = 0.0,
    eps: float | int = 1e-6,
    axis_name: str | None = None,
) -> tuple[Float[Array, " batch"], RatioBins | None]:
    r"""The whole weighting of NVlabs/FastGen: ratios clipped to a range, linear bins, and 1e-6 beside every mean.

    It composes :func:`log_ratio`, :func:`bin_index`, :func:`normalize_log_ratio` and :func:`normalized_weight`. That
    code leaves out the constant factors 1/4 of the squared Hellinger weight and 2 of Neyman's; for parity at the size
    of ``eps`` pass ``scale(divergence("squared_hellinger"), 4)`` and ``scale(divergence("neyman_chi2"), 0.5)``.

    Args:
      div: the divergence.
      logits: one logit per example and head.
      sigma: noise levels, needed with ``bins``.
      bins: the running means, or None for no normalisation by bins.
      sigma_range: lowest and highest level, for the bins.
      ratio_range: bounds on the ratio.
      decay: decay of the running means.
      eps: the small number.
      axis_name: the mapped device axis over which the batch is spread, or None.

    Returns:
      The weights and the new bins (None if there were none).

    Raises:
      ValueError: if there are bins but no ``sigma``, and as the functions that it composes.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import divergence, fastgen_weight
      >>> h, _ = fastgen_weight(divergence("forward_kl"), jnp.log(jnp.array([[1.0], [3.0], [1e6]])))
      >>> [round(x, 3) for x in h.tolist()]
      [0.125, 0.375, 2.5]

    References:
      NVlabs/FastGen, f_distill, https://github.com/NVlabs/FastGen
    """
    ell = log_ratio(logits, clip=10.0, ratio_range=ratio_range)
    if bins is not None:
        if sigma is None:
            raise ValueError("sigma must be given with bins, got None")
        index = bin_index(sigma, sigma_range, bins.log_mean.shape[0], kind="linear")
        ell, bins, _ = normalize_log_ratio(ell, index, bins, decay, axis_name, eps)
    return normalized_weight(div, ell, axis_name, eps), bins


def effective_sample_size(weight: Float[Array, " batch"], axis_name: str | None = None) -> Float[Array, ""]:
    r"""The number of examples that count, $(\sum_i h_i)^2 / \sum_i h_i^2$, from 1 to the global batch size.

    Args:
      weight: non-negative weights of any scale.
      axis_name: the mapped device axis over which the batch is spread, or None.

    Returns:
      The effective sample size; 0 if all weights are 0.

    Raises:
      ValueError: if ``weight`` isn't of rank 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import effective_sample_size
      >>> float(effective_sample_size(jnp.array([2.0, 2.0, 0.0])))
      2.0

    References:
      Kong, "A note on importance sampling using standardized weights" (1992).
    """
    if weight.ndim != 1:
        raise ValueError(f"weight must have shape [batch], got {weight.shape}")
    weight = _constant(weight)
    peak = _max_over(axis_name, jnp.max(weight, initial=0.0))
    share = weight / jnp.where(peak > 0, peak, 1.0)  # of any scale, without overflow
    total, squares = sum_over(axis_name, (jnp.sum(share), jnp.sum(share**2)))
    return total**2 / jnp.where(squares > 0, squares, 1.0)
