"""What a run's checkpoints are in an object store: files under names of their own, and a list of them that comes last.

A store has no folder that could be renamed once all is in it. Here the list, ``.commits/<phase>/<step>.json``, is what
makes a checkpoint one: it is written when all files are there, tells their sizes and digests, and goes first.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from poise.launch.object_store import is_safe

CHECKPOINTS, FROZEN, COMMITS = "checkpoints", "checkpoints/frozen", ".commits"
BEGUN = ".commits/begun"  # from then on a checkpoint is what a commit says; before, what somebody copied there
# of these tensorboard and profile go up, and aren't needed down here
_NOT_MIRRORED = ("checkpoints", "data", "tensorboard", "profile")
_FORMAT = 1
CHECKPOINT = re.compile(r"(\d\d+_[\w-]+)/(\d+)")


class BadCommit(Exception):
    """A checkpoint in the store that can't be brought down as it was; the message says why."""


@dataclasses.dataclass(frozen=True, order=True)
class Saved:
    """A checkpoint's place in its run; the later the larger."""

    phase: str
    step: int

    @classmethod
    def named(cls, name: str) -> "Saved | None":
        """From ``00_teacher/300``; None for anything else."""
        match = CHECKPOINT.fullmatch(name)
        return cls(match[1], int(match[2])) if match and str(int(match[2])) == match[2] else None

    @property
    def folder(self) -> str:
        """Where its files are."""
        return f"{CHECKPOINTS}/{self.phase}/{self.step}"

    @property
    def commit(self) -> str:
        """The object that says that they are all there."""
        return f"{COMMITS}/{self.phase}/{self.step}.json"


Files = Mapping[str, tuple[int, str]]  # bytes and SHA-256 of files, by their names in the run's folder


def digest_of(path: pathlib.Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(files: Mapping[str, pathlib.Path]) -> Files:
    """The sizes and digests of files."""
    return {name: (path.stat().st_size, digest_of(path)) for name, path in files.items()}


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def commit_content(files: Files, frozen: Files) -> bytes:
    """What a checkpoint's last object says."""
    content = {"format": _FORMAT, "files": {k: list(v) for k, v in files.items()}}
    content["frozen"] = {k: list(v) for k, v in frozen.items()}
    return json.dumps(content | {"sha256": _seal(content)}).encode()


def read_commit(saved: Saved, raw: bytes) -> tuple[Files, Files]:
    """The files of a checkpoint and of the frozen parts beside it, each of which lies where it must.

    Raises:
      BadCommit: if it was not written like that.
    """
    try:
        content = json.loads(raw)
        seal = content.pop("sha256")
        if content["format"] != _FORMAT or _seal(content) != seal:
            raise ValueError
        parts = [{name: (int(size), str(digest)) for name, (size, digest) in content[part].items()}
                 for part in ("files", "frozen")]  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadCommit("its list of files is damaged") from None
    for names, folder in zip(parts, (saved.folder, FROZEN), strict=True):
        for name in names:
            if not is_safe(name) or not name.startswith(f"{folder}/"):
                raise BadCommit(f"its list of files names {name!r}, which is none of its own")
    if not parts[0]:
        raise BadCommit("its list of files is empty")
    return parts[0], parts[1]


def files_under(folder: pathlib.Path, below: str, without: Sequence[str] = ()) -> dict[str, pathlib.Path]:
    """The regular files below a part of a folder, by their names; what vanishes meanwhile is left out.

    Args:
      folder: a run's.
      below: the part's name; ``""`` for all of it.
      without: names of its own folders that are passed over.
    """
    found, top = {}, os.path.join(folder, below)
    for parent, folders, files in os.walk(top):
        if parent == top:
            folders[:] = [name for name in folders if name not in without]
        for path in (pathlib.Path(parent) / name for name in files):
            if path.is_file() and not path.is_symlink():
                found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


def saved_here(folder: pathlib.Path) -> list[Saved]:
    """The checkpoints in a run's folder, in the order of the run."""
    found = ((path, Saved.named(f"{path.parent.name}/{path.name}")) for path in (folder / CHECKPOINTS).glob("*/*"))
    return sorted(saved for path, saved in found if saved is not None and path.is_dir())


def saved_there(names: Mapping[str, Any]) -> list[Saved]:
    """The checkpoints that a store's objects speak of."""
    inner = (name.removeprefix(f"{COMMITS}/").removesuffix(".json") for name in names if name.startswith(f"{COMMITS}/"))
    return sorted(saved for saved in map(Saved.named, inner) if saved is not None and saved.commit in names)


def others_in(names: Mapping[str, Any]) -> list[str]:
    """The objects that are plain files of a run: results, settings and rows."""
    return [
        name
        for name in names
        if name.split("/")[0] not in _NOT_MIRRORED and not any(part.startswith(".") for part in name.split("/"))
    ]
