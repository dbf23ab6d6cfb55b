"""A run's place, held by all of its processes: a folder that they share, or for an address a folder on each machine."""

import contextlib
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from poise.launch.agreement import agree, exchange, main_says, only_main, several
from poise.launch.config import ConfigError
from poise.launch.fetch import say, telling
from poise.launch.files import atomic_path
from poise.launch.follower import Follower
from poise.launch.hosts import HEARTBEAT_SECONDS
from poise.launch.lock import WorkdirLocked, workdir_lock
from poise.launch.mirror import claimed_workdir, mirror_of
from poise.launch.object_store import ObjectStore, checked_address, is_address
from poise.launch.workdir import prepare_workdir, workdir_path

_LEAVING_SECONDS = 10.0  # that a process takes to leave once it knows that others are gone


class _Held(NamedTuple):
    """What this process knows of a place that it holds together with others.

    Attributes:
      apart: whether some of them don't see process 0's folder.
      follower: brings checkpoints to the folder of this machine, in one process of each machine but process 0's.
    """

    apart: bool
    follower: Follower | None


_held: dict[pathlib.Path, _Held] = {}


@contextlib.contextmanager
def claimed_by_all(
    workdir: str | os.PathLike[str], log: Callable[[str], None] = say, settle: Callable[[], None] = lambda: None
) -> Iterator[bool]:
    """Holds a run's place for all of its processes, which enter together: see :func:`claimed_workdir` for one.

    Process 0 claims it. A folder must be one that all of them see. The folder behind an address may be another on each
    machine: then process 0 brings up whatever it has, and one process of each other machine locks its own folder and
    gives it the checkpoints that the store has. It may be claimed again within, which makes those folders fresh.

    Args:
      workdir: a folder, or an address; made if it is not there.
      log: gets sentences for the user, in process 0.
      settle: done by process 0 once all hold the place, such as writing the settings.

    Yields:
      Whether the processes are apart: some have another folder than process 0, which alone writes checkpoints then.

    Raises:
      ConfigError: if the place can't be used, is in use, or isn't the same for all.
      StoreError: if the store refuses what the run in it needs.
      CheckpointError: if it has no checkpoint that is whole, or what was made can't be brought up.
      HostError: if another process failed.

    Example:
      >>> import tempfile
      >>> from poise.launch.claim import claimed_by_all
      >>> with tempfile.TemporaryDirectory() as workdir, claimed_by_all(workdir) as apart:
      ...     print(apart)
      False
    """
    path = workdir_path(workdir)
    _check_address(workdir)
    with contextlib.ExitStack() as stack:

        def claim() -> None:
            prepare_workdir(workdir)
            stack.enter_context(claimed_workdir(workdir, log))

        only_main(claim)
        held = _held.get(path, _Held(False, None))
        if several() and path not in _held:
            held = _held[path] = _joined(workdir, path, stack)
            stack.callback(_held.pop, path)
        only_main(settle)
        if held.apart:
            _bring_everywhere(path, held)
        yield held.apart


def _check_address(workdir: str | os.PathLike[str]) -> None:
    """A folder may have another name on each machine, an address has not."""
    said = exchange(checked_address(workdir) if is_address(workdir) else "")
    for process, other in enumerate(said):
        if other != said[0]:
            raise ConfigError(
                "all processes must have the same address for their workdir: it is "
                f"{said[0] or 'a folder'} in process 0 and {other or 'a folder'} in process {process}"
            )


def _joined(workdir: str | os.PathLike[str], path: pathlib.Path, stack: contextlib.ExitStack) -> _Held:
    """Finds out which processes share a folder: each marks its own, and looks for the mark of the first it can see.

    Process 0 looks as well: a mark that it sees is one in its folder, however late it is seen from there.
    """
    import jax

    own, address = jax.process_index(), is_address(workdir)
    token = main_says(secrets.token_hex(8))
    marks = [path / f".shared-{token}-{process}" for process in range(own + 1)]

    def mark() -> None:
        if own and address:
            prepare_workdir(workdir)
        if not own or address:
            with atomic_path(marks[own]) as temporary:
                temporary.touch()

    agree(mark)
    first = next((process for process, path_of_mark in enumerate(marks) if path_of_mark.is_file()), -1)
    seen_by_main = main_says(
        [(path / f".shared-{token}-{process}").is_file() for process in range(jax.process_count())]
    )
    first = 0 if seen_by_main[own] else first
    apart = any(text != "0" for text in exchange(str(first)))  # all have looked now
    follower: list[Follower] = []

    def follow() -> None:
        if first == own:
            for left in path.glob(".shared-*"):  # also of a process that was killed
                left.unlink(missing_ok=True)
        if first < 0:
            raise ConfigError(
                f"the workdir {path} must be on a file system that all processes share; one of them doesn't see what "
                "process 0 wrote there"
            )
        if first == own != 0:
            stack.enter_context(_lock_in_time(path))
            follower.append(Follower(ObjectStore(checked_address(workdir)), path, say))

    agree(follow)
    return _Held(apart, follower[0] if follower else None)


@contextlib.contextmanager
def _lock_in_time(path: pathlib.Path) -> Iterator[None]:
    """A folder's lock; a follower of a run whose process 0 was killed holds it until it finds that out."""
    with contextlib.ExitStack() as stack:
        with telling(say, f"waiting for another launcher in {path} on {socket.gethostname()}"):
            end = time.monotonic() + HEARTBEAT_SECONDS + _LEAVING_SECONDS
            while True:
                try:
                    stack.enter_context(workdir_lock(path))
                    break
                except WorkdirLocked as error:
                    if time.monotonic() > end:
                        raise WorkdirLocked(f"on {socket.gethostname()}: {error}") from error
                    time.sleep(0.5)
        yield


def _bring_everywhere(path: pathlib.Path, held: _Held) -> None:
    """Gives all machines what process 0 has."""
    from poise.launch.manifest import CheckpointError

    def up() -> None:
        mirror = mirror_of(path)
        assert mirror is not None
        mirror.bring_up()

    only_main(up, CheckpointError)
    agree(held.follower.refresh if held.follower is not None else lambda: None, CheckpointError)
