"""What the weight compander does to the weights of a small network on the handwritten digits.

    python docs/effects/compander_weights.py

writes compander_weights.json and compander_weights.png beside itself, and prints a table.
"""

import json
import pathlib
import platform
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats
from sklearn.datasets import load_digits

from poise.optim import CompandedParams, companded_scales, compander, companding

BATCH = 32
TRAINING_IMAGES = 300
COMPANDERS = {
    "plain": compander("identity"),
    "arctan": compander("arctan", a=0.2, b=0.1, clip=0.99),
    "tanh": compander("tanh", a=0.3, b=0.15, clip=0.99),
    "softsign": compander("softsign", a=0.4, b=0.2, clip=0.99),
    "arctan, learned": compander("arctan", a=0.2, b=0.1, clip=0.99, learn=True),
}


class MLP(nn.Module):
    """Two hidden layers of 128."""

    @nn.compact
    def __call__(self, x):
        """Logits of ten classes."""
        for _ in range(2):
            x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """300 images to train on and the rest to test on, with their labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    return images[:TRAINING_IMAGES], labels[:TRAINING_IMAGES], images[TRAINING_IMAGES:], labels[TRAINING_IMAGES:]


def train(wc: Any, seed: jax.Array, steps: int) -> dict[str, Any]:
    """One run: the effective kernels, the learned scales, the accuracy on test images."""
    images, labels, test_images, test_labels = map(jnp.asarray, digits())
    model, optimizer = MLP(), optax.sgd(0.05, momentum=0.9)
    init_key, data_key = jax.random.split(jax.random.key(seed))
    raw = wc.init(model.init(init_key, images[:1])["params"])

    def loss(raw, rows):
        logits = model.apply({"params": wc.apply(raw)}, images[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def step(carry, key):
        raw, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(images))
        updates, state = optimizer.update(jax.grad(loss)(raw, rows), state)
        return (optax.apply_updates(raw, updates), state), None

    (raw, _), _ = jax.lax.scan(step, (raw, optimizer.init(raw)), jax.random.split(data_key, steps))
    params = wc.apply(raw)
    logits = model.apply({"params": params}, test_images)
    out = {
        "kernels": jnp.concatenate([layer["kernel"].ravel() for layer in params.values()]),
        "hidden": params["Dense_1"]["kernel"].ravel(),
        "test_accuracy": (logits.argmax(-1) == test_labels).mean(),
    }
    if isinstance(raw, CompandedParams):
        a, b = companded_scales(raw)
        out |= {name: jnp.stack([layer["kernel"] for layer in tree.values()]) for name, tree in (("a", a), ("b", b))}
    return out


def experiment(seeds: int = 5, steps: int = 1000) -> dict[str, dict[str, Any]]:
    """All runs by compander; arrays are [seed, ...]."""
    return {
        name: jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda seed, wc=wc: train(wc, seed, steps)))(jnp.arange(seeds)))
        for name, wc in COMPANDERS.items()
    }


def distribution(run: dict[str, Any]) -> dict[str, np.ndarray]:
    """Of all kernels together: largest magnitude, kurtosis, and the share below a tenth of the standard deviation."""
    flat = run["kernels"].astype(np.float64)
    return {
        "maximum": np.abs(flat).max(1),
        "kurtosis": stats.kurtosis(flat, axis=1, fisher=False),
        "near_zero": (np.abs(flat) < 0.1 * flat.std(1, keepdims=True)).mean(1),
        "test_accuracy": run["test_accuracy"].astype(np.float64),
    }


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, by compander."""
    out = {}
    for name, run in runs.items():
        values = distribution(run) | {key: run[key].mean(-1) for key in ("a", "b") if key in run}
        out[name] = {key: {"mean": float(x.mean()), "std": float(x.std(ddof=1))} for key, x in values.items()}
    return out


def draw(runs: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """The functions, the weights of the hidden kernel, and the three statistics of every seed."""
    import matplotlib.pyplot as plt

    figure, (curves, weights, numbers) = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    v = np.linspace(-1, 1, 401)
    for kind, a, b in (("arctan", 0.2, 0.1), ("tanh", 0.3, 0.15), ("softsign", 0.4, 0.2)):
        curves.plot(v, companding(jnp.asarray(v), a, b, kind), label=f"{kind}, a = {a}, b = {b}")
    curves.plot(v, v, color="gray", lw=0.8, label="identity")
    curves.set(title="effective over raw weight", xlabel="v", ylim=(-0.45, 0.45))
    curves.legend(fontsize=8)
    bins = np.linspace(-0.45, 0.45, 91)
    for i, name in enumerate(("plain", "arctan", "arctan, learned")):
        weights.hist(runs[name]["hidden"].ravel(), bins, density=True, histtype="step", color=f"C{i}", label=name)
    weights.set(title="hidden kernel's weights at the end, 5 seeds", xlabel="w")
    weights.legend(fontsize=8)
    plain = distribution(runs["plain"])
    for i, (name, run) in enumerate(runs.items()):
        values = distribution(run)
        for place, key in enumerate(("maximum", "kurtosis", "near_zero")):
            relative = values[key] / plain[key].mean()
            numbers.plot(np.full(len(relative), place + 0.12 * (i - 2)), relative, ".", color=f"C{i}")
        numbers.plot([], [], ".", color=f"C{i}", label=name)
    numbers.set_xticks(range(3), ["largest", "kurtosis", "near zero"])
    numbers.set(title="relative to the plain network", ylim=(0, 1.7))
    numbers.legend(fontsize=8, loc="upper right", ncols=2)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Runs it all and writes the results."""
    start = time.time()
    runs = experiment()
    here = pathlib.Path(__file__).parent
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.time() - start),
        "batch_size": BATCH,
        "training_images": TRAINING_IMAGES,
        "steps": 1000,
        "seeds": list(range(len(runs["plain"]["kernels"]))),
        "by_compander": summary(runs),
    }
    (here / "compander_weights.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(runs, here / "compander_weights.png")
    for name, row in results["by_compander"].items():
        print(name, {key: f"{value['mean']:.4f} ± {value['std']:.4f}" for key, value in row.items()})


if __name__ == "__main__":
    main()
