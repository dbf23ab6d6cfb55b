"""Every method at every number of bits, one file each, and the table and picture of what they cost."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import PyTree

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
from poise.launch.ptq_methods import round_network
from poise.launch.quantized_files import load_quantized, save_quantized
from poise.launch.results import text_table, write_report
from poise.nets import VisionTransformer, integer_apply
from poise.quant import QuantizedParams, dequantize_tree

if TYPE_CHECKING:
    from poise.launch.ptq import PTQConfig

ROWS = "rows.json"


def quantize_all(config: "PTQConfig", images: Images, variables: PyTree, workdir: pathlib.Path) -> dict[str, Any]:
    """Quantizes, judges what the files hold, writes the report and the picture, and prints the table.

    What an earlier call has finished (its row in ``rows.json``, its file) is not done again.

    Args:
      config: the run's settings.
      images: for calibration and judgement.
      variables: of the float network.
      workdir: where ``<method>_<bits>bit.safetensors``, ``float.safetensors``, ``report.json`` and ``ptq.png`` go.

    Returns:
      The content of ``report.json``.
    """
    model = model_of(config, images.num_classes)
    jitted = jax.jit(model.apply)

    def forward(x: Any) -> Any:
        return jitted(variables, x)

    target = logits_of(forward, images.images)
    done = _read(workdir / ROWS)
    if "float" not in done:
        save_floats(workdir / "float.safetensors", variables["params"])
        done["float"] = {
            "method": "float",
            "bits": 32,
            "accuracy": accuracy_of(target, images.labels),
            "logit_mse": 0.0,
            "bytes": (workdir / "float.safetensors").stat().st_size,
            "milliseconds": milliseconds(forward, images.images, config.timing_images),
        }
        _write(workdir / ROWS, done)
    calibration = images.calibration(config.calibration_images)
    wanted = {f"{method}_{bits}bit": (method, bits) for bits in config.bits for method in config.method_names}
    for name, (method, bits) in wanted.items():
        path = workdir / f"{name}.safetensors"
        if name in done and path.exists():
            continue
        rounded = round_network(config, method, bits, model, variables["params"], calibration)
        save_quantized(path, rounded.params)
        judged = judge(config, images, model, jitted, target, path)
        done[name] = {"method": method, "bits": bits, **judged, "reconstruction_losses": rounded.losses}
        _write(workdir / ROWS, done)
    rows = [done[name] for name in ("float", *wanted)]
    report = {
        "rows": rows,
        "config": dataclasses.asdict(config),
        "seed": config.seed,
        "devices": [device.device_kind for device in jax.devices()],
    }
    write_report(workdir / "report.json", report, ("poise", "jax", "flax", "optax"))
    error_picture(workdir / "ptq.png", rows, config)
    print(table(rows), flush=True)
    return report


def judge(
    config: "PTQConfig",
    images: Images,
    model: VisionTransformer,
    apply: Callable[..., Any],
    target: Any,
    path: pathlib.Path,
) -> dict[str, Any]:
    """What a file of integers is worth: with float activations, and in integer products.

    Args:
      config: the run's settings.
      images: held-out ones are judged by.
      model: the network.
      apply: the compiled ``model.apply``.
      target: the float network's logits.
      path: the file.
    """
    stored = load_quantized(path)
    assert isinstance(stored, QuantizedParams)
    floats = {"params": dequantize_tree(stored)}
    logits = logits_of(lambda x: apply(floats, x), images.images)
    products = integer_products(model)

    def integers(x: Any) -> Any:
        return products(stored.params, x)

    integer_logits = logits_of(integers, images.images)
    return {
        "accuracy": accuracy_of(logits, images.labels),
        "logit_mse": squared_error(logits, target),
        "integer_accuracy": accuracy_of(integer_logits, images.labels),
        "integer_logit_mse": squared_error(integer_logits, target),
        "bytes": path.stat().st_size,
        "milliseconds": milliseconds(integers, images.images, config.timing_images),
    }


def integer_products(model: VisionTransformer) -> Callable[[PyTree, Any], Any]:
    """``(params, images) -> logits``, compiled, in integer products."""
    return jax.jit(lambda params, images: integer_apply(model, {"params": params}, images))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the report as text; times of quantized networks are those of their integer products.

    Example:
      >>> from poise.launch.ptq_results import table
      >>> row = {"method": "float", "bits": 32, "accuracy": 0.97, "logit_mse": 0.0, "bytes": 9000, "milliseconds": 2.5}
      >>> print(table([row]))
      method  bits  accuracy  logit error  as integers: accuracy  logit error  bytes on disk  ms per batch
      ----------------------------------------------------------------------------------------------------
      float     32     0.970        0.000                      -            -          9,000          2.50
    """
    heads = ["method", "bits", "accuracy", "logit error", "as integers: accuracy", "logit error", "bytes on disk",
             "ms per batch"]  # fmt: skip

    def figure(row: Mapping[str, Any], name: str) -> str:
        return f"{row[name]:.3f}" if name in row else "-"

    cells = [
        [
            row["method"],
            str(row["bits"]),
            *(figure(row, name) for name in ("accuracy", "logit_mse", "integer_accuracy", "integer_logit_mse")),
            f"{row['bytes']:,}",
            f"{row['milliseconds']:.2f}",
        ]
        for row in rows
    ]
    return text_table(heads, cells)


def error_picture(path: pathlib.Path, rows: Sequence[Mapping[str, Any]], config: "PTQConfig") -> None:
    """Draws the logits' error and the accuracy by bits, a line for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), dpi=110, layout="constrained")
    figure.suptitle(f"{config.calibration_images} images, {config.steps} steps a block, seed {config.seed}")
    errors, accuracies = figure.subplots(1, 2)
    for method in config.method_names:
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["bits"])
        bits = [row["bits"] for row in own]
        errors.semilogy(bits, [row["logit_mse"] for row in own], "o-", label=method)
        accuracies.plot(bits, [row["accuracy"] for row in own], "o-", label=method)
    accuracies.axhline(rows[0]["accuracy"], color="black", lw=0.8, label="float")
    errors.set_ylabel("mean squared error of the logits")
    accuracies.set_ylabel("accuracy on held-out images")
    accuracies.legend(fontsize=8)
    for axis in (errors, accuracies):
        axis.set_xlabel("bits of the blocks' weights")
        axis.set_xticks(sorted(config.bits))
        axis.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(path: pathlib.Path, rows: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
