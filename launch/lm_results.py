"""What a language-model run leaves: a table of losses by context length, a picture of it, and texts."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from poise.launch.checkpoint_tree import restore_tree
from poise.launch.files import atomic_path
from poise.launch.lm_phases import QUARTERS, model_of
from poise.launch.results import cell, phase_folder, read_rows, text_table, write_report
from poise.launch.texts import Codec
from poise.nets import generate

if TYPE_CHECKING:
    from poise.launch.lm import LanguageModelConfig


def write_results(
    config: "LanguageModelConfig", codec: Codec, seconds: Mapping[str, float], workdir: pathlib.Path
) -> dict[str, Any]:
    """Writes the report, the picture and the samples, and prints the table.

    Args:
      config: the run's settings.
      codec: turns tokens into text.
      seconds: training took, by kind of attention.
      workdir: where ``report.json``, ``extrapolation.png`` and ``samples.txt`` go.

    Returns:
      The content of ``report.json``.
    """
    losses = {name: rows[-1] for name, rows in read_rows(workdir).items()}
    report = {
        "losses": {name: _figures(losses[name], config.eval_factors) for name in config.variant_names},
        "seconds": dict(seconds),
        "config": dataclasses.asdict(config),
        "seed": config.seed,
        "devices": [device.device_kind for device in jax.devices()],
    }
    write_report(workdir / "report.json", report, ("poise", "jax", "flax", "optax"))
    _picture(workdir / "extrapolation.png", report["losses"], config)
    if config.sample_tokens:
        texts = {
            name: _sample(config, codec, name, phase_folder(workdir, index, name))
            for index, name in enumerate(config.variant_names)
        }
        with atomic_path(workdir / "samples.txt") as temporary:
            temporary.write_text(
                "".join(f"=== {name} ===\n{text}\n\n" for name, text in texts.items()), encoding="utf-8"
            )
    print(table(report["losses"], config.eval_factors), flush=True)
    return report


def _figures(row: Mapping[str, Any], factors: tuple[int, ...]) -> dict[str, Any]:
    """The losses of an evaluation, as a row of metrics has them."""
    names = [f"loss_{factor}x" for factor in factors]
    found = {name: row[f"eval/{name}"] for name in names}
    for name in names:
        quarters = [row.get(f"eval/{name}_q{index + 1}") for index in range(QUARTERS)]
        if None not in quarters:
            found[f"{name}_quarters"] = quarters
    return found


def table(losses: Mapping[str, Mapping[str, Any]], factors: tuple[int, ...]) -> str:
    """Losses in nats per token by context length, and the last relative to the first.

    Example:
      >>> from poise.launch.lm_results import table
      >>> print(table({"softmax": {"loss_1x": 1.5, "loss_8x": 3.0}}, (1, 8)))
      attention     1x     8x  8x / 1x
      --------------------------------
      softmax    1.500  3.000     2.00
    """
    heads = ["attention", *(f"{factor}x" for factor in factors), f"{factors[-1]}x / 1x"]
    rows = []
    for name, row in losses.items():
        values = [row[f"loss_{factor}x"] for factor in factors]  # None where a loss wasn't finite
        first, last = values[0], values[-1]
        ratio = "-" if first is None or last is None else f"{last / first:.2f}"
        rows.append([name, *map(cell, values), ratio])
    return text_table(heads, rows)


def _sample(config: "LanguageModelConfig", codec: Codec, variant: str, folder: pathlib.Path) -> str:
    model = model_of(config, variant, codec.vocab_size)
    params = restore_tree(folder)["params"]
    draw = jax.jit(functools.partial(generate, model, num_tokens=config.sample_tokens, temperature=config.temperature))
    prompt = jnp.asarray(codec.encode(config.prompt.encode()))[None]
    tokens = draw({"params": params}, prompt, key=jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1))
    return config.prompt + codec.decode(jax.device_get(tokens)[0])


def _picture(path: pathlib.Path, losses: Mapping[str, Mapping[str, Any]], config: "LanguageModelConfig") -> None:
    """Loss against context length, and within the longest window by quarter."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    figure.suptitle(f"trained on windows of {config.length} tokens, {config.steps} updates, seed {config.seed}")
    lengths, quarters = figure.subplots(1, 2, sharey=True)
    contexts = [config.length * factor for factor in config.eval_factors]
    longest = config.eval_factors[-1]
    for name, row in losses.items():
        lengths.plot(contexts, [row[f"loss_{factor}x"] for factor in config.eval_factors], "o-", ms=4, label=name)
        if f"loss_{longest}x_quarters" in row:
            quarters.plot(range(1, QUARTERS + 1), row[f"loss_{longest}x_quarters"], "o-", ms=4, label=name)
    lengths.set_xscale("log", base=2)
    lengths.set_xticks(contexts, [str(context) for context in contexts])
    lengths.axvline(config.length, color="black", lw=0.8, ls=":")
    lengths.set_xlabel("context length")
    lengths.set_ylabel("loss on held-out text, nats per token")
    lengths.legend(fontsize=8)
    quarters.set_xticks(range(1, QUARTERS + 1))
    quarters.set_xlabel(f"quarter of the windows of {contexts[-1]} tokens")
    for axis in (lengths, quarters):
        axis.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
