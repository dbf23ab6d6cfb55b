"""Runs that are looked at: their folder, or of an address in an object store a copy of the part that is needed."""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping

from poise.launch.commits import (
    BEGUN,
    CHECKPOINTS,
    BadCommit,
    others_in,
    saved_here,
    saved_there,
)
from poise.launch.fetch import bring_checkpoint, say
from poise.launch.lock import LOCK_FILE
from poise.launch.mirror import mirror_of
from poise.launch.object_store import (
    Entry,
    MissingObject,
    ObjectStore,
    at_once,
    checked_address,
    is_address,
    make_private,
    scratch_folder,
)
from poise.launch.workdir import workdir_path

_TRIES = 3  # a run that is going on removes checkpoints


def local_copy(place: str | os.PathLike[str], checkpoints: str | None = None) -> pathlib.Path:
    """Where a run's files can be read.

    Of an address, its results are brought down to a cache folder, those that changed; of its checkpoints only the
    newest that is whole. The run may be going on meanwhile.

    Args:
      place: a run's folder or address; or, of an address, a checkpoint, a phase's folder, or a safetensors file.
      checkpoints: the phase, such as ``"00_teacher"``, whose newest checkpoint is needed; ``""``: any phase's; None: no
        checkpoint.

    Returns:
      The path on this machine.

    Raises:
      ConfigError: if it is an address of no store that is known, or whose library is not installed.
      StoreError: if the store can't be reached or refuses, or a result is removed again and again.
      CheckpointError: if the checkpoints that are needed are all damaged.

    Example:
      >>> from poise.launch.local_copy import local_copy
      >>> str(local_copy("runs/digits"))
      'runs/digits'
    """
    if not is_address(place):
        return pathlib.Path(place).expanduser()
    address, _, within = checked_address(place, "a run").partition(f"/{CHECKPOINTS}/")
    address = address.removesuffix(f"/{CHECKPOINTS}")
    if address.endswith(".safetensors"):
        return _file(address)
    if mirror_of(workdir_path(address)) is not None:  # the run itself asks
        folder = workdir_path(address)
    else:
        folder = scratch_folder(address, "copy")
        make_private(folder)
        store = ObjectStore(address)
        for left in reversed(range(_TRIES)):
            names = store.names()
            try:
                with _changing(folder):
                    _forget(folder, names)
                    _refresh(store, folder, others_in(names), names)
                    if within or checkpoints is not None:
                        _bring_newest(store, folder, within or checkpoints or "", names)
                break
            except MissingObject:
                if not left:
                    raise
            except BadCommit as error:
                if not left:
                    from poise.launch.manifest import CheckpointError

                    raise CheckpointError(f"the checkpoint {address}/{CHECKPOINTS} is damaged: {error}") from error
    return folder / CHECKPOINTS / within if within else folder


def _file(address: str) -> pathlib.Path:
    parent, _, name = address.rpartition("/")
    folder = scratch_folder(parent, "copy")
    make_private(folder)
    store = ObjectStore(parent)
    names = store.names(name)
    with _changing(folder):
        if name in names:
            _refresh(store, folder, [name], names)
        else:
            (folder / name).unlink(missing_ok=True)
    return folder / name


@contextlib.contextmanager
def _changing(folder: pathlib.Path) -> Iterator[None]:
    """Waits until no other process changes a copy."""
    with folder.with_name(f"{folder.name}{LOCK_FILE}").open("a") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _forget(folder: pathlib.Path, names: Mapping[str, Entry]) -> None:
    """Removes the results that a run has no more, by the list of all that it has."""
    for path in folder.iterdir():
        if path.is_file() and path.name not in names:
            path.unlink()


def _refresh(store: ObjectStore, folder: pathlib.Path, wanted: Iterable[str], names: Mapping[str, Entry]) -> None:
    """Brings down what is another here, by bytes and time."""

    def one(name: str) -> None:
        path, (size, modified) = folder / name, names[name]
        facts = path.stat() if path.is_file() else None
        if facts is None or modified is None or (facts.st_size, facts.st_mtime) != (size, modified):
            store.get(name, path)
            if modified is not None:
                os.utime(path, (modified, modified))

    at_once(one, wanted)


def _bring_newest(store: ObjectStore, folder: pathlib.Path, within: str, names: Mapping[str, Entry]) -> None:
    """The newest checkpoint of a run, of a phase or with a step."""
    if BEGUN not in names:  # copied there by somebody; whether it is whole is known when it is read
        under = f"{CHECKPOINTS}/{within}".rstrip("/")
        parts = [name for name in names if name.startswith((f"{under}/", f"{CHECKPOINTS}/frozen/"))]
        _refresh(store, folder, parts, names)
        return
    there = saved_there(names)
    for saved in saved_here(folder):
        if saved not in there:
            shutil.rmtree(folder / saved.folder, ignore_errors=True)
    damage: BadCommit | None = None
    for saved in reversed(there):
        if within not in ("", saved.phase, f"{saved.phase}/{saved.step}"):
            continue
        try:
            bring_checkpoint(store, folder, saved, names, say)
            return
        except BadCommit as error:
            damage = damage or error
    if damage is not None:
        raise damage
