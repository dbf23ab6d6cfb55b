"""Quantizers of activations: a module with a learned step, and its insertion into layers that know nothing of it."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.core.arguments import check_range
from poise.core.arrays import at_least_float32
from poise.quant.checks import Axis
from poise.quant.lsq import lsq, lsq_init
from poise.quant.qdrop import qdrop
from poise.quant.qparams import absmax_scale
from poise.quant.rules import QuantRule, match_rule
from poise.quant.uniform import fake_quantize

LAYERS = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvTranspose, nn.ConvLocal)


class LSQQuantizer(nn.Module):
    r"""Quantizes activations with steps that are learned, :func:`poise.quant.lsq`.

    The steps start from the batch that ``init`` is called with, so call it with real data; they are never set again.
    With a shift the output is $\mathrm{lsq}(x + b_1) + b_2$, both vectors learned and zero at first.

    Attributes:
      bits: from 2 to 8, from 1 without a sign.
      signed: whether codes may be negative.
      axis: the axes that share one step; None for all. The batch should be among them.
      multiplier: of :func:`poise.quant.lsq_init`; None for 2, or 4 without a sign.
      shift: of how many last axes every entry has a shift of its own; 0 for no shifts.
      collection: where steps and shifts live: ``"params"``, or ``"quant"`` as for :func:`activation_quantization`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import LSQQuantizer
      >>> x = jnp.array([[0.0, 0.6, 1.2, 2.0]])
      >>> quantizer = LSQQuantizer(bits=2, signed=False)
      >>> y, variables = quantizer.init_with_output(jax.random.key(0), x)
      >>> f"{variables['params']['step'][0, 0]:.3f}", [f"{a:.3f}" for a in y[0]]
      ('2.194', ['0.000', '0.000', '2.194', '2.194'])

    References:
      Esser et al., *Learned Step Size Quantization*, https://arxiv.org/abs/1902.08153; Liu, Liu and Cheng,
      *Oscillation-free Quantization for Low-bit Vision Transformers*, https://arxiv.org/abs/2302.02210
    """

    bits: int
    signed: bool = True
    axis: Axis = None
    multiplier: float | int | None = None
    shift: int = 0
    collection: str = "params"

    def _learned(self, name: str, init: Callable[[], Array]) -> Array:
        if self.collection == "params":
            return self.param(name, lambda _: init())
        return self.variable(self.collection, name, init).value

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Quantizes.

        Args:
          x: activations, the batch first.

        Returns:
          Quantized activations in the dtype of ``x``.

        Raises:
          ValueError: if an attribute does not suit ``x``, or the batch is empty when the steps are set.
        """
        if not 0 <= self.shift <= x.ndim:
            raise ValueError(f"shift must lie in [0, {x.ndim}] for an array of {x.ndim} axes, got {self.shift}")
        multiplier = (2.0 if self.signed else 4.0) if self.multiplier is None else self.multiplier
        shape, dtype = x.shape[x.ndim - self.shift :], jnp.promote_types(x.dtype, jnp.float32)
        if self.shift:
            x = x + self._learned("shift_before", lambda: jnp.zeros(shape, dtype)).astype(x.dtype)
        options: dict[str, Any] = {"bits": self.bits, "signed": self.signed, "axis": self.axis}
        step = self._learned("step", lambda: lsq_init(at_least_float32(x), **options, multiplier=multiplier))
        y = lsq(x, step, **options)
        return y + self._learned("shift_after", lambda: jnp.zeros(shape, dtype)).astype(y.dtype) if self.shift else y


def activation_axes(axis: Axis | str, ndim: int) -> Axis:
    """The axes that share one step, from what a rule says of them: a name, None or numbers."""
    if axis == "token":
        return tuple(a for a in range(ndim) if a != ndim - 2)
    if axis == "channel":
        return tuple(range(ndim - 1))
    return axis  # pyright: ignore[reportReturnType]


def activation_quantization(
    rules: Sequence[QuantRule], *, drop: float | int | Float[Array, ""] | None = None
) -> Callable[..., Any]:
    r"""An interceptor that quantizes what enters the layers that rules name; no module is edited.

    Inside of ``flax.linen.intercept_methods`` the input of every Dense, DenseGeneral, Einsum and convolution whose rule
    has ``act_bits`` goes through a quantizer first. What ``act_method="lsq"`` learns lives in the collection
    ``"quant"``, at the layer's path, and starts from the batch that ``init`` (or ``apply`` with ``mutable=["quant"]``,
    for a model that is trained already) is called with. It composes with ``jit``, ``grad``, ``vmap`` and sharding, as
    variables do.

    Args:
      rules: the first match wins. The path of a layer is that of its weight, ``"block_0/fc1/kernel"``.
      drop: the probability that an entry is quantized, in :func:`poise.quant.qdrop`, where the model is applied with
        ``rngs={"qdrop": key}``. Without that stream, as at inference, and with None, everything is quantized.

    Returns:
      A function for ``flax.linen.intercept_methods``.

    Raises:
      ValueError: if ``drop`` is outside of [0, 1]; when a layer is called, if its input does not suit its rule.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from poise.nets import activation_quantization
      >>> from poise.quant import QuantRule
      >>> rules = [QuantRule("layers_0", act_bits=4), QuantRule(".*", act_bits=2, act_signed=False)]
      >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), jax.random.normal(jax.random.key(0), (16, 5))
      >>> with nn.intercept_methods(activation_quantization(rules)):
      ...     variables = model.init(jax.random.key(1), x)
      ...     y = model.apply(variables, x)
      >>> jax.tree.map(jnp.shape, variables["quant"])
      {'layers_0': {'act_quantizer': {'step': (1, 1)}}, 'layers_2': {'act_quantizer': {'step': (1, 1)}}}
    """
    rules = tuple(rules)
    check_range("drop", drop, 0.0, 1.0)

    def quantized(x: Array, rule: QuantRule, bits: int) -> Array:
        axis = activation_axes(rule.act_axis, x.ndim)
        if rule.act_method == "lsq":
            module = LSQQuantizer(
                bits, rule.act_signed, axis, shift=int(rule.act_shift), collection="quant", name="act_quantizer"
            )
            return module(x)
        return fake_quantize(x, jax.lax.stop_gradient(absmax_scale(x, bits, axis)), bits=bits)

    def interceptor(next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, LAYERS):
            return next_fun(*args, **kwargs)
        rule = match_rule(rules, "/".join((*module.path, "kernel")))
        if rule is None or rule.act_bits is None:
            return next_fun(*args, **kwargs)
        x = args[0] if args else kwargs["inputs"]
        y = quantized(x, rule, rule.act_bits)
        if drop is not None and module.has_rng("qdrop"):
            y = qdrop(module.make_rng("qdrop"), x, y, drop)
        return next_fun(y, *args[1:], **kwargs) if args else next_fun(**{**kwargs, "inputs": y})

    return interceptor
