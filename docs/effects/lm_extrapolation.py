"""Length extrapolation on real text: five kinds of attention, three seeds, losses at 1 to 16 times the training length.

    python docs/effects/lm_extrapolation.py [--folder runs/lm_extrapolation]

The base of the rotary positions is chosen first, on the validation part of the text, by the mean loss of softmax and
LSSAR (p = 15) at 8 times the training length after 400 updates of a seed that the table doesn't use. The table is of
the test part. A run that was stopped goes on where it was.
"""

import argparse
import json
import pathlib
import statistics
import time

import jax

from poise.launch.files import atomic_path
from poise.launch.lm import VARIANTS
from poise.launch.lm import main as launch

HERE = pathlib.Path(__file__).parent
BASES, SEEDS = (5.0, 20.0, 100.0, 1000.0), (1, 2, 3)
FACTORS = (1, 2, 4, 8, 16)


def run(folder: pathlib.Path, *flags: str) -> dict:
    """One run of the launcher; its report."""
    if not (folder / "report.json").exists() and launch([f"--workdir={folder}", "--sample_tokens=0", *flags]):
        raise SystemExit(f"the run in {folder} failed")
    return json.loads((folder / "report.json").read_text())


def choose_base(folder: pathlib.Path) -> tuple[float, dict[str, dict[str, float]]]:
    """The best base on the validation part, and the losses at 8 times the training length that it was chosen by."""
    found = {}
    for base in BASES:
        report = run(
            folder / f"base_{base:g}",
            "--variants=softmax,lssar_p15",
            f"--rope_base={base}",
            "--held_out=validation",
            "--seed=100",
            "--steps=400",
            "--decay_steps=400",
            "--eval_factors=1,8",
            "--eval_tokens=20480",
        )
        found[f"{base:g}"] = {name: losses["loss_8x"] for name, losses in report["losses"].items()}
    return float(min(found, key=lambda base: statistics.mean(found[base].values()))), found


def picture(path: pathlib.Path, losses: dict[str, list[dict]]) -> None:
    """Mean loss by context length with the range over seeds, and by quarter of the longest window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    figure.suptitle(f"CPython's help texts, trained on windows of 64 bytes, {len(SEEDS)} seeds: mean and range")
    lengths, quarters = figure.subplots(1, 2, sharey=True)
    contexts = [64 * factor for factor in FACTORS]
    for name, rows in losses.items():
        for axis, places, curves in (
            (lengths, contexts, [[row[f"loss_{factor}x"] for factor in FACTORS] for row in rows]),
            (quarters, [1, 2, 3, 4], [row["loss_16x_quarters"] for row in rows]),
        ):
            columns = list(zip(*curves, strict=True))
            (line,) = axis.plot(places, [statistics.mean(column) for column in columns], "o-", ms=4, label=name)
            axis.fill_between(
                places, list(map(min, columns)), list(map(max, columns)), alpha=0.2, color=line.get_color()
            )
    lengths.set_xscale("log", base=2)
    lengths.set_xticks(contexts, [str(context) for context in contexts])
    lengths.set_xlabel("context length in bytes")
    lengths.set_ylabel("loss, nats per byte")
    lengths.legend(fontsize=8)
    quarters.set_xticks([1, 2, 3, 4])
    quarters.set_xlabel("quarter of the windows of 1024 bytes")
    for axis in (lengths, quarters):
        axis.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def main() -> None:
    """Chooses the base, runs every seed and writes table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/lm_extrapolation"))
    folder = parser.parse_args().folder
    base, chosen_by = choose_base(folder)
    reports = [run(folder / f"seed_{seed}", "--recipe=all", f"--rope_base={base}", f"--seed={seed}") for seed in SEEDS]
    losses = {name: [report["losses"][name] for report in reports] for name in VARIANTS}
    result = {
        "rope_base": base,
        "loss_8x_on_validation_by_base": chosen_by,
        "seeds": SEEDS,
        "losses": losses,
        "seconds": [report["seconds"] for report in reports],
        "versions": reports[0]["versions"],
        "devices": [device.device_kind for device in jax.devices()],
        "date": time.strftime("%Y-%m-%d"),
    }
    with atomic_path(HERE / "lm_extrapolation.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    picture(HERE / "lm_extrapolation.png", losses)
    for name, rows in losses.items():
        means = [statistics.mean(row[f"loss_{factor}x"] for row in rows) for factor in FACTORS]
        ratios = [row["loss_8x"] / row["loss_1x"] for row in rows]
        print(f"{name:15}", *(f"{mean:.3f}" for mean in means), f"8x/1x {min(ratios):.3f}-{max(ratios):.3f}")


if __name__ == "__main__":
    main()
