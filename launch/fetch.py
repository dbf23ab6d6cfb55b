"""A run's checkpoints on their way from an object store to a folder: each whole, or not there."""

import contextlib
import pathlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

from poise.launch.commits import (
    CHECKPOINTS,
    COMMITS,
    BadCommit,
    Files,
    Saved,
    digest_of,
    files_under,
    others_in,
    read_commit,
)
from poise.launch.object_store import MissingObject, ObjectStore, at_once

Digest = Callable[[pathlib.Path], str]


def bring(
    store: ObjectStore, folder: pathlib.Path, files: Files, names: Mapping[str, Any], digest: Digest = digest_of
) -> None:
    """Brings files down that have the digests that they should have; those that are here already stay.

    Raises:
      BadCommit: if one is missing or another.
    """

    def here(name: str) -> bool:
        path, (size, wanted) = folder / name, files[name]
        return path.is_file() and path.stat().st_size == size and digest(path) == wanted

    def one(name: str) -> None:
        size, wanted = files[name]
        if here(name):
            return
        if name not in names:
            raise BadCommit(f"its object {name} is missing")
        if names[name].size != size:
            raise BadCommit(f"its object {name} has {names[name].size} bytes, not {size}")
        try:
            store.get(name, folder / name)
        except MissingObject:
            raise BadCommit(f"its object {name} is missing") from None
        if digest(folder / name) != wanted:
            raise BadCommit(f"its object {name} is not what its digest says")

    at_once(one, files)


def bring_checkpoint(
    store: ObjectStore,
    folder: pathlib.Path,
    saved: Saved,
    names: Mapping[str, Any],
    log: Callable[[str], None],
    digest: Digest = digest_of,
) -> set[str]:
    """Brings one checkpoint down, with the frozen parts beside it as far as they are whole.

    Args:
      store: the run's address.
      folder: its folder.
      saved: the checkpoint.
      names: the objects under the address.
      log: gets a sentence for each frozen part that isn't whole.
      digest: gives a file's SHA-256.

    Returns:
      The names of its files.

    Raises:
      BadCommit: if it isn't whole; nothing of it is left here.
    """
    kept, damaged = bring_all(store, folder, [saved], names, log, digest)
    for error in damaged.values():
        raise error
    return kept


def bring_all(
    store: ObjectStore,
    folder: pathlib.Path,
    there: Iterable[Saved],
    names: Mapping[str, Any],
    log: Callable[[str], None],
    digest: Digest = digest_of,
) -> tuple[set[str], dict[Saved, BadCommit]]:
    """Brings checkpoints down, see :func:`bring_checkpoint`; of frozen parts what the newest says is what counts.

    Returns:
      The names of their files, and what was wrong with those that aren't whole.
    """
    kept, damaged = set[str](), {}
    homes: dict[str, Files] = {}
    for saved in sorted(there):
        try:
            files, frozen = _commit_of(store, saved)
            bring(store, folder, files, names, digest)
        except BadCommit as error:
            shutil.rmtree(folder / saved.folder, ignore_errors=True)
            damaged[saved] = error
        else:
            kept |= {*files, *frozen}
            homes |= _homes(frozen)
    _bring_frozen(store, folder, homes, names, log, digest)
    return kept, damaged


def _commit_of(store: ObjectStore, saved: Saved) -> tuple[Files, Files]:
    try:
        return read_commit(saved, store.read(saved.commit))
    except MissingObject as error:
        raise BadCommit("it was removed a moment ago") from error


def _homes(frozen: Files) -> dict[str, Files]:
    """The files of frozen parts, by the parts' folders."""
    homes: dict[str, Files] = {}
    for name, facts in frozen.items():
        home = "/".join(name.split("/")[:3])
        homes[home] = {**homes.get(home, {}), name: facts}
    return homes


