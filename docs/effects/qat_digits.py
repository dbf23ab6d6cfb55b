"""Quantization-aware training to 2 bits on the handwritten digits, over seeds: what is lost against the float network.

    python docs/effects/qat_digits.py

runs ``poise.launch.qat`` as it is, for every method and seed in a temporary folder, and writes qat_digits.json and
qat_digits.png beside itself. A method that is in the file with every seed already is not run again.
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

from poise.launch import qat

METHODS = ("ofq", "lsq")
NAMES = ("float", "quantizers", "integers")
HERE = pathlib.Path(__file__).parent


def trained(method: str, seed: int, *flags: str) -> dict[str, Any]:
    """One run's figures: accuracy of the float network, of the trained quantizers, and of the exported integers."""
    with tempfile.TemporaryDirectory() as workdir:
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            code = qat.main([f"--workdir={workdir}", f"--method={method}", f"--seed={seed}", "--bits=2", *flags])
        assert code == 0, f"the run of {method}, seed {seed}, ended with code {code}"
        rows = json.loads((pathlib.Path(workdir) / "report.json").read_text())["rows"]
    figures = {name: row["accuracy"] for name, row in zip(NAMES, rows, strict=True)}
    return {"seed": seed, **figures, "logit_mse": rows[2]["logit_mse"], "bytes": rows[2]["bytes"],
            "float_bytes": rows[0]["bytes"]}  # fmt: skip


def losses(rows: list[dict[str, Any]]) -> np.ndarray:
    """Points of accuracy that the integers lose against the float network, of each seed."""
    return 100 * np.array([row["float"] - row["integers"] for row in rows])


def save(result: dict[str, Any], path: pathlib.Path) -> None:
    """The figures, and a dot for every seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    figure, axis = plt.subplots(figsize=(6, 3.2), dpi=120, layout="constrained")
    for place, rows in enumerate(result["methods"].values()):
        for shift, name in zip((-0.22, 0, 0.22), NAMES, strict=True):
            values = [100 * row[name] for row in rows]
            colour = {"float": "0.5", "quantizers": "#e69f00", "integers": "#0072b2"}[name]
            axis.plot([place + shift] * len(values), values, "o", ms=5, alpha=0.7, color=colour, mew=0)
            axis.plot([place + shift - 0.07, place + shift + 0.07], [np.mean(values)] * 2, color=colour, lw=2)
            axis.annotate(name, (place + shift, min(values)), (0, -10), textcoords="offset points", ha="center",
                          fontsize=7, color=colour)  # fmt: skip
    axis.set_xticks(range(len(result["methods"])), [f"{name}, 2 bits" for name in result["methods"]])
    axis.set_ylabel("accuracy on held-out digits (%)")
    axis.margins(0.25, 0.2)
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(path.with_suffix(".png"))
    plt.close(figure)


def main() -> None:
    """Runs what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    path = HERE / "qat_digits.json"
    result = json.loads(path.read_text()) if path.exists() else {"methods": {}}
    if result.get("jax", jax.__version__) != jax.__version__:
        parser.error(f"{path} is of jax {result['jax']}, this is {jax.__version__}: move it away to start afresh")
    for method in options.methods:
        rows = result["methods"].setdefault(method, [])
        for seed in range(len(rows), options.seeds):
            rows.append(trained(method, seed))
            result |= {"date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, "machine": platform.machine()}
            save(result, path)
        lost = losses(rows)
        print(f"{method}: {lost.mean():.2f} points lost (of the seeds: {', '.join(f'{value:.1f}' for value in lost)})")


if __name__ == "__main__":
    main()
