"""What a quantization-aware training leaves: packed integers, a table of what they cost, the oscillation over steps."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from poise.launch.classifier import (
    Images,
    accuracy_of,
    logits_of,
    milliseconds,
    model_of,
    save_floats,
    squared_error,
)
from poise.launch.files import atomic_path
from poise.launch.loop import FitResult
from poise.launch.qat_export import FILE, deployed, export_classifier
from poise.launch.qat_phases import QuantizedState, quantized_model
from poise.launch.quantized_files import load_quantized
from poise.launch.results import read_rows, text_table, write_report
from poise.quant import QuantizedParams

if TYPE_CHECKING:
    from poise.launch.qat import QATConfig

_SMOOTH = 20  # steps of the mean that is drawn


def write_results(config: "QATConfig", images: Images, result: FitResult, workdir: pathlib.Path) -> dict[str, Any]:
    """Exports, reads what was exported, judges it, writes the report and the picture, and prints the table.

    Args:
      config: the run's settings.
      images: held-out ones are judged by.
      result: of the training.
      workdir: where ``model.safetensors``, ``float.safetensors``, ``report.json`` and ``oscillation.png`` go.

    Returns:
      The content of ``report.json``.
    """
    state: QuantizedState = result.state
    save_floats(workdir / "float.safetensors", state.frozen["teacher"]["params"])
    export_classifier(config, images.num_classes, state.learned, workdir)
    rows = judge(config, images, state, workdir)
    report = {
        "rows": rows,
        "oscillation": _oscillation(read_rows(workdir)),
        "seconds": result.seconds,
        "config": dataclasses.asdict(config),
        "seed": config.seed,
        "devices": [device.device_kind for device in jax.devices()],
    }
    write_report(workdir / "report.json", report, ("poise", "jax", "flax", "optax"))
    oscillation_picture(workdir / "oscillation.png", read_rows(workdir), config)
    print(table(rows), flush=True)
    return report


def judge(config: "QATConfig", images: Images, state: QuantizedState, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Accuracy, error of the logits, size and speed: in float, with quantizers, and as integers from the file."""
    stored = load_quantized(workdir / FILE)
    assert isinstance(stored, QuantizedParams)
    teacher, name = state.frozen["teacher"], f"{config.method}{'+qkr' if config.qkr else ''}"
    float_model, trained = model_of(config, images.num_classes), quantized_model(config, images.num_classes)
    few, files = config.bits, (workdir / "float.safetensors", None, workdir / FILE)
    kinds: list[tuple[str, int, Callable[..., Any], Any]] = [
        ("float", 32, float_model.apply, teacher),
        (f"{name}, quantizers", few, trained.forward, state.learned),
        (f"{name}, integers", few, deployed(config, images.num_classes).forward, stored.params),
    ]
    rows, target = [], None
    for (kind, bits, apply, variables), path in zip(kinds, files, strict=True):
        jitted = jax.jit(apply)

        def forward(x: Any, jitted: Any = jitted, variables: Any = variables) -> Any:
            return jitted(variables, x)

        logits = logits_of(forward, images.images)
        target = logits if target is None else target
        rows.append(
            {
                "method": kind,
                "bits": bits,
                "accuracy": accuracy_of(logits, images.labels),
                "logit_mse": squared_error(logits, target),
                "bytes": None if path is None else path.stat().st_size,
                "milliseconds": milliseconds(forward, images.images, config.timing_images),
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of :func:`judge` as text.

    Example:
      >>> from poise.launch.qat_results import table
      >>> row = {"method": "float", "bits": 32, "accuracy": 0.97, "logit_mse": 0.0, "bytes": 9000, "milliseconds": 2.5}
      >>> print(table([row]))
      method  bits  accuracy  logit error  bytes on disk  ms per batch
      ----------------------------------------------------------------
      float     32     0.970        0.000          9,000          2.50
    """
    heads = ["method", "bits", "accuracy", "logit error", "bytes on disk", "ms per batch"]
    cells = [
        [
            row["method"],
            str(row["bits"]),
            f"{row['accuracy']:.3f}",
            f"{row['logit_mse']:.3f}",
            "-" if row["bytes"] is None else f"{row['bytes']:,}",
            f"{row['milliseconds']:.2f}",
        ]
        for row in rows
    ]
    return text_table(heads, cells)


def _oscillation(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """By phase: the share that oscillates at its end, and the share of codes that a step changes, over its last 100."""
    return {
        phase: {
            "oscillating": rows[phase][-1]["oscillating"],
            "flips": float(np.mean([row["flips"] for row in rows[phase][-100:]])),
        }
        for phase in ("qat", "cga")
        if phase in rows
    }


def oscillation_picture(
    path: pathlib.Path, rows: Mapping[str, Sequence[Mapping[str, Any]]], config: "QATConfig"
) -> None:
    """Draws which share of the weights oscillates and changes its code, and the accuracy, over the quantized steps."""
    from matplotlib.figure import Figure

    steps = [*rows["qat"], *rows.get("cga", [])]
    count = np.arange(1, len(steps) + 1)
    figure = Figure(figsize=(12, 4), dpi=110, layout="constrained")
    figure.suptitle(
        f"{config.method}, {config.bits}-bit weights, {config.act_bits}-bit activations, seed {config.seed}"
    )
    axes = figure.subplots(1, 3)
    axes[0].plot(count, [row["oscillating"] for row in steps], color="C0")
    axes[0].set_ylabel("share of weights that oscillate")
    width = min(_SMOOTH, len(steps))
    flips = np.convolve([row["flips"] for row in steps], np.full(width, 1 / width), "valid")
    axes[1].semilogy(count[width - 1 :], np.maximum(flips, 1e-7), color="C1")
    axes[1].set_ylabel(f"share of codes changed in a step, mean of {width}", fontsize=9)
    judged = [(step, row["eval/accuracy"]) for step, row in zip(count, steps, strict=True) if "eval/accuracy" in row]
    places, accuracies = [step for step, _ in judged], [accuracy for _, accuracy in judged]
    axes[2].plot(places, accuracies, "o-", ms=3, color="C2", label="quantized")
    before = rows["float"][-1].get("eval/accuracy")
    if before is not None:
        axes[2].axhline(before, color="black", lw=0.8, label="float")
    axes[2].set_ylabel("accuracy on held-out images")
    for axis in axes:
        if "cga" in rows:
            axis.axvline(len(rows["qat"]) + 0.5, color="black", lw=0.8, ls=":", label="annealing begins")
        axis.set_xlabel("quantized steps")
        axis.grid(alpha=0.3)
    axes[2].legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
