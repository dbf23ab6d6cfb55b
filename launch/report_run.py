"""What a run's folder holds, read for a page that is mailed: nothing is trusted, and what can't be read is told."""

import dataclasses
import io
import json
import os
import pathlib
import stat
import warnings
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from poise.launch.config import ConfigError
from poise.launch.local_copy import local_copy
from poise.launch.report_curves import Curve
from poise.launch.workdir import CONFIG_FILE, DATA_FILE

METRICS_FILE, TIMING_FILE, REPORT_FILE = "metrics.jsonl", "timing.jsonl", "report.json"
# Not results: what launchers note for themselves.
_OTHER_JSON = (CONFIG_FILE, DATA_FILE, "rows.json", "teacher.json", "vocabulary.json")

_MEGABYTE = 2**20
_MAX_LINES_BYTES, _MAX_LINE, _MAX_DAMAGED = 1024 * _MEGABYTE, _MEGABYTE, 1000
_MAX_JSON, _MAX_JSON_FILES = 4 * _MEGABYTE, 12
_MAX_TEXT, _MAX_TEXTS = 20_000, 6
_MAX_PICTURE, _MAX_PICTURES, _MAX_PIXELS = 3 * _MEGABYTE, 12, 40_000_000
_MAX_CURVES, _MAX_NOTES = 200, 30
_PICTURE_TYPES = {"PNG": "image/png", "GIF": "image/gif", "JPEG": "image/jpeg"}


class Picture(NamedTuple):
    """A picture that Pillow could decode: its bytes as they are in the file, their type, and its size in pixels."""

    data: bytes
    media_type: str
    width: int
    height: int


@dataclasses.dataclass
class RunRecord:
    """What was found in a run's folder.

    Attributes:
      folder: as it was given.
      name: what the page calls the run.
      config: the settings, with the facts about the data.
      results: JSON objects by the name of their file.
      curves: by phase and metric.
      steps: the last step of each phase.
      seconds: that each phase took.
      rates: steps a second of each phase, as last measured.
      pictures: by the name of their file.
      texts: likewise.
      notes: sentences about what is missing, damaged or left out.
    """

    folder: str
    name: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    results: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    curves: dict[str, dict[str, Curve]] = dataclasses.field(default_factory=dict)
    steps: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    pictures: dict[str, Picture] = dataclasses.field(default_factory=dict)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def note(self, sentence: str) -> None:
        """Takes a sentence for the page; the hundredth is as good as the thirtieth."""
        if len(self.notes) < _MAX_NOTES:
            self.notes.append(sentence)
        elif len(self.notes) == _MAX_NOTES:
            self.notes.append("More was left out of this run; no more sentences are written about it.")


class _Unusable(Exception):
    """Why a file is not taken; the end of a sentence that begins with its name."""


def check_run(folder: str) -> pathlib.Path:
    """The folder, if a run is in it.

    Raises:
      ConfigError: naming it, if there is none.
    """
    path = local_copy(folder)
    if not path.is_dir():
        raise ConfigError(f"{folder} is no run: there is no such folder")
    if not any((path / name).is_file() for name in (CONFIG_FILE, METRICS_FILE, REPORT_FILE)):
        raise ConfigError(f"{folder} is no run: it has neither {CONFIG_FILE} nor {METRICS_FILE} nor {REPORT_FILE}")
    return path


def read_run(folder: str, name: str) -> RunRecord:
    """Reads a run's folder; whatever is missing or damaged becomes a sentence of the record.

    Files are taken only if they are regular ones that lie in the folder, also behind links.

    Args:
      folder: of a run.
      name: what the page calls it.

    Raises:
      ConfigError: naming the folder, if it is no run's.
    """
    path, record = check_run(folder), RunRecord(folder, name)
    names = sorted(os.listdir(path))
    if CONFIG_FILE in names:
        record.config = _json(record, path, CONFIG_FILE)
    else:
        record.note(f"There is no {CONFIG_FILE}: its settings are unknown.")
    if DATA_FILE in names:
        facts = _json(record, path, DATA_FILE)
        record.config |= {f"{DATA_FILE}: {key}": value for key, value in facts.items()}
    _read_lines(record, path, METRICS_FILE, names, _take_metrics)
    _read_lines(record, path, TIMING_FILE, names, _take_timing)
    if REPORT_FILE not in names:
        record.note(f"There is no {REPORT_FILE}: the run isn't finished, or no launcher made it.")
    results = [entry for entry in names if entry.endswith(".json") and entry not in _OTHER_JSON]
    for entry in _first(record, sorted(results, key=lambda entry: entry != REPORT_FILE), _MAX_JSON_FILES, "results"):
        if content := _json(record, path, entry):
            record.results[entry] = content
    seconds = record.results.get(REPORT_FILE, {}).get("seconds")
    if not record.seconds and isinstance(seconds, dict):
        for phase, value in list(seconds.items())[:_MAX_CURVES]:
            _take_timing(record, phase, 0, {"seconds": value})
    endings = (".png", ".gif", ".jpg", ".jpeg")
    pictures = [entry for entry in names if entry.lower().endswith(endings) and not entry.startswith(".")]
    for entry in _first(record, pictures, _MAX_PICTURES, "pictures"):
        try:
            record.pictures[entry] = _picture(_bytes(path, entry, _MAX_PICTURE))
        except _Unusable as reason:
            record.note(f"{entry} {reason}.")
    texts = [entry for entry in names if entry.endswith(".txt") and not entry.startswith(".")]
    for entry in _first(record, texts, _MAX_TEXTS, "texts"):
        try:
            with _opened(path, entry) as file:
                text = file.read(4 * _MAX_TEXT + 1).decode("utf-8", "replace")
            if len(text) > _MAX_TEXT:
                record.note(f"Of {entry} only the first {_MAX_TEXT:,} characters are shown.")
            record.texts[entry] = text[:_MAX_TEXT]
        except _Unusable as reason:
            record.note(f"{entry} {reason}.")
    return record


