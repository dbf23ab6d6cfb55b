"""How often two-bit weights jump in a last fine-tune on digits, with confidence-guided annealing and without.

    python docs/effects/oscillation_digits.py

writes oscillation_digits.json and oscillation_digits.png beside itself, and prints a table.
"""

import functools
import json
import pathlib
import platform
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from poise.quant import (
    QuantRule,
    apply_weight_quant,
    confidence_guided_annealing,
    init_weight_qparams,
    lsq,
    oscillating_fraction,
    oscillation_init,
    oscillation_update,
    statsq_codes,
)

BITS, BATCH = 2, 64
FLOAT_STEPS, QAT_STEPS, TAIL_STEPS, CHECK_EVERY = 800, 1500, 600, 10
RATE, LAST_RATE = 3e-3, 1e-3
MODEL = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])
RUNS = {
    "StatsQ": ("statsq", None),
    "StatsQ, range 0.005": ("statsq", 0.005),
    "StatsQ, range 0.02": ("statsq", 0.02),
    "LSQ": ("lsq", None),
}


def rules_of(method: str) -> list[QuantRule]:
    """All kernels at two bits, one scale per output."""
    return [QuantRule("kernel", weight_bits=BITS, method=method)]


def codes_of(learned: dict, method: str) -> list[jax.Array]:
    """The integers of all kernels."""
    out = []
    for name, layer in learned["params"].items():
        if method == "statsq":
            out.append(statsq_codes(layer["kernel"], bits=BITS, axis=0)[0])
        else:
            step = learned["steps"][f"{name}/kernel"]["step"]
            quantized = lsq(layer["kernel"], step, bits=BITS, axis=0)
            out.append(jnp.round(quantized / jnp.maximum(step, 1e-5)).astype(jnp.int8))
    return out


