"""The mean of a Gaussian by likelihood and by noise contrast: population landscapes, and a run on samples.

    python docs/effects/meco_landscape.py

writes meco_landscape.json and meco_landscape.png beside itself, and prints a table.
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

from poise.optim import average_gradients, effective_sample_size_from_log_weights, meco_init, meco_loss, nce_loss

HALF_LOG = 0.5 * np.log(2 * np.pi)  # log Z of exp(-(x - theta)^2/2)
STEPS, BATCH = 1500, 128


def f(theta, x):
    """The unnormalized log density."""
    return -0.5 * (x - theta) ** 2


def slopes(theta: jax.Array, center: float) -> tuple[jax.Array, jax.Array]:
    """Population gradients in theta by quadrature, data N(center, 1), noise N(0, 1): of NLL, of NCE at c = log Z."""
    z = jnp.linspace(-12.0, 12.0 + center, 4001)
    cell = z[1] - z[0]
    density = lambda mean: jnp.exp(f(mean, z) - HALF_LOG)  # noqa: E731

    def nce(theta):
        ratio = f(theta, z) - f(0.0, z)
        terms = density(center) * jax.nn.log_sigmoid(ratio) + density(0.0) * jax.nn.log_sigmoid(-ratio)
        return -jnp.sum(terms) * cell

    def nll(theta):
        return -jnp.sum(density(center) * f(theta, z)) * cell + jnp.log(jnp.sum(jnp.exp(f(theta, z))) * cell)

    return jax.grad(nll)(theta), jax.grad(nce)(theta)


@functools.partial(jax.jit, static_argnames="method")
@functools.partial(jax.vmap, in_axes=(0, None, None, None))
def stochastic(key: jax.Array, center: float, width: float, method: str) -> tuple[jax.Array, jax.Array]:
    """The error of the mean over the steps, and the effective sample size, for noise N(0, width^2)."""
    start = (jnp.zeros(()), jnp.asarray(HALF_LOG, jnp.float32))
    tx = optax.chain(average_gradients(0.5), optax.sgd(optax.cosine_decay_schedule(0.05, STEPS)))

    def step(carry, key):
        params, state, opt = carry
        x, z = jax.random.normal(key, (2, BATCH))
        x, z = center + x, width * z
        log_q = lambda at: -0.5 * (at / width) ** 2 - HALF_LOG - jnp.log(width)  # noqa: E731

        def loss(params):
            theta, c = params
            if method == "meco":
                return meco_loss(f(theta, x), f(theta, z) - log_q(z), state, 0.3)
            return nce_loss(f(theta, x), log_q(x), f(theta, z), log_q(z), c), state

        grads, state = jax.grad(loss, has_aux=True)(params)
        updates, opt = tx.update(grads, opt, params)
        size = effective_sample_size_from_log_weights(f(params[0], z) - log_q(z))
        return (optax.apply_updates(params, updates), state, opt), (params[0] - center, size)

    return jax.lax.scan(step, (start, meco_init(), tx.init(start)), jax.random.split(key, STEPS))[1]


def main() -> None:
    """Runs it all and writes the results."""
    import matplotlib.pyplot as plt

    begin = time.time()
    here = pathlib.Path(__file__).parent
    centers = (4.0, 8.0, 16.0)
    shares = np.linspace(0, 1.5, 61)
    with jax.enable_x64():
        grid = jax.jit(jax.vmap(slopes, (0, None)))
        population = {r: tuple(map(np.asarray, grid(jnp.asarray(shares * r), r))) for r in centers}
    keys = jax.random.split(jax.random.key(0), 5)
    cases = [("meco", 1.0), ("meco", 4.0), ("nce", 1.0), ("nce", 4.0)]
    runs = {case: tuple(map(np.asarray, stochastic(keys, 4.0, case[1], case[0]))) for case in cases}
    finals = {
        f"{method}, noise of width {width:g}": {
            "error_mean": float(np.abs(errors[:, -1]).mean()),
            "error_std": float(np.abs(errors[:, -1]).std(ddof=1)),
            "effective_sample_size": float(sizes[:, -1].mean()),
        }
        for (method, width), (errors, sizes) in runs.items()
    }
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.time() - begin),
        "nce_slope_at_half_way": {str(r): float(np.interp(0.5, shares, p[1])) for r, p in population.items()},
        "nll_slope_at_half_way": {str(r): float(np.interp(0.5, shares, p[0])) for r, p in population.items()},
        "stochastic_R_4": finals,
    }
    (here / "meco_landscape.json").write_text(json.dumps(results, indent=1) + "\n")
    figure, (landscape, errors) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for i, (r, (by_nll, by_nce)) in enumerate(population.items()):
        inside = shares < 0.99
        landscape.semilogy(shares[inside], -by_nll[inside], "-", color=f"C{i}", label=f"likelihood, R = {r:g}")
        landscape.semilogy(shares[inside], -by_nce[inside], "--", color=f"C{i}", label=f"noise contrast, R = {r:g}")
    landscape.set(title="slope towards the mean R", xlabel="θ/R", ylim=(1e-6, 30))
    landscape.legend(fontsize=7)
    for i, ((method, width), (error, _)) in enumerate(runs.items()):
        panel_style = {"color": f"C{i}", "ls": "-" if method == "meco" else "--"}
        errors.semilogy(np.abs(error).mean(0), lw=1, label=f"{method}, noise N(0, {width:g}²)", **panel_style)
    errors.set(title="error on samples, R = 4, batches of 128, 5 seeds", xlabel="step")
    errors.legend(fontsize=8)
    figure.savefig(here / "meco_landscape.png", dpi=100)
    print(json.dumps({k: results[k] for k in list(results)[-3:]}, indent=1))


if __name__ == "__main__":
    main()
