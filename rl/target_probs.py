"""Scalar and distributional targets as probabilities over a grid: HL-Gauss, two-hot and the categorical projection."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from poise.core.arguments import check_range
from poise.core.arrays import at_least_float32
from poise.rl.value_grids import check_increasing


def _within(values: Array, low: Array, high: Array) -> Array:
    """Clips finite values; what is not finite becomes NaN, since no bin is its own."""
    return jnp.where(jnp.isfinite(values), jnp.clip(values, low, high), jnp.nan)


def hl_gauss_probs(
    target: Float[Array, "*batch"], edges: Float[Array, " edges"], sigma: ArrayLike
) -> Float[Array, "*batch bins"]:
    r"""The histogram of a Gaussian around each target, cut to the support and renormalized (HL-Gauss).

    $$p_i = \frac{g_{i+1}-g_i}{g_m-g_0}, \qquad g_j = \mathrm{erf}\frac{e_j-y}{\sqrt2\,\sigma}.$$

    The usual $\sigma = 0.75\,w$, $w$ the width of a bin, spreads a target over about six bins, and the mean of $p$ is
    the target to $5\cdot10^{-6}\,w$, except within some $3\sigma$ of the ends, where it is drawn inside: at $y=v_\max$
    by about $\sigma\sqrt{2/\pi}$. Targets outside of the support are clipped to it first. A target that is NaN or
    infinite belongs to no bin: all of its probabilities are NaN, and so is a loss made of them
    (``chex.assert_tree_all_finite(target)`` finds it earlier).

    Args:
      target: $y$, of any shape.
      edges: $m+1$ increasing edges of the bins; they need not be equally wide.
      sigma: the Gaussian's standard deviation, in the targets' unit; positive.

    Returns:
      Probabilities of $m$ bins, in the dtype of ``target`` (float32 for bfloat16 and float16).

    Raises:
      ValueError: if ``sigma`` is not positive, or the edges don't increase or are fewer than 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import bin_edges, hl_gauss_probs
      >>> probs = hl_gauss_probs(jnp.array(0.5), bin_edges(0.0, 1.0, 5), 0.15)
      >>> [f"{p:.3f}" for p in probs]
      ['0.022', '0.230', '0.495', '0.230', '0.022']

    References:
      Imani, White, Improving Regression Performance with Distributional Losses, https://arxiv.org/abs/1806.04613;
      Farebrother et al., Stop Regressing, https://arxiv.org/abs/2403.03950. The listing in the second does not clip
      and divides 0 by 0 a few sigma outside of the support; here targets are clipped.
    """
    check_range("sigma", sigma, 0.0, open_low=True, open_high=True)
    check_increasing("edges", edges)
    target = at_least_float32(target)
    edges = jnp.asarray(edges, target.dtype)
    y = _within(target, edges[0], edges[-1])[..., None]
    g = jax.lax.erf((edges - y) / (jnp.sqrt(jnp.asarray(2, y.dtype)) * jnp.asarray(sigma, y.dtype)))
    total = jnp.maximum(g[..., -1:] - g[..., :1], jnp.finfo(g.dtype).tiny)
    return jnp.maximum(jnp.diff(g, axis=-1), 0) / total  # float32's erf falls by a rounding error here and there


def _triangles(values: Array, atoms: Array) -> Array:
    """The share that each atom gets of a unit of mass at each value inside of the support."""
    y = values[..., None]
    gaps = jnp.diff(atoms)
    ones = jnp.ones_like(y)
    from_left = jnp.concatenate([ones, (y - atoms[:-1]) / gaps], axis=-1)
    to_right = jnp.concatenate([(atoms[1:] - y) / gaps, ones], axis=-1)
    return jnp.clip(jnp.minimum(from_left, to_right), 0, 1)


def two_hot_probs(target: Float[Array, "*batch"], atoms: Float[Array, " atoms"]) -> Float[Array, "*batch atoms"]:
    r"""Each target shared between its two neighbouring atoms so that the mean is kept.

    $$p_i = \mathrm{clip}(1 - |y-z_i|/d, 0, 1)$$

    for equally spaced atoms; for others $d$ is the gap on the side of $y$. A target on an atom is one-hot, one outside
    of the support is clipped to it first, and one that is NaN or infinite gives NaN.

    Args:
      target: $y$, of any shape.
      atoms: $m$ increasing atoms.

    Returns:
      Probabilities, in the dtype of ``target`` (float32 for bfloat16 and float16), with $\sum_i p_iz_i = y$.

    Raises:
      ValueError: if the atoms don't increase or are fewer than 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import atoms, two_hot_probs
      >>> two_hot_probs(jnp.array([0.25, 2.0, 9.0]), atoms(0.0, 2.0, 3)).tolist()
      [[0.75, 0.25, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]

    References:
      Schrittwieser et al., MuZero, https://arxiv.org/abs/1911.08265; Farebrother et al., Stop Regressing,
      https://arxiv.org/abs/2403.03950.
    """
    check_increasing("atoms", atoms)
    target = at_least_float32(target)
    atoms = jnp.asarray(atoms, target.dtype)
    return _triangles(_within(target, atoms[0], atoms[-1]), atoms)


def categorical_projection(
    source_atoms: Float[Array, "*#batch source"],
    probs: Float[Array, "*#batch source"],
    atoms: Float[Array, " atoms"],
) -> Float[Array, "*batch atoms"]:
    r"""A distribution on moved atoms, projected onto fixed ones (C51).

    $$p_i = \sum_j \mathrm{clip}(1 - |\mathrm{clip}(u_j, z_1, z_m) - z_i|/d, 0, 1)\,q_j .$$

    For a Bellman target $u_j = r + \gamma(1-\text{terminated})z_j$ and $q$ the next state's distribution. The mean is
    kept unless an atom is clipped. An atom that is NaN or infinite makes its distribution NaN.

    Args:
      source_atoms: $u$, the places of the masses.
      probs: $q$, the masses.
      atoms: $z$, $m$ increasing atoms.

    Returns:
      Probabilities of the fixed atoms, in the wider dtype of ``source_atoms`` and ``probs``, at least float32.

    Raises:
      ValueError: if the atoms don't increase or are fewer than 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import atoms, categorical_projection
      >>> z = atoms(0.0, 2.0, 3)
      >>> categorical_projection(0.5 + 0.5 * z, jnp.array([0.5, 0.0, 0.5]), z).tolist()
      [0.25, 0.5, 0.25]

    References:
      Bellemare, Dabney, Munos, A Distributional Perspective on Reinforcement Learning,
      https://arxiv.org/abs/1707.06887.
    """
    check_increasing("atoms", atoms)
    dtype = jnp.promote_types(jnp.result_type(source_atoms, probs), jnp.float32)
    atoms = jnp.asarray(atoms, dtype)
    shares = _triangles(_within(jnp.asarray(source_atoms, dtype), atoms[0], atoms[-1]), atoms)
    return jnp.sum(shares * jnp.asarray(probs, dtype)[..., None], axis=-2)
