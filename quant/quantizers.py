"""The quantizers that reconstruction trains: one small interface over AdaRound, FlexRound, LRQ and NUPES."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from poise.core.arguments import check_choice, check_count, check_range
from poise.core.arrays import at_least_float32
from poise.quant.adaround import (
    adaround_beta,
    adaround_codes,
    adaround_hard,
    adaround_init,
    adaround_regularizer,
    adaround_soft,
)
from poise.quant.checks import Axis, check_bits
from poise.quant.flexround import (
    FlexRoundParams,
    LRQParams,
    flexround,
    flexround_codes,
    flexround_init,
    lrq,
    lrq_codes,
    lrq_init,
)
from poise.quant.nupes import NupesParams, nupes_beta, nupes_codes, nupes_hard, nupes_init, nupes_soft
from poise.quant.qparams import absmax_scale, minmax_qparams, mse_qparams
from poise.quant.quantized_tensor import QuantizedTensor, quantized_tensor

Parameters = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Quantizer(abc.ABC):
    """How the weights of a block are quantized while it is reconstructed; a base of the four below.

    Attributes:
      bits: from 2 to 8.
      axis: the axes of a weight that share one scale; None for all, ``"channel"`` for all but the last (the outputs of
        a Flax kernel).

    Raises:
      ValueError: if ``bits`` is out of range.
    """

    bits: int
    axis: Axis | str = "channel"
    method: ClassVar[str]
    learned: ClassVar[tuple[str, ...]]

    def __post_init__(self):
        check_bits(self.bits, low=2)
        if isinstance(self.axis, str):
            check_choice("axis", self.axis, ("channel",))

    def axes(self, w: Array) -> Axis:
        """The axes of a group, for one weight."""
        return tuple(range(jnp.ndim(w) - 1)) if isinstance(self.axis, str) else self.axis

    @abc.abstractmethod
    def init(self, w: Array, key: PRNGKeyArray) -> Parameters:
        """What is learned and what is kept, by name, from a weight and a random key."""

    @abc.abstractmethod
    def soft(self, w: Array, parameters: Parameters, step: Array, total: int) -> Array:
        """The weight at a step of the reconstruction, from 1 to ``total``; differentiable."""

    @abc.abstractmethod
    def hard(self, w: Array, parameters: Parameters) -> Array:
        """The quantized weight."""

    @abc.abstractmethod
    def store(self, w: Array, parameters: Parameters) -> QuantizedTensor:
        """The quantized weight as integers."""

    def regularizer(self, parameters: Parameters, step: Array, total: int) -> Array:
        """What is added to the loss at a step."""
        del parameters, step, total
        return jnp.zeros(())

    def _stored(self, w: Array, codes: Array, scale: Array, *rest: Any, **options: Any) -> QuantizedTensor:
        return quantized_tensor(
            codes, scale, *rest, bits=self.bits, packed_axis=packing_axis(jnp.shape(w)), dtype=w.dtype, **options
        )


@dataclasses.dataclass(frozen=True)
class AdaRound(Quantizer):
    """AdaRound: each weight goes up or down; see :func:`adaround_soft`.

    Attributes:
      bits: from 2 to 8.
      axis: the axes that share one scale.
      symmetric: no zero point.
      search: scales of the least error instead of the weights' range, as in the reference code.
      strength: of the regularizer.
      warmup: the part of the steps without it.

    Raises:
      ValueError: if a field is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import AdaRound
      >>> w, quantizer = jnp.array([[0.3, -0.8], [1.0, 0.2]]), AdaRound(bits=4)
      >>> sorted(quantizer.init(w, jax.random.key(0)))
      ['scale', 'v', 'zero_point']
    """

    symmetric: bool = False
    search: bool = True
    strength: float = 0.01
    warmup: float = 0.2
    method: ClassVar[str] = "adaround"
    learned: ClassVar[tuple[str, ...]] = ("v",)

    def __post_init__(self):
        super().__post_init__()
        check_range("strength", self.strength, 0.0)
        check_range("warmup", self.warmup, 0.0, 1.0, open_high=True)

    def init(self, w, key):
        """Rounding variables, scale and, unless symmetric, zero point."""
        del key
        wide, zero_point = at_least_float32(w), None
        if self.search:
            scale, zero_point = mse_qparams(wide, self.bits, self.axes(w), symmetric=self.symmetric)
        elif self.symmetric:
            scale = absmax_scale(wide, self.bits, self.axes(w))
        else:
            scale, zero_point = minmax_qparams(wide, self.bits, self.axes(w))
        fixed = {"scale": scale}
        if not self.symmetric and zero_point is not None:
            fixed["zero_point"] = zero_point.astype(scale.dtype)
        return {"v": adaround_init(wide, scale), **fixed}

    def soft(self, w, parameters, step, total):
        """See :func:`adaround_soft`."""
        del step, total
        return adaround_soft(w, *_adaround(parameters), bits=self.bits)

    def hard(self, w, parameters):
        """See :func:`adaround_hard`."""
        return adaround_hard(w, *_adaround(parameters), bits=self.bits)

    def store(self, w, parameters):
        """See :func:`adaround_codes`."""
        codes, zero_point = adaround_codes(w, *_adaround(parameters), bits=self.bits)
        return self._stored(w, codes, parameters["scale"], zero_point)

    def regularizer(self, parameters, step, total):
        """See :func:`adaround_regularizer`; zero while warming up."""
        penalty = adaround_regularizer(parameters["v"], adaround_beta(step, total, self.warmup))
        return jnp.where(step < self.warmup * total, 0.0, self.strength * penalty)


@dataclasses.dataclass(frozen=True)
class FlexRound(Quantizer):
    """FlexRound: a divisor for each weight, and the grid size; see :func:`flexround`.

    Attributes:
      bits: from 2 to 8.
      axis: the axes that share one grid size.
      symmetric: no zero point.
      search: grid sizes of the least error instead of the weights' range, to start with.

    Raises:
      ValueError: if a field is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import FlexRound
      >>> quantizer = FlexRound(bits=3, symmetric=True)
      >>> sorted(quantizer.init(jnp.array([[0.3, -0.8], [1.0, 0.2]]), jax.random.key(0)))
      ['log_s1', 'log_s2', 'log_s3', 'log_start', 'start']
    """

    symmetric: bool = False
    search: bool = False
    method: ClassVar[str] = "flexround"
    learned: ClassVar[tuple[str, ...]] = ("log_s1", "log_s2", "log_s3", "log_s4")

    def init(self, w, key):
        """See :func:`flexround_init`."""
        del key
        options = {"symmetric": self.symmetric, "search": self.search, "channel_axis": -1}
        return _present(flexround_init(at_least_float32(w), bits=self.bits, axis=self.axes(w), **options))

    def soft(self, w, parameters, step, total):
        """See :func:`flexround`."""
        del step, total
        return self.hard(w, parameters)

    def hard(self, w, parameters):
        """See :func:`flexround`."""
        return flexround(w, FlexRoundParams(**parameters), bits=self.bits)

    def store(self, w, parameters):
        """See :func:`flexround_codes`."""
        return self._stored(w, *flexround_codes(w, FlexRoundParams(**parameters), bits=self.bits))


@dataclasses.dataclass(frozen=True)
class LRQ(Quantizer):
    """LRQ: FlexRound with divisors of low rank, for matrices; see :func:`lrq`.

    Attributes:
      bits: from 2 to 8.
      axis: the axes that share one grid size.
      symmetric: no zero point.
      search: grid sizes of the least error instead of the weights' range, to start with.
      rank: of the divisors' logarithm.

    Raises:
      ValueError: if a field is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import LRQ
      >>> LRQ(bits=3, rank=2).init(jnp.ones((6, 4)), jax.random.key(0))["left"].shape
      (6, 2)
    """

    symmetric: bool = False
    search: bool = False
    rank: int = 16
    method: ClassVar[str] = "lrq"
    learned: ClassVar[tuple[str, ...]] = ("log_s1", "left", "right", "row", "column")

    def __post_init__(self):
        super().__post_init__()
        check_count("rank", self.rank)

    def init(self, w, key):
        """See :func:`lrq_init`."""
        options = {"symmetric": self.symmetric, "search": self.search, "channel_axis": -1}
        start = lrq_init(at_least_float32(w), bits=self.bits, axis=self.axes(w), rank=self.rank, key=key, **options)
        return _present(start)

    def soft(self, w, parameters, step, total):
        """See :func:`lrq`."""
        del step, total
        return self.hard(w, parameters)

    def hard(self, w, parameters):
        """See :func:`lrq`."""
        return lrq(w, LRQParams(**parameters), bits=self.bits)

    def store(self, w, parameters):
        """See :func:`lrq_codes`."""
        return self._stored(w, *lrq_codes(w, LRQParams(**parameters), bits=self.bits))


@dataclasses.dataclass(frozen=True)
class Nupes(Quantizer):
    """NUPES: the codes themselves and the exponent of a power quantizer; see :func:`nupes_soft`.

    Attributes:
      bits: from 2 to 8.
      axis: the axes that share one scale.
      exponent: to start with; None for that of :func:`power_search`.
      learn_scale: whether the scale is learned, too.
      beta_start: the sharpness at the first step.
      beta_end: at the last one.

    Raises:
      ValueError: if a field is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import Nupes
      >>> sorted(Nupes(bits=4, exponent=0.5).init(jnp.ones((2, 2)), jax.random.key(0)))
      ['codes', 'log_gain', 'rho', 'scale']
    """

    exponent: float | None = None
    learn_scale: bool = False
    beta_start: float = 1.0
    beta_end: float = 40.0
    method: ClassVar[str] = "nupes"

    def __post_init__(self):
        super().__post_init__()
        check_range("exponent", self.exponent, 0.0, open_low=True, open_high=True)
        check_range("beta_start", self.beta_start, 0.0, open_low=True)
        check_range("beta_end", self.beta_end, 0.0, open_low=True)

    @property
    def learned(self) -> tuple[str, ...]:
        """The names of what is learned."""
        return ("codes", "rho", "log_gain") if self.learn_scale else ("codes", "rho")

    def init(self, w, key):
        """See :func:`nupes_init`."""
        del key
        start = nupes_init(at_least_float32(w), bits=self.bits, axis=self.axes(w), exponent=self.exponent)
        return _present(start)

    def soft(self, w, parameters, step, total):
        """See :func:`nupes_soft`."""
        beta = nupes_beta(step, total, self.beta_start, self.beta_end)
        return nupes_soft(NupesParams(**parameters), beta, bits=self.bits).astype(w.dtype)

    def hard(self, w, parameters):
        """See :func:`nupes_hard`."""
        return nupes_hard(NupesParams(**parameters), bits=self.bits).astype(w.dtype)

    def store(self, w, parameters):
        """See :func:`nupes_codes`."""
        codes, scale, exponent = nupes_codes(NupesParams(**parameters), bits=self.bits)
        return self._stored(w, codes, scale, scheme="power", exponent=exponent)


QUANTIZERS: dict[str, type[Quantizer]] = {kind.method: kind for kind in (AdaRound, FlexRound, LRQ, Nupes)}


def packing_axis(shape: Sequence[int]) -> int:
    """The axis along which a weight is packed: the last but one if it fills whole groups, else the longest that does.

    Neighbours along an axis that is not the last are whole rows, which unpack without a shuffle.

    Example:
      >>> from poise.quant.quantizers import packing_axis
      >>> packing_axis((16, 3)), packing_axis((3, 16)), packing_axis((3, 5))
      (-2, -1, -2)
    """
    order = sorted(range(-len(shape), 0), key=lambda axis: (shape[axis] % 8 == 0, axis == -2, shape[axis]))
    return order[-1]


def _adaround(parameters: Parameters) -> tuple[Array, Array, Array | None]:
    return parameters["v"], parameters["scale"], parameters.get("zero_point")


def _present(parameters: Any) -> Parameters:
    return {name: value for name, value in parameters._asdict().items() if value is not None}
