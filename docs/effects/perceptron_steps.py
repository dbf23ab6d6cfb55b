"""Steps until separation against the step size, on the worst case for gradient descent on the logistic loss.

    python docs/effects/perceptron_steps.py

writes perceptron_steps.json and perceptron_steps.png beside itself, and prints a table.
"""

import json
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from poise.optim import batch_perceptron_rule, iterations_to_separate, logistic_gd, logistic_rule

STEP_SIZES = np.logspace(-1, 3, 17)


def worst_case(n: int) -> tuple[jax.Array, jax.Array]:
    """One example of one class against n - 1 copies of another."""
    x = np.concatenate([[[0.5, -1.0]], np.tile([[-0.5, -1.0]], (n - 1, 1))])
    return jnp.asarray(x), jnp.asarray([1.0] + (n - 1) * [-1.0])


def counts(n: int) -> dict[str, list[int]]:
    """Steps of gradient descent and of the normalized one, by step size, and of their limit."""
    x, y = worst_case(n)

    @jax.jit
    def both(step_size):
        rules = logistic_rule(step_size), logistic_rule(step_size, normalized=True)
        return [iterations_to_separate(rule, x, y, 10**6).num_steps for rule in rules]

    plain, normalized = zip(*(map(int, both(g)) for g in STEP_SIZES), strict=True)
    limits = [int(iterations_to_separate(batch_perceptron_rule(b), x, y, 10**6).num_steps) for b in (False, True)]
    return {"plain": list(plain), "normalized": list(normalized), "limits": limits}


def main() -> None:
    """Runs it all and writes the results."""
    import matplotlib.pyplot as plt

    start = time.time()
    with jax.enable_x64():
        by_size = {n: counts(n) for n in (100, 1000)}
        x, y = jnp.array([[1.0, -1.0], [-1.0, -4.0]]), jnp.array([1.0, -1.0])
        paths = {g: logistic_gd(x, y, g, 8) for g in (1.0, 10.0, 100.0)}
        losses = {g: np.asarray(jnp.mean(jnp.logaddexp(0, -y * (p @ x.T)), 1)) for g, p in paths.items()}
        separated = {g: int(jnp.argmax((y * (p @ x.T) > 0).all(1))) for g, p in paths.items()}
    here = pathlib.Path(__file__).parent
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.time() - start),
        "step_sizes": STEP_SIZES.tolist(),
        "steps_by_number_of_examples": by_size,
    }
    (here / "perceptron_steps.json").write_text(json.dumps(results, indent=1) + "\n")
    figure, (steps, loss) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for i, (n, row) in enumerate(by_size.items()):
        steps.loglog(STEP_SIZES, row["plain"], "o-", color=f"C{i}", ms=3, label=f"gradient descent, n = {n}")
        steps.loglog(STEP_SIZES, row["normalized"], "s--", color=f"C{i}", ms=3, label=f"normalized, n = {n}")
        steps.axhline(row["limits"][0], color=f"C{i}", lw=0.8, ls=":")
    steps.set(title="steps until all is separated", xlabel="step size")
    steps.legend(fontsize=8)
    for i, (g, values) in enumerate(losses.items()):
        loss.semilogy(values, ".-", color=f"C{i}", label=f"step size {g:g}")
        loss.semilogy(separated[g], values[separated[g]], "o", color=f"C{i}", mfc="none", ms=10)
    loss.set(title="loss on two examples; circle: separated", xlabel="step", ylim=(1e-40, 1e6))
    loss.legend(fontsize=8)
    figure.savefig(here / "perceptron_steps.png", dpi=100)
    print(by_size)


if __name__ == "__main__":
    main()
