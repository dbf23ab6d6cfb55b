"""A profile of some steps of a run, as TensorBoard and Perfetto read it."""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

from poise.launch.config import ConfigError
from poise.launch.errors import LaunchError

# jax is imported when a profile begins, so that mistakes in the flags answer at once.


class ProfileError(LaunchError, RuntimeError):
    """A profile that can't be written; the message names the folder."""


class StepProfile:
    """Profiles the steps from ``first`` to ``last`` that a process trains, counted from 1 over all phases.

    The profile goes to ``<folder>/plugins/profile/<time>``; ``tensorboard --logdir=<folder>`` with its profile plugin
    reads it, and the file ``perfetto_trace.json.gz`` in it opens at https://ui.perfetto.dev.

    Args:
      steps: nothing for no profile, or ``(first, last)``. The first step of a phase is compiled ahead of it, but the
        first few warm caches up: 10 and 15 are good numbers.
      folder: where it goes.

    Raises:
      ConfigError: if there are not two numbers, or they are out of order.

    Example:
      >>> from poise.launch.profiling import StepProfile
      >>> StepProfile((15, 10), "profile")
      Traceback (most recent call last):
      poise.launch.config.ConfigError: profile_steps must be two steps in order, such as 10,15, got 15,10
    """

    def __init__(self, steps: Sequence[int], folder: str | pathlib.Path):
        if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
            text = ",".join(map(str, steps))
            raise ConfigError(f"profile_steps must be two steps in order, such as 10,15, got {text}")
        self._first, self._last = steps or (0, 0)
        self._folder, self._running = pathlib.Path(folder), False

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """What a step runs in: the profile begins before its first one and knows each by its number."""
        import jax

        if number == self._first:
            try:
                jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            except Exception as error:
                raise ProfileError(f"profile_steps: no profile can be begun in {self._folder}: {error}") from error
            self._running = True
        if not self._running:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def after(self, number: int, results: Any) -> None:
        """Ends the profile after its last step, once that step's results are there."""
        if self._running and number >= self._last:
            import jax

            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends and writes a profile that is under way."""
        if self._running:
            import jax

            self._running = False
            try:
                jax.profiler.stop_trace()
            except Exception as error:
                raise ProfileError(f"profile_steps: the profile can't be written to {self._folder}: {error}") from error
