"""HL-Gauss beside the squared error, two-hot and C51 on Breakout of MinAtar, with and without noise on the rewards.

    pip install ".[rl]"
    python docs/effects/hl_gauss_minatar.py

runs ``poise.launch.value`` as it is, once for each noise, writes hl_gauss_minatar.json and hl_gauss_minatar.png beside
itself, and prints a table. The runs are in ``--workdir`` (runs/breakout, and runs/breakout_quiet without noise), go on
there when stopped, and are read there when they are finished.
"""

import argparse
import json
import pathlib
import platform
import time
from typing import Any

import jax
import numpy as np

from poise.launch import value
from poise.launch.results import read_rows

LOSSES, PARTS = ("hl_gauss", "mse", "two_hot", "c51"), 32
HERE = pathlib.Path(__file__).parent


def trained(noise: float, workdir: pathlib.Path, seeds: int) -> dict[str, Any]:
    """One run's figures by loss: returns over the last eighth, greedy returns after it, and the course of the means."""
    code = value.main(
        [
            "--env=Breakout-MinAtar",
            f"--num_seeds={seeds}",
            f"--losses={','.join(LOSSES)}",
            f"--reward_noise={noise}",
            f"--workdir={workdir}",
        ]
    )
    assert code == 0, f"the run in {workdir} ended with code {code}"
    report, rows = json.loads((workdir / "report.json").read_text()), read_rows(workdir)
    losses = {}
    for loss in LOSSES:
        figures = report["losses"][loss]
        curves = np.array([row["return_mean"] for row in rows[loss]])
        parts = curves.reshape(PARTS, -1, seeds).mean(1)
        last = figures["return_last_eighth"]
        losses[loss] = {
            "mean": float(np.mean(last["by_seed"])),
            **last,
            "greedy_return": figures["greedy_return"],
            "value_error": figures["value_error"],
            "curve_by_seed": parts.T.round(4).tolist(),
        }
    return {
        "noise": noise,
        "support": report["support"],
        "env_steps": report["env_steps"],
        "seconds": {loss: round(seconds) for loss, seconds in report["seconds"].items()},
        "losses": losses,
    }


def picture(runs: list[dict[str, Any]], path: pathlib.Path) -> None:
    """The course of returns: means over seeds, with the least and the greatest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(5 * len(runs), 3.6), layout="constrained", squeeze=False)
    for axis, run in zip(axes[0], runs, strict=True):
        env_steps = np.arange(1, PARTS + 1) / PARTS * run["env_steps"] / 1e3
        for i, (loss, figures) in enumerate(run["losses"].items()):
            curves = np.array(figures["curve_by_seed"])
            axis.plot(env_steps, curves.mean(0), color=f"C{i}", label=loss)
            axis.fill_between(env_steps, curves.min(0), curves.max(0), color=f"C{i}", alpha=0.15, lw=0)
        noise = f"noise of {run['noise']:g} on rewards" if run["noise"] else "without noise"
        axis.set(title=noise, xlabel="thousand environment steps", ylabel="return")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Runs it all and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/breakout"))
    options = parser.parse_args()
    quiet = options.workdir.with_name(options.workdir.name + "_quiet")
    runs = [trained(noise, workdir, options.seeds) for noise, workdir in ((1.0, options.workdir), (0.0, quiet))]
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "environment": "Breakout-MinAtar",
        "seeds": options.seeds,
        "runs": runs,
    }
    (HERE / "hl_gauss_minatar.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    picture(runs, HERE / "hl_gauss_minatar.png")
    for run in runs:
        for loss, figures in run["losses"].items():
            print(run["noise"], loss, f"{figures['mean']:.2f}", np.round(figures["by_seed"], 2).tolist())


if __name__ == "__main__":
    main()
