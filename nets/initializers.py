"""How the layers of the diffusion U-Nets draw their weights."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, variance_scaling, zeros
from jaxtyping import Array

_MODES: dict[str, tuple[Any, Any]] = {
    "xavier_uniform": ("fan_avg", "uniform"),
    "kaiming_uniform": ("fan_in", "uniform"),
    "kaiming_normal": ("fan_in", "normal"),
}


@dataclasses.dataclass(frozen=True)
class LayerInit:
    r"""The distribution that one layer's kernel and bias are drawn from.

    With $n_\text{in} = k^2\,\text{in}$ and $n_\text{out} = k^2\,\text{out}$ ($k=1$ for dense layers) and $U$ uniform
    on $[-1, 1]$, a unit draw is $\sqrt{6/(n_\text{in}+n_\text{out})}\,U$ for ``"xavier_uniform"``,
    $\sqrt{3/n_\text{in}}\,U$ for ``"kaiming_uniform"``, and $\mathcal N(0, 1/n_\text{in})$ for ``"kaiming_normal"``.
    The kernel is ``gain`` times a unit draw, the bias ``bias_gain`` times a unit draw with the fans of its layer.

    Attributes:
      mode: the unit draw: ``"xavier_uniform"``, ``"kaiming_uniform"`` or ``"kaiming_normal"``.
      gain: factor of the kernel; 0 gives exact zeros.
      bias_gain: factor of the bias; 0 gives exact zeros.

    Raises:
      ValueError: for an unknown mode.

    Example:
      >>> import jax
      >>> from poise.nets import LayerInit
      >>> kernel = LayerInit("kaiming_uniform", gain=(1 / 3) ** 0.5).kernel()(jax.random.key(0), (3, 3, 4, 8))
      >>> bool((abs(kernel) <= 36**-0.5).all())
      True
    """

    mode: str = "xavier_uniform"
    gain: float | int = 1
    bias_gain: float | int = 0

    def __post_init__(self):
        if self.mode not in _MODES:
            raise ValueError(f"mode must be one of {sorted(_MODES)}, got {self.mode!r}")

    def kernel(self) -> Initializer:
        """Initializer of a dense kernel ``[in, out]`` or a convolution kernel ``[k, k, in, out]``."""
        if self.gain == 0:
            return zeros
        return variance_scaling(self.gain**2, *_MODES[self.mode])

    def bias(self, fan_in: int, fan_out: int) -> Callable[..., Array]:
        """Initializer of the bias of a layer with these fans."""
        if self.bias_gain == 0:
            return zeros
        fan, distribution = _MODES[self.mode]
        std = self.bias_gain / math.sqrt((fan_in + fan_out) / 2 if fan == "fan_avg" else fan_in)

        def draw(key, shape, dtype=jnp.float32):
            if distribution == "normal":
                return std * jax.random.normal(key, shape, dtype)
            return math.sqrt(3) * std * jax.random.uniform(key, shape, dtype, -1, 1)

        return draw
