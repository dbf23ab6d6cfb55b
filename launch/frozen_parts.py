"""The frozen leaves of a run's states, each set of them once: ``<directory>/frozen/<digest>``."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from poise.launch.agreement import agree, from_main, only_main
from poise.launch.checkpoint_write import write
from poise.launch.digest import digests
from poise.launch.leaves import Layout
from poise.launch.manifest import (
    FORMAT,
    CheckpointError,
    Damaged,
    checkpointer,
    content_hash,
    describe,
    matching,
    read_frozen_manifest,
    read_leaves,
    verify_by_itself,
)


class FrozenParts:
    """Frozen leaves on disk, under the digest of what they are.

    Args:
      directory: the run's checkpoints.
      apart: whether process 0 alone writes them.
      put_aside: moves a damaged folder out of the way, in process 0; all call it.
      log: gets a sentence where leaves are written anew.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        apart: bool,
        put_aside: Callable[[pathlib.Path], None],
        log: Callable[[str], None],
    ):
        self._directory, self._apart, self._put_aside, self._log = directory, apart, put_aside, log
        self._last: tuple[tuple[jax.Array, ...], str] | None = None  # the last leaves and their name

    def read(
        self, home: pathlib.Path, layout: Layout, shardings: Sequence[Any], make: Callable[[], tuple[jax.Array, ...]]
    ) -> tuple[jax.Array, ...]:
        """The leaves in a folder; damaged ones are made again where that gives the very same bits.

        Args:
          home: the folder.
          layout: of the state that they are in.
          shardings: how they are to lie.
          make: gives what the phase starts with.

        Raises:
          Damaged: if they can't be read and what ``make`` gives isn't the same.
          CheckpointError: if the system doesn't let them be read, they are another model's, or process 0 has a folder
            of its own in which they are whole: then nothing is moved.
        """
        try:
            manifest = agree(lambda: read_frozen_manifest(home), Damaged, CheckpointError)
            manifest = matching(home, manifest, layout.frozen_names, layout.abstract_frozen)
            leaves = read_leaves(home, manifest, layout.abstract_frozen, shardings)
        except Damaged as error:
            if self._apart and self._is_whole(home):
                raise CheckpointError(
                    f"the frozen part {home.name} of the checkpoints is whole on process 0 and can't be read on "
                    f"another machine: {error}; nothing was moved; where its objects in the store are damaged, remove "
                    f"checkpoints/frozen/{home.name} there, and the same command brings it up again from process 0"
                ) from error
            self._put_aside(home)
            leaves = make()
            if _name_of(_manifest_of(layout, leaves)) != home.name:
                raise Damaged(f"its frozen part {home} can't be read: {error}") from error
            self._log(f"warning: {home} is damaged; the same leaves were made again: {error}")
            self.save(layout, leaves)
        self._last = (leaves, home.name)
        return leaves

    def save(self, layout: Layout, leaves: tuple[jax.Array, ...]) -> str:
        """Writes leaves that aren't there yet, and waits; gives the name that checkpoints refer to."""
        if self._last is not None and [*map(id, self._last[0])] == [*map(id, leaves)]:
            return self._last[1]
        manifest = _manifest_of(layout, leaves)
        path = self._directory / "frozen" / _name_of(manifest)
        there = from_main(path.exists)
        if there:
            try:  # from before; what refers to it from now on shall find it whole
                self._check(path, layout, leaves)
            except Damaged as error:
                self._put_aside(path)
                there = False
                self._log(f"warning: {path} is damaged and is written anew: {error}")
        if not there:
            only_main(lambda: path.parent.mkdir(parents=True, exist_ok=True))

            def save(args: Any) -> None:
                with checkpointer(self._apart) as writer:
                    writer.save(path, args=args)

            write(path, layout.frozen_names, leaves, {"format": FORMAT, "leaves": manifest}, save, self._apart)
        self._last = (leaves, path.name)
        return path.name

    def _is_whole(self, home: pathlib.Path) -> bool:
        """Whether process 0 can read its own copy."""

        def look() -> bool:
            try:
                verify_by_itself(home, read_frozen_manifest(home))
            except Damaged:
                return False
            return True

        return from_main(look, CheckpointError)

    def _check(self, path: pathlib.Path, layout: Layout, leaves: Sequence[jax.Array]) -> None:
        if self._apart:
            only_main(lambda: verify_by_itself(path, read_frozen_manifest(path)), Damaged, CheckpointError)
            return
        found = agree(lambda: read_frozen_manifest(path), Damaged, CheckpointError)
        read_leaves(path, found, layout.abstract_frozen, [leaf.sharding for leaf in leaves])


def _manifest_of(layout: Layout, leaves: Sequence[jax.Array]) -> list[dict[str, Any]]:
    return describe(layout.frozen_paths, leaves, digests(leaves)) if leaves else []


def _name_of(manifest: list[dict[str, Any]]) -> str:
    return content_hash(manifest)[:32]
