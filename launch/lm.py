"""Trains byte language models that differ in their attention alone and compares them on contexts longer than trained.

Each kind of attention (``softmax``; ``softmax_scaled``, with normalized queries and keys and the log-length scale;
``lssa``; ``lssar_p3``; ``lssar_p15``) is one phase of the run, with the same batches and the same seed. The loss on
held-out text is measured at 1, 2, 4, 8 and 16 times the training length; ``report.json``, ``extrapolation.png`` and
``samples.txt`` are written to the working directory, a table is printed. The same command goes on where a stopped run
left off.
"""

import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from poise.launch.config import ConfigError, field, parse_names, validate
from poise.launch.execution import BatchConfig
from poise.launch.main import launch

VARIANTS = ("softmax", "softmax_scaled", "lssa", "lssar_p3", "lssar_p15")

RECIPES: dict[str, dict[str, Any]] = {
    "topics": {},
    # Seconds, to see that everything works.
    "smoke": {
        "variants": "softmax,lssar_p15", "steps": 4, "decay_steps": 4, "warmup_steps": 1, "batch_size": 4, "length": 16,
        "width": 16, "num_layers": 1, "num_heads": 1, "eval_tokens": 512, "eval_factors": (1, 4), "sample_tokens": 20,
        "save_every": 2,
    },
    # All five kinds, the table of the documentation.
    "all": {"variants": ",".join(VARIANTS)},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig(BatchConfig):
    """The settings of a language-model run; every field is a flag of the same name."""

    workdir: str = field("", "folder that everything is written to; rerun in it to resume", role="execution")
    data: str = field("topics", "the text: topics (CPython's help texts), file:PATH, or tfds:NAME")
    data_dir: str = field("", "folder of prepared TFDS sets; empty: TFDS's own", role="execution")
    text_key: str = field("text", "the feature of a TFDS set that holds the text")
    vocab_size: int = field(
        0, "tokens of a byte-pair vocabulary trained on the text, at least 257; 0: bytes", minimum=0
    )
    held_out: str = field("test", "the part of the text that losses are reported of", choices=("test", "validation"))
    seed: int = field(0, "seed of the run: parameters and data order", minimum=0, maximum=2**32 - 1)

    variants: str = field("softmax,softmax_scaled,lssar_p15", f"kinds of attention, in order: {', '.join(VARIANTS)}")
    num_layers: int = field(3, "layers", minimum=1)
    num_heads: int = field(2, "attention heads", minimum=1)
    width: int = field(64, "width of the residual stream, an even multiple of num_heads", minimum=2)
    mlp_ratio: int = field(4, "hidden width of the MLPs over the width", minimum=1)
    rope_base: float = field(5.0, "base of the rotary positions; small ones extrapolate", exclusive_minimum=0.0)
    precision: str = field("float32", "what the network computes in", choices=("float32", "bfloat16"))

    length: int = field(64, "tokens predicted per training window", minimum=4)
    steps: int = field(1000, "updates of each model", minimum=1)
    batch_size: int = field(32, "windows per update", minimum=1)
    learning_rate: float = field(3e-3, "peak learning rate", exclusive_minimum=0.0)
    warmup_steps: int = field(50, "updates over which the learning rate rises from zero", minimum=0)
    decay_steps: int = field(1000, "updates in which it falls to a tenth along a cosine", minimum=1)
    weight_decay: float = field(0.05, "weight decay of AdamW", minimum=0.0)

    eval_factors: tuple[int, ...] = field(
        (1, 2, 4, 8, 16), "context lengths of the evaluation, in training lengths; each divides the last", minimum=1
    )
    eval_tokens: int = field(45_056, "held-out tokens, at most, that are predicted at every length", minimum=1)
    eval_every: int = field(0, "updates between evaluations; 0: at the end only", role="execution", minimum=0)
    prompt: str = field("The ", "what the sampled texts begin with", role="execution")
    sample_tokens: int = field(400, "tokens of a sampled text; 0: none", role="execution", minimum=0)
    temperature: float = field(0.8, "of the sampled texts; 0: the likeliest token", role="execution", minimum=0.0)

    def __post_init__(self):
        """Checks each field, and those that belong together."""
        validate(self)
        object.__setattr__(self, "variants", ",".join(parse_names("variants", self.variants, VARIANTS)))
        if 0 < self.vocab_size < 257:
            raise ConfigError(f"vocab_size must be 0 or at least 257, got {self.vocab_size}")
        if self.width % (2 * self.num_heads):
            raise ConfigError(f"width must be an even multiple of num_heads={self.num_heads}, got {self.width}")
        if self.eval_factors[:1] != (1,) or any(self.eval_factors[-1] % factor for factor in self.eval_factors):
            given = ",".join(map(str, self.eval_factors))
            raise ConfigError(f"eval_factors must begin with 1 and divide their last, got {given or 'none'}")
        if self.eval_every and self.steps % self.eval_every:
            raise ConfigError(f"eval_every must divide steps={self.steps}, got {self.eval_every}")
        if not self.prompt:
            raise ConfigError("prompt must have at least one character, got none")
        kind, _, place = self.data.partition(":")
        if (kind, bool(place)) not in (("topics", False), ("file", True), ("tfds", True)):
            raise ConfigError(f"data must be topics, file:PATH or tfds:NAME, got {self.data!r}")
        if kind == "file":  # the same text wherever the run is resumed from
            object.__setattr__(self, "data", f"file:{pathlib.Path(place).expanduser().absolute()}")

    @property
    def variant_names(self) -> tuple[str, ...]:
        """The kinds of attention, in order."""
        return tuple(self.variants.split(","))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the launcher and returns its exit code, see :func:`poise.launch.main.launch`."""
    arguments = sys.argv[1:] if argv is None else argv
    return launch(
        LanguageModelConfig, RECIPES, arguments, run, prog="poise.launch.lm", description=__doc__ or "", check=check
    )


def check(config: LanguageModelConfig) -> None:
    """Looks at the text before anything is written.

    Raises:
      DataError: if it cannot be read or is too short.
    """
    from poise.launch.devices import check_devices
    from poise.launch.lm_phases import evaluation_windows, windows
    from poise.launch.texts import ByteCodec, open_text, require_tokenizers

    check_devices(config, "batch_size")
    splits = open_text(config.data, config.data_dir, config.text_key)
    if config.vocab_size:
        require_tokenizers()
    else:
        encode = ByteCodec().encode
        windows(encode(splits.train), config.length, config.batch_size, config.seed)
        lengths = [config.length * factor for factor in config.eval_factors]
        evaluation_windows(encode(getattr(splits, config.held_out)), lengths, config.eval_tokens)


def run(config: LanguageModelConfig, workdir: pathlib.Path) -> None:
    """The whole run, top to bottom: text, tokens, one training per kind of attention, table and pictures."""
    from poise.launch.agreement import is_main, main_first
    from poise.launch.lm_phases import language_model_phases
    from poise.launch.lm_results import write_results
    from poise.launch.loop import fit
    from poise.launch.texts import ByteCodec, open_text
    from poise.launch.workdir import settle_data

    splits = main_first(lambda: open_text(config.data, config.data_dir, config.text_key))
    settle_data({name: hashlib.sha256(part).hexdigest() for name, part in splits._asdict().items()}, workdir)
    codec = byte_pairs(config, splits.train, workdir) if config.vocab_size else ByteCodec()
    train, held_out = codec.encode(splits.train), codec.encode(getattr(splits, config.held_out))
    result = fit(
        language_model_phases(config, train, held_out, codec.vocab_size),
        workdir=workdir,
        seed=config.seed,
        **config.for_fit(),
    )
    if is_main():
        write_results(config, codec, result.seconds, workdir)


def byte_pairs(config: LanguageModelConfig, text: bytes, workdir: pathlib.Path) -> Any:
    """The run's byte pairs, learned at its first start and read from ``vocabulary.json`` from then on, by process 0."""
    from poise.launch.agreement import from_main
    from poise.launch.files import atomic_path
    from poise.launch.texts import BytePairCodec

    path = workdir / "vocabulary.json"

    def learned() -> str:
        if not path.exists():
            with atomic_path(path) as temporary:
                temporary.write_text(BytePairCodec(config.vocab_size, text).to_json(), encoding="utf-8")
        return path.read_text(encoding="utf-8")

    return BytePairCodec(description=from_main(learned))


if __name__ == "__main__":
    sys.exit(main())
