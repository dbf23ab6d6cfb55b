"""What a finished comparison of preference losses leaves: a table, ``report.json`` and a picture."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from poise.launch.checkpoint_tree import restore_tree
from poise.launch.files import atomic_path
from poise.launch.preference_data import END, PreferenceData
from poise.launch.preference_judge import Judge
from poise.launch.preference_pictures import Strip, comparison_picture
from poise.launch.results import cell, phase_folder, read_rows, text_table, write_report
from poise.launch.trigger_task import TRIGGER

if TYPE_CHECKING:
    from poise.launch.preference import PreferenceConfig

_PACKAGES = ("poise", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_SHOWN = 48  # tokens of the text in the picture, at most
_COLUMNS = {
    "right before": "ranking_accuracy_before",
    "right after": "ranking_accuracy",
    "idealized": "idealized_accuracy",
    "reward right": "reward_accuracy",
    "made right": "flipped_right",
    "made wrong": "flipped_wrong",
    "KL": "kl",
    "KL at trigger": "kl_at_trigger",
    "KL off trigger": "kl_off_trigger",
    "good after trigger": "good_after_trigger",
}


def write_results(
    config: "PreferenceConfig",
    data: PreferenceData,
    judges: Mapping[str, Judge],
    seconds: Mapping[str, float],
    workdir: pathlib.Path,
) -> dict[str, Any]:
    """Judges every loss by its last checkpoint; prints the table and writes the files.

    Args:
      config: the run's settings.
      data: its texts.
      judges: by loss.
      seconds: that each phase took.
      workdir: where ``report.json``, ``table.txt`` and ``preference.png`` go.

    Returns:
      The content of ``report.json``.
    """
    methods: dict[str, dict[str, float]] = {}
    strips: dict[str, Strip] = {}
    text, mask, marked, letters = _shown_text(data)
    for index, method in enumerate(config.method_names, 1):
        state = restore_tree(phase_folder(workdir, index, method))
        trained = {"policy": state["trained"]["policy"], "masks": state["trained"].get("masks", {})}
        ref, judge = state["frozen"]["ref"], judges[method]
        methods[method] = judge(trained, ref)
        seen = judge.see(trained, ref, text, mask)
        weights = None if seen.weights is None else np.asarray(seen.weights[0])[0]
        strips[method] = Strip(np.asarray(seen.kl)[0], weights)
    report = {
        "methods": methods,
        "data": config.data,
        "pairs": len(data.train.chosen),
        "held_out_pairs": len(data.held_out.chosen),
        "share_of_raters": config.raters,
        "seconds": dict(seconds),
        "config": dataclasses.asdict(config),
        "devices": [device.device_kind for device in jax.devices()],
        "seed": config.seed,
    }
    write_report(workdir / "report.json", report, _PACKAGES)
    lines = table(report)
    with atomic_path(workdir / "table.txt") as temporary:
        temporary.write_text(lines + "\n", encoding="utf-8")
    rows = read_rows(workdir)
    courses = {
        method: [(row["eval/kl"], row["eval/ranking_accuracy"]) for row in rows[method] if "eval/kl" in row]
        for method in methods
    }
    what = "the trigger experiment" if data.mixed is not None else pathlib.Path(config.data).name
    title = f"preferences of {what}, {len(data.train.chosen)} pairs, beta {config.beta:g}, {config.steps} updates"
    comparison_picture(workdir / "preference.png", methods, courses, strips, letters, marked, title)
    print(lines, flush=True)
    return report


def table(report: Mapping[str, Any]) -> str:
    """The comparison as text, a row per loss; what belongs to the trigger is left out where there is none."""
    methods = report["methods"]
    names = {head: name for head, name in _COLUMNS.items() if any(name in figures for figures in methods.values())}
    rows = [[method, *(cell(figures.get(name)) for name in names.values())] for method, figures in methods.items()]
    return text_table(["", *names], rows)


def _shown_text(data: PreferenceData) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """The text of the picture: tokens, what counts, which positions are behind a trigger, and labels of the tokens."""
    if data.mixed is not None:
        count = (data.mixed[:, :-1] == TRIGGER).sum(1)
        text = data.mixed[[int(np.argmax(count == min(3, count.max())))]]
        names = [str(token) for token in text[0, 1:]]
        return text, np.ones((1, text.shape[1] - 1), bool), text[0, :-1] == TRIGGER, names
    mask = data.held_out.chosen_mask[:1]
    last = int(np.flatnonzero(mask[0])[-1]) + 1
    text, mask = data.held_out.chosen[:1], np.array(mask)
    names = ["end" if token == END else chr(token) if 32 < token < 127 else "·" for token in text[0, 1:].tolist()]
    first = max(0, last - _SHOWN)
    shown = np.zeros(mask.shape[1], bool)
    shown[first:last] = True
    return text, mask & shown, np.zeros(mask.shape[1], bool), names
