"""The settings of f-distill, checked when they are made."""

import dataclasses
import math

from poise.fdistill.divergences import FDivergence, divergence

_BINS = ("karras", "linear", "none")
_WEIGHTINGS = ("edm", "none")


@dataclasses.dataclass(frozen=True)
class FDistillConfig:
    r"""Settings of :func:`poise.fdistill.f_distill`.

    Attributes:
      divergence: the f-divergence, by name (see :func:`poise.fdistill.divergence`) or as a value.
      sigma_init: the noise level at which the student is called, once.
      sigma_min: the lowest noise level at which the distributions are matched.
      sigma_max: the highest.
      rho: curvature of the grid of noise levels.
      min_level: index of the lowest level, of a grid of 1000 ascending ones, that the student's loss uses.
      max_level: index of the highest, inclusive. The critics see the whole grid.
      fake_updates: critic updates (fake score and head) for one student update.
      bins: how density ratios are normalised over noise levels: ``"karras"`` bins hold equal shares of the levels,
        ``"linear"`` bins are uniform in sigma (as the official code has them), ``"none"`` leaves the ratios alone.
      num_bins: the number of bins.
      bins_decay: the decay of each bin's running mean; 0 uses the batch alone.
      ratio_clip: bound on the log density ratio.
      ratio_range: bounds on the density ratio itself, after that, as the official code has them; None for none.
      gan_weight: weight of the student's adversarial loss; 0 is allowed, since the head is trained by a loss of its own
        (the paper's runs without adversarial loss).
      discriminator_weight: weight of the head's loss. It trains the ratio, so only reverse-KL can do without.
      r1_weight: weight of the approximate R1 penalty on the head; 0 leaves it out.
      r1_noise: standard deviation of the penalty's perturbation, of the noised real image (the official code perturbs
        the clean one).
      fake_weighting: weight of the fake score's loss: ``"edm"`` is $1/\sigma^2 + 1/\sigma_d^2$, ``"none"`` is 1.
      sigma_data: the data's standard deviation.
      guidance_scale: classifier-free guidance of the teacher; 1 is none.
      ema_decays: decays of the averages of the student that are kept, the first being the one that is used.

    Raises:
      ValueError: naming the field, what came and what is allowed.

    Example:
      >>> from poise.fdistill import FDistillConfig
      >>> FDistillConfig(divergence="forward_kl").fake_updates
      5
      >>> FDistillConfig(fake_updates=0)
      Traceback (most recent call last):
      ...
      ValueError: fake_updates must be an integer of at least 1, got 0
    """

    divergence: str | FDivergence = "jensen_shannon"
    sigma_init: float = 80.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    min_level: int = 2
    max_level: int = 998
    fake_updates: int = 5
    bins: str = "karras"
    num_bins: int = 10
    bins_decay: float = 0.9
    ratio_clip: float = 10.0
    ratio_range: tuple[float, float] | None = (0.1, 20.0)
    gan_weight: float = 1e-3
    discriminator_weight: float = 1.0
    r1_weight: float = 0.0
    r1_noise: float = 0.1
    fake_weighting: str = "edm"
    sigma_data: float = 0.5
    guidance_scale: float = 1.0
    ema_decays: tuple[float, ...] = (0.9996, 0.9999, 0.99995)

    def __post_init__(self):
        """Checks every field."""
        resolved = self.resolved_divergence
        for name in ("sigma_init", "sigma_min", "sigma_max", "rho", "ratio_clip", "sigma_data", "r1_noise"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")
        for name in ("gan_weight", "discriminator_weight", "r1_weight", "guidance_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        if self.discriminator_weight == 0 and (resolved.name != "reverse_kl" or self.gan_weight > 0):
            raise ValueError(
                "discriminator_weight must be above 0, since the head that it trains supplies the density ratio and "
                f"the adversarial loss; 0 is allowed only for reverse_kl with gan_weight 0, got divergence "
                f"{resolved.name!r} and gan_weight {self.gan_weight}"
            )
        for name in ("fake_updates", "num_bins"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value}")
        if not 0 <= self.min_level <= self.max_level <= 999:
            raise ValueError(
                f"min_level and max_level must satisfy 0 <= min_level <= max_level <= 999, "
                f"got {self.min_level} and {self.max_level}"
            )
        if self.ratio_range is not None and not 0 < self.ratio_range[0] < self.ratio_range[1] < math.inf:
            raise ValueError(f"ratio_range must be 0 < low < high or None, got {self.ratio_range}")
        if not 0 <= self.bins_decay < 1:
            raise ValueError(f"bins_decay must be in [0, 1), got {self.bins_decay}")
        for name, allowed in (("bins", _BINS), ("fake_weighting", _WEIGHTINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not self.ema_decays or not all(0 <= decay < 1 for decay in self.ema_decays):
            raise ValueError(f"ema_decays must be one or more numbers in [0, 1), got {self.ema_decays}")

    @property
    def resolved_divergence(self) -> FDivergence:
        """The divergence as a value."""
        return divergence(self.divergence) if isinstance(self.divergence, str) else self.divergence
