"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


def duration(seconds: float | int) -> str:
    """A duration in words.

    Example:
      >>> from poise.launch.progress import duration
      >>> duration(7.2), duration(125), duration(7500)
      ('7 s', '2 min 5 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def headline(values: Mapping[str, Any]) -> str:
    """The metric worth showing: the loss, or the first one; its mean where there is one for every seed."""
    name = "loss" if "loss" in values else next((key for key in values if key.endswith("loss")), next(iter(values), ""))
    value = values.get(name)
    if isinstance(value, list):
        value = sum(value) / len(value)
    return f"{name} {value:.4g}" if isinstance(value, int | float) else ""


class Console:
    r"""The run's voice on stderr.

    Args:
      stream: the text stream to write to; stderr if None.
      every_seconds: between plain lines, where there is no terminal.
      clock: seconds from any origin; never goes back.

    Example:
      >>> import io
      >>> from poise.launch import Console
      >>> stream = io.StringIO()
      >>> Console(stream).line("teacher: compiled in 8 s")
      >>> stream.getvalue()
      'teacher: compiled in 8 s\n'
    """

    def __init__(
        self,
        stream: Any = None,
        every_seconds: float | int = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = sys.stderr if stream is None else stream
        self._every, self._clock = every_seconds, clock
        self._bar: Any = None
        self._name, self._total, self._first = "", 0, 0
        self._started = self._spoke = clock()

    def line(self, text: str) -> None:
        """A sentence of its own, above the bar if there is one."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def start(self, name: str, total: int, done: int) -> None:
        """A phase starts, or goes on."""
        self._name, self._total, self._first = name, total, done
        self._started = self._spoke = self._clock()
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=done, desc=name, unit="step", file=self._stream, mininterval=0.2, smoothing=0.05
            )

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """A step is finished."""
        if self._bar is not None:
            self._bar.set_postfix_str(headline(values), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = self._clock()
        if now - self._spoke >= self._every and step < self._total:
            self._spoke = now
            self.line(self.describe(step, values, now))

    def describe(self, step: int, values: Mapping[str, Any], now: float) -> str:
        """The plain line after a step."""
        rate = (step - self._first) / max(now - self._started, 1e-9)
        left = (self._total - step) / rate if rate > 0 else math.inf
        parts = [f"{self._name}: step {step} of {self._total}", headline(values), f"{rate:.3g} steps/s"]
        if math.isfinite(left):
            parts.append(f"{duration(left)} left")
        return ", ".join(filter(None, parts))

    def finish(self, text: str | None = None) -> None:
        """The phase ended."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.close()
        if text:
            self.line(text)
