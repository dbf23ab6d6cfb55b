"""What the processes of a run settle among themselves; with one process it is what that one says, at once.

Everything here but :func:`is_main` is collective: all processes call it, in the same order.
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from poise.launch.config import ConfigError
from poise.launch.errors import LaunchError
from poise.launch.signals import StopRequest

Result = TypeVar("Result")

# jax and numpy are imported where there are several processes: --help and mistakes answer without.


class HostError(LaunchError, RuntimeError):
    """Another process of the run failed, is gone or can't be reached."""


def several() -> bool:
    """Whether this is one of several processes that ``jax.distributed`` joined."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Whether this process writes the files and speaks: process 0, or the only one.

    Example:
      >>> from poise.launch.agreement import is_main
      >>> is_main()
      True
    """
    return not several() or sys.modules["jax"].process_index() == 0


def exchange(text: str) -> list[str]:
    """What each process says, in their order."""
    if not several():
        return [text]
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    own = np.frombuffer(text.encode(), np.uint8)
    lengths = process_allgather(np.array([len(own)], np.int32)).ravel()
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(own)] = own
    rows = process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def main_says(value: Result) -> Result:
    """What process 0 has for a value that JSON can write."""
    return value if not several() else json.loads(exchange(json.dumps(value))[0])


def agree(action: Callable[[], Result], *kinds: type[Exception]) -> Result:
    """Does the same in every process, and fails in all of them where it fails in one.

    Args:
      action: what is done; nothing in it may wait for another process.
      *kinds: failures that those who succeeded raise, too, as the first of these types that fits; any other is a
        ``ConfigError`` if it was one, or else a :class:`HostError`.

    Returns:
      What the action gave here.

    Raises:
      Exception: what the action raised here, or what stands for what it raised elsewhere.
    """
    if not several():
        return action()
    types = (*kinds, ConfigError, HostError)
    failure: BaseException | None = None
    result: Any = None
    try:
        result = action()
    except BaseException as error:
        failure = error
    place = next((index for index, kind in enumerate(types) if isinstance(failure, kind)), len(types) - 1)
    said = exchange("" if failure is None else f"{place}:{str(failure) or type(failure).__name__}")
    if failure is not None:
        raise failure
    for process, words in enumerate(said):
        if words:
            number, _, sentence = words.partition(":")
            kind = types[int(number)]
            raise kind(f"process {process} failed: {sentence}" if kind is HostError else sentence)
    return result


def from_main(action: Callable[[], Result], *kinds: type[Exception]) -> Result:
    """What an action gives in process 0, which alone does it: a value that JSON can write; fails as :func:`agree`."""
    if not several():
        return action()
    found: list[Result] = []
    only_main(lambda: found.append(action()), *kinds)
    return json.loads(exchange(json.dumps(found[0]) if found else "")[0])


def alike(own: Callable[[], str], what: str, because: str) -> None:
    """Makes sure that something is the same in all processes.

    Args:
      own: gives a text that stands for it here; called where there are several processes.
      what: its name in a sentence.
      because: what may have made it another.

    Raises:
      ConfigError: naming the first process where it differs from that of process 0.
    """
    if not several():
        return
    said = exchange(agree(own))
    for process, other in enumerate(said):
        if other != said[0]:
            raise ConfigError(
                f"{what} must be the same in all processes, but is another in process {process}: {because}"
            )


def only_main(action: Callable[[], Any], *kinds: type[Exception]) -> None:
    """Does something in process 0 alone, while the others wait; where it fails all of them do, see :func:`agree`."""
    agree(action if is_main() else lambda: None, *kinds)


def main_first(action: Callable[[], Result], *kinds: type[Exception]) -> Result:
    """Does the same in every process, first in process 0, which may make files for the others; see :func:`agree`."""
    if not several():
        return action()

    def nothing() -> Any:
        return None

    before = agree(action if is_main() else nothing, *kinds)
    after = agree(nothing if is_main() else action, *kinds)
    return before if is_main() else after


class Decisions:
    """Whether to stop and whether it is time to save: decided alike by all processes, after each step.

    A single process decides by itself and at once. Of several, each says after a step which signal it got and process
    0 what its clock says; the devices take the maximum while the next step runs, and everybody reads it after that
    one, together with the metrics: nobody waits, and all stop and save after the same step, one later than asked.

    Args:
      stop: this process's signals; gets those of the others.
    """

    def __init__(self, stop: StopRequest):
        self._stop, self._several = stop, several()
        self._coming: Any = None
        self._saved = False

    def begin(self) -> None:
        """A phase begins: nothing is left of the one before."""
        self._coming, self._saved = None, False

    def after_step(self, save: bool) -> tuple[bool, bool]:
        """Whether to stop, and whether to save; ``save`` is what this process's clock says."""
        if not self._several:
            return bool(self._stop), save
        before, fresh = self._coming, not self._saved
        self._coming, self._saved = self._vote(save), False
        if before is None:
            return False, False
        stopping, saving = self._read(before)
        return stopping, saving and fresh

    def saved(self) -> None:
        """A checkpoint was made: who asked for one before that has it."""
        self._saved = True

    def stopping(self) -> bool:
        """Whether to stop; several processes wait for each other here."""
        return bool(self._stop) if not self._several else self._read(self._vote(False))[0]

    def _vote(self, save: bool) -> Any:
        return _strongest([self._stop.signum or 0, int(save and is_main())])

    def _read(self, vote: Any) -> tuple[bool, bool]:
        signum, save = vote.tolist()
        if signum and self._stop.signum is None:
            self._stop.signum = signum
        return bool(signum), bool(save)


def _strongest(vote: list[int]) -> Any:
    """The largest of what all processes say, on the devices; nobody waits for it here."""
    import jax
    import numpy as np

    split, maximum = _maximum()
    row = np.array([vote], np.int32)
    return maximum(jax.make_array_from_callback((jax.device_count(), len(vote)), split, lambda index: row))


@functools.cache
def _maximum() -> tuple[Any, Callable[[Any], Any]]:
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("all",), ()))
    return split, jax.jit(lambda votes: votes.max(0), out_shardings=whole)
