"""EvoNorm: normalization and activation found as one layer, with batch statistics (B) or without (S)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.core.arguments import check_choice, check_count, check_range
from poise.core.collectives import mean_over

KINDS = ("B0", "B1", "B2", "S0", "S1", "S2")


def _check(x: Array, eps: float) -> None:
    if x.ndim < 3:
        raise ValueError(f"x must have a batch, at least one spatial axis and channels, got shape {x.shape}")
    check_range("eps", eps, 0.0, open_low=True)


def _wide(x: Array, *vectors: Array | None) -> list[Any]:
    """Everything in the dtype of x, at least float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return [None if a is None else jnp.asarray(a, dtype) for a in (x, *vectors)]


def batch_variance(x: Float[Array, "batch *space channels"], axis_name: str | None = None) -> Float[Array, " channels"]:
    """Each channel's biased variance over batch and space, and over a mapped device axis if there is one.

    Centred values are squared, since the difference of two means loses the digits that matter for a large mean.
    """
    (x,) = _wide(x)
    axes = tuple(range(x.ndim - 1))
    mean = mean_over(axis_name, x.mean(axes))
    return mean_over(axis_name, jnp.square(x - mean).mean(axes))


def _instance(x: Array, centred: bool) -> Array:
    """The variance, or the mean square, over space of each sample and channel."""
    axes = tuple(range(1, x.ndim - 1))
    x = x - x.mean(axes, keepdims=True) if centred else x
    return jnp.square(x).mean(axes, keepdims=True)


