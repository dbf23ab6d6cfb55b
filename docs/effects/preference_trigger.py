"""DPO, SparsePO and MaPO where one token decides, over seeds: who learns the preference and leaves the rest alone?

    python docs/effects/preference_trigger.py

runs ``poise.launch.preference`` as it is, for every seed in a temporary folder, and writes preference_trigger.json and
preference_trigger.png beside itself. A seed that is in the file already is not run again.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import tempfile
import time
from typing import Any

import jax
import numpy as np

from poise.launch import preference

METHODS = ("dpo", "sparse_po", "mapo")
SHOWN = {
    "kl_off_trigger": "KL off the trigger",
    "ranking_accuracy": "ranking accuracy, held out",
    "reward_margin": "reward margin, held out",
}
HERE = pathlib.Path(__file__).parent


def trained(seed: int, *flags: str) -> dict[str, dict[str, float]]:
    """One run's figures by method."""
    with tempfile.TemporaryDirectory() as workdir:
        arguments = [f"--workdir={workdir}/run", f"--seed={seed}", f"--methods={','.join(METHODS)}", *flags]
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            code = preference.main(arguments)
        assert code == 0, f"the run of seed {seed} ended with code {code}"
        return json.loads((pathlib.Path(workdir) / "run" / "report.json").read_text())["methods"]


def save(result: dict[str, Any], path: pathlib.Path) -> None:
    """The figures, and a dot for every seed with a line through those of one seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(9, 3), dpi=110, layout="constrained")
    for axis, (name, title) in zip(axes, SHOWN.items(), strict=True):
        values = np.array([[methods[method][name] for method in METHODS] for methods in result["seeds"]])
        axis.plot(values.T, "-", color="0.8", lw=1)
        for place in range(len(METHODS)):
            axis.plot([place] * len(values), values[:, place], "o", ms=5, alpha=0.7, mew=0, color=f"C{place}")
            axis.plot([place - 0.2, place + 0.2], [values[:, place].mean()] * 2, color=f"C{place}", lw=2)
        axis.set_xticks(range(len(METHODS)), METHODS, fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.margins(0.2, 0.15)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylim(bottom=0)
    figure.savefig(path.with_suffix(".png"))
    plt.close(figure)


def main() -> None:
    """Runs what is not there yet, and prints means with the least and the greatest of the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    path = HERE / "preference_trigger.json"
    result = json.loads(path.read_text()) if path.exists() else {"seeds": []}
    if result.get("jax", jax.__version__) != jax.__version__:
        parser.error(f"{path} is of jax {result['jax']}, this is {jax.__version__}: move it away to start afresh")
    for seed in range(len(result["seeds"]), options.seeds):
        result["seeds"].append(trained(seed))
        result |= {"date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, "machine": platform.machine()}
        save(result, path)
    for method in METHODS:
        for name in (*SHOWN, "kl_at_trigger", "good_after_trigger", "reward_accuracy"):
            values = [methods[method][name] for methods in result["seeds"]]
            print(f"{method} {name}: {np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
