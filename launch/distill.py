"""Distils a diffusion teacher into a one-step generator: ``python -m poise.launch.distill --workdir=runs/digits``.

The run has three phases: an EDM teacher is trained (unless ``--teacher`` brings one), the critics (fake score and ratio
head) are warmed up, and the student is distilled. Then teacher and student are judged against held-out images, and
``report.json``, ``samples.png``, ``distill.png`` and ``student.safetensors`` are written to the working directory. The
same command goes on where a stopped run left off.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from poise.launch.config import ConfigError, field, validate
from poise.launch.distill_recipes import RECIPES
from poise.launch.execution import BatchConfig
from poise.launch.main import launch
from poise.launch.object_store import settled

DIVERGENCES = (
    "reverse_kl", "softened_reverse_kl", "jensen_shannon", "squared_hellinger", "forward_kl", "jeffreys",
    "pearson_chi2", "neyman_chi2", "triangular",
)  # fmt: skip

PRESETS = (
    "none", "dmd2", "dmd2_no_gan", "dmd2_finetune", "dmd2_sd15", "dmd2_sd15_finetune", "fastgen", "fastgen_imagenet64",
    "fastgen_sd15", "paper_cifar10", "paper_imagenet64", "paper_sd15",
)  # fmt: skip
ARCHITECTURES = ("ddpmpp", "ncsnpp", "adm")

# jax and everything that needs it is imported when the run starts, so that --help and mistakes answer at once.


@dataclasses.dataclass(frozen=True)
class DistillConfig(BatchConfig):
    """The settings of a distillation run; every field is a flag of the same name."""

    workdir: str = field("", "folder that everything is written to; rerun in it to resume", role="execution")
    data: str = field(
        "digits",
        "what is learned: digits, mixture2d (two modes in the plane), synthetic (noise, to measure speed), tfds:NAME, "
        "or folder:PATH of images",
    )
    data_dir: str = field("", "folder of prepared data sets; empty: <workdir>/data", role="execution")
    image_size: int = field(
        0, "side of synthetic images; those of a folder are cropped and resized to it; 0: 32, their own", minimum=0
    )
    eval_images: int = field(5000, "training images, at most, that generated ones are compared with", minimum=10)
    seed: int = field(0, "seed of the run: parameters, data order and noise", minimum=0, maximum=2**32 - 1)

    teacher: str = field("", "folder of a trained teacher, of a run or of convert_edm; empty: train one")
    architecture: str = field("ddpmpp", "the U-Net, unless --teacher brings its own", choices=ARCHITECTURES)
    model_channels: int = field(16, "channels of the U-Net's finest level", minimum=4)
    channel_mult: tuple[int, ...] = field((1, 2), "channel multiplier of each level, finest first", minimum=1)
    num_blocks: int = field(1, "residual blocks per level", minimum=1)
    attn_resolutions: tuple[int, ...] = field((4,), "resolutions with self-attention", minimum=1)
    dropout: float = field(0.0, "dropout while the teacher trains", minimum=0.0, maximum=0.9)
    precision: str = field("float32", "what the networks compute in", choices=("float32", "bfloat16"))
    remat: bool = field(False, "recompute activations in the backward pass: less memory, more time")

    teacher_steps: int = field(2500, "updates of the teacher", minimum=1)
    teacher_batch_size: int = field(64, "images per update of the teacher", minimum=1)
    teacher_learning_rate: float = field(2e-3, "its peak learning rate", exclusive_minimum=0.0)
    teacher_warmup_steps: int = field(0, "updates over which its learning rate rises from zero", minimum=0)
    teacher_decay: bool = field(True, "whether its learning rate then falls to zero along a cosine")
    teacher_ema_halflife: float = field(22_000.0, "half-life of its average, in images", exclusive_minimum=0.0)
    teacher_ema_rampup: float = field(
        0.0, "bound on the half-life, as a share of the images seen; 0: none", minimum=0.0
    )

    preset: str = field(
        "none", "published noise levels, constants, clipping and other things that have no flag here", choices=PRESETS
    )
    divergence: str = field("jensen_shannon", "the f-divergence that is lowered", choices=DIVERGENCES)
    steps: int = field(
        400, "updates of the student; more than before extends a finished run", role="execution", minimum=1
    )
    warmup_steps: int = field(200, "updates of the critics before the student moves", minimum=0)
    decay_steps: int = field(400, "updates in which the student's learning rate falls to a tenth; 0: never", minimum=0)
    batch_size: int = field(128, "images per update of student and critics", minimum=2)
    fake_updates: int = field(5, "critic updates per update of the student", minimum=1)
    learning_rate: float = field(1e-3, "the student's peak learning rate", exclusive_minimum=0.0)
    fake_learning_rate: float = field(1e-3, "the fake score's learning rate", exclusive_minimum=0.0)
    head_learning_rate: float = field(1e-3, "the ratio head's learning rate", exclusive_minimum=0.0)
    weight_decay: float = field(0.0, "weight decay of student, fake score and head", minimum=0.0)
    feature_levels: tuple[int, ...] = field(
        (-1,),
        "levels of the teacher's features, 0 the finest and -1 the coarsest, one head each",
        minimum=-8,
        maximum=7,
    )
    sigma_min: float = field(0.02, "lowest noise level at which distributions are matched", exclusive_minimum=0.0)
    sigma_max: float = field(5.0, "highest noise level at which distributions are matched", exclusive_minimum=0.0)
    gan_weight: float = field(1e-2, "weight of the student's adversarial loss", minimum=0.0)
    r1_weight: float = field(0.0, "weight of the approximate R1 penalty on the head", minimum=0.0)
    guidance_scale: float = field(1.0, "classifier-free guidance of the teacher; 1: none", minimum=0.0)
    bins: str = field("karras", "bins over which density ratios are normalised", choices=("karras", "linear", "none"))
    bins_decay: float = field(0.9, "decay of the bins' running means", minimum=0.0, maximum=0.9999)
    ratio_min: float = field(0.0, "lower bound on density ratios, below 1", minimum=0.0, exclusive_maximum=1.0)
    ratio_max: float = field(0.0, "upper bound on density ratios, above 1; 0: bounded log-ratios alone", minimum=0.0)
    ema_decay: float = field(0.98, "decay of the student's average", minimum=0.0, maximum=0.999999)

    sampler_steps: int = field(18, "Heun steps of the teacher when it is judged", minimum=2)
    eval_draws: int = field(5, "draws that the reported Fréchet distance is averaged over", role="execution", minimum=1)
    eval_every: int = field(50, "student updates between evaluations; 0: at the end only", role="execution", minimum=0)
    save_every: int = field(100, "steps between checkpoints; 0: by time alone", role="execution", minimum=0)

    def __post_init__(self):
        """Checks each field, and those that belong together."""
        validate(self)
        kind, _, place = self.data.partition(":")
        if kind == "folder" and place:  # as a run's other places, wherever it is resumed or looked at from
            object.__setattr__(self, "data", f"folder:{pathlib.Path(place).expanduser().absolute()}")
        if self.teacher:
            object.__setattr__(self, "teacher", settled(self.teacher, absolute=True))
        if (kind, bool(place)) not in (
            ("digits", False),
            ("mixture2d", False),
            ("synthetic", False),
            ("tfds", True),
            ("folder", True),
        ):
            raise ConfigError(f"data must be digits, mixture2d, synthetic, tfds:NAME or folder:PATH, got {self.data!r}")
        if kind == "mixture2d" and self.teacher:
            raise ConfigError(f"teacher must be empty for data=mixture2d, whose teacher is exact, got {self.teacher!r}")
        if self.image_size and kind not in ("folder", "synthetic"):
            raise ConfigError(f"image_size must be 0 for data={self.data}, whose size is known, got {self.image_size}")
        if self.model_channels % 4 or (self.model_channels > 128 and self.model_channels % 32):
            raise ConfigError(f"model_channels must be a multiple of 4, above 128 one of 32, got {self.model_channels}")
        if not self.channel_mult:
            raise ConfigError("channel_mult must have at least one entry, got none")
        if not self.feature_levels:
            raise ConfigError("feature_levels must have at least one entry, got none")
        if not self.sigma_min < self.sigma_max:
            raise ConfigError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")
        if bool(self.ratio_min) != bool(self.ratio_max) or (self.ratio_max and self.ratio_max <= 1):
            raise ConfigError(
                "ratio_min and ratio_max must both be 0, or lie below and above 1, "
                f"got {self.ratio_min} and {self.ratio_max}"
            )
        if kind == "digits" and not self.teacher:
            check_levels(self, 8)


def check_levels(config: DistillConfig, size: int) -> None:
    """Makes sure that the U-Net's levels fit images of this height and width.

    Raises:
      ConfigError: naming the flag.
    """
    levels = len(config.channel_mult)
    if size % 2 ** (levels - 1):
        raise ConfigError(
            f"channel_mult must have fewer entries, since images of {size}x{size} are halved between levels, "
            f"got {levels}"
        )
    resolutions = [size >> level for level in range(levels)]
    if not set(config.attn_resolutions) <= set(resolutions):
        raise ConfigError(
            f"attn_resolutions must be among the network's resolutions {', '.join(map(str, resolutions))}, "
            f"got {', '.join(map(str, config.attn_resolutions))}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the launcher and returns its exit code, see :func:`poise.launch.main.launch`."""
    arguments = sys.argv[1:] if argv is None else argv
    return launch(
        DistillConfig, RECIPES, arguments, run, prog="poise.launch.distill", description=__doc__ or "", check=check
    )