def _group(x: Array, groups: int, centred: bool) -> Array:
    """The variance, or the mean square, over space and a group of channels, for each sample and channel."""
    channels = x.shape[-1]
    parts = x.reshape(x.shape[0], -1, groups, channels // groups)
    parts = parts - parts.mean((1, 3), keepdims=True) if centred else parts
    value = jnp.repeat(jnp.square(parts).mean((1, 3)), channels // groups, axis=-1)
    return value.reshape(x.shape[0], *(1,) * (x.ndim - 2), channels)


def evonorm_b(
    kind: str,
    x: Float[Array, "batch *space channels"],
    gamma: Float[Array, " channels"],
    beta: Float[Array, " channels"],
    v: Float[Array, " channels"] | None = None,
    batch_var: Float[Array, " channels"] | None = None,
    *,
    eps: float = 1e-5,
    axis_name: str | None = None,
) -> tuple[Float[Array, "batch *space channels"], Float[Array, " channels"]]:
    r"""EvoNorm with batch statistics: $y = \gamma\,x/\max(\sqrt{s_b^2+\epsilon},\,d(x)) + \beta$.

    $s_b^2$ is each channel's variance over batch and space, and with the variance $s_i^2$ and the mean square
    $\mu_i(x^2)$ over space of each sample and channel,

    - B0: $d = v x + \sqrt{s_i^2+\epsilon}$,
    - B1: $d = (x+1)\sqrt{\mu_i(x^2)+\epsilon}$,
    - B2: $d = \sqrt{\mu_i(x^2)+\epsilon} - x$.

    Args:
      kind: ``"B0"``, ``"B1"`` or ``"B2"``.
      x: channels last.
      gamma: $\gamma$.
      beta: $\beta$.
      v: $v$, for B0 alone.
      batch_var: $s_b^2$ where it is known, in evaluation; None computes it, with its gradient.
      eps: $\epsilon > 0$.
      axis_name: a mapped device axis that the batch is spread over.

    Returns:
      y in the dtype of x, and $s_b^2$ in at least float32.

    Raises:
      ValueError: if the kind is unknown, ``v`` is missing, x has fewer than 3 axes or ``eps`` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.nets import evonorm_b
      >>> y, variance = evonorm_b("B0", jnp.ones((2, 4, 4, 3)), jnp.ones(3), jnp.zeros(3), jnp.ones(3))
      >>> y.shape, variance.tolist()
      ((2, 4, 4, 3), [0.0, 0.0, 0.0])

    References:
      Liu, Brock, Simonyan and Le, *Evolving Normalization-Activation Layers*, https://arxiv.org/abs/2004.02967
    """
    check_choice("kind", kind, KINDS[:3])
    _check(x, eps)
    if kind == "B0" and v is None:
        raise ValueError("v must be given for kind B0, got None")
    wide, gamma, beta, v, batch_var = _wide(x, gamma, beta, v, batch_var)
    batch_var = batch_variance(wide, axis_name) if batch_var is None else batch_var
    deviation = jnp.sqrt(_instance(wide, centred=kind == "B0") + eps)
    if kind == "B0":
        other = v * wide + deviation
    elif kind == "B1":
        other = (wide + 1) * deviation
    else:
        other = deviation - wide
    y = wide / jnp.maximum(jnp.sqrt(batch_var + eps), other) * gamma + beta
    return y.astype(x.dtype), batch_var


def evonorm_s(
    kind: str,
    x: Float[Array, "batch *space channels"],
    gamma: Float[Array, " channels"],
    beta: Float[Array, " channels"],
    v: Float[Array, " channels"] | None = None,
    *,
    groups: int = 32,
    eps: float = 1e-5,
) -> Float[Array, "batch *space channels"]:
    r"""EvoNorm without batch statistics: $y = \gamma\,x\,\sigma(a x)/\sqrt{t_g+\epsilon} + \beta$.

    S0 has $a = v$ and the variance $t_g = s_g^2$ over space and a group of channels; S1 has $a = 1$ and the same
    $t_g$; S2 has $a = 1$ and the mean square $t_g = \mu_g(x^2)$. Each sample's output is independent of the others.

    Args:
      kind: ``"S0"``, ``"S1"`` or ``"S2"``.
      x: channels last.
      gamma: $\gamma$.
      beta: $\beta$.
      v: $v$, for S0 alone.
      groups: the number of contiguous channel groups, which divides the channels.
      eps: $\epsilon > 0$.

    Returns:
      y in the dtype of x; statistics are at least float32.

    Raises:
      ValueError: if the kind is unknown, ``v`` is missing, x has fewer than 3 axes, ``eps`` is not positive, or
        ``groups`` doesn't divide the channels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import evonorm_s
      >>> x = jax.random.normal(jax.random.key(0), (2, 4, 4, 6))
      >>> s0, s1 = (evonorm_s(k, x, jnp.ones(6), jnp.zeros(6), jnp.ones(6), groups=3) for k in ("S0", "S1"))
      >>> bool(jnp.allclose(s0, s1))
      True

    References:
      Liu, Brock, Simonyan and Le, *Evolving Normalization-Activation Layers*, https://arxiv.org/abs/2004.02967. The
      official code lowers the number of groups until it divides the channels; here that is an error.
    """
    check_choice("kind", kind, KINDS[3:])
    _check(x, eps)
    check_count("groups", groups)
    if x.shape[-1] % groups:
        raise ValueError(f"groups must divide the {x.shape[-1]} channels of x, got {groups}")
    if kind == "S0" and v is None:
        raise ValueError("v must be given for kind S0, got None")
    wide, gamma, beta, v = _wide(x, gamma, beta, v)
    gate = jax.nn.sigmoid(wide * v if kind == "S0" else wide)
    inverse = jax.lax.rsqrt(_group(wide, groups, centred=kind != "S2") + eps)
    return (wide * gate * inverse * gamma + beta).astype(x.dtype)


class EvoNorm(nn.Module):
    r"""A layer in the place of normalization and activation: :func:`evonorm_b` or :func:`evonorm_s` with parameters.

    Takes the place of ``nn.BatchNorm`` with the activation behind it, and its arguments: B layers keep a running
    variance in ``batch_stats/var`` and need ``mutable=["batch_stats"]`` in training; S layers keep nothing and ignore
    ``use_running_average``. Residual networks need the pre-activation form.

    Attributes:
      kind: one of B0, B1, B2, S0, S1, S2.
      use_running_average: whether B layers use the running variance; may be given in the call instead.
      groups: the number of channel groups of S layers.
      momentum: the fraction of the old running variance that an update keeps.
      eps: $\epsilon > 0$.
      nonlinearity: False leaves $\gamma x + \beta$ alone, for the place of a normalization without activation.
      unbiased_running_var: whether the running variance averages n/(n-1) times the batch's.
      axis_name: a mapped device axis that the batch is spread over.
      gamma_init: of $\gamma$; zeros for the last layer of a residual branch.
      param_dtype: of the parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import EvoNorm
      >>> x = jax.random.normal(jax.random.key(0), (2, 4, 4, 6))
      >>> variables = EvoNorm("B0", use_running_average=False).init(jax.random.key(1), x)
      >>> sorted(variables["params"]), variables["batch_stats"]["var"].shape
      (['beta', 'gamma', 'v'], (6,))

    References:
      Liu, Brock, Simonyan and Le, *Evolving Normalization-Activation Layers*, https://arxiv.org/abs/2004.02967. The
      official code averages biased variances, the port to PyTorch Image Models unbiased ones.
    """

    kind: str
    use_running_average: bool | None = None
    groups: int = 32
    momentum: float = 0.9
    eps: float = 1e-5
    nonlinearity: bool = True
    unbiased_running_var: bool = False
    axis_name: str | None = None
    gamma_init: nn.initializers.Initializer = nn.initializers.ones
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *space channels"], use_running_average: bool | None = None
    ) -> Float[Array, "batch *space channels"]:
        """Normalizes and activates ``x``, channels last; the result has its dtype."""
        check_choice("kind", self.kind, KINDS)
        check_range("momentum", self.momentum, 0.0, 1.0)
        shape = (x.shape[-1],)
        gamma = self.param("gamma", self.gamma_init, shape, self.param_dtype)
        beta = self.param("beta", nn.initializers.zeros, shape, self.param_dtype)
        if not self.nonlinearity:
            wide, gamma, beta = _wide(x, gamma, beta)
            return (wide * gamma + beta).astype(x.dtype)
        v = self.param("v", nn.initializers.ones, shape, self.param_dtype) if self.kind in ("B0", "S0") else None
        if self.kind in KINDS[3:]:
            return evonorm_s(self.kind, x, gamma, beta, v, groups=self.groups, eps=self.eps)
        average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        running = self.variable("batch_stats", "var", lambda: jnp.ones(shape, dtype))
        known = running.value if average else None
        axis_name = None if self.is_initializing() else self.axis_name
        y, variance = evonorm_b(self.kind, x, gamma, beta, v, known, eps=self.eps, axis_name=axis_name)
        if not average and not self.is_initializing():
            if self.unbiased_running_var:
                number = x.size // x.shape[-1] * (1 if axis_name is None else jax.lax.axis_size(axis_name))
                variance = variance * (number / max(number - 1, 1))
            running.value = self.momentum * running.value + (1 - self.momentum) * jax.lax.stop_gradient(variance)
        return y


class EvoNormB0(EvoNorm):
    """:class:`EvoNorm` of kind B0.

    Example:
      >>> from poise.nets import EvoNormB0
      >>> EvoNormB0().kind
      'B0'
    """

    kind: str = "B0"


class EvoNormB1(EvoNorm):
    """:class:`EvoNorm` of kind B1.

    Example:
      >>> from poise.nets import EvoNormB1
      >>> EvoNormB1().kind
      'B1'
    """

    kind: str = "B1"


class EvoNormB2(EvoNorm):
    """:class:`EvoNorm` of kind B2.

    Example:
      >>> from poise.nets import EvoNormB2
      >>> EvoNormB2().kind
      'B2'
    """

    kind: str = "B2"


class EvoNormS0(EvoNorm):
    """:class:`EvoNorm` of kind S0.

    Example:
      >>> from poise.nets import EvoNormS0
      >>> EvoNormS0().kind
      'S0'
    """

    kind: str = "S0"


class EvoNormS1(EvoNorm):
    """:class:`EvoNorm` of kind S1.

    Example:
      >>> from poise.nets import EvoNormS1
      >>> EvoNormS1().kind
      'S1'
    """

    kind: str = "S1"


class EvoNormS2(EvoNorm):
    """:class:`EvoNorm` of kind S2.

    Example:
      >>> from poise.nets import EvoNormS2
      >>> EvoNormS2().kind
      'S2'
    """

    kind: str = "S2"