def split(seed: int) -> tuple[np.ndarray, ...]:
    """1297 images to train on and 500 to test on, shuffled by the seed."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = images[order].astype(np.float32) / 16, labels[order]
    return images[:-500], labels[:-500], images[-500:], labels[-500:]


def logits(learned: dict, method: str | None, x: jax.Array) -> jax.Array:
    """Of the quantized network, or of the float one."""
    params = learned["params"]
    if method is not None:
        params = apply_weight_quant(params, learned["steps"], rules_of(method))
    return MODEL.apply({"params": params}, x)


def train(
    learned: dict, key: jax.Array, data: tuple, method: str | None, tx: optax.GradientTransformation, steps: int
) -> tuple[dict, jax.Array, jax.Array, jax.Array]:
    """Trains; per ten steps the share of codes that changed in a step and the accuracy, at last who oscillates."""
    x, y, x_test, y_test = data
    count = sum(layer["kernel"].size for layer in learned["params"].values())

    def step(carry, key):
        learned, state, oscillation = carry
        index = jax.random.randint(key, (BATCH,), 0, len(x))
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(logits(p, method, x[index]), y[index]).mean()  # noqa: E731
        updates, state = tx.update(jax.grad(loss)(learned), state, learned)
        learned = optax.apply_updates(learned, updates)
        flips = jnp.zeros(())
        if method is not None:
            codes = codes_of(learned, method)
            flips = sum(jnp.sum(new != old.codes) for new, old in zip(codes, oscillation, strict=True)) / count
            oscillation = [oscillation_update(old, new) for new, old in zip(codes, oscillation, strict=True)]
        return (learned, state, oscillation), flips

    def block(carry, keys):
        carry, flips = jax.lax.scan(step, carry, keys)
        return carry, (flips.mean(), (logits(carry[0], method, x_test).argmax(-1) == y_test).mean())

    oscillation = [] if method is None else [oscillation_init(codes) for codes in codes_of(learned, method)]
    keys = jax.random.split(key, (steps // CHECK_EVERY, CHECK_EVERY))
    (learned, _, oscillation), curves = jax.lax.scan(block, (learned, tx.init(learned), oscillation), keys)
    sizes = [state.frequency.size for state in oscillation]
    shares = [oscillating_fraction(state) * size for state, size in zip(oscillation, sizes, strict=True)]
    return learned, *curves, sum(shares) / max(sum(sizes), 1)


@functools.partial(jax.jit, static_argnames=("method", "boundary_range"))
def run(key: jax.Array, data: tuple, method: str, boundary_range: float | None):
    """Float training, quantization-aware training, and the fine-tune whose flips are counted."""
    first, second, third, fourth = jax.random.split(key, 4)
    params = MODEL.init(first, data[0][:1])["params"]
    learned = {"params": params, "steps": {}}
    adam = lambda steps: optax.adam(optax.cosine_decay_schedule(RATE, steps))  # noqa: E731
    learned, *_ = train(learned, second, data, None, adam(FLOAT_STEPS), FLOAT_STEPS)
    learned = {"params": learned["params"], "steps": init_weight_qparams(learned["params"], rules_of(method))}
    learned, *_ = train(learned, third, data, method, adam(QAT_STEPS), QAT_STEPS)

    tx = optax.adamw(LAST_RATE)
    if boundary_range is not None:
        mask = {"params": jax.tree.map(lambda w: w.ndim > 1, learned["params"]), "steps": False}
        tx = confidence_guided_annealing(tx, bits=BITS, boundary_range=boundary_range, axis=0, mask=mask)
    before = (logits(learned, method, data[2]).argmax(-1) == data[3]).mean()
    _, flips, accuracy, share = train(learned, fourth, data, method, tx, TAIL_STEPS)
    return {"flips": flips, "accuracy": accuracy, "before": before, "oscillating": share}


def experiment(seeds: int = 5) -> dict[str, dict[str, np.ndarray]]:
    """Curves of every run, [seed, block]."""
    out = {}
    for name, (method, boundary_range) in RUNS.items():
        rows = [run(jax.random.key(seed), split(seed), method, boundary_range) for seed in range(seeds)]
        out[name] = {key: np.stack([np.asarray(row[key]) for row in rows]) for key in rows[0]}
    return out


def summary(runs: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, list[float]]]:
    """By run and seed: flips per weight and step, share of oscillating weights, accuracies and their deviation."""
    return {
        name: {
            "flips": curves["flips"].mean(1).tolist(),
            "oscillating": curves["oscillating"].tolist(),
            "accuracy_before": curves["before"].tolist(),
            "accuracy": curves["accuracy"][:, -10:].mean(1).tolist(),
            "accuracy_std_in_the_last_100_steps": curves["accuracy"][:, -10:].std(1).tolist(),
        }
        for name, curves in runs.items()
    }


def main() -> None:
    """Runs it all and writes the results."""
    import matplotlib.pyplot as plt

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
        "seeds": list(range(len(runs["LSQ"]["before"]))),
        "runs": summary(runs),
    }
    (here / "oscillation_digits.json").write_text(json.dumps(results, indent=1) + "\n")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = CHECK_EVERY * (1 + np.arange(TAIL_STEPS // CHECK_EVERY))
    for i, (name, curves) in enumerate(runs.items()):
        left.semilogy(steps, 1e-6 + curves["flips"].mean(0), color=f"C{i}", label=name)
        right.plot(steps, curves["accuracy"].mean(0), color=f"C{i}", label=name)
    left.set(title="codes changed per weight and step, plus $10^{-6}$", xlabel="step of the fine-tune")
    right.set(title="test accuracy", xlabel="step of the fine-tune")
    left.legend(fontsize=8)
    figure.savefig(here / "oscillation_digits.png", dpi=100)
    for name, row in results["runs"].items():
        print(f"{name:22}", {key: f"{np.mean(v):.3g} ± {np.std(v, ddof=1):.2g}" for key, v in row.items()})


if __name__ == "__main__":
    main()
