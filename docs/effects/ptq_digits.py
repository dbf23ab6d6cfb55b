"""Post-training quantization of a small network on the handwritten digits: how far its logits move, by method.

    python docs/effects/ptq_digits.py

writes ptq_digits.json and ptq_digits.png beside itself, and prints a table.
"""

import argparse
import functools
import itertools
import json
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from poise.quant import (
    AdaRound,
    FlexRound,
    Nupes,
    Quantizer,
    apply_quantizers,
    fake_quantize,
    minmax_qparams,
    power_fake_quantize,
    power_search,
    reconstruct_blocks,
)

WIDTHS = (64, 64, 32, 10)
BITS = (2, 3, 4)
CALIBRATION = 256
STEPS = 600
STRENGTH = 1e-3  # of AdaRound's regularizer; at 0.01 it holds 2-bit weights too early on some seeds
RATES = {"AdaRound": 1e-2, "FlexRound": 3e-3, "NUPES": 1e-2}
Layer = dict[str, jax.Array]


def digits() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """1437 images to train on and 360 to test on, with their labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order], jnp.int32)
    return images[:1437], labels[:1437], images[1437:], labels[1437:]


def hidden(params: Layer, x: jax.Array) -> jax.Array:
    """A layer with a ReLU."""
    return jax.nn.relu(x @ params["kernel"] + params["bias"])


def output(params: Layer, x: jax.Array) -> jax.Array:
    """The last layer."""
    return x @ params["kernel"] + params["bias"]


BLOCKS = (*[hidden] * (len(WIDTHS) - 2), output)


def logits(layers: list[Layer], x: jax.Array) -> jax.Array:
    """What the network says."""
    for block, params in zip(BLOCKS, layers, strict=True):
        x = block(params, x)
    return x


@functools.partial(jax.jit, static_argnames="steps")
def train(key: jax.Array, images: jax.Array, labels: jax.Array, steps: int = 1500) -> list[Layer]:
    """The float network."""
    *keys, data_key = jax.random.split(key, len(WIDTHS))
    init = jax.nn.initializers.he_normal()
    layers = [
        {"kernel": init(k, shape), "bias": jnp.zeros(shape[1])}
        for k, shape in zip(keys, itertools.pairwise(WIDTHS), strict=True)
    ]
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss(layers, rows):
        return optax.softmax_cross_entropy_with_integer_labels(logits(layers, images[rows]), labels[rows]).mean()

    def step(carry, key):
        layers, state = carry
        updates, state = optimizer.update(
            jax.grad(loss)(layers, jax.random.randint(key, (128,), 0, len(images))), state
        )
        return (optax.apply_updates(layers, updates), state), None

    (layers, _), _ = jax.lax.scan(step, (layers, optimizer.init(layers)), jax.random.split(data_key, steps))
    return layers


OPTIMIZERS = {name: optax.adam(optax.cosine_decay_schedule(rate, STEPS)) for name, rate in RATES.items()}


def reconstructed(name: str, quantizer: Quantizer, layers: list[Layer], x: jax.Array) -> list[Layer]:
    """Layer by layer, on two streams."""
    qparams, _ = reconstruct_blocks(
        BLOCKS, layers, x, quantizer=quantizer, optimizer=OPTIMIZERS[name], steps=STEPS, key=jax.random.key(0)
    )
    return [apply_quantizers(params, q, quantizer) for params, q in zip(layers, qparams, strict=True)]


def nearest(layers: list[Layer], quantize: Callable[[jax.Array], jax.Array]) -> list[Layer]:
    """Every kernel rounded at once."""
    return [{**params, "kernel": quantize(params["kernel"])} for params in layers]


def methods(bits: int, layers: list[Layer]) -> dict[str, Callable[[jax.Array], list[Layer]]]:
    """By name: the calibration images to the quantized layers. One scale for each kernel."""

    def uniform(w: jax.Array) -> jax.Array:
        return fake_quantize(w, *minmax_qparams(w, bits, None), bits=bits, signed=False)

    a = power_search([params["kernel"] for params in layers], bits=bits) if bits > 2 else jnp.ones(())
    found: dict[str, Callable[[jax.Array], list[Layer]]] = {
        "RTN": lambda x: nearest(layers, uniform),
        "AdaRound": lambda x: reconstructed(
            "AdaRound", AdaRound(bits, None, search=False, strength=STRENGTH), layers, x
        ),
        "FlexRound": lambda x: reconstructed("FlexRound", FlexRound(bits, None), layers, x),
    }
    if bits > 2:  # at 2 bits a power quantizer has nothing to choose
        nupes = Nupes(bits, None)
        found |= {
            "RTN, symmetric": lambda x: nearest(layers, lambda w: power_fake_quantize(w, 1.0, bits=bits)),
            "power": lambda x: nearest(layers, lambda w: power_fake_quantize(w, a, bits=bits)),
            "NUPES": lambda x: reconstructed("NUPES", nupes, layers, x),
        }
    return found


def experiment(seeds: int = 5) -> dict[str, Any]:
    """Mean squared error of the test logits, and test accuracy, by width, method and seed."""
    images, labels, test_images, test_labels = digits()
    results: dict[str, Any] = {"float": [], "bits": {str(bits): {} for bits in BITS}}
    for seed in range(seeds):
        layers = train(jax.random.key(seed), images, labels)
        target = logits(layers, test_images)
        results["float"].append(float((target.argmax(-1) == test_labels).mean()))
        for bits in BITS:
            for name, run in methods(bits, layers).items():
                out = logits(run(images[:CALIBRATION]), test_images)
                row = results["bits"][str(bits)].setdefault(name, {"mse": [], "accuracy": []})
                row["mse"].append(float(jnp.mean((out - target) ** 2)))
                row["accuracy"].append(float((out.argmax(-1) == test_labels).mean()))
    return results


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """A point for every seed, by method and width."""
    import matplotlib.pyplot as plt

    names = ["RTN", "RTN, symmetric", "power", "AdaRound", "NUPES", "FlexRound"]
    figure, panels = plt.subplots(1, len(BITS), figsize=(12, 3.6), layout="constrained", sharey=True)
    for panel, bits in zip(panels, BITS, strict=True):
        rows = results["bits"][str(bits)]
        for place, name in enumerate(names):
            values = rows.get(name, {"mse": []})["mse"]
            panel.plot([place] * len(values), values, "o", color=f"C{place}", alpha=0.7)
        panel.set(title=f"{bits} bits", yscale="log")
        panel.set_xticks(range(len(names)), names, rotation=40, ha="right")
    panels[0].set_ylabel("mean squared error of logits")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Runs it all and writes the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    start = time.time()
    results = experiment(seeds)
    here = pathlib.Path(__file__).parent
    header = {
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.time() - start),
        "seeds": list(range(seeds)),
        "steps": STEPS,
        "calibration_images": CALIBRATION,
        "learning_rates": RATES,
        "adaround_strength": STRENGTH,
    }
    (here / "ptq_digits.json").write_text(json.dumps({**header, **results}, indent=1) + "\n")
    draw(results, here / "ptq_digits.png")
    print("float", [f"{x:.3f}" for x in results["float"]])
    for bits, rows in results["bits"].items():
        for name, row in rows.items():
            print(bits, f"{name:15}", [f"{x:.3f}" for x in row["mse"]], f"{np.mean(row['accuracy']):.3f}")


if __name__ == "__main__":
    main()
