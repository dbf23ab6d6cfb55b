"""What a checkpoint says of itself: every leaf's name, shape, type and checksum, and how it is read and verified."""

import contextlib
import errno
import functools
import gc
import hashlib
import inspect
import json
import logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from poise.launch.agreement import agree
from poise.launch.digest import digests
from poise.launch.errors import LaunchError
from poise.launch.leaves import abstract_data, dtype_named, from_data, leaf_name, to_data

FORMAT = 1
ITEMS = ("state", "meta")


class CheckpointError(LaunchError, RuntimeError):
    """A checkpoint that can't be written or doesn't belong to this run; the message names its path."""


class Damaged(Exception):
    """A checkpoint that can't be read back as it was written; the message says why."""


def content_hash(content: Any) -> str:
    """SHA-256 of anything that JSON can write."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def describe(paths: Sequence[Sequence[str]], leaves: Sequence[Any], sums: Sequence[str]) -> list[dict[str, Any]]:
    """The manifest: every leaf's place, shape, type and checksum."""
    return [
        {"path": list(path), "shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": digest}
        for path, leaf, digest in zip(paths, leaves, sums, strict=True)
    ]


_Leaves = Sequence[jax.Array] | Sequence[np.ndarray]


def _payload(names: Sequence[str], leaves: _Leaves) -> dict[str, jax.Array | np.ndarray]:
    """What orbax gets: arrays by name. It can't store arrays without elements; the manifest is enough for those."""
    numbers = (leaf if isinstance(leaf, np.ndarray) else to_data(leaf) for leaf in leaves)
    data = dict(zip(names, numbers, strict=True))
    return {name: leaf for name, leaf in data.items() if leaf.size}


def _sealed(meta: dict[str, Any]) -> dict[str, Any]:
    return meta | {"sha256": content_hash(meta)}


def save_args(names: Sequence[str], leaves: _Leaves, meta: dict[str, Any]) -> Any:
    """What orbax saves: the leaves, or the numbers in them, and the sealed description."""
    payload = _payload(names, leaves)
    items = {"state": ocp.args.StandardSave(payload)} if payload else {}
    return ocp.args.Composite(meta=ocp.args.JsonSave(_sealed(meta)), **items)


def alone() -> ocp.options.MultiprocessingOptions:
    """What makes orbax work in this process without the others."""
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})


def checkpointer(by_itself: bool = False) -> ocp.Checkpointer:
    """Writes single checkpoints, atomically, and waits; all processes take part, or this one by itself."""
    return _alone() if by_itself else ocp.Checkpointer(ocp.CompositeCheckpointHandler(*ITEMS))


def _alone() -> ocp.Checkpointer:
    options = alone()
    handler = ocp.CompositeCheckpointHandler(
        *ITEMS, composite_options=ocp.CompositeOptions(multiprocessing_options=options)
    )
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def in_short(error: Exception) -> str:
    """A library's error as one line; of a long one the beginning and the end, where the system's own words are."""
    words = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return words if len(words) <= 260 else f"{words[:120]} ... {words[-130:]}"


def obstacle_of(error: BaseException | None) -> str | None:
    """What the system said, in its words, where it kept a file from being read; None where a file is missing or bad.

    Too many open files, an input/output error or a lack of rights say nothing about what is in a file. Python's own
    errors tell the number; those of the file format's library have it in their text.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        codes = [int(code) for code in re.findall(r"os_error_code='(\d+)'", str(error))]
        if isinstance(error, OSError) and error.errno is not None:
            codes.append(error.errno)
        for code in codes:
            if code not in (errno.ENOENT, errno.ENOTDIR):
                return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None


class reading:
    """Says of an ``OSError`` below that it kept a checkpoint from being read, as a :class:`CheckpointError`."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, OSError) and not isinstance(error, LaunchError):
            where = error.filename or self._path
            raise CheckpointError(f"the checkpoint {where} can't be read: {error.strerror or error}") from error


def _read(path: pathlib.Path, item: str, args: Any) -> Any:
    """Restores an item; what goes wrong in the libraries below means damage unless memory or the system was in the way.

    Raises:
      Damaged: if what is there can't be read.
      CheckpointError: if the system doesn't let it be read, which says nothing about what is there.
    """
    try:
        with _alone() as reader:
            content = reader.restore(path, args=ocp.args.Composite(**{item: args}))[item]
        if content is None:
            raise ValueError(f"its item {item} is not there")
        return content
    except MemoryError:
        raise
    except Exception as error:
        obstacle = obstacle_of(error)
        if obstacle is not None:
            raise CheckpointError(
                f"the checkpoint {path} can't be read: {obstacle}; nothing was moved, the same command goes on once "
                "that is mended"
            ) from error
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = in_short(error)
    gc.collect()  # the reads that were abandoned end now, while their complaints are dropped
    raise Damaged(reason)


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Drops what orbax says behind our back when a read or a write fails: pages of tracebacks from its threads.

    Nothing is lost by it, every failure comes back as an exception, of which we make one sentence.
    """
    hook = sys.unraisablehook

    def filtered(unraisable: Any) -> None:
        abandoned = inspect.iscoroutine(unraisable.object) and "orbax" in unraisable.object.cr_code.co_filename
        if not abandoned and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    def by_others(record: logging.LogRecord) -> bool:
        if record.name == "asyncio":  # tasks that orbax left with the failure that it told of already
            trace = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
            return "orbax" not in record.getMessage() + trace
        return "orbax" not in record.pathname

    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for log in logs:
        log.addFilter(by_others)
    sys.unraisablehook = filtered
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for log in logs:
            log.removeFilter(by_others)


def read_meta(path: pathlib.Path) -> dict[str, Any]:
    """A checkpoint's own description, with its seal checked."""
    if not path.is_dir():
        raise Damaged("it is not there")
    meta = _read(path, "meta", ocp.args.JsonRestore())
    if not isinstance(meta, dict) or "sha256" not in meta:
        raise Damaged("its description is incomplete")
    seal = meta.pop("sha256")
    if content_hash(meta) != seal:
        raise Damaged("its description doesn't match its own checksum")
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{path} was written in format {meta.get('format')}; this version reads format {FORMAT}")
    return meta


