"""Norms of scale-invariant weights on the handwritten digits, under SGD and Adam and under their projected forms.

    python docs/effects/adamp_norms.py

writes adamp_norms.json and adamp_norms.png beside itself, and prints a table.
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
from sklearn.datasets import load_digits

from poise.optim import adamp, adamp_view, flax_channel_axes, sgdp

BATCH = 64
EVERY = 10  # steps between two measurements
OPTIMIZERS = {
    "SGD": optax.sgd(0.1, momentum=0.9),
    "SGDP": sgdp(0.1, momentum=0.9, channel_axes=flax_channel_axes),
    "SGDP, momentum projected": sgdp(0.1, momentum=0.9, channel_axes=flax_channel_axes, project_momentum=True),
    "SGDP, Nesterov": sgdp(0.1, momentum=0.9, nesterov=True, channel_axes=flax_channel_axes),
    "Adam": optax.adam(1e-2),
    "AdamP": adamp(1e-2, channel_axes=flax_channel_axes),
}


class Normalized(nn.Module):
    """Two hidden layers of 64, each followed by batch normalization, so that its kernel's length does not matter."""

    @nn.compact
    def __call__(self, x, train: bool):
        """Logits of ten classes."""
        for _ in range(2):
            x = nn.Dense(64, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x)


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """1500 images to train on and 297 to test on, with their labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    return images[:1500], labels[:1500], images[1500:], labels[1500:]


def train(optimizer: optax.GradientTransformation, seed: jax.Array, steps: int) -> dict[str, Any]:
    """One run: the norms of the two normalized kernels, which view projects them, the accuracy on test images."""
    images, labels, test_images, test_labels = map(jnp.asarray, digits())
    model = Normalized()
    init_key, data_key = jax.random.split(jax.random.key(seed))
    variables = model.init(init_key, images[:1], train=False)
    params, stats = variables["params"], variables["batch_stats"]

    def loss(params, stats, rows):
        logits, new = model.apply({"params": params, "batch_stats": stats}, images[rows], True, mutable="batch_stats")
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean(), new["batch_stats"]

    def step(carry, key):
        params, stats, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(images))
        grads, stats = jax.grad(loss, has_aux=True)(params, stats, rows)
        view = adamp_view(params, grads, channel_axes=flax_channel_axes)
        updates, state = optimizer.update(grads, state, params)
        new = (optax.apply_updates(params, updates), stats, state)
        return new, jnp.stack([view[layer]["kernel"] for layer in ("Dense_0", "Dense_1", "Dense_2")])

    def norms(params):
        return jnp.stack([jnp.linalg.norm(params[layer]["kernel"]) for layer in ("Dense_0", "Dense_1")])

    def stretch(carry, keys):
        before = norms(carry[0])
        carry, views = jax.lax.scan(step, carry, keys)
        return carry, (before, views)

    keys = jax.random.split(data_key, (steps // EVERY, EVERY))
    (params, stats, _), (log, views) = jax.lax.scan(stretch, (params, stats, optimizer.init(params)), keys)
    logits = model.apply({"params": params, "batch_stats": stats}, test_images, False)
    views = views.reshape(-1, 3)
    return {
        "norms": jnp.concatenate([log, norms(params)[None]]),
        "by_channel": (views == 1).mean(0),
        "by_layer": (views == 2).mean(0),
        "test_accuracy": (logits.argmax(-1) == test_labels).mean(),
    }


def experiment(seeds: int = 5, steps: int = 500) -> dict[str, dict[str, Any]]:
    """All runs by optimizer; arrays are [seed, ...]."""
    return {
        name: jax.tree.map(
            np.asarray, jax.jit(jax.vmap(lambda seed, tx=optimizer: train(tx, seed, steps)))(jnp.arange(seeds))
        )
        for name, optimizer in OPTIMIZERS.items()
    }


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, by optimizer."""

    def spread(values):
        return {"mean": float(values.mean()), "std": float(values.std(ddof=1))}

    return {
        name: {
            "first_norm": spread(run["norms"][:, -1, 0]),
            "second_norm": spread(run["norms"][:, -1, 1]),
            "test_accuracy": spread(run["test_accuracy"]),
            "share_projected_by_channel": [float(x) for x in run["by_channel"].mean(0)],
            "share_projected_by_layer": [float(x) for x in run["by_layer"].mean(0)],
        }
        for name, run in runs.items()
    }


def draw(runs: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """The norm of each of the two kernels over the steps: mean and range over seeds."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 3.4), layout="constrained", sharey=True)
    colors = {"SGD": ("C0", "-"), "Adam": ("C3", "-"), "AdamP": ("C3", "--")}
    dashes = iter([("C0", "--"), ("C0", ":"), ("C0", "-.")])
    for name, run in runs.items():
        color, style = colors.get(name) or next(dashes)
        for panel, norms in zip(panels, np.moveaxis(run["norms"], -1, 0), strict=True):
            steps = EVERY * np.arange(norms.shape[1])
            panel.plot(steps, norms.mean(0), color=color, ls=style, label=name)
            panel.fill_between(steps, norms.min(0), norms.max(0), color=color, alpha=0.2, lw=0)
    for panel, which in zip(panels, ("first", "second"), strict=True):
        panel.set(title=f"norm of the {which} normalized kernel", xlabel="step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
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
        "steps": EVERY * (runs["SGD"]["norms"].shape[1] - 1),
        "seeds": list(range(len(runs["SGD"]["norms"]))),
        "first_norms_at_start": [float(x) for x in runs["SGD"]["norms"][:, 0].mean(0)],
        "by_optimizer": summary(runs),
    }
    (here / "adamp_norms.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(runs, here / "adamp_norms.png")
    for name, row in results["by_optimizer"].items():
        numbers = {key: f"{row[key]['mean']:.3f} ± {row[key]['std']:.3f}" for key in list(row)[:3]}
        print(name, numbers, row["share_projected_by_channel"], row["share_projected_by_layer"])


if __name__ == "__main__":
    main()
