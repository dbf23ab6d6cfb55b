"""HL-Gauss as the loss of a regressor: scikit-learn's diabetes data, beside the squared error and two-hot.

    python docs/effects/hl_gauss_diabetes.py

writes hl_gauss_diabetes.json and hl_gauss_diabetes.png beside itself, and prints a table.
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
from sklearn.datasets import load_diabetes

from poise.nets import ValueMLP
from poise.rl import hl_gauss, scalar, softmax_scalar, two_hot

SEEDS, STEPS, EVERY = 10, 2_000, 50
MAKERS = {
    "mse": scalar,
    "hl_gauss": functools.partial(hl_gauss, -3.0, 4.0, 51),
    "two_hot": functools.partial(two_hot, -3.0, 4.0, 51),
    "mse_softmax": functools.partial(softmax_scalar, -3.0, 4.0, 51),
}


def data() -> tuple[np.ndarray, np.ndarray]:
    """Ten columns and a target, all of mean 0 and variance 1."""
    x, y = load_diabetes(return_X_y=True, scaled=True)
    return (x / x.std(0)).astype(np.float32), ((y - y.mean()) / y.std()).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("name", "rate"))
def fit(key: jax.Array, train: tuple, test: tuple, name: str, rate: float) -> tuple[jax.Array, jax.Array]:
    """Root mean squared errors on both parts after every ``EVERY`` steps of Adam on all of the training data."""
    transform = MAKERS[name]()
    net, tx = ValueMLP(1, transform.num_outputs, (64, 64)), optax.adam(rate)
    params = net.init(key, train[0])

    def error(params, part):
        return jnp.sqrt(jnp.mean((transform.decode(net.apply(params, part[0])[:, 0]) - part[1]) ** 2))

    def objective(params):
        return transform.loss(net.apply(params, train[0])[:, 0], transform.encode(train[1])).mean()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(objective)(params), state)
        return (optax.apply_updates(params, updates), state), None

    def some(carry, _):
        carry = jax.lax.scan(step, carry, length=EVERY)[0]
        return carry, (error(carry[0], train), error(carry[0], test))

    return jax.lax.scan(some, (params, tx.init(params)), length=STEPS // EVERY)[1]


def main() -> None:
    """Runs it all and writes the results."""
    import matplotlib.pyplot as plt

    start, here = time.time(), pathlib.Path(__file__).parent
    x, y = data()
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    rows = {}
    for i, name in enumerate(MAKERS):
        curves = []
        for seed in range(SEEDS):
            order = np.random.default_rng(seed).permutation(len(x))
            parts = [(x[part], y[part]) for part in (order[:300], order[300:])]
            curves.append(np.stack(fit(jax.random.key(seed), *parts, name, 1e-3)))
        train, test = np.stack(curves, 1)
        rows[name] = {
            "test_best": float(test.min(1).mean()),
            "test_last": float(test[:, -1].mean()),
            "test_last_std": float(test[:, -1].std(ddof=1)),
            "train_last": float(train[:, -1].mean()),
        }
        print(name, {key: round(value, 3) for key, value in rows[name].items()}, flush=True)
        steps = np.arange(EVERY, STEPS + 1, EVERY)
        axis.plot(steps, test.mean(0), color=f"C{i}", label=name)
        axis.fill_between(steps, test.min(0), test.max(0), color=f"C{i}", alpha=0.12, lw=0)
    axis.set(xlabel="step", ylabel="test error (standard deviations)", ylim=(0.6, 1.6))
    axis.legend(fontsize=8)
    figure.savefig(here / "hl_gauss_diabetes.png", dpi=100)
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.time() - start),
        "seeds": SEEDS,
        "steps": STEPS,
        "errors": rows,
    }
    (here / "hl_gauss_diabetes.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
