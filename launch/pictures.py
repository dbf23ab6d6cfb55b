"""The pictures that a distillation run leaves, ``samples.png`` and ``distill.png``, and grids of images."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from poise.launch.files import atomic_path

_TITLE_INCHES = 1.6  # "teacher, 18 Heun steps" takes as much


def samples_picture(
    path: pathlib.Path, groups: Mapping[str, np.ndarray], class_names: Sequence[str], maximum: int, title: str
) -> None:
    """Draws groups of images side by side, a row per class.

    Args:
      path: the PNG to write, atomically.
      groups: by title, images ``[classes, columns, H, W, C]`` in pixel values.
      class_names: the rows' labels.
      maximum: the pixel value that is drawn black (images of one channel) or brightest.
      title: of the whole picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    num_classes, cell = len(class_names), 0.42
    inches = [max(cell * images.shape[1], _TITLE_INCHES) for images in groups.values()]
    labels = 0.08 * max(map(len, class_names))
    size = (sum(inches) + 0.4 * len(inches) + labels, cell * num_classes + 1.1)
    figure = Figure(figsize=size, dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.15))
    figure.suptitle(title, fontsize=11)
    axes = np.atleast_1d(figure.subplots(1, len(groups), width_ratios=inches))
    for axis, (name, images) in zip(axes, groups.items(), strict=True):
        mosaic, centers = _mosaic(images)
        colours = {"cmap": "gray_r", "vmin": 0, "vmax": maximum} if mosaic.shape[-1] == 1 else {}
        axis.imshow(mosaic[..., 0] if mosaic.shape[-1] == 1 else mosaic / maximum, interpolation="nearest", **colours)
        axis.set_title(name.replace(" (", "\n("), fontsize=9, pad=5)
        axis.set_xticks([])
        axis.set_yticks(centers, class_names if axis is axes[0] else [""] * num_classes, fontsize=8)
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def grid_picture(path: pathlib.Path, images: np.ndarray, maximum: int) -> None:
    """Writes images as one PNG, about as many columns as rows, every pixel of an image enlarged to be seen.

    Args:
      path: the PNG to write, atomically.
      images: ``[N, H, W, C]`` in pixel values, with 1 or 3 channels.
      maximum: the pixel value that is drawn black (images of one channel) or brightest.
    """
    from PIL import Image

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    padded = np.concatenate([images, np.zeros((rows * columns - len(images), *images.shape[1:]), images.dtype)])
    mosaic, _ = _mosaic(padded.reshape(rows, columns, *images.shape[1:]))
    values = np.rint(mosaic * (255 / maximum)).astype(np.uint8)
    pixels = 255 - values[..., 0] if values.shape[-1] == 1 else values
    enlarged = max(1, 48 // images.shape[1])
    picture = Image.fromarray(pixels.repeat(enlarged, 0).repeat(enlarged, 1))
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def _mosaic(images: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Tiles ``[rows, columns, H, W, C]`` with a blank pixel between tiles; also gives the rows' centres."""
    rows, columns, height, width, channels = images.shape
    canvas = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1, channels))
    for i in range(rows):
        for j in range(columns):
            y, x = i * (height + 1), j * (width + 1)
            canvas[y : y + height, x : x + width] = images[i, j]
    return canvas, [i * (height + 1) + (height - 1) / 2 for i in range(rows)]


def curves_picture(path: pathlib.Path, metrics_file: pathlib.Path, report: Mapping, title: str) -> None:
    """Draws the run's curves: losses, the weights' effective sample size, and the Fréchet distance.

    Args:
      path: the PNG to write, atomically.
      metrics_file: the run's ``metrics.jsonl``.
      report: what goes into ``report.json``; the teacher's and the real images' figures are drawn as lines.
      title: of the whole picture.
    """
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    figure = Figure(figsize=(11, 6.2), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(2, 3)
    _curve(axes[0, 0], rows, "teacher", ["loss"], "teacher: denoising loss", log=True)
    _curve(axes[0, 1], rows, "distill", ["fake_loss"], "fake score: denoising loss", log=True)
    _curve(axes[0, 2], rows, "distill", ["discriminator_loss", "generator_loss"], "adversarial losses")
    _curve(axes[1, 0], rows, "distill", ["matching_norm"], "mean size of the matching gradient", log=True)
    _curve(axes[1, 1], rows, "distill", ["effective_sample_size"], "effective sample size of the weights")
    axis = axes[1, 2]
    points = [(row["step"], row["eval/frechet"]) for row in rows if row["phase"] == "distill" and "eval/frechet" in row]
    if points:
        axis.plot(*zip(*points, strict=True), "o-", ms=3, label=f"student, {report['student']['nfe']} evaluation")
    for name, style in (("teacher", "--"), ("real", ":")):
        label = f"teacher, {report['teacher']['nfe']} evaluations" if name == "teacher" else "real images"
        axis.axhline(report[name]["frechet"], color="black", linestyle=style, lw=1, label=label)
    axis.set_yscale("log")
    axis.set_title("Fréchet distance from held-out images", fontsize=9)
    axis.set_xlabel("student updates", fontsize=8)
    axis.legend(fontsize=7)
    for axis in axes.flat:
        axis.tick_params(labelsize=7, which="both")
        axis.grid(alpha=0.25)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _curve(axis, rows, phase, names, title, log=False):
    for name in names:
        points = [(row["step"], row[name]) for row in rows if row["phase"] == phase and name in row]
        if not points:
            continue
        steps, values = map(np.asarray, zip(*points, strict=True))
        axis.plot(steps, values, lw=0.5, alpha=0.35)
        window = max(1, len(values) // 50)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axis.plot(steps[window - 1 :], smooth, lw=1.3, color=axis.lines[-1].get_color(), label=name.replace("_", " "))
    if log:
        axis.set_yscale("log")
    if len(names) > 1:
        axis.legend(fontsize=7)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("updates", fontsize=8)
