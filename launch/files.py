"""Files that are there whole or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a temporary path beside ``path`` that replaces it when the block ends without an error.

    Args:
      path: the file that shall exist whole or not at all, also after a kill or on a full disk.

    Yields:
      The path to write to. Its content is synced to the disk before it gets its name.

    Example:
      >>> import pathlib, tempfile
      >>> from poise.launch.files import atomic_path
      >>> target = pathlib.Path(tempfile.mkdtemp()) / "report.json"
      >>> with atomic_path(target) as temporary:
      ...     _ = temporary.write_text("{}")
      >>> target.read_text(), len(list(target.parent.iterdir()))
      ('{}', 1)
    """
    target = pathlib.Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The process's mask for the modes of new files, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
