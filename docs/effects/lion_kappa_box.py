"""Lion on the handwritten digits: how the weight decay keeps weights in a box, over several seeds.

    python docs/effects/lion_kappa_box.py

writes lion_kappa_box.json and lion_kappa_box.png beside itself, and prints a table.
"""

import functools
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

from poise.optim import (
    lion_kappa,
    lion_kappa_constraint_violation,
    lion_kappa_lyapunov,
    lion_kappa_stationarity_gap,
)

DECAYS = (1.0, 5.0, 20.0)
RATE = 2e-3
BATCH = 64
EVERY = 25  # steps between two measurements


class MLP(nn.Module):
    """Two hidden layers of 64."""

    @nn.compact
    def __call__(self, x):
        """Logits of ten classes."""
        for _ in range(2):
            x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(10)(x)


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """1500 images to train on and 297 to test on, with their labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    return images[:1500], labels[:1500], images[1500:], labels[1500:]


def train(weight_decay: jax.Array, seed: jax.Array, steps: int, descent: bool) -> dict[str, Any]:
    """One run, measured on the whole training set every few steps.

    Args:
      weight_decay: the inverse size of the box.
      seed: of the first weights and the batches.
      steps: how many.
      descent: whether to start inside of the box and step with the gradient of the whole training set, as the theory of
        the Lyapunov function has it, instead of starting from the usual weights and stepping with batches.
    """
    images, labels, test_images, test_labels = map(jnp.asarray, digits())
    model = MLP()
    init_key, data_key = jax.random.split(jax.random.key(seed))
    params = model.init(init_key, images[:1])["params"]
    if descent:
        params = jax.tree.map(lambda x: jnp.clip(x, -1 / weight_decay, 1 / weight_decay), params)
    optimizer = lion_kappa(RATE, weight_decay=weight_decay)

    def loss(params, images, labels):
        logits = model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry, key):
        params, state = carry
        rows = slice(None) if descent else jax.random.randint(key, (BATCH,), 0, len(images))
        updates, state = optimizer.update(jax.grad(loss)(params, images[rows], labels[rows]), state, params)
        return (optax.apply_updates(params, updates), state), None

    def measure(params, state):
        value, grads = jax.value_and_grad(loss)(params, images, labels)
        mu = optax.tree.get(state, "mu")
        return {
            "loss": value,
            "violation": lion_kappa_constraint_violation(params, weight_decay=weight_decay),
            "lyapunov": lion_kappa_lyapunov(value, params, mu, learning_rate=RATE, weight_decay=weight_decay),
            "gap": lion_kappa_stationarity_gap(grads, params, weight_decay=weight_decay),
        }

    def stretch(carry, keys):
        measured = measure(*carry)
        return jax.lax.scan(step, carry, keys)[0], measured

    keys = jax.random.split(data_key, (steps // EVERY, EVERY))
    (params, state), log = jax.lax.scan(stretch, (params, optimizer.init(params)), keys)
    log = jax.tree.map(lambda old, new: jnp.append(old, new), log, measure(params, state))
    kernels = jnp.concatenate([layer["kernel"].ravel() for layer in params.values()])
    guesses = model.apply({"params": params}, test_images).argmax(-1)
    return {
        "log": log,
        "scaled_kernels": weight_decay * kernels,
        "scaled_maximum": weight_decay * jnp.max(jnp.abs(kernels)),
        "near_boundary": jnp.mean(jnp.abs(weight_decay * kernels) > 0.9),
        "test_accuracy": jnp.mean(guesses == test_labels),
    }


def experiment(seeds: int = 5, steps: int = 2500, descent: bool = False) -> dict[str, Any]:
    """All runs at once; arrays are [decay, seed, ...]."""
    run = functools.partial(train, steps=steps, descent=descent)
    runs = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))(jnp.array(DECAYS), jnp.arange(seeds))
    return jax.tree.map(np.asarray, runs)


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, by weight decay."""
    finals = {
        "scaled_maximum": runs["scaled_maximum"],
        "near_boundary": runs["near_boundary"],
        "test_accuracy": runs["test_accuracy"],
        "training_loss": runs["log"]["loss"][..., -1],
        "gap": runs["log"]["gap"][..., -1],
        "violation": runs["log"]["violation"][..., -1],
    }
    return {
        str(decay): {
            name: {"mean": float(values[i].mean()), "std": float(values[i].std(ddof=1))}
            for name, values in finals.items()
        }
        for i, decay in enumerate(DECAYS)
    }


def draw(runs: dict[str, Any], descents: dict[str, Any], path: pathlib.Path) -> None:
    """Distance to the box, the Lyapunov function with loss and gap, and where the weights end."""
    import matplotlib.pyplot as plt

    log = runs["log"]
    steps = EVERY * np.arange(log["loss"].shape[-1])
    figure, (distance, falling, weights) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for i, decay in enumerate(DECAYS):
        color = f"C{i}"
        for seed, values in enumerate(log["violation"][i]):
            outside = np.where(values > 1e-6, values, np.nan)
            distance.semilogy(steps, outside, color=color, label=f"λ = {decay:g}" if seed == 0 else None, lw=1)
        if np.nanmax(log["violation"][i, :, 0]) > 0:
            start = log["violation"][i, :, 0].max()
            distance.semilogy(steps, start * (1 - RATE * decay) ** steps, color="black", ls=":", lw=1)
        bins = np.linspace(-1.02, 1.02, 52)
        weights.hist(runs["scaled_kernels"][i].ravel(), bins, density=True, histtype="step", color=color)
    distance.set(title="distance to the box", xlabel="step", ylim=(1e-6, 1))
    distance.plot([], [], color="black", ls=":", label="$(1-\\eta\\lambda)^t$")
    distance.legend()
    chosen = 1
    steps = EVERY * np.arange(descents["log"]["loss"].shape[-1])
    for name, color in (("loss", "C4"), ("lyapunov", "C5"), ("gap", "C6")):
        for seed, values in enumerate(descents["log"][name][chosen]):
            falling.semilogy(steps, values, color=color, lw=1, label=name if seed == 0 else None)
    falling.set(title=f"all of the training set, from inside, λ = {DECAYS[chosen]:g}", xlabel="step")
    falling.legend()
    weights.set(title="kernel weights times λ at the end", xlabel="λ w", yscale="log")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Runs it all and writes the results."""
    start = time.time()
    runs = experiment()
    descents = experiment(steps=500, descent=True)
    here = pathlib.Path(__file__).parent
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.time() - start),
        "learning_rate": RATE,
        "batch_size": BATCH,
        "steps": EVERY * (runs["log"]["loss"].shape[-1] - 1),
        "seeds": list(range(runs["log"]["loss"].shape[1])),
        "by_weight_decay": summary(runs),
        "descent": {
            str(decay): {
                "steps": EVERY * (descents["log"]["loss"].shape[-1] - 1),
                "lyapunov_first": float(descents["log"]["lyapunov"][i, :, 0].mean()),
                "lyapunov_last": float(descents["log"]["lyapunov"][i, :, -1].mean()),
                "greatest_rise": float(np.diff(descents["log"]["lyapunov"][i], axis=-1).max()),
            }
            for i, decay in enumerate(DECAYS)
        },
    }
    (here / "lion_kappa_box.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(runs, descents, here / "lion_kappa_box.png")
    for decay, row in results["by_weight_decay"].items():
        print(decay, {name: f"{value['mean']:.4f} ± {value['std']:.4f}" for name, value in row.items()})


if __name__ == "__main__":
    main()
