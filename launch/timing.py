"""Wall-clock: apart from the metrics, which are the same in every run of a seed."""

import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import TextIO

from poise.launch.writers import writing


class TimingLog:
    """``timing.jsonl``: seconds a phase has taken and its rate, a row every few seconds and at every checkpoint.

    Durations come from a clock that never goes back; only the field ``time`` is the wall clock's. Rows of a run that
    was stopped and repeated stay. What can't be written raises :class:`poise.launch.writers.WriteError`.

    Args:
      path: the file; None writes nothing.
      every_seconds: between rows.
      clock: seconds from any origin.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        every_seconds: float | int = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._path = None if path is None else pathlib.Path(path)
        self._every, self._clock = every_seconds, clock
        self._file: TextIO | None = None
        self._phase, self._before = "", 0.0
        self._started = self._saved = self._wrote = clock()
        self._step: int | None = None

    def start(self, phase: str, before: float | int) -> None:
        """A phase starts, having taken some seconds in earlier calls."""
        self._phase, self._before, self._step = phase, before, None
        self._started = self._saved = self._wrote = self._clock()

    @property
    def seconds(self) -> float:
        """Seconds the phase has taken, earlier calls included."""
        return self._before + self._clock() - self._started

    @property
    def since_save(self) -> float:
        """Seconds since the last checkpoint, or since the phase started or went on."""
        return self._clock() - self._saved

    def saved(self, step: int) -> None:
        """A checkpoint was made."""
        self._saved = self._clock()
        self._write(step, event="checkpoint")

    def row(self, step: int) -> None:
        """A step is finished; writes a row now and then."""
        now = self._clock()
        if self._step is None:  # the first step of this call, which the rate is counted from
            self._write(step, event="first step")
        elif now - self._wrote >= self._every:
            self._write(step, steps_per_second=(step - self._step) / (now - self._wrote))

    def _write(self, step: int, **facts: str | float) -> None:
        if self._path is None:
            return
        row = {"phase": self._phase, "step": step, "seconds": round(self.seconds, 3), "time": time.time(), **facts}
        with writing(self._path):
            if self._file is None:
                self._file = self._path.open("a", encoding="utf-8")
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if facts.get("event") != "checkpoint":
            self._step, self._wrote = step, self._clock()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None and self._path is not None:
            file, self._file = self._file, None
            with writing(self._path):
                file.close()
