"""The settings of f-distill, checked when they are made."""

import dataclasses
import itertools
import math

from poise.core.arguments import check_choice
from poise.fdistill.divergences import FDivergence, divergence

_CHOICES = {
    "bins": ("karras", "linear", "none"),
    "matching_weighting": ("dmd", "score"),
    "head_features": ("teacher", "fake", "own"),
    "r1_image": ("noised", "clean"),
    "fake_weighting": ("edm", "epsilon", "none"),
}
_SWITCHES = ("train_features", "gan_own_noise", "gan_same_noise", "critics_on_student_step")


@dataclasses.dataclass(frozen=True)
class FDistillConfig:
    r"""Settings of :func:`poise.fdistill.f_distill`.

    Attributes:
      divergence: the f-divergence, by name (see :func:`poise.fdistill.divergence`) or as a value.
      sigma_init: the noise level at which the student is called, once.
      sigma_min: the lowest noise level at which the distributions are matched.
      sigma_max: the highest.
      rho: curvature of the grid of noise levels.
      levels: an ascending grid of noise levels instead of 1000 between these two, from which levels are drawn evenly.
      min_level: index of the lowest level of the grid that the student's loss uses.
      max_level: index of the highest, inclusive.
      fake_min_level: index of the lowest level of the critics' losses.
      fake_max_level: index of the highest, inclusive.
      fake_updates: critic updates (fake score and head) for one student update.
      critics_on_student_step: whether the first of these updates takes the very images that the student's update
        generated, as DMD2 does, whose every iteration trains the critics; else all take fresh ones, as FastGen does.
      matching_weighting: what multiplies the difference $D_\mathrm{fake} - D_\mathrm{teacher}$ beside the weight:
        ``"dmd"`` is $1/(\mathrm{mean}|x - D_\mathrm{teacher}| + \epsilon)$, ``"score"`` is $1/\sigma^2$, which makes
        it the difference of the scores: the gradient of the f-divergence itself.
      matching_eps: $\epsilon$; 1e-6 as FastGen. DMD2 has 0 and turns the NaN that may follow into zeros.
      bins: how density ratios are normalised over noise levels: ``"karras"`` bins hold equal shares of the levels,
        ``"linear"`` bins are uniform in sigma (as the official code has them), ``"none"`` leaves the ratios alone.
      num_bins: the number of bins.
      bins_decay: the decay of each bin's running mean; 0 uses the batch alone.
      weight_eps: added to the counts and means that ratios and weights are divided by; 1e-6 as FastGen.
      ratio_clip: bound on the log density ratio.
      ratio_range: bounds on the density ratio itself, after that, as the official code has them; None for none.
      head_features: what the head sees: ``"teacher"`` for the frozen teacher's features (FastGen), ``"fake"`` for those
        of the fake score (DMD2), ``"own"`` for the noised image itself; then the head is a discriminator of its own,
        ``(x, sigma, labels) -> logits``.
      train_features: whether the head's loss trains the fake score, too, whose features it sees, so that one optimizer
        moves both (DMD2); only with ``head_features="fake"``.
      gan_own_noise: whether the adversarial losses draw noise of their own for the generated images, at the critics'
        levels, as DMD2 does; else they judge the images that the matching and the fake score see. The ratio is always
        taken where the distributions are matched.
      gan_same_noise: whether real images get the noise levels and the noise of the generated ones.
      gan_weight: weight of the student's adversarial loss; 0 is allowed, since the head is trained by a loss of its own
        (the paper's runs without adversarial loss).
      discriminator_weight: weight of the head's loss. It trains the ratio, so only reverse-KL can do without.
      r1_weight: weight of the approximate R1 penalty on the head; 0 leaves it out.
      r1_noise: standard deviation of the penalty's perturbation.
      r1_image: what is perturbed, the ``"noised"`` real image or, as in FastGen, the ``"clean"`` one, which the head
        then judges as if it were at that noise level.
      fake_weighting: weight of the fake score's loss: ``"edm"`` is $1/\sigma^2 + 1/\sigma_d^2$, ``"epsilon"`` is
        $1/\sigma^2$, ``"none"`` is 1.
      sigma_data: the data's standard deviation.
      guidance_scale: classifier-free guidance of the teacher; 1 is none.
      regression_weight: weight of the student's regression towards images that the teacher made from the same latents
        (DMD's loss; the later methods do without).
      ema_decays: decays of the averages of the student that are kept, the first being the one that is used.

    Raises:
      TypeError: if a switch is neither True nor False.
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
    levels: tuple[float, ...] | None = None
    min_level: int = 2
    max_level: int = 998
    fake_min_level: int = 0
    fake_max_level: int = 999
    fake_updates: int = 5
    critics_on_student_step: bool = False
    matching_weighting: str = "dmd"
    matching_eps: float = 1e-6
    bins: str = "karras"
    num_bins: int = 10
    bins_decay: float = 0.9
    weight_eps: float = 0.0
    ratio_clip: float = 10.0
    ratio_range: tuple[float, float] | None = (0.1, 20.0)
    head_features: str = "teacher"
    train_features: bool = False
    gan_own_noise: bool = False
    gan_same_noise: bool = False
    gan_weight: float = 1e-3
    discriminator_weight: float = 1.0
    r1_weight: float = 0.0
    r1_noise: float = 0.1
    r1_image: str = "noised"
    fake_weighting: str = "edm"
    sigma_data: float = 0.5
    guidance_scale: float = 1.0
    regression_weight: float = 0.0
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
        for name in (
            "gan_weight", "discriminator_weight", "r1_weight", "guidance_scale", "regression_weight", "matching_eps",
            "weight_eps",
        ):  # fmt: skip
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
        if self.levels is not None and not (
            len(self.levels) > 0
            and 0 < self.levels[0] <= self.levels[-1] < math.inf
            and all(a < b for a, b in itertools.pairwise(self.levels))
        ):
            raise ValueError("levels must be positive, finite and ascending, or None")
        last = 999 if self.levels is None else len(self.levels) - 1
        for low, high in (("min_level", "max_level"), ("fake_min_level", "fake_max_level")):
            if not 0 <= getattr(self, low) <= getattr(self, high) <= last:
                raise ValueError(
                    f"{low} and {high} must satisfy 0 <= {low} <= {high} <= {last}, "
                    f"got {getattr(self, low)} and {getattr(self, high)}"
                )
        if self.ratio_range is not None and not 0 < self.ratio_range[0] < self.ratio_range[1] < math.inf:
            raise ValueError(f"ratio_range must be 0 < low < high or None, got {self.ratio_range}")
        if not 0 <= self.bins_decay < 1:
            raise ValueError(f"bins_decay must be in [0, 1), got {self.bins_decay}")
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.train_features and self.head_features != "fake":
            raise ValueError(
                f"train_features must be False unless head_features is 'fake', got head_features {self.head_features!r}"
            )
        if not self.ema_decays or not all(0 <= decay < 1 for decay in self.ema_decays):
            raise ValueError(f"ema_decays must be one or more numbers in [0, 1), got {self.ema_decays}")

    @property
    def resolved_divergence(self) -> FDivergence:
        """The divergence as a value."""
        return divergence(self.divergence) if isinstance(self.divergence, str) else self.divergence
