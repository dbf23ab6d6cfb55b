"""The picture of a comparison of preference losses."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from poise.launch.files import atomic_path


class Strip(NamedTuple):
    """One text as a policy sees it, a number for each token but the first.

    Attributes:
      kl: divergence from the reference.
      weights: of the token's reward in the loss; None where all are 1.
    """

    kl: np.ndarray
    weights: np.ndarray | None


def comparison_picture(
    path: pathlib.Path,
    methods: Mapping[str, Mapping[str, float]],
    courses: Mapping[str, Sequence[tuple[float, float]]],
    strips: Mapping[str, Strip],
    tokens: Sequence[str],
    marked: np.ndarray,
    title: str,
) -> None:
    """Draws divergences, rankings before and after, how both went while training, and one text token by token.

    Args:
      path: the PNG to write, atomically.
      methods: figures by loss.
      courses: divergence and ranking accuracy while training, by loss.
      strips: one text as each loss' policy sees it.
      tokens: its tokens but the first.
      marked: which of them follow a trigger.
      title: of the whole picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.0 + 0.62 * len(strips)), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11)
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=(3.2, 0.9 + 0.62 * len(strips))))
    divergence, ranking, course = upper.subplots(1, 3)
    places = np.arange(len(methods))
    kinds = ("kl_at_trigger", "kl_off_trigger") if all("kl_at_trigger" in m for m in methods.values()) else ("kl",)
    for i, kind in enumerate(kinds):
        heights = [figures[kind] for figures in methods.values()]
        bars = divergence.bar(places + 0.8 * i / len(kinds), heights, 0.8 / len(kinds), label=kind.replace("_", " "))
        divergence.bar_label(bars, fmt="%.2g", fontsize=7)
    divergence.set_xticks(places + 0.4 * (1 - 1 / len(kinds)), [_words(name) for name in methods], fontsize=8)
    divergence.set_title("KL to the reference, a token", fontsize=9)
    divergence.margins(y=0.15)
    divergence.legend(fontsize=7)
    marks = (
        ("ranking_accuracy_before", "s"),
        ("ranking_accuracy", "o"),
        ("idealized_accuracy", "_"),
        ("reward_accuracy", "x"),
    )
    words = ("ranked right before", "ranked right after", "idealized", "reward ranked right")
    for (name, mark), word in zip(marks, words, strict=True):
        values = [figures[name] for figures in methods.values()]
        ranking.plot(places, values, mark, ms=14 if mark == "_" else 6, mew=1.6, ls="none", label=word)
    ranking.set_xticks(places, [_words(name) for name in methods], fontsize=8)
    ranking.set_xlim(-0.5, len(methods) - 0.5)
    ranking.set_title("held-out pairs", fontsize=9)
    ranking.legend(fontsize=7)
    for method, points in courses.items():
        steps, ranked = [step for step, _ in points], [share for _, share in points]  # none, where none was judged
        course.plot(steps, ranked, "o-", ms=3, label=_words(method))
    course.set_xlabel("KL to the reference, a token of held-out pairs", fontsize=8)
    course.set_ylabel("pairs ranked right", fontsize=8)
    course.set_title("while training", fontsize=9)
    course.legend(fontsize=7)
    for axis in (divergence, ranking, course):
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    _strips(lower, strips, tokens, marked)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _words(name: str) -> str:
    return name.replace("_independent", "\nindependent").replace("_", " ")


def _strips(figure, strips: Mapping[str, Strip], tokens: Sequence[str], marked: np.ndarray) -> None:
    """Left the divergence of each policy along the text, right the weights that its loss gave the tokens."""
    shown = np.flatnonzero(np.any([strip.kl != 0 for strip in strips.values()], axis=0))
    if not len(shown):
        shown = np.arange(len(tokens))
    part = slice(int(shown[0]), int(shown[-1]) + 1)
    weighted = {name: strip.weights for name, strip in strips.items() if strip.weights is not None}
    tables = [("KL to the reference at each token of one text", {name: strip.kl for name, strip in strips.items()})]
    if weighted:
        tables.append(("weights of the tokens' rewards in the loss", weighted))
    axes = np.atleast_1d(figure.subplots(1, len(tables)))
    for axis, (title, rows) in zip(axes, tables, strict=True):
        values = np.stack([np.asarray(row)[part] for row in rows.values()])
        image = axis.imshow(values, aspect="auto", cmap="magma_r", vmin=0.0, interpolation="nearest")
        figure.colorbar(image, ax=axis, shrink=0.8).ax.tick_params(labelsize=7)
        axis.set_yticks(range(len(rows)), [_words(name) for name in rows], fontsize=8)
        axis.set_xticks(range(values.shape[1]), list(tokens)[part], fontsize=7)
        for label, behind in zip(axis.get_xticklabels(), marked[part], strict=True):
            label.set_color("tab:red" if behind else "black")
            label.set_fontweight("bold" if behind else "normal")
        axis.set_title(title + (" (red: behind the trigger)" if marked.any() else ""), fontsize=9)