def check(config: DistillConfig) -> None:
    """Looks at the data and the teacher before anything is written.

    Raises:
      ConfigError: if they don't fit each other or the flags.
    """
    from poise.launch.devices import check_devices
    from poise.launch.distill_phases import settings_of
    from poise.launch.image_sets import open_images
    from poise.launch.teachers import read_description

    own_teacher = not config.teacher and config.data != "mixture2d"
    check_devices(config, "batch_size", *(["teacher_batch_size"] if own_teacher else []))
    try:
        settings_of(config, 0.5)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    shape, classes, maximum = (8, 8, 1), 10, 16  # the digits
    if config.data == "mixture2d":
        if config.guidance_scale != 1.0:
            raise ConfigError(f"guidance_scale must be 1 for data=mixture2d, got {config.guidance_scale}")
        return
    if config.data != "digits":
        images = open_images(config.data, config.data_dir, config.image_size).train
        shape, classes, maximum = images.image_shape, len(images.class_names), images.maximum
    levels = len(config.channel_mult)
    if not config.teacher:
        check_levels(config, shape[0])
    else:
        found = read_description(config.teacher)
        levels = len(found["network"].architecture.get("channel_mult", (1, 2, 2, 2)))
        has = (found["network"].image_shape, found["scale"].maximum, found["network"].num_classes)
        classes = min(classes, has[2])  # a teacher without classes learns from images alone
        if has != (shape, maximum, classes):
            raise ConfigError(
                "the teacher must be one of the data's images: its network has shape, largest pixel value and classes "
                f"{has}, the data has {(shape, maximum, classes)}"
            )
    if config.guidance_scale != 1.0 and not classes:
        raise ConfigError(f"guidance_scale must be 1 without classes, got {config.guidance_scale}")
    if not all(-levels <= level < levels for level in config.feature_levels):
        given = ",".join(map(str, config.feature_levels))
        raise ConfigError(f"feature_levels must be levels of the network, from {-levels} to {levels - 1}, got {given}")


