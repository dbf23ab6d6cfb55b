"""HL-Gauss beside the squared error, two-hot and C51 on Breakout of MinAtar, with and without noise on the rewards.

    pip install ".[rl]"
    python docs/effects/hl_gauss_minatar.py

writes hl_gauss_minatar.json and hl_gauss_minatar.png beside itself, and prints a table.
"""

import argparse
import json
import pathlib
import platform
import time

import gymnax
import jax
import numpy as np
import optax

from poise.launch.value_phases import pictures_as_booleans
from poise.nets import ValueMLP
from poise.rl import (
    DQNConfig,
    c51,
    dqn,
    from_gymnax,
    hl_gauss,
    over_seeds,
    reward_noise,
    scalar,
    two_hot,
)

UPDATES, PARTS = 8_000, 32
SUPPORT = {1.0: (-3.0, 9.0), 0.0: (-1.0, 9.0)}
LOSSES = {
    "hl_gauss": lambda noise: hl_gauss(*SUPPORT[noise]),
    "mse": lambda noise: scalar(),
    "two_hot": lambda noise: two_hot(*SUPPORT[noise]),
    "c51": lambda noise: c51(*SUPPORT[noise]),
}


def train(loss: str, noise: float, seeds: int) -> np.ndarray:
    """Mean returns of the episodes that ended in each part of the run, ``[parts, seeds]``; noise has mean zero."""
    env = reward_noise(pictures_as_booleans(from_gymnax(*gymnax.make("Breakout-MinAtar"))), noise)
    transform = LOSSES[loss](noise)
    net = ValueMLP(env.num_actions, transform.num_outputs)
    config = DQNConfig(iterations=UPDATES // PARTS)
    agent = over_seeds(dqn(env, net, transform, optax.adam(1e-3, eps=1e-5), config), seeds)
    state = jax.jit(agent.init)(jax.random.key(0), ())
    step = jax.jit(agent.step, donate_argnums=0)
    returns = []
    for part in range(PARTS):
        state, metrics = step(state, (), jax.random.key(1 + part))
        returns.append(np.asarray(metrics["return_mean"]))
    return np.stack(returns)


def interval(values: np.ndarray) -> tuple[float, float]:
    """A bootstrap interval of 95% for the mean over seeds."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (10_000, len(values))).mean(1)
    return tuple(float(q) for q in np.quantile(means, [0.025, 0.975]))


def main() -> None:
    """Runs it all and writes the results."""
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--noises", type=float, nargs="+", default=[1.0, 0.0])
    parser.add_argument("--losses", nargs="+", default=list(LOSSES))
    args = parser.parse_args()
    start, here = time.time(), pathlib.Path(__file__).parent
    figure, axes = plt.subplots(
        1, len(args.noises), figsize=(5 * len(args.noises), 3.6), layout="constrained", squeeze=False
    )
    rows = []
    for axis, noise in zip(axes[0], args.noises, strict=True):
        for i, loss in enumerate(args.losses):
            curves = train(loss, noise, args.seeds)
            last = curves[-PARTS // 8 :].mean(0)
            rows.append(
                {
                    "noise": noise,
                    "loss": loss,
                    "last_eighth_by_seed": last.round(4).tolist(),
                    "mean": float(last.mean()),
                    "interval_95": interval(last),
                    "curve_mean": curves.mean(1).round(4).tolist(),
                }
            )
            results = {
                "date": time.strftime("%Y-%m-%d"),
                "jax": jax.__version__,
                "python": platform.python_version(),
                "device": jax.devices()[0].device_kind,
                "seconds": round(time.time() - start),
                "environment": "Breakout-MinAtar",
                "updates": UPDATES,
                "seeds": args.seeds,
                "runs": rows,
            }
            (here / "hl_gauss_minatar.json").write_text(json.dumps(results, indent=1) + "\n")
            print(noise, loss, f"{last.mean():.2f}", last.round(2).tolist(), f"{time.time() - start:.0f} s", flush=True)
            env_steps = np.arange(1, PARTS + 1) * 32 * UPDATES / PARTS / 1e3
            axis.plot(env_steps, curves.mean(1), color=f"C{i}", label=loss)
            axis.fill_between(env_steps, curves.min(1), curves.max(1), color=f"C{i}", alpha=0.15, lw=0)
        axis.set(title=f"reward noise N(0, {noise:g}²)", xlabel="thousand environment steps", ylabel="return")
        axis.legend(fontsize=8)
    figure.savefig(here / "hl_gauss_minatar.png", dpi=100)


if __name__ == "__main__":
    main()
