"""Frames of an episode: the game's picture beside what the network says of the action that it takes."""

import math
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from poise.launch.files import atomic_path
from poise.launch.pictures import grid_picture

_SIDE, _LINE, _GAP = 160, 14, 8  # pixels: of the game and the bars, of a line of text, between them
_SHOWN = 24  # frames of a sheet, at most
_COLOURS = np.array(
    [
        (31, 119, 180),
        (255, 127, 14),
        (44, 160, 44),
        (214, 39, 40),
        (148, 103, 189),
        (140, 86, 75),
        (227, 119, 194),
        (127, 127, 127),
        (188, 189, 34),
        (23, 190, 207),
    ],
    np.uint8,
)  # matplotlib's ten
_DARK, _LIGHT, _INK = (20, 20, 30), (255, 255, 255), (60, 60, 60)


def paint(observation: Shaped[np.ndarray, "height width *channels"]) -> UInt8[np.ndarray, "height width 3"]:
    """A picture of an observation: each channel in its own colour where it is not zero, later ones on top.

    Args:
      observation: zeros and ones, with any number of channels or without their axis.

    Example:
      >>> import numpy as np
      >>> from poise.launch.frames import paint
      >>> paint(np.array([[0, 1]])).tolist()
      [[[20, 20, 30], [31, 119, 180]]]
    """
    channels = observation[..., None] if observation.ndim == 2 else observation
    picture = np.full((*channels.shape[:2], 3), _DARK, np.uint8)
    for channel in range(channels.shape[-1]):
        picture[channels[..., channel] != 0] = _COLOURS[channel % len(_COLOURS)]
    return picture


def draw_frames(
    observations: Shaped[np.ndarray, "frames height width *channels"],
    values: Float[np.ndarray, " steps"],
    returns: Float[np.ndarray, " steps"],
    probs: Float[np.ndarray, "steps bins"] | None = None,
    support: Float[np.ndarray, " bins"] | None = None,
) -> list[UInt8[np.ndarray, "tall wide 3"]]:
    """Draws an episode.

    Args:
      observations: before each step, and the last one.
      values: of the actions that were taken.
      returns: the reward up to and with each step.
      probs: the distributions whose means the values are, if there are any.
      support: what their bins stand for.

    Returns:
      One picture more than there are steps, all of one size.
    """
    from PIL import Image, ImageDraw

    frames = []
    sofar = np.concatenate([[0.0], returns])
    for step, observation in enumerate(observations):
        game = paint(observation)
        scale = max(1, _SIDE // max(game.shape[:2]))
        game = game.repeat(scale, 0).repeat(scale, 1)
        height, width = max(game.shape[0], _SIDE), game.shape[1]
        frame = Image.new("RGB", (width + _GAP + _SIDE, height + 2 * _LINE), _LIGHT)
        frame.paste(Image.fromarray(game), (0, 2 * _LINE))
        pen = ImageDraw.Draw(frame)
        pen.text((2, 1), f"step {step}", fill=_INK)
        pen.text((2, 1 + _LINE), f"return {sofar[step]:g}", fill=_INK)
        left = width + _GAP
        if step < len(values):
            pen.text((left, 1), f"value {values[step]:.2f}", fill=_INK)
            if probs is not None and support is not None:
                pen.text((left, 1 + _LINE), f"{support[0]:.3g} to {support[-1]:.3g}", fill=_INK)
                _bars(pen, probs[step], float(probs.max()), left, 2 * _LINE + height)
                place = left + (_SIDE - 1) * (values[step] - support[0]) / (support[-1] - support[0])
                pen.line((place, 2 * _LINE, place, 2 * _LINE + height), fill=tuple(_COLOURS[3].tolist()))
        else:
            pen.text((left, 1), "the end", fill=_INK)
        frames.append(np.asarray(frame))
    return frames


def _bars(pen, probs: np.ndarray, highest: float, left: int, bottom: int) -> None:
    """A histogram as wide as the game."""
    colour = tuple(_COLOURS[0].tolist())
    wide = _SIDE / len(probs)
    for i, share in enumerate(probs / highest):
        tall = round(float(share) * (_SIDE - 2))
        if tall:
            pen.rectangle((left + i * wide, bottom - tall, left + (i + 1) * wide - 1, bottom - 1), fill=colour)


def animation(path: pathlib.Path, frames: Sequence[np.ndarray], frames_per_second: float) -> None:
    """Writes an animated GIF, which begins anew a second after its end.

    Args:
      path: the file, written whole or not at all.
      frames: pictures of one size.
      frames_per_second: of the episode.
    """
    from PIL import Image

    first, *others = [Image.fromarray(frame) for frame in frames]
    each = round(1000 / frames_per_second)
    durations = [each] * len(others) + [each + 1000]
    with atomic_path(path) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)


def sheet(path: pathlib.Path, frames: Sequence[np.ndarray]) -> None:
    """Writes frames of the whole episode, evenly chosen, as one PNG.

    Args:
      path: the file, written whole or not at all.
      frames: pictures of one size.
    """
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _SHOWN)).round().astype(int))
    columns = math.ceil(math.sqrt(len(chosen)))
    blank = [np.full_like(frames[0], 255)] * (-len(chosen) % columns)
    grid_picture(path, np.stack([*(frames[i] for i in chosen), *blank]), 255)