def run(config: DistillConfig, workdir: pathlib.Path) -> None:
    """The whole run, top to bottom: data, teacher, networks, training, judgement."""
    if config.data == "mixture2d":
        from poise.launch.mixture2d import run_mixture2d

        return run_mixture2d(config, workdir)
    import jax

    from poise.launch.agreement import is_main, main_first
    from poise.launch.distill_phases import distill_phases, network_of
    from poise.launch.distill_results import write_results
    from poise.launch.image_sets import ImageSplits, Unlabelled, first_images, open_images
    from poise.launch.loop import fit
    from poise.launch.pixels import PixelScale
    from poise.launch.quality import Judge
    from poise.launch.teachers import describe_teacher, load_teacher

    data_dir = config.data_dir or (workdir / "data" if config.data == "digits" else "")
    images = main_first(lambda: open_images(config.data, data_dir, config.image_size))
    loaded = load_teacher(config.teacher) if config.teacher else None
    if loaded is not None and not loaded.network.num_classes:
        images = ImageSplits(*map(Unlabelled, images))
    train, held_out = (first_images(part, config.eval_images) for part in images)
    class_names = images.train.class_names
    if loaded is not None:
        network, scale = loaded.network._replace(precision=config.precision), loaded.scale
        start = jax.device_get(loaded.variables)
    else:
        scale = PixelScale.fit(train["image"], images.train.maximum) if config.data == "digits" else PixelScale.edm()
        network, start = network_of(config, images.train), None
        if is_main():
            describe_teacher(workdir, network, scale, class_names, config.teacher_steps)
    judge = Judge(train, held_out, scale)
    result = fit(
        distill_phases(config, network, images.train, judge),
        workdir=workdir,
        seed=config.seed,
        start=start,
        **config.for_fit(),
    )
    if is_main():
        write_results(config, network, result, train, judge, class_names, workdir)


if __name__ == "__main__":
    sys.exit(main())
