"""The pictures of a comparison of losses for values: learning curves, and values beside the returns that came."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from poise.launch.files import atomic_path
from poise.launch.intervals import interquartile_mean

_BARS = 50


class Distributions(NamedTuple):
    """What came and what was said of it, over the states of played episodes.

    Attributes:
      returns: the discounted returns from those states on.
      targets: shares of the support in the mean target distribution, or target values where there is no support.
      predictions: likewise of the network.
      support: the grid of values, or None.
    """

    returns: np.ndarray
    targets: np.ndarray
    predictions: np.ndarray
    support: np.ndarray | None


def curves_picture(
    path: pathlib.Path,
    env_steps: np.ndarray,
    curves: Mapping[str, np.ndarray],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    title: str,
) -> None:
    """Draws returns while training, each agent at the end, and the size of the values.

    Args:
      path: the PNG to write, atomically.
      env_steps: environment steps of an agent at each row.
      curves: mean returns ``[steps, seeds]`` by loss.
      rows: the run's rows of metrics by loss.
      title: of the whole picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, 3, width_ratios=(1.5, 0.8, 1.2))
    thousands = env_steps / 1e3
    for i, (loss, curve) in enumerate(curves.items()):
        smooth = _smooth(curve)
        found = interquartile_mean(smooth)
        axes[0].plot(thousands, found.mean, color=f"C{i}", label=loss)
        axes[0].fill_between(thousands, found.low, found.high, color=f"C{i}", alpha=0.2, lw=0)
        last = curve[-max(1, len(curve) // 8) :].mean(0)
        whole = interquartile_mean(last)
        axes[1].scatter(np.full(len(last), i), last, color=f"C{i}", s=16, alpha=0.6)
        axes[1].errorbar(
            i + 0.25,
            float(whole.mean),
            [[float(whole.mean - whole.low)], [float(whole.high - whole.mean)]],
            fmt="o",
            color="black",
            ms=4,
            capsize=3,
        )
        values = np.array([row["q_max"] for row in rows[loss]])
        found = interquartile_mean(values)
        axes[2].plot(thousands, found.mean, color=f"C{i}", label=loss)
        axes[2].fill_between(thousands, found.low, found.high, color=f"C{i}", alpha=0.2, lw=0)
    axes[0].set_title("return while training: interquartile mean, 95% bootstrap interval", fontsize=9)
    axes[0].set_ylabel("return")
    axes[0].legend(fontsize=8)
    axes[1].set_title("last eighth, each agent", fontsize=9)
    axes[1].set_xticks(range(len(curves)), list(curves), fontsize=8, rotation=20 if len(curves) > 3 else 0)
    axes[1].set_xlim(-0.6, len(curves) - 0.2)
    axes[2].set_title("greatest value of the next states, mean over updates", fontsize=9)
    for axis in (axes[0], axes[2]):
        axis.set_xlabel("thousand environment steps of an agent", fontsize=8)
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _smooth(curve: np.ndarray) -> np.ndarray:
    """A running mean over a thirtieth of the curve, of what came before alone."""
    window = max(1, len(curve) // 30)
    total = np.concatenate([np.zeros((1, curve.shape[1])), np.cumsum(curve, axis=0)])
    ends = np.arange(1, len(curve) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)[:, None]


def values_picture(path: pathlib.Path, seen: Mapping[str, Distributions], title: str) -> None:
    """Draws for each loss the histogram of returns, the mean target distribution and the predicted one.

    Args:
      path: the PNG to write, atomically.
      seen: by loss.
      title: of the whole picture.
    """
    from matplotlib.figure import Figure

    columns = min(len(seen), 3)
    lines = math.ceil(len(seen) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.3 * lines + 0.5), dpi=110, layout="constrained")
    figure.suptitle(f"{title}\nreturns from the states of played episodes, and what was said of them", fontsize=10)
    axes = np.atleast_1d(figure.subplots(lines, columns, sharex=True)).ravel()
    everything = np.concatenate([one.returns for one in seen.values()])
    low, high = np.quantile(everything, [0.002, 0.998]) if len(everything) else (0.0, 1.0)
    margin = 0.1 * (high - low) + 1e-3
    edges = np.linspace(low - margin, high + margin, _BARS + 1)
    for axis, (loss, one) in zip(axes, seen.items(), strict=False):
        axis.hist(one.returns, edges, density=True, color="0.8", label="returns that came")
        for what, style, values in (("targets", "C1--", one.targets), ("predictions", "C0-", one.predictions)):
            if one.support is None:
                heights, centres = np.histogram(values, edges, density=True)[0], (edges[1:] + edges[:-1]) / 2
            else:
                heights, centres = values / (one.support[1] - one.support[0]), one.support
            axis.plot(centres, heights, style, lw=1.4, label=f"{what}, {'values' if one.support is None else 'mean'}")
        axis.set_xlim(edges[0], edges[-1])
        axis.set_title(loss, fontsize=9)
        axis.set_xlabel("discounted return", fontsize=8)
        axis.tick_params(labelsize=8, labelbottom=True)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    for axis in axes[len(seen) :]:
        axis.set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
