"""Activations of 4 bits after training, on the handwritten digits: steps that are learned, with and without dropping.

    python docs/effects/qdrop_digits.py

trains one float vision transformer as ``poise.launch.ptq`` does, rounds it by FlexRound for every seed (which draws the
calibration images, the batches and what is dropped), and writes qdrop_digits.json and qdrop_digits.png beside itself.
What is in the file already is not run again.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import tempfile
import time
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from poise.launch.classifier import Images, accuracy_of, float_phase, logits_of, model_of, open_classes, squared_error
from poise.launch.loop import fit
from poise.launch.ptq import PTQConfig
from poise.launch.ptq_activations import quantized_forward
from poise.launch.ptq_methods import round_network
from poise.quant import dequantize_tree

BITS = (4, 3, 2)
ACT_BITS = 4
RATE = 3e-3  # of the steps, chosen at W4A4 with another seed
VARIANTS = {
    "fixed": {"activation_learning_rate": 0.0, "drop": 1.0},
    "learned": {"activation_learning_rate": RATE, "drop": 1.0},
    "learned, dropped": {"activation_learning_rate": RATE, "drop": 0.5},
}
CONFIG = PTQConfig(act_bits=ACT_BITS, methods="flexround", reconstruction_batch_size=32)
HERE = pathlib.Path(__file__).parent


def trained() -> tuple[Images, PyTree]:
    """The digits, and the float network's variables."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        images = open_classes(CONFIG, workdir / "data")
        phase = float_phase(CONFIG, images)
        state = fit((phase,), workdir=workdir, seed=CONFIG.seed, **CONFIG.for_fit()).state
        everything = images.calibration(10_000)  # while the folder is there
    return images._replace(calibration=lambda number: everything[:number]), state.variables


def rounded(
    images: Images, variables: PyTree, target: np.ndarray, bits: int, variant: str, seed: int
) -> dict[str, Any]:
    """How far one quantized network's logits are from the float one's, and its accuracy."""
    config = dataclasses.replace(CONFIG, seed=seed, **VARIANTS[variant])
    model = model_of(config, images.num_classes)
    pool = images.calibration(10_000)
    chosen = pool[np.random.default_rng(seed).permutation(len(pool))[: config.calibration_images]]
    found = dequantize_tree(round_network(config, "flexround", bits, model, variables["params"], chosen).params)
    forward = quantized_forward(model, ACT_BITS, integers=False)
    logits = logits_of(lambda x: forward(found, x), images.images)
    return {"seed": seed, "logit_mse": squared_error(logits, target), "accuracy": accuracy_of(logits, images.labels)}


def save(result: dict[str, Any], path: pathlib.Path) -> None:
    """The figures, and a dot for every seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), dpi=100, layout="constrained")
    for place, variant in enumerate(VARIANTS):
        for axis, name in zip(axes, ("logit_mse", "accuracy"), strict=True):
            points = [
                (number + 0.2 * (place - 1), row[name])
                for number, bits in enumerate(BITS)
                for row in result["bits"].get(str(bits), {}).get(variant, [])
            ]
            axis.plot(*zip(*points, strict=True), "o", color=f"C{place}", alpha=0.7, label=variant) if points else None
    axes[0].set(ylabel="mean squared error of logits", yscale="log")
    axes[1].set_ylabel("accuracy on held-out digits")
    axes[1].axhline(result["float_accuracy"], color="black", lw=0.8, label="float")
    axes[1].legend(fontsize=8)
    for axis in axes:
        axis.set_xticks(range(len(BITS)), [f"W{bits}A{ACT_BITS}" for bits in BITS])
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path.with_suffix(".png"))
    plt.close(figure)


def main() -> None:
    """Runs what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    path = HERE / "qdrop_digits.json"
    result = json.loads(path.read_text()) if path.exists() else {"bits": {}}
    if result.get("jax", jax.__version__) != jax.__version__:
        parser.error(f"{path} is of jax {result['jax']}, this is {jax.__version__}: move it away to start afresh")
    begun = time.process_time()
    images, variables = trained()
    forward = jax.jit(model_of(CONFIG, images.num_classes).apply)
    target = logits_of(lambda x: forward(variables, x), images.images)
    result |= {"jax": jax.__version__, "machine": platform.machine(), "steps": CONFIG.steps, "rate": RATE,
               "float_accuracy": accuracy_of(target, images.labels)}  # fmt: skip
    for bits in BITS:
        for variant in VARIANTS:
            rows = result["bits"].setdefault(str(bits), {}).setdefault(variant, [])
            for seed in range(len(rows), options.seeds):
                rows.append(rounded(images, variables, target, bits, variant, seed))
                result |= {"date": time.strftime("%Y-%m-%d"), "cpu_seconds": round(time.process_time() - begun)}
                save(result, path)
            errors = [row["logit_mse"] for row in rows]
            accuracies = [row["accuracy"] for row in rows]
            print(f"W{bits}A{ACT_BITS} {variant:16}  error {np.mean(errors):.3f} ({min(errors):.3f} to "
                  f"{max(errors):.3f})  accuracy {np.mean(accuracies):.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
