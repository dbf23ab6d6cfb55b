"""Distils a diffusion teacher into a one-step generator: ``python -m poise.launch.distill --workdir=runs/digits``.

The run has three phases: a class-conditional EDM teacher is trained, the critics (fake score and ratio head) are warmed
up, and the student is distilled. Then teacher and student are judged against held-out images, and ``report.json``,
``samples.png``, ``distill.png`` and ``student.safetensors`` are written to the working directory. The same command goes
on where a stopped run left off.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from poise.launch.config import ConfigError, field, validate
from poise.launch.main import launch

DIVERGENCES = (
    "reverse_kl", "softened_reverse_kl", "jensen_shannon", "squared_hellinger", "forward_kl", "jeffreys",
    "pearson_chi2", "neyman_chi2", "triangular",
)  # fmt: skip

# jax and everything that needs it is imported when the run starts, so that --help and mistakes answer at once.


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The settings of a distillation run; every field is a flag of the same name."""

    workdir: str = field("", "folder that everything is written to; rerun in it to resume", role="execution")
    data_dir: str = field("", "folder of prepared data sets; empty: <workdir>/data", role="execution")
    seed: int = field(0, "seed of the run: parameters, data order and noise", minimum=0, maximum=2**32 - 1)

    model_channels: int = field(16, "channels of the U-Net's finest level", minimum=4)
    channel_mult: tuple[int, ...] = field((1, 2), "channel multiplier of each level, finest first", minimum=1)
    num_blocks: int = field(1, "residual blocks per level", minimum=1)
    attn_resolutions: tuple[int, ...] = field((4,), "resolutions with self-attention", minimum=1)
    dropout: float = field(0.0, "dropout while the teacher trains", minimum=0.0, maximum=0.9)
    precision: str = field("float32", "what the networks compute in", choices=("float32", "bfloat16"))

    teacher_steps: int = field(2500, "updates of the teacher", minimum=1)
    teacher_batch_size: int = field(64, "images per update of the teacher", minimum=1)
    teacher_learning_rate: float = field(2e-3, "its peak learning rate (cosine to zero)", exclusive_minimum=0.0)
    teacher_ema_halflife: float = field(22_000.0, "half-life of its average, in images", exclusive_minimum=0.0)

    divergence: str = field("jensen_shannon", "the f-divergence that is lowered", choices=DIVERGENCES)
    steps: int = field(
        400, "updates of the student; more than before extends a finished run", role="execution", minimum=1
    )
    warmup_steps: int = field(200, "updates of the critics before the student moves", minimum=0)
    decay_steps: int = field(400, "updates after which the student's learning rate has reached its floor", minimum=1)
    batch_size: int = field(128, "images per update of student and critics", minimum=2)
    fake_updates: int = field(5, "critic updates per update of the student", minimum=1)
    learning_rate: float = field(1e-3, "the student's peak learning rate (cosine to a tenth)", exclusive_minimum=0.0)
    fake_learning_rate: float = field(1e-3, "the fake score's learning rate", exclusive_minimum=0.0)
    head_learning_rate: float = field(1e-3, "the ratio head's learning rate", exclusive_minimum=0.0)
    sigma_min: float = field(0.02, "lowest noise level at which distributions are matched", exclusive_minimum=0.0)
    sigma_max: float = field(5.0, "highest noise level at which distributions are matched", exclusive_minimum=0.0)
    gan_weight: float = field(1e-2, "weight of the student's adversarial loss", minimum=0.0)
    bins: str = field("karras", "bins over which density ratios are normalised", choices=("karras", "linear", "none"))
    bins_decay: float = field(0.9, "decay of the bins' running means", minimum=0.0, maximum=0.9999)
    ema_decay: float = field(0.98, "decay of the student's average", minimum=0.0, maximum=0.999999)

    sampler_steps: int = field(18, "Heun steps of the teacher when it is judged", minimum=2)
    eval_draws: int = field(5, "draws that the reported Fréchet distance is averaged over", role="execution", minimum=1)
    eval_every: int = field(50, "student updates between evaluations; 0: at the end only", role="execution", minimum=0)
    save_every: int = field(100, "steps between checkpoints", role="execution", minimum=1)
    keep: int = field(2, "checkpoints kept per phase", role="execution", minimum=1)
    parallel: str = field("jit", "how a batch is spread over devices", role="execution", choices=("jit",))
    jax_cache_dir: str = field("", "folder of JAX's compilation cache; empty: none", role="execution")

    def __post_init__(self):
        """Checks each field, and those that belong together."""
        validate(self)
        levels, size = len(self.channel_mult), 8  # the digits' height and width
        if not levels or size % 2 ** (levels - 1):
            raise ConfigError(
                f"channel_mult must have 1 to 4 entries, since images of {size}x{size} are halved between levels, "
                f"got {levels}"
            )
        resolutions = [size >> level for level in range(levels)]
        if not set(self.attn_resolutions) <= set(resolutions):
            raise ConfigError(
                f"attn_resolutions must be among the network's resolutions {', '.join(map(str, resolutions))}, "
                f"got {', '.join(map(str, self.attn_resolutions))}"
            )
        if self.model_channels % 4 or (self.model_channels > 128 and self.model_channels % 128):
            raise ConfigError(
                f"model_channels must be a multiple of 4, above 128 one of 128, got {self.model_channels}"
            )
        if not self.sigma_min < self.sigma_max:
            raise ConfigError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")


RECIPES = {
    "digits": {},
    "smoke": {
        "teacher_steps": 6, "warmup_steps": 2, "steps": 4, "batch_size": 8, "teacher_batch_size": 8, "fake_updates": 1,
        "model_channels": 4, "channel_mult": (1,), "attn_resolutions": (), "sampler_steps": 3, "eval_draws": 1,
        "eval_every": 2, "save_every": 2, "decay_steps": 4,
    },
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the launcher and returns its exit code, see :func:`poise.launch.main.launch`."""
    arguments = sys.argv[1:] if argv is None else argv
    return launch(DistillConfig, RECIPES, arguments, run, prog="poise.launch.distill", description=__doc__ or "")


def run(config: DistillConfig, workdir: pathlib.Path) -> None:
    """The whole run, top to bottom: data, networks, training, judgement."""
    from poise.launch.digits import CLASS_NAMES, MAXIMUM, load_digits
    from poise.launch.distill_phases import distill_phases
    from poise.launch.distill_results import write_results
    from poise.launch.loop import fit
    from poise.launch.networks import NetworkConfig
    from poise.launch.pixels import PixelScale
    from poise.launch.quality import Judge

    digits = load_digits(config.data_dir or workdir / "data")
    train, held_out = digits["train"], digits["test"]
    scale = PixelScale.fit(train["image"], MAXIMUM)
    network = NetworkConfig(
        image_shape=train["image"].shape[1:],
        num_classes=len(CLASS_NAMES),
        model_channels=config.model_channels,
        channel_mult=config.channel_mult,
        num_blocks=config.num_blocks,
        attn_resolutions=config.attn_resolutions,
        dropout=config.dropout,
        precision=config.precision,
    )
    judge = Judge(train, held_out, scale)
    result = fit(
        distill_phases(config, network, train, judge),
        workdir=workdir,
        seed=config.seed,
        save_every=config.save_every,
        keep=config.keep,
        parallel=config.parallel,
    )
    write_results(config, network, result, train, judge, CLASS_NAMES, workdir)


if __name__ == "__main__":
    sys.exit(main())