def _first(record: RunRecord, names: list[str], number: int, what: str) -> list[str]:
    if len(names) > number:
        record.note(f"Only the first {number} of its {len(names)} {what} are shown.")
    return names[:number]


def _opened(folder: pathlib.Path, name: str) -> BinaryIO:
    """A regular file of the folder, open for reading; nothing else is waited for, and no link leads out of it."""
    try:
        root, target = folder.resolve(strict=True), (folder / name).resolve(strict=True)
        if not target.is_relative_to(root):
            raise _Unusable("is left out: it is a link out of the run's folder")
        descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise _Unusable("is left out: it is no regular file")
        return os.fdopen(descriptor, "rb")
    except (OSError, RuntimeError) as error:  # the latter for links in a circle
        raise _Unusable(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _bytes(folder: pathlib.Path, name: str, limit: int) -> bytes:
    with _opened(folder, name) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise _Unusable(f"is left out: it is larger than {limit // _MEGABYTE} MB")
    return data


def _json(record: RunRecord, folder: pathlib.Path, name: str) -> dict[str, Any]:
    """The object in a file; empty, with a note, where there is none."""
    try:
        content = json.loads(_bytes(folder, name, _MAX_JSON))
    except _Unusable as reason:
        record.note(f"{name} {reason}.")
    except (ValueError, RecursionError) as error:
        record.note(f"{name} is damaged: {error}.")
    else:
        if isinstance(content, dict):
            return content
        record.note(f"{name} is damaged: it holds no JSON object.")
    return {}


def _picture(data: bytes) -> Picture:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=tuple(_PICTURE_TYPES)) as image:
                width, height = image.size
                if width * height > _MAX_PIXELS:
                    raise Image.DecompressionBombError
                image.load()
                return Picture(data, _PICTURE_TYPES[str(image.format)], width, height)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _Unusable(f"is left out: it has more than {_MAX_PIXELS // 10**6} million pixels") from error
    except Exception as error:  # decoders raise whatever they stumble over
        raise _Unusable("is left out: it is no picture that can be decoded as PNG, GIF or JPEG") from error


Take = Callable[[RunRecord, str, int, dict[str, Any]], None]


def _read_lines(record: RunRecord, folder: pathlib.Path, name: str, names: list[str], take: Take) -> None:
    """Hands every whole row of a file to `take` and notes which lines were none."""
    if name not in names:
        record.note(f"There is no {name}.")
        return
    damaged = []
    try:
        with _opened(folder, name) as file:
            for number, line in enumerate(_lines(record, name, file), 1):
                try:
                    row = json.loads(line)
                    phase, step = row["phase"], row["step"]
                    if not isinstance(phase, str) or type(step) is not int or not 0 <= step < 2**53:
                        raise ValueError("another phase or step")
                except (ValueError, KeyError, TypeError, RecursionError):
                    damaged.append((number, line.endswith(b"\n")))
                    if len(damaged) == _MAX_DAMAGED:
                        raise _Unusable(f"is not read to its end: {_MAX_DAMAGED:,} lines are damaged") from None
                else:
                    take(record, phase, step, row)
    except _Unusable as reason:
        record.note(f"{name} {reason}.")
    if damaged and not damaged[-1][1]:
        record.note(f"The last line of {name}, {damaged.pop()[0]:,}, is half written and left out.")
    if damaged:
        lines = ", ".join(f"{number:,}" for number, _ in damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        record.note(f"{len(damaged):,} damaged line{'s' * (len(damaged) > 1)} of {name} left out: {lines}.")


def _lines(record: RunRecord, name: str, file: BinaryIO) -> Iterator[bytes]:
    seen = 0
    while line := file.readline(_MAX_LINE):
        seen += len(line)
        if seen > _MAX_LINES_BYTES:
            record.note(f"Of {name} only the first {_MAX_LINES_BYTES // _MEGABYTE:,} MB were read.")
            return
        yield line


def _take_metrics(record: RunRecord, phase: str, step: int, row: dict[str, Any]) -> None:
    if phase not in record.steps and len(record.steps) == _MAX_CURVES:
        return
    record.steps[phase] = step
    curves = record.curves.setdefault(phase, {})
    for metric, value in row.items():
        if metric in ("phase", "step"):
            continue
        if metric not in curves:
            if sum(map(len, record.curves.values())) >= _MAX_CURVES:
                sentence = f"Only its first {_MAX_CURVES} curves are drawn."
                if sentence not in record.notes:
                    record.note(sentence)
                continue
            curves[metric] = Curve()
        curves[metric].add(step, value)


def _take_timing(record: RunRecord, phase: str, step: int, row: dict[str, Any]) -> None:
    if phase not in record.seconds and len(record.seconds) == _MAX_CURVES:
        return
    for name, found in (("seconds", record.seconds), ("steps_per_second", record.rates)):
        value = row.get(name)
        if isinstance(value, int | float) and 0 <= value < 1e12:
            found[phase] = float(value)