def read_leaves(
    path: pathlib.Path, manifest: Sequence[Mapping[str, Any]], abstract: Sequence[Any], shardings: Sequence[Any]
) -> tuple[jax.Array, ...]:
    """The arrays of a checkpoint, each compared with its checksum and laid out by its sharding.

    Where arrays lie on several processes, each reads its parts and all of them find the same damage.
    """
    names = [leaf_name(entry["path"]) for entry in manifest]
    wanted = [abstract_data(leaf) for leaf in abstract]
    template = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf, sharding in zip(names, wanted, shardings, strict=True)
        if leaf.size
    }
    data = {}
    together = not all(sharding.is_fully_addressable for sharding in shardings)
    if template:
        read = functools.partial(_read, path, "state", ocp.args.StandardRestore(template))
        data = agree(read, Damaged, CheckpointError) if together else read()
    leaves = []
    for name, leaf, origin, sharding in zip(names, wanted, abstract, shardings, strict=True):
        value = data[name] if leaf.size else _empty(leaf, sharding)
        leaves.append(from_data(value, origin.dtype))
    sums = digests(leaves)
    compare = functools.partial(_compare, manifest, sums)
    if together:  # each has read its own files
        agree(compare, Damaged)
    else:
        compare()
    return tuple(leaves)


def _compare(manifest: Sequence[Mapping[str, Any]], sums: Sequence[str]) -> None:
    for entry, digest in zip(manifest, sums, strict=True):
        if entry["digest"] != digest:
            raise Damaged(f"its leaf {leaf_name(entry['path'])} has checksum {digest}, not {entry['digest']}")


def verify_by_itself(path: pathlib.Path, manifest: Sequence[Mapping[str, Any]]) -> None:
    """Compares the arrays of a checkpoint with their checksums, one at a time on a device.

    Raises:
      Damaged: if one is another, or can't be read.
      CheckpointError: if the system doesn't let it be read.
    """
    wanted = [jax.ShapeDtypeStruct(tuple(entry["shape"]), dtype_named(entry["dtype"])) for entry in manifest]
    data = {leaf_name(entry["path"]): abstract_data(leaf) for entry, leaf in zip(manifest, wanted, strict=True)}
    # what takes no memory stands for arrays of these shapes
    template = {name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for name, leaf in data.items() if leaf.size}
    found = _read(path, "state", ocp.args.StandardRestore(template)) if template else {}
    sums = []
    for name, leaf in data.items():
        value = found[name] if leaf.size else np.zeros(leaf.shape, leaf.dtype)
        sums += digests([jax.numpy.asarray(value)])
    _compare(manifest, sums)


def _empty(leaf: Any, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.zeros(leaf.shape, leaf.dtype)[index])


def matching(
    path: pathlib.Path, manifest: Sequence[Any], names: Sequence[str], abstract: Sequence[Any]
) -> list[Mapping[str, Any]]:
    """The manifest in the order of a layout's leaves, after making sure that it describes the same leaves."""
    entries = {leaf_name(entry["path"]): entry for entry in manifest}
    saved = {name: f"{entry['dtype']}{entry['shape']}" for name, entry in entries.items()}
    wanted = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in zip(names, abstract, strict=True)}
    for name in {**wanted, **saved}:
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{path} holds the state of another model: its leaf {name} is {saved.get(name, 'not there')} there and "
                f"{wanted.get(name, 'not there')} now"
            )
    return [entries[name] for name in names]


def frozen_home(directory: pathlib.Path, meta: Mapping[str, Any]) -> pathlib.Path:
    """Where a checkpoint's frozen leaves are."""
    name = meta["frozen"]
    if not isinstance(name, str) or not re.fullmatch("[0-9a-f]{32}", name):
        raise Damaged(f"it refers to a frozen part {name!r}")
    return directory / "frozen" / name


def read_frozen_manifest(home: pathlib.Path) -> list[Mapping[str, Any]]:
    """The manifest of frozen leaves, which their folder's name stands for."""
    manifest = read_meta(home)["leaves"]
    if content_hash(manifest)[:32] != home.name:
        raise Damaged("its content is not what its name says")
    return manifest


def saved_steps(folder: pathlib.Path) -> list[int]:
    """The steps that a phase's folder has checkpoints of, newest first."""
    if not folder.is_dir():
        return []
    return sorted((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), reverse=True)


def checkpoints_at(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The checkpoints at or under a path, newest first: one checkpoint, a phase, or a run's folder."""
    root = path
    if (path / "checkpoints").is_dir():  # a run's folder may have a number for a name, too
        root = path / "checkpoints"
    elif path.name.isdecimal():
        yield path
        return
    folders = sorted((folder for folder in root.glob("[0-9][0-9]*_*") if folder.is_dir()), reverse=True) or [root]
    for folder in folders:
        yield from (folder / str(step) for step in saved_steps(folder))