def _bring_frozen(
    store: ObjectStore,
    folder: pathlib.Path,
    homes: Mapping[str, Files],
    names: Mapping[str, Any],
    log: Callable[[str], None],
    digest: Digest = digest_of,
) -> None:
    for home, files in homes.items():
        try:
            bring(store, folder, files, names, digest)
        except BadCommit as error:  # whether it is needed, and can be made again, is known when it is read
            shutil.rmtree(folder / home, ignore_errors=True)
            log(f"warning: the frozen part {store.address}/{home} can't be brought to this machine: {error}")


def bring_missing(
    store: ObjectStore,
    folder: pathlib.Path,
    there: Iterable[Saved],
    names: Mapping[str, Any],
    log: Callable[[str], None],
) -> None:
    """Brings down what a folder lacks of its run; files are known by their sizes alone, and later ones stay."""
    homes: dict[str, Files] = {}
    for saved in sorted(there):
        try:
            files, frozen = _commit_of(store, saved)
            if not _has(folder, files):
                bring(store, folder, files, names)
            homes |= _homes(frozen)
        except BadCommit as error:
            shutil.rmtree(folder / saved.folder, ignore_errors=True)
            log(passed_over(store.address, saved, error))
    lacking = {home: files for home, files in homes.items() if not _has(folder, files)}
    _bring_frozen(store, folder, lacking, names, log)
    missing = [name for name in others_in(names) if not (folder / name).is_file()]
    at_once(lambda name: store.get(name, folder / name), missing)


def _has(folder: pathlib.Path, files: Files) -> bool:
    paths = {folder / name: size for name, (size, _) in files.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def lost_there(store: ObjectStore, folder: pathlib.Path, there: Iterable[Saved]) -> dict[str, pathlib.Path]:
    """The files of checkpoints that are whole here and, by name or size, not in the store that lists them."""
    homes: dict[str, Files] = {}
    for saved in sorted(there):
        with contextlib.suppress(BadCommit):
            files, frozen = _commit_of(store, saved)
            homes |= {saved.folder: files, **_homes(frozen)}
    names, lost = store.names(CHECKPOINTS), {}
    for name, (size, wanted) in ((name, facts) for files in homes.values() for name, facts in files.items()):
        if name not in names or names[name].size != size:
            with contextlib.suppress(FileNotFoundError):  # not here either
                if digest_of(folder / name) == wanted:
                    lost[name] = folder / name
    return lost


def keep_only(folder: pathlib.Path, kept: Set[str]) -> dict[str, pathlib.Path]:
    """Removes all files of a run's folder but these, ``data/``, and what is of the folder itself, such as its lock.

    Returns:
      Those of them that are here.
    """
    here = {}
    for name, path in files_under(folder, "").items():
        if name in kept:
            here[name] = path
        elif not name.startswith((".", "data/")):
            path.unlink()
    for path in sorted((folder / CHECKPOINTS).rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    return here


def passed_over(address: str, saved: Saved, error: BadCommit) -> str:
    """What is said of a damaged checkpoint."""
    return f"warning: the checkpoint {address}/{saved.folder} is damaged and was passed over: {error}"


def all_damaged(address: str, damaged: Mapping[Saved, BadCommit]) -> str:
    """What is said where no checkpoint is whole."""
    newest, one = max(damaged), len(damaged) == 1
    return (
        f"{'the only checkpoint' if one else f'all {len(damaged)} checkpoints'} in {address} {'is' if one else 'are'} "
        f"damaged, the newest, {newest.folder}, because {damaged[newest]}; remove {COMMITS} there to start afresh"
    )


def say(sentence: str) -> None:
    """Tells the user, before there is a progress line."""
    print(sentence, file=sys.stderr, flush=True)


@contextlib.contextmanager
def telling(log: Callable[[str], None], what: str) -> Iterator[None]:
    """Says what is waited for, where that takes more than a second."""
    timer = threading.Timer(1.0, lambda: log(f"{what} ..."))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
