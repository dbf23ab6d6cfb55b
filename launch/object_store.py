"""Object stores: addresses such as ``gs://bucket/run``, and whole objects that go there and come from there.

An object is written whole or not at all, and is seen by everybody once it is written. There are no folders to rename
and no locks; what runs need instead is in :mod:`poise.launch.lease` and :mod:`poise.launch.mirror`.
"""

import concurrent.futures
import contextlib
import datetime
import hashlib
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from poise.launch.config import ConfigError
from poise.launch.errors import LaunchError
from poise.launch.files import atomic_path

SCRATCH = "POISE_SCRATCH"
_LIBRARIES = {"gs": ("gcsfs", "'poise[gcs]'"), "s3": ("s3fs", "s3fs"), "az": ("adlfs", "adlfs")}
_NAME_BYTES = 255 - len(f"..{2**22}.tmp")  # what file systems allow, less what a file's temporary name adds
_AT_ONCE = 8  # objects under way; each waits for the network most of its time

Result = TypeVar("Result")


class StoreError(LaunchError, RuntimeError):
    """An object store that can't be reached or refuses; the message names the address."""


class MissingObject(StoreError):
    """There is no such object."""


class Entry(NamedTuple):
    """What a listing says of an object: its bytes, and when it was written, by the store's clock, where it says so."""

    size: int
    modified: float | None


def is_address(place: str | os.PathLike[str]) -> bool:
    """Whether a place is in an object store.

    Example:
      >>> from poise.launch.object_store import is_address
      >>> is_address("gs://bucket/run"), is_address("runs/digits")
      (True, False)
    """
    return "://" in os.fspath(place)


def checked_address(place: str | os.PathLike[str], what: str = "workdir") -> str:
    """An address without slashes at its end.

    Args:
      place: such as ``gs://bucket/runs/digits``.
      what: the flag that it came from.

    Raises:
      ConfigError: if it is in no store that is known, or names no folder there.

    Example:
      >>> from poise.launch.object_store import checked_address
      >>> checked_address("gs://bucket/runs/digits/")
      'gs://bucket/runs/digits'
    """
    text = os.fspath(place).rstrip("/")
    scheme, _, path = text.partition("://")
    if scheme not in _LIBRARIES:
        known = ", ".join(f"{name}://" for name in _LIBRARIES)
        raise ConfigError(f"{what} must be a folder, or an address that begins with one of {known}, got {text!r}")
    if "/" not in path or not is_safe(path):
        raise ConfigError(f"{what} must name a folder in a bucket, such as {scheme}://bucket/run, got {text!r}")
    return text


def is_safe(name: str) -> bool:
    r"""Whether an object's name is one of a file in a folder: nothing in it leads out of the folder.

    Example:
      >>> from poise.launch.object_store import is_safe
      >>> is_safe("checkpoints/10/state"), is_safe("../config.json"), is_safe("a\\b"), is_safe("/etc/passwd")
      (True, False, False, False)
    """
    parts = name.split("/")
    return (
        all(part not in ("", ".", "..") and len(part.encode("utf-8", "surrogatepass")) <= _NAME_BYTES for part in parts)
        and "\\" not in name
        and name.isprintable()
        and not re.match("[A-Za-z]:", name)
    )


def settled(place: str, absolute: bool = False) -> str:
    """A place as a configuration keeps it: of a folder with ``~`` for the home replaced, an address as it is."""
    if is_address(place):
        return place.rstrip("/")
    path = pathlib.Path(place).expanduser()
    return str(path.absolute() if absolute else path)


def scratch_folder(address: str, kind: str = "run") -> pathlib.Path:
    """Where on this machine the files of an address are: under ``POISE_SCRATCH``, or the user's cache folder.

    Args:
      address: see :func:`checked_address`.
      kind: ``"run"`` for a run that goes on there, ``"copy"`` for what is only looked at.

    Returns:
      A path that depends on the address alone.
    """
    cache = os.environ.get(SCRATCH) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "poise")
    readable = re.sub(r"[^\w.-]", "_", address.rpartition("/")[2])[:40]
    digest = hashlib.sha256(address.encode()).hexdigest()[:16]
    return pathlib.Path(cache).expanduser().absolute() / kind / f"{readable}-{digest}"


