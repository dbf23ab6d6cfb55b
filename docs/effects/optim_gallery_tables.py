"""The tables of docs/methods/gallery.md, from the results of optim_gallery.py."""

from typing import Any

from optim_gallery import KAPPAS
from optim_gallery_constraints import CONSTRAINED, PENALTIES

NAMES = {name: f"lion_kappa, {name}" for name in [*KAPPAS, "log_sum_exp"]}


def point(x: Any) -> str:
    """A point to three places."""
    return f"({x[0]:.3f}, {x[1]:.3f})".replace("-0.000", "0.000")


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the page, in Markdown."""
    valley_rows = [
        f"| {NAMES.get(name, name)} | {'searched' if row['rate'] is None else format(row['rate'], '.2g')} "
        f"| {row['loss']:.1e} | {row['distance']:.1e} |"
        for name, row in sorted(results["valley"].items(), key=lambda item: item[1]["loss"])
    ]
    ball_rows = [
        f"| {NAMES.get(name, name)} | {CONSTRAINED[name][0]} | {PENALTIES.get(name, 'none')} "
        f"| {point(row['minimum'])} | {point(row['end'])} | {row['distance']:.1e} |"
        for name, row in results["constraint"].items()
        if "minimum" in row
    ]
    free_rows = [
        f"| {name} | {point(row['end'])} |" for name, row in results["constraint"].items() if "minimum" not in row
    ]
    cone_rows = [f"| {name} | {count} |" for name, count in results["cone"].items()]
    angle_rows = [f"| {name} | {row['length']:.2f} | {row['angle']:.2f} |" for name, row in results["angle"].items()]
    same_rows = [f"| {sentence} | {distance:.1e} |" for sentence, distance in results["same"].items()]
    heads = {
        "valley": ("| optimizer | learning rate | loss at the end | distance to the minimum |", valley_rows),
        "constraint": ("| optimizer | set | penalty | minimum of the problem | end | distance |", ball_rows),
        "free": ("| optimizer | end |", free_rows),
        "same": ("| | greatest distance between the paths |", same_rows),
        "cone": ("| rule | steps to separation |", cone_rows),
        "angle": ("| optimizer | length at the end | angle at the end |", angle_rows),
    }
    return {
        name: "\n".join([head, "|" + (head.count("|") - 1) * "---|", *rows]) for name, (head, rows) in heads.items()
    }
