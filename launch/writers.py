"""Where metrics go: one JSON object a step, TensorBoard where it is installed, and whatever a user plugs in."""

import importlib.util
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TextIO, runtime_checkable

import numpy as np

from poise.launch.errors import LaunchError

Values = Mapping[str, Any]


class WriteError(LaunchError, OSError):
    """Metrics that can't be written; the message names the file."""


@runtime_checkable
class Writer(Protocol):
    """Takes what a run reports, in order; implement it for any tracker."""

    def begin(self, phases: Sequence[str], restored: tuple[str, int] | None) -> None:
        """The run starts, after this (phase, step); whatever was written for later ones comes again."""
        ...

    def write(self, phase: str, step: int, values: Values) -> None:
        """Numbers by name after a step, from 1: scalars, lists of one number a seed, or None for what doesn't apply.

        It comes once for every step; the figures of an evaluation after the step are among them, as ``eval/...``.
        """
        ...

    def images(self, phase: str, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures by name, ``[H, W]``, ``[H, W, C]`` or ``[N, H, W, C]``: uint8, or floats in 0..1."""
        ...

    def flush(self) -> None:
        """Makes everything so far durable; a checkpoint follows."""
        ...

    def close(self) -> None:
        """The run ended."""
        ...


def truncate_jsonl(path: str | os.PathLike[str], phases: Sequence[str], restored: tuple[str, int] | None) -> int:
    r"""Cuts a file of metrics back to what a restored run has done.

    Rows stand in the order of the run, so the longest beginning whose rows are whole and not later than ``restored``
    is kept: a half-written last line goes, too.

    Args:
      path: the file; nothing happens where there is none.
      phases: the names of the run's phases, in order.
      restored: the (phase, step) that the run goes on from; None cuts everything.

    Returns:
      The number of rows kept.

    Example:
      >>> import pathlib, tempfile
      >>> from poise.launch.writers import truncate_jsonl
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> _ = path.write_text('{"phase": "a", "step": 1}\n{"phase": "a", "step": 2}\n{"phase": "a", "st')
      >>> truncate_jsonl(path, ["a"], ("a", 1)), path.read_text()
      (1, '{"phase": "a", "step": 1}\n')
    """
    path = pathlib.Path(path)
    if not path.exists():
        return 0
    order = {name: index for index, name in enumerate(phases)}
    limit = (order[restored[0]], restored[1]) if restored else (-1, 0)
    kept, rows = 0, 0
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
                place = (order[row["phase"]], row["step"])
                if not line.endswith(b"\n") or place > limit:
                    break
            except (ValueError, KeyError, TypeError):
                break
            kept, rows = kept + len(line), rows + 1
    if kept < path.stat().st_size:
        os.truncate(path, kept)
    return rows


class JsonLinesWriter:
    """``metrics.jsonl``: ``{"phase": name, "step": n, metric: value, ...}``, one line for every step.

    Numbers are written so that reading them gives the same bits back. No wall-clock value is in it, so that two runs of
    the same seed can be compared byte for byte.

    Args:
      path: the file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = pathlib.Path(path)
        self._file: TextIO | None = None

    def begin(self, phases: Sequence[str], restored: tuple[str, int] | None) -> None:
        """Cuts the file back and opens it."""
        with writing(self._path):
            truncate_jsonl(self._path, phases, restored)
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, phase: str, step: int, values: Values) -> None:
        """Appends a line."""
        assert self._file is not None, "begin comes first"
        row = json.dumps({"phase": phase, "step": step, **values}, allow_nan=False)
        with writing(self._path):
            self._file.write(row + "\n")

    def images(self, phase: str, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures have no place in this file."""

    def flush(self) -> None:
        """Forces the lines to the disk."""
        if self._file is not None:
            with writing(self._path):
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            file, self._file = self._file, None
            with writing(self._path):
                file.close()


class writing:
    """Says of an ``OSError`` below which file can't be written, and why, as a :class:`WriteError`."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, OSError):
            raise WriteError(f"{self._path} can't be written: {error.strerror or error}") from error


class TensorBoardWriter:
    """TensorBoard files, one folder a phase, by tensorboardX.

    Args:
      folder: the files go to ``<folder>/<phase>``.

    Raises:
      ImportError: if tensorboardX isn't installed; see :func:`tensorboard_available`.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        from tensorboardX import SummaryWriter

        self._make, self._folder = SummaryWriter, pathlib.Path(folder)
        self._phases: dict[str, Any] = {}
        self._restored: tuple[str, int] | None = None

    def begin(self, phases: Sequence[str], restored: tuple[str, int] | None) -> None:
        """Later steps of the restored phase are hidden."""
        self._restored = restored

    def _phase(self, name: str) -> Any:
        if name not in self._phases:
            step = self._restored[1] if self._restored and self._restored[0] == name else 0
            self._phases[name] = self._make(logdir=str(self._folder / name), purge_step=step + 1)
        return self._phases[name]

    def write(self, phase: str, step: int, values: Values) -> None:
        """Scalars; one curve for each seed where there are several."""
        for name, value in values.items():
            if isinstance(value, list):
                for seed, entry in enumerate(value):
                    self._phase(phase).add_scalar(f"{name}/{seed}", entry, step)
            elif value is not None:
                self._phase(phase).add_scalar(name, value, step)

    def images(self, phase: str, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures, each of a batch on its own."""
        formats = {2: "HW", 3: "HWC", 4: "NHWC"}
        for name, image in images.items():
            self._phase(phase).add_image(name, image, step, dataformats=formats[image.ndim])

    def flush(self) -> None:
        """Writes what is buffered."""
        for writer in self._phases.values():
            writer.flush()

    def close(self) -> None:
        """Closes the files."""
        for writer in self._phases.values():
            writer.close()
        self._phases = {}


def tensorboard_available() -> bool:
    """Whether the extra ``tensorboard`` is installed."""
    return importlib.util.find_spec("tensorboardX") is not None
