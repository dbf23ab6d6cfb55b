"""One launcher per run's folder: a lock that ends with its process, however that ends."""

import contextlib
import errno
import fcntl
import os
import pathlib
from collections.abc import Iterator

from poise.launch.config import ConfigError

LOCK_FILE = ".lock"
_held: dict[str, int] = {}


class WorkdirLocked(ConfigError):
    """Another launcher works in the folder."""


@contextlib.contextmanager
def workdir_lock(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Holds a run's folder for this process.

    The lock is the operating system's (``flock``), which drops it when the process ends, also by SIGKILL: a crash
    leaves nothing behind that would have to be removed. The file ``.lock`` only carries it and stays. Within one
    process the lock may be taken again, so that a launcher can hold it around :func:`poise.launch.fit`, which takes it
    too. A file system without locks (some network file systems) counts as unlocked.

    Args:
      workdir: an existing folder.

    Yields:
      Nothing.

    Raises:
      WorkdirLocked: if another process holds it; the message names the folder and the process.

    Example:
      >>> import tempfile
      >>> from poise.launch.lock import workdir_lock
      >>> with tempfile.TemporaryDirectory() as workdir, workdir_lock(workdir), workdir_lock(workdir):
      ...     print("held")
      held
    """
    path = pathlib.Path(workdir).resolve()
    if _held.get(str(path), 0):
        _held[str(path)] += 1
        try:
            yield
        finally:
            _held[str(path)] -= 1
        return
    descriptor = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
                raise WorkdirLocked(
                    f"another launcher (process {holder}) works in {path}; wait until it ends or use another workdir"
                ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        _held[str(path)] = 1
        try:
            yield
        finally:
            _held[str(path)] -= 1
    finally:
        os.close(descriptor)
