"""Nonzero groups of pixels under the group sparse envelope, and how well the survivors classify once refitted.

    python docs/effects/wgsef_groups.py

writes wgsef_groups.json and wgsef_groups.png beside itself, and prints a table.
"""

import functools
import json
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from poise.optim import WGSEFRule, apply_prox, wgsef_penalty, wgsef_top_k_mask

KS = (5, 10, 20)
LAMBDAS = np.logspace(-2, 1, 13)
RATE = 0.5


def digits(seed: int) -> tuple[jax.Array, jax.Array, jax.Array, np.ndarray]:
    """1000 images to train on and the rest to test on, shuffled by the seed, with their labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    x, y = jnp.asarray(images[order] / 16, jnp.float32), labels[order]
    return x[:1000], jnp.asarray(y[:1000]), x[1000:], y[1000:]


def fit(tx: optax.GradientTransformation, x: jax.Array, y: jax.Array, steps: int) -> jax.Array:
    """Softmax regression from zero on all images at once."""

    def step(carry, _):
        w, state = carry
        grad = jax.grad(lambda w: optax.softmax_cross_entropy_with_integer_labels(x @ w, y).mean())(w)
        updates, state = tx.update(grad, state, w)
        return (optax.apply_updates(w, updates), state), None

    w = jnp.zeros((64, 10))
    return jax.lax.scan(step, (w, tx.init(w)), length=steps)[0][0]


@functools.partial(jax.jit, static_argnames="k")
def penalized(x, y, lam, k):
    """Proximal gradient descent with one group per pixel."""
    penalty = wgsef_penalty({"": WGSEFRule("rows", k, lam)})
    return fit(optax.chain(optax.sgd(RATE), apply_prox(penalty.prox, RATE)), x, y, 400)


@jax.jit
def refitted(x, y, mask):
    """The chosen pixels alone, without a penalty."""
    return fit(optax.chain(optax.sgd(RATE), apply_prox(lambda w, _: jnp.where(mask, w, 0), 0.0)), x, y, 400)


def experiment(seeds: int = 5) -> dict[str, np.ndarray]:
    """Nonzero groups and accuracies [k, lambda, seed]."""
    out = {name: np.zeros((len(KS), len(LAMBDAS), seeds)) for name in ("groups", "accuracy", "refitted")}
    out["all"] = np.zeros(seeds)
    for seed in range(seeds):
        x, y, x_test, y_test = digits(seed)
        score = lambda w, x=x_test, y=y_test: float((np.asarray(x @ w).argmax(1) == y).mean())  # noqa: E731
        out["all"][seed] = score(refitted(x, y, jnp.ones((64, 10), bool)))
        for i, k in enumerate(KS):
            for j, lam in enumerate(LAMBDAS):
                w = penalized(x, y, lam, k)
                out["groups"][i, j, seed] = int((jnp.abs(w).max(1) > 0).sum())
                out["accuracy"][i, j, seed] = score(w)
                out["refitted"][i, j, seed] = score(refitted(x, y, wgsef_top_k_mask(w, "rows", k)))
    return out


def main() -> None:
    """Runs it all and writes the results."""
    import matplotlib.pyplot as plt

    start = time.time()
    runs = experiment()
    here = pathlib.Path(__file__).parent
    means = {name: runs[name].mean(-1).tolist() for name in ("groups", "accuracy", "refitted")}
    deviations = {name: runs[name].std(-1, ddof=1).tolist() for name in ("groups", "accuracy", "refitted")}
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.time() - start),
        "seeds": list(range(len(runs["all"]))),
        "k": list(KS),
        "lambdas": LAMBDAS.tolist(),
        "accuracy_of_all_pixels": float(runs["all"].mean()),
        "mean_by_k_and_lambda": means,
        "std_by_k_and_lambda": deviations,
    }
    (here / "wgsef_groups.json").write_text(json.dumps(results, indent=1) + "\n")
    figure, (groups, scores) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for i, k in enumerate(KS):
        values = runs["groups"][i]
        groups.semilogx(LAMBDAS, values.mean(1), "o-", ms=3, color=f"C{i}", label=f"k = {k}")
        groups.fill_between(LAMBDAS, values.min(1), values.max(1), color=f"C{i}", alpha=0.2, lw=0)
        groups.axhline(k, color=f"C{i}", lw=0.8, ls=":")
        scores.semilogx(LAMBDAS, runs["accuracy"][i].mean(1), "--", color=f"C{i}", label=f"k = {k}, penalized")
        scores.semilogx(LAMBDAS, runs["refitted"][i].mean(1), "-", color=f"C{i}", label=f"k = {k}, refitted")
    scores.axhline(runs["all"].mean(), color="black", lw=0.8, ls=":", label="all 64 pixels")
    groups.set(title="nonzero pixels of 64", xlabel="λ")
    groups.legend()
    scores.set(title="test accuracy", xlabel="λ")
    scores.legend(fontsize=7)
    figure.savefig(here / "wgsef_groups.png", dpi=100)
    for i, k in enumerate(KS):
        print(k, [f"{lam:.3g}: {g:.1f}" for lam, g in zip(LAMBDAS, means["groups"][i], strict=True)])
        print("  ", [f"{a:.3f} / {r:.3f}" for a, r in zip(means["accuracy"][i], means["refitted"][i], strict=True)])


if __name__ == "__main__":
    main()
