"""Every method at every number of bits, one file each, and the table and picture of what they cost."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
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
from poise.launch.config import ConfigError
from poise.launch.digest import digests
from poise.launch.files import atomic_path
from poise.launch.progress import Console
from poise.launch.ptq_activations import act_bits_of, quantized_forward
from poise.launch.ptq_methods import round_network
from poise.launch.quantized_files import load_quantized, save_quantized
from poise.launch.results import text_table, write_report
from poise.launch.workdir import settle_data
from poise.nets import VisionTransformer
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
      workdir: where ``<method>_<bits>bit.safetensors`` (see :func:`name_of`), ``float.safetensors``, ``report.json``
        and ``ptq.png`` go.

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
    wanted = {name_of(config, method, bits): (method, bits) for bits in config.bits for method in config.method_names}
    console = Console()
    for number, (name, (method, bits)) in enumerate(wanted.items(), 1):
        path = workdir / f"{name}.safetensors"
        if name in done and path.exists():
            continue
        console.line(f"{method} at {bits} bits, {number} of {len(wanted)}")
        rounded = round_network(config, method, bits, model, variables["params"], calibration)
        save_quantized(path, rounded.params)
        judged = judge(config, images, model, jitted, target, path)
        inputs = {"act_bits": config.act_bits, **_drop_of(config, method)} if config.act_bits else {}
        done[name] = {
            "method": method, "bits": bits, **inputs, **judged, "reconstruction_losses": rounded.losses,
        }  # fmt: skip
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


def name_of(config: "PTQConfig", method: str, bits: int) -> str:
    """What a result's row and file are called: by method and bits, with ``act_bits`` by these and ``drop``, too.

    Example:
      >>> from poise.launch.ptq import PTQConfig
      >>> from poise.launch.ptq_results import name_of
      >>> [name_of(PTQConfig(act_bits=bits), "flexround", 3) for bits in (0, 4)]
      ['flexround_3bit', 'flexround_3bit_act4_drop0.5']
    """
    parts = [f"{method}_{bits}bit"]
    if config.act_bits:
        parts += [f"act{config.act_bits}", *(f"{name}{value}" for name, value in _drop_of(config, method).items())]
    return "_".join(parts)


def _drop_of(config: "PTQConfig", method: str) -> dict[str, float]:
    """The probability, of methods that have a use for it."""
    return {} if method == "rtn" else {"drop": float(config.drop)}


def settle_network(params: PyTree, workdir: pathlib.Path) -> None:
    """Notes which float network the folder's results are of, or makes sure that it is the same still.

    Args:
      params: its parameters.
      workdir: the run's folder.

    Raises:
      ConfigError: if it is another one.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = digests([jnp.asarray(leaf) for _, leaf in leaves])
    lines = [f"{jax.tree_util.keystr(path)} {digest}" for (path, _), digest in zip(leaves, sums, strict=True)]
    try:
        settle_data({"float_network": hashlib.sha256("\n".join(lines).encode()).hexdigest()}, workdir)
    except ConfigError as error:
        raise ConfigError(f"{error} (here, the float network)") from error


def judge(
    config: "PTQConfig",
    images: Images,
    model: VisionTransformer,
    apply: Callable[..., Any],
    target: Any,
    path: pathlib.Path,
) -> dict[str, Any]:
    """What a file of integers is worth: with activations in float, or on their steps, and in integer products.

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
    act_bits = act_bits_of(stored)
    forward = quantized_forward(model, act_bits, integers=False) if act_bits else apply
    floats = dequantize_tree(stored) if act_bits else {"params": dequantize_tree(stored)}
    logits = logits_of(lambda x: forward(floats, x), images.images)
    products = integer_products(model, act_bits)

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


def integer_products(model: VisionTransformer, act_bits: int = 0) -> Callable[[PyTree, Any], Any]:
    """``(tree, images) -> logits`` in integer products, of a file's tree: parameters, with ``act_bits`` variables."""
    products = quantized_forward(model, act_bits, integers=True)
    return products if act_bits else lambda params, images: products({"params": params}, images)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the report as text; times of quantized networks are those of their integer products.

    With quantized activations, W3A4 stands for weights of 3 bits and activations of 4.

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
            f"W{row['bits']}A{row['act_bits']}" if "act_bits" in row else str(row["bits"]),
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
    inputs = f", activations of {config.act_bits} bits" if config.act_bits else ""
    figure.suptitle(f"{config.calibration_images} images, {config.steps} steps a block, seed {config.seed}{inputs}")
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
