"""The figures of optim_gallery.py: small multiples, one optimizer a panel, the same axes and level lines in all."""

import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optim_gallery as gallery
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from optim_gallery_constraints import CONSTRAINED, CURVATURE, FREE_MINIMUM, none
from optim_gallery_tables import NAMES

OURS, THEIRS, GOAL = "#1f5fa8", "#c2571a", "#177245"


def color_of(name: str) -> str:
    """Blue for poise, orange for optax."""
    return THEIRS if name.startswith("optax") else OURS


def panels(names: list[str], columns: int, ratio: float, width: float = 2.3) -> tuple[Any, dict[str, Axes]]:
    """A figure with an axes for each name, in the order given, of a certain ratio of height to width."""
    rows = -(-len(names) // columns)
    size = (width * columns, (width * ratio + 0.42) * rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    for spare in axes.ravel()[len(names) :]:
        spare.axis("off")
    return figure, dict(zip(names, axes.ravel(), strict=False))


def levels(axes: Axes, function: Callable, x: np.ndarray, y: np.ndarray, values: np.ndarray) -> None:
    """Level lines of a function of points [..., 2], darker where it is small."""
    grid = np.stack(np.meshgrid(x, y), -1)
    axes.contour(x, y, function(grid), values, colors="0.75", linewidths=0.6, zorder=1)


def walk(axes: Axes, path: np.ndarray, color: str) -> None:
    """A path with its steps as dots, an open circle at its start and a full one at its end."""
    axes.plot(*path.T, "-", color=color, lw=0.9, zorder=3)
    axes.plot(*path.T, ".", color=color, ms=1.8, zorder=3)
    axes.plot(*path[0], "o", mfc="white", mec=color, ms=5, zorder=4)
    axes.plot(*path[-1], "o", color=color, ms=4, zorder=5)


def title(axes: Axes, name: str, below: str) -> None:
    """The optimizer in bold, and a number under it."""
    first = NAMES.get(name, name)
    axes.set_title(first, fontsize=8, fontweight="bold", color=color_of(name), pad=14)
    axes.text(0.5, 1.025, below, transform=axes.transAxes, ha="center", va="bottom", fontsize=7.5, color="0.25")
    axes.tick_params(labelsize=7, length=2)


def rosenbrock(points: np.ndarray) -> np.ndarray:
    """The valley at points [..., 2]."""
    return (1 - points[..., 0]) ** 2 + 100 * (points[..., 1] - points[..., 0] ** 2) ** 2


def bowl(points: np.ndarray) -> np.ndarray:
    """The quadratic at points [..., 2]."""
    moved = points - FREE_MINIMUM
    return np.einsum("...i,ij,...j->...", moved, CURVATURE, moved) / 2


def draw_valley(paths: dict[str, tuple[np.ndarray, float | None]], results: dict[str, Any]) -> Any:
    """The valley, each optimizer at its best learning rate."""
    figure, axes = panels(list(paths), 6, 1.0)
    for name, (path, _) in paths.items():
        levels(
            axes[name],
            rosenbrock,
            np.linspace(-2, 2, 401),
            np.linspace(-1.2, 2.6, 401),
            np.array([1, 10, 50, 150, 400, 900, 1800]),
        )
        walk(axes[name], path, color_of(name))
        axes[name].plot(1, 1, "+", color=GOAL, ms=11, mew=1.4, zorder=6)
        title(axes[name], name, f"loss {results['valley'][name]['loss']:.0e} after {len(path) - 1} steps")
        axes[name].set(xlim=(-2, 2), ylim=(-1.2, 2.6))
    return figure


def feasible(axes: Axes, name: str, x: np.ndarray, y: np.ndarray) -> None:
    """Shades the set, which is the same in each quadrant; the simplex is a line."""
    if name == "log_sum_exp":
        axes.plot([0, 1], [1, 0], color=GOAL, lw=3, alpha=0.35, zorder=2)
        return
    if name not in CONSTRAINED or CONSTRAINED[name][1] is none:
        return
    gauge = CONSTRAINED[name][1]
    inside = np.array([[np.max(gauge(np.abs(np.array([u, v])))) for u in x] for v in y])
    axes.contourf(x, y, inside, [-1, 1], colors=[GOAL], alpha=0.15, zorder=0)
    axes.contour(x, y, inside, [1], colors=[GOAL], linewidths=0.8, zorder=2)


def draw_constraint(paths: dict[str, np.ndarray], results: dict[str, Any]) -> Any:
    """The quadratic, whose free minimum lies outside of every set."""
    figure, axes = panels(list(paths), 6, 0.82)
    x, y = np.linspace(-1.9, 1.9, 191), np.linspace(-1.3, 1.8, 156)
    for name, path in paths.items():
        row = results["constraint"][name]
        feasible(axes[name], name, x, y)
        levels(axes[name], bowl, x, y, np.array([0.05, 0.25, 0.6, 1.1, 1.8, 2.8, 4.2, 6, 8.5]))
        walk(axes[name], path, color_of(name))
        axes[name].plot(*FREE_MINIMUM, "x", color="0.35", ms=5, zorder=4)
        if "minimum" in row:
            axes[name].plot(*row["minimum"], "+", color=GOAL, ms=11, mew=1.4, zorder=6)
            title(axes[name], name, f"{CONSTRAINED[name][0]}: {row['distance']:.0e} away".replace("none: ", ""))
        else:
            title(axes[name], name, "no constraint")
        axes[name].set(xlim=(-1.9, 1.9), ylim=(-1.3, 1.8), aspect="equal")
    return figure


def draw_cone(paths: dict[str, tuple[np.ndarray, int]]) -> Any:
    """Linear classifiers: the cone of the weights that separate, and the way there, scaled to one picture."""
    figure, axes = panels(list(paths), 8, 1.7, width=1.75)
    signed = gallery.LABELS[:, None] * gallery.EXAMPLES
    grid = np.stack(np.meshgrid(np.linspace(-0.25, 1.15, 281), np.linspace(-1.15, 1.15, 461)), -1)
    separated = (grid @ signed.T > 0).all(-1)
    for name, (path, count) in paths.items():
        shown = path[: count + 1]
        shown = shown / np.abs(shown).max()
        axes[name].contourf(
            grid[..., 0], grid[..., 1], separated, [0.5, 1.5], cmap=ListedColormap([GOAL]), alpha=0.2, zorder=0
        )
        walk(axes[name], shown, color_of(name))
        axes[name].plot(*shown.T, ".", color=color_of(name), ms=5, zorder=4)
        rule, _, variant = name.partition(", ")
        title(axes[name], rule, f"{variant}, {count} steps".removeprefix(", "))
        axes[name].set(xlim=(-0.25, 1.15), ylim=(-1.15, 1.15), aspect="equal")
    return figure


def draw_angle(paths: dict[str, np.ndarray], results: dict[str, Any]) -> Any:
    """A loss of the angle alone; its level lines are rays, shown dotted at the start and dashed at the minimum."""
    figure, axes = panels(list(paths), 4, 0.54, width=3.2)
    most = 1.1 * max(np.abs(path).max() for path in paths.values())
    turn = np.linspace(0, 2 * np.pi, 200)
    for name, path in paths.items():
        for radius in range(1, int(most) + 2):
            axes[name].plot(radius * np.cos(turn), radius * np.sin(turn), color="0.85", lw=0.6, zorder=1)
        axes[name].plot([0, 9 * np.cos(2.6)], [0, 9 * np.sin(2.6)], "--", color=GOAL, lw=1.2, zorder=2)
        walk(axes[name], path, color_of(name))
        title(axes[name], name, f"length 1 grows to {results['angle'][name]['length']:.2f}")
        axes[name].set(xlim=(-most, most), ylim=(-0.4, most), aspect="equal")
    return figure


def draw(paths: Any, results: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes all four figures."""
    figures = {
        "valley": draw_valley(paths.valley, results),
        "constraint": draw_constraint(paths.ball, results),
        "cone": draw_cone(paths.cone),
        "angle": draw_angle(paths.angle, results),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"optim_gallery_{name}.png", dpi=110)
        plt.close(figure)
