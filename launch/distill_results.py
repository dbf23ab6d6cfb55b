"""What a finished distillation leaves: report, table, pictures and the student itself."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from poise.fdistill import student_variables
from poise.launch.distill_phases import settings_of
from poise.launch.drawing import draw_sets, many_steps_generate, one_step_generate
from poise.launch.export import Student, save_student
from poise.launch.loop import FitResult
from poise.launch.networks import NetworkConfig
from poise.launch.pictures import curves_picture, samples_picture
from poise.launch.quality import Judge
from poise.launch.results import text_table, write_report

if TYPE_CHECKING:
    from poise.launch.distill import DistillConfig

_ROWS, _COLUMNS = 10, 5
_PACKAGES = (
    "poise", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy", "scikit-learn",
)  # fmt: skip
_FIGURES = (
    "frechet",
    "frechet_train",
    "precision",
    "recall",
    "coverage",
    "class_consistency",
    "nfe",
    "images_per_second",
)


def write_results(
    config: "DistillConfig",
    network: NetworkConfig,
    result: FitResult,
    train: Mapping[str, np.ndarray],
    judge: Judge,
    class_names: Sequence[str],
    workdir: pathlib.Path,
) -> dict[str, Any]:
    """Judges teacher and student, prints the table and writes everything; each file is whole or not there.

    Args:
      config: the run's settings.
      network: the denoiser's settings.
      result: what training ended with.
      train: the training images, the floor of what can be reached.
      judge: compares images with real ones.
      class_names: names of the classes, in the order of their labels.
      workdir: where ``student.safetensors``, ``report.json``, ``samples.png`` and ``distill.png`` go.

    Returns:
      The figures of ``report.json``.
    """
    sigma_init = settings_of(config, network.sigma_data).sigma_init
    rows = _row_labels(train.get("label"), class_names)
    teacher = result.state.frozen["teacher"]
    student = Student(network, jax.device_get(student_variables(result.state)), sigma_init, judge.scale)
    save_student(workdir / "student.safetensors", student)

    once, sampled = one_step_generate(network, sigma_init), many_steps_generate(network, config.sampler_steps)
    generators = {
        "teacher": (sampled, teacher, 2 * config.sampler_steps - 1),
        "teacher_1step": (once, teacher, 1),
        "student": (once, student.variables, 1),
    }
    key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)  # no phase has this number
    report: dict[str, Any] = {}
    shown = {}
    for name, (generate, variables, nfe) in generators.items():
        draws = draw_sets(
            generate,
            variables,
            network,
            judge.scale,
            key=key,
            number=judge.num_train,
            num_sets=config.eval_draws,
        )
        report[name] = judge.judge(draws, nfe)
        shown[name] = _rows(draws[0].images, draws[0].labels, rows)
    report["real"] = judge.judge_real(train)
    report |= {
        "classifier_accuracy": judge.classifier_accuracy,
        "seconds": result.seconds,
        "config": dataclasses.asdict(config),
        "devices": [device.device_kind for device in jax.devices()],
        "seed": config.seed,
        "student_updates": int(result.state.step),
    }
    write_report(workdir / "report.json", report, _PACKAGES)

    groups = {
        "real images": _rows(train["image"], train.get("label"), rows),
        f"teacher, {config.sampler_steps} Heun steps ({report['teacher']['nfe']} evaluations)": shown["teacher"],
        "student, 1 step (1 evaluation)": shown["student"],
    }
    title = f"f-distill ({config.divergence.replace('_', '-')}) after {report['student_updates']} student updates"
    samples_picture(workdir / "samples.png", groups, list(rows.values()), judge.scale.maximum, title)
    curves_picture(workdir / "distill.png", workdir / "metrics.jsonl", report, title)
    print(table(report), flush=True)
    return report


def table(report: Mapping[str, Any]) -> str:
    """The report's figures as text, a row per generator; a dash where a value does not apply."""
    heads = ("", *(name.replace("_", " ") for name in _FIGURES))
    rows = []
    for name in ("real", "teacher", "teacher_1step", "student"):
        label = name.replace("_", ", ").replace("1step", "1 step")
        rows.append([label, *(_cell(report[name][key]) for key in _FIGURES)])
    return text_table(heads, rows)


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.3f}"


def _row_labels(labels: np.ndarray | None, class_names: Sequence[str]) -> dict[int, str]:
    """The classes that get a row in the picture, the first ones that there are images of; without, blank rows."""
    if labels is None:
        return dict.fromkeys(range(_ROWS), "")
    return {int(c): str(class_names[int(c)]) for c in np.unique(labels)[:_ROWS]}


def _rows(images: np.ndarray, labels: np.ndarray | None, rows: Mapping[int, str]) -> np.ndarray:
    """The first images of every class, ``[rows, columns, H, W, C]``."""
    if labels is None:
        columns = min(_COLUMNS, len(images) // len(rows))
        return images[: len(rows) * columns].reshape(len(rows), columns, *images.shape[1:])
    columns = min(_COLUMNS, *(int((labels == c).sum()) for c in rows))
    return np.stack([images[labels == c][:columns] for c in rows])