def make_private(folder: pathlib.Path) -> None:
    """Makes a scratch folder that nobody else may write to.

    Raises:
      ConfigError: if it can't be made, or is somebody else's, with the variable that names another place.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
        if facts.st_uid != os.getuid():
            raise ConfigError(
                f"the scratch folder {folder} is another user's; the variable {SCRATCH} names another place"
            )
        if facts.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(
            f"the scratch folder {folder} cannot be made: {error.strerror or error}; the variable {SCRATCH} names "
            "another place for it"
        ) from error


class ObjectStore:
    """The objects under an address, by their names relative to it.

    ``fsspec`` does the talking, which ``etils.epath`` uses as well, and which alone can create an object only where
    there is none. How to sign in is up to the store's library: the machine's own account, or variables such as
    ``GOOGLE_APPLICATION_CREDENTIALS`` and ``FSSPEC_GS_TOKEN``.

    Args:
      address: see :func:`checked_address`.

    Raises:
      ConfigError: if the store's library is not installed, or doesn't start.
    """

    def __init__(self, address: str):
        import fsspec

        self.address = address
        scheme, _, self._root = address.partition("://")
        library, package = _LIBRARIES[scheme]
        try:
            self._files: Any = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            raise ConfigError(f"{address} needs {library}: pip install {package}") from error
        except Exception as error:
            raise ConfigError(f"{address} cannot be opened: {in_words(error)}") from error

    def _do(self, action: Callable[..., Result], name: str, *arguments: Any, **options: Any) -> Result:
        """Calls the library, whose errors are of many kinds."""
        try:
            return action(*arguments, **options)
        except FileNotFoundError as error:
            raise MissingObject(f"there is no {self.address}/{name}") from error
        except FileExistsError:
            raise
        except Exception as error:
            raise StoreError(f"{self.address}/{name}: {in_words(error)}") from error

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def names(self, under: str = "") -> dict[str, Entry]:
        """All objects in a folder, or of that very name, ``""`` for all; what is no file's name is left out."""
        folder = self._at(under).rstrip("/")
        found = self._do(self._files.find, under, folder, detail=True)
        entries = {}
        for path, facts in found.items():
            name = path.removeprefix(f"{self._root}/")
            if name != path and is_safe(name) and facts.get("type") != "directory" and _is_under(name, under):
                entries[name] = Entry(int(facts.get("size") or 0), _time_of(facts))
        return entries

    def read(self, name: str) -> bytes:
        """An object's content.

        Raises:
          MissingObject: if there is none.
        """
        return self._do(self._files.cat_file, name, self._at(name))

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, or writes it anew."""
        self._do(self._files.pipe_file, name, self._at(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object where there is none, and says whether it did; of several only one does."""
        try:
            self._do(self._files.pipe_file, name, self._at(name), content, mode="create")
            return True
        except FileExistsError:  # or the answer to the first try was lost on its way, and the second found its object
            with contextlib.suppress(MissingObject):
                return self.read(name) == content
            return False

    def put(self, path: pathlib.Path, name: str) -> None:
        """Writes a file's content as an object; the file must not change meanwhile."""
        self._do(self._files.put_file, name, str(path), self._at(name))

    def get(self, name: str, path: pathlib.Path) -> None:
        """Brings an object down to a file, which is there whole or not at all.

        Raises:
          MissingObject: if there is none.
          StoreError: if it can't be read, or the file can't be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                self._do(self._files.get_file, name, self._at(name), str(temporary))
        except OSError as error:  # such as objects a and a/b, of which a folder holds only one
            raise StoreError(f"{self.address}/{name} can't be brought to {path}: {in_words(error)}") from error

    def remove(self, name: str) -> None:
        """Removes an object, if it is there."""
        with contextlib.suppress(MissingObject):
            self._do(self._files.rm_file, name, self._at(name))

    def put_all(self, files: Mapping[str, pathlib.Path]) -> None:
        """Several files, by their objects' names."""
        at_once(lambda name: self.put(files[name], name), files)


def at_once(action: Callable[[str], Any], names: Iterable[str]) -> None:
    """Does the same for several objects at a time; the first failure is raised, once nothing is under way."""
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            for done in concurrent.futures.as_completed([pool.submit(action, name) for name in names]):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def in_words(error: BaseException) -> str:
    """A library's error as one short line."""
    words = " ".join(str(getattr(error, "strerror", None) or error).split()) or "no reason given"
    return f"{type(error).__name__}: {words[:300]}"


def _is_under(name: str, folder: str) -> bool:
    """Some libraries list by the beginnings of names, and ``3`` is one of ``30``."""
    return not folder or name == folder or name.startswith(f"{folder}/")


def _time_of(facts: Mapping[str, Any]) -> float | None:
    """When an object was written; each library has its own word for it."""
    for key in ("updated", "LastModified", "last_modified", "mtime", "created"):
        value = facts.get(key)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.datetime.fromisoformat(value)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None


@contextlib.contextmanager
def delivered(output: str) -> Iterator[pathlib.Path]:
    """A path for files that a command writes: the place itself, or one whose files are brought to an address after.

    Args:
      output: the beginning of the files' paths, or an address likewise.

    Yields:
      The path, in a folder that exists.

    Raises:
      StoreError: if they can't be brought there.

    Example:
      >>> import pathlib, tempfile
      >>> from poise.launch.object_store import delivered
      >>> with tempfile.TemporaryDirectory() as folder, delivered(f"{folder}/new/samples") as path:
      ...     path.parent.is_dir(), path.name
      (True, 'samples')
    """
    if not is_address(output):
        path = pathlib.Path(output).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
        return
    folder, _, name = checked_address(output, "output").rpartition("/")
    with tempfile.TemporaryDirectory() as temporary:
        yield pathlib.Path(temporary) / name
        store = ObjectStore(folder)
        store.put_all({path.name: path for path in sorted(pathlib.Path(temporary).iterdir())})
