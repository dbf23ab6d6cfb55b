"""All suites after each other, each in a process of its own, and one page of what they measured.

    python -m benchmarks --suite=all --output=benchmarks/results

Writes ``<suite>.json`` for every suite, ``results.md`` with all tables, and ``results.png``, which shows how many times
as fast each contestant is as the first of its table. Files of suites that are not run this time are kept and shown as
they are. A peer that isn't installed (``pip install -e ".[bench]"`` brings most) is named as missing. Run it on a
machine that does nothing else.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from benchmarks.records import Row, markdown_table, version_of
from poise.launch.files import atomic_path

# Flags of a run that shows in a minute or two that everything works; its numbers mean little.
SUITES: dict[str, list[str]] = {
    "attention": ["--lengths=128", "--rounds=2"],
    "fdistill": ["--size=tiny", "--rounds=2"],
    "loop": ["--width=32", "--batch=16", "--steps=20", "--rounds=2", "--seconds=0.2"],
    "optim": ["--sizes=1e4", "--leaves=4", "--seconds=0.1", "--rounds=3"],
    "quant": ["--sizes=64", "--rows=16", "--steps=20", "--seconds=0.1", "--rounds=3"],
    "rl": ["--seconds=0.5", "--seeds=1"],
    "softmax": ["--shapes=16x256", "--rounds=3"],
}
NEEDS = {"fdistill": ("torch",)}


def run(suite: str, folder: pathlib.Path, quick: bool) -> str:
    """Runs a suite; returns what went wrong, or nothing."""
    missing = [name for name in NEEDS.get(suite, ()) if version_of(name) is None]
    if missing:
        return f"{suite} needs {', '.join(missing)}, which is not installed"
    flags = [f"--output={folder / suite}.json", *(SUITES[suite] if quick else [])]
    print(f"\n== {suite}", flush=True)
    code = subprocess.run([sys.executable, "-m", f"benchmarks.{suite}", *flags]).returncode
    return f"{suite} failed with exit code {code}" if code else ""


def page(records: list[Row], problems: list[str]) -> str:
    """Every table, with the machine that it was measured on."""
    lines = ["# Benchmarks", "", "`speedup` is how many times as fast a row is as the first of its table.", ""]
    lines += [f"- {problem}" for problem in problems] + [""] * bool(problems)
    for record in records:
        facts = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
        lines += [f"## {record['suite']}", "", facts, ""]
        if record["missing"]:
            lines += [f"Not installed, so not measured: {', '.join(record['missing'])}.", ""]
        for table in record["tables"]:
            lines += [f"### {table['title']}", "", markdown_table(table["rows"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def draw(records: list[Row], path: pathlib.Path) -> None:
    """Speed of every contestant over that of the first of its table, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [
        (table["title"], {next(iter(row.values())): row["speedup"] for row in table["rows"] if row.get("speedup")})
        for record in records
        for table in record["tables"]
    ]
    tables = [(title, speeds) for title, speeds in found if len(speeds) > 1]
    if not tables:
        return
    columns = min(3, len(tables))
    rows = -(-len(tables) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.5 * columns, 1.75 * rows + 0.3), sharex=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(tables) :]:
        axis.axis("off")
    for axis, (title, speeds) in zip(axes.flat, tables, strict=False):
        names, values = list(speeds), list(speeds.values())
        axis.barh(names, [value - 1 for value in values], left=1, color=["0.6", *["#0072b2"] * (len(names) - 1)])
        for place, value in enumerate(values):
            axis.annotate(f" {value:.2g}", (max(value, 1), place), va="center", fontsize=7)
        axis.axvline(1, color="0.4", linewidth=0.8)
        axis.set(xscale="log", ylim=(max(len(names), 4) - 0.5, -0.5))
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=7, labelbottom=True)
    figure.supxlabel("times as fast as the first", fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", nargs="+", choices=["all", *SUITES], default=["all"])
    parser.add_argument(
        "--output", default="", help="the folder for the files; empty: benchmarks/results, or benchmarks/quick"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything works")
    options = parser.parse_args()
    folder = pathlib.Path(options.output or ("benchmarks/quick" if options.quick else "benchmarks/results"))
    folder.mkdir(parents=True, exist_ok=True)
    chosen = list(SUITES) if "all" in options.suite else options.suite
    problems = [problem for suite in chosen if (problem := run(suite, folder, options.quick))]
    found = [path for suite in SUITES if (path := folder / f"{suite}.json").exists()]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    newest = [record["machine"] for record in records if record["suite"] in chosen]
    problems += [
        f"{record['suite']} was measured earlier, on another machine or with other versions"
        for record in records
        if record["suite"] not in chosen and record["machine"] not in newest
    ]
    with atomic_path(folder / "results.md") as temporary:
        temporary.write_text(page(records, problems), encoding="utf-8")
    draw(records, folder / "results.png")
    print(f"\n{folder / 'results.md'} and {folder / 'results.png'}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
