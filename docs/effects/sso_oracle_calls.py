"""Loss per gradient of the loss, for gradient descent and for target-based surrogates with many cheap inner steps.

    python docs/effects/sso_oracle_calls.py

writes sso_oracle_calls.json and sso_oracle_calls.png beside itself, and prints a table.
"""

import json
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from poise.optim import sso

INNER_STEPS = (1, 10, 100)


def problem(seed: int, n: int = 300, d: int = 20) -> tuple[jax.Array, jax.Array, float]:
    """Logistic regression with feature scales from 1 to 10^-1.5, and the largest curvature of ||Xw||^2/2."""
    rng = np.random.default_rng(seed)
    scales = np.logspace(0, -1.5, d)
    x = rng.standard_normal((n, d)) * scales
    labels = rng.random(n) < 1 / (1 + np.exp(-x @ (rng.standard_normal(d) / scales)))
    return jnp.asarray(x), jnp.asarray(labels, jnp.float64), float(np.linalg.eigvalsh(x.T @ x)[-1])


def predict(w, batch):
    """The logits."""
    return batch[0] @ w


def logistic(z, batch):
    """The summed logistic loss, 1/4-smooth in the logits."""
    return jnp.sum(jnp.logaddexp(0.0, z) - batch[1] * z)


def curve(seed: int, inner_steps: int | None, calls: int = 100) -> np.ndarray:
    """The mean loss before every gradient of the loss; None for gradient descent with the largest safe step."""
    x, y, curvature = problem(seed)
    batch, w = (x, y), jnp.zeros(x.shape[1])
    if inner_steps is None:

        def step(w, _):
            value, grad = jax.value_and_grad(lambda w: logistic(predict(w, batch), batch))(w)
            return w - 4.0 / curvature * grad, value / len(y)

        return np.asarray(jax.jit(lambda w: jax.lax.scan(step, w, length=calls))(w)[1])
    inner = optax.sgd(4.0 / curvature)
    algorithm = sso(predict, logistic, eta=4.0, inner_steps=inner_steps, inner_optimizer=inner)

    def outer(carry, _):
        w, state, info = algorithm.step(*carry, batch)
        return (w, state), info.loss / len(y)

    return np.asarray(jax.jit(lambda c: jax.lax.scan(outer, c, length=calls))((w, algorithm.init(w)))[1])


def optimum(seed: int) -> float:
    """The least mean loss, by Newton's method."""
    x, y, _ = problem(seed)
    loss = lambda w: logistic(x @ w, (x, y)) / len(y)  # noqa: E731
    step = lambda w, _: (w - jnp.linalg.solve(jax.hessian(loss)(w), jax.grad(loss)(w)), None)  # noqa: E731
    return float(loss(jax.lax.scan(step, jnp.zeros(x.shape[1]), length=20)[0]))


def experiment(seeds: int = 5) -> dict[str, np.ndarray]:
    """Loss above the optimum, [seed, call], by method."""
    with jax.enable_x64():
        best = np.array([[optimum(seed)] for seed in range(seeds)])
        runs = {"gradient descent": np.stack([curve(seed, None) for seed in range(seeds)])}
        for steps in INNER_STEPS:
            runs[f"surrogate, {steps} inner"] = np.stack([curve(seed, steps) for seed in range(seeds)])
        return {name: losses - best for name, losses in runs.items()}


def main() -> None:
    """Runs it all and writes the results."""
    import matplotlib.pyplot as plt

    start = time.time()
    runs = experiment()
    here = pathlib.Path(__file__).parent
    final = {name: {"mean": float(x[:, -1].mean()), "std": float(x[:, -1].std(ddof=1))} for name, x in runs.items()}
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.time() - start),
        "seeds": list(range(len(runs["gradient descent"]))),
        "excess_loss_after_100_gradients": final,
    }
    (here / "sso_oracle_calls.json").write_text(json.dumps(results, indent=1) + "\n")
    figure, panel = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for i, (name, losses) in enumerate(runs.items()):
        panel.semilogy(losses.mean(0), color=f"C{i}", ls="--" if i == 0 else "-", lw=3 if i == 0 else 1.5, label=name)
        panel.fill_between(range(losses.shape[1]), losses.min(0), losses.max(0), color=f"C{i}", alpha=0.2, lw=0)
    panel.set(title="loss above the optimum", xlabel="gradients of the loss")
    panel.legend(fontsize=9)
    figure.savefig(here / "sso_oracle_calls.png", dpi=100)
    print(final)


if __name__ == "__main__":
    main()
