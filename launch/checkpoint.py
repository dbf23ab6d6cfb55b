"""Checkpoints of a run: written atomically in the background, verified when read, and never lost to a damaged one."""

import contextlib
import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from poise.launch.agreement import agree, alike, from_main, only_main, several
from poise.launch.checkpoint_write import write, writing
from poise.launch.digest import digests
from poise.launch.frozen_parts import FrozenParts
from poise.launch.leaves import Layout
from poise.launch.manifest import (
    FORMAT,
    ITEMS,
    CheckpointError,
    Damaged,
    alone,
    content_hash,
    describe,
    frozen_home,
    matching,
    quiet_orbax,
    read_leaves,
    read_meta,
    reading,
    saved_steps,
)
from poise.launch.mirror import Mirror, mirror_of


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
      phase: the phase's place in the run, from 0.
      step: finished steps of it.
      live: the live leaves, in the order of the phase's layout.
      frozen: the frozen leaves, likewise.
      seconds: seconds spent in each phase so far, by name.
    """

    phase: int
    step: int
    live: tuple[jax.Array, ...]
    frozen: tuple[jax.Array, ...]
    seconds: dict[str, float]


# Held from a failure on: orbax's threads go on complaining of it until the process ends.
_HUSHED: list[contextlib.ExitStack] = []

Shardings = tuple[Sequence[Any], Sequence[Any]]  # of the live leaves and of the frozen ones
MakeFrozen = Callable[[int, Restored | None], Sequence[jax.Array]]


class _Reader(NamedTuple):
    """How leaves are read: see :meth:`CheckpointStore.restore_newest`."""

    layouts: tuple[Layout, ...]
    shardings: tuple[Shardings, ...]
    make_frozen: MakeFrozen | None


class CheckpointStore:
    """A run's checkpoints: ``<directory>/00_teacher/<step>``, frozen leaves once in ``<directory>/frozen/<digest>``.

    Every checkpoint holds the arrays and a manifest with each array's checksum, sealed by a checksum of its own. Orbax
    writes into a temporary folder and renames it when all is there, so a folder with a step's name is complete.

    Args:
      directory: of the checkpoints; made at the first save.
      phases: ``(name, num_steps)`` of the run's phases, in order.
      seed: the run's seed.
      keep: checkpoints kept of each phase, the newest; at least 1.
      log: gets a sentence whenever a checkpoint is passed over.
      apart: whether processes have other folders than process 0, see :func:`poise.launch.claim.claimed_by_all`: each
        reads its own, and process 0 alone writes what it gathers of all.

    Raises:
      ValueError: if ``keep`` is below 1.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        phases: Sequence[tuple[str, int]],
        seed: int,
        keep: int,
        log: Callable[[str], None],
        apart: bool = False,
    ):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.directory = pathlib.Path(directory).absolute()
        self._phases, self._seed, self._keep, self._log = tuple(phases), seed, keep, log
        self._apart = apart
        self._folders = [self.directory / f"{index:02d}_{name}" for index, (name, _) in enumerate(phases)]
        self._manager: ocp.CheckpointManager | None = None
        self._manager_phase = -1
        self._quiet = contextlib.ExitStack()
        self._failed = False
        self._frozen = FrozenParts(self.directory, apart, self._put_aside, log)

    def path(self, phase: int, step: int) -> pathlib.Path:
        """Where a checkpoint is."""
        return self._folders[phase] / str(step)

    # Reading

    def restore_newest(
        self, layouts: Sequence[Layout], shardings: Sequence[Shardings], make_frozen: MakeFrozen | None = None
    ) -> Restored | None:
        """The newest checkpoint that is whole, or None where there is none yet.

        Where the newest is damaged, the one before it is tried, back to the end of the phase before and so on; once one
        is found, the damaged ones are put aside under ``damaged/``, each with a note. Damaged frozen leaves are made
        again where that gives the very same bits.

        Args:
          layouts: of every phase's state.
          shardings: of every phase's live and frozen leaves; the devices need not be those that it was saved from.
          make_frozen: ``(phase, the end of the phase before, or None for the first) -> frozen leaves`` that the phase
            starts with.

        Raises:
          CheckpointError: if a checkpoint is in order but belongs to another run: other phases, another seed, or states
            of another shape. Also if the system doesn't let one be read, and if all of them are damaged. No
            checkpoint is put aside then, and starting afresh takes moving them away.
        """
        reader = _Reader(tuple(layouts), tuple(shardings), make_frozen)
        with quiet_orbax(), reading(self.directory):
            only_main(self._clean)
            agree(self._check_phases, CheckpointError)
            return self._restore_newest(reader)

    def _check_phases(self) -> None:
        known = {folder.name for folder in self._folders}
        for path in sorted(self.directory.glob("[0-9][0-9]*_*")):
            if path.is_dir() and path.name not in known:
                names = ", ".join(name for name, _ in self._phases)
                raise CheckpointError(f"{path} holds a phase that this run has not (its phases are {names})")

    def _restore_newest(self, reader: _Reader) -> Restored | None:
        damaged: list[tuple[pathlib.Path, Damaged]] = []
        for phase in reversed(range(len(self._phases))):
            for step in self._saved_steps(phase):
                try:
                    restored = self._restore(reader, phase, step)
                except Damaged as error:
                    damaged.append((self.path(phase, step), error))
                    continue
                for path, reason in damaged:
                    self._put_aside(path)
                    self._log(f"warning: the checkpoint {path} is damaged and was passed over: {reason}")
                return restored
        if damaged:
            newest, reason = damaged[0]
            subject = "the only checkpoint" if len(damaged) == 1 else f"all {len(damaged)} checkpoints"
            raise CheckpointError(
                f"{subject} in {self.directory} {'is' if len(damaged) == 1 else 'are'} damaged, the newest, {newest}, "
                f"because {reason}; move {self.directory} away to start afresh"
            ) from reason
        return None

    def _saved_steps(self, phase: int) -> list[int]:
        return from_main(lambda: saved_steps(self._folders[phase]))

    def _restore(self, reader: _Reader, phase: int, step: int) -> Restored:
        path, layout = self.path(phase, step), reader.layouts[phase]
        meta = agree(lambda: read_meta(path), Damaged, CheckpointError)
        self._check_same_run(path, meta, phase, step)
        manifest = matching(path, meta["leaves"], layout.live_names, layout.abstract_live)
        live = read_leaves(path, manifest, layout.abstract_live, reader.shardings[phase][0])
        frozen: tuple[jax.Array, ...] = ()
        if layout.frozen_names:
            home, shardings = frozen_home(self.directory, meta), reader.shardings[phase][1]
            frozen = self._frozen.read(home, layout, shardings, lambda: self._make_frozen(reader, phase))
        return Restored(phase, step, live, frozen, dict(meta["seconds"]))

    def _make_frozen(self, reader: _Reader, phase: int) -> tuple[jax.Array, ...]:
        """What the phase starts with, from the end of the one before; nothing where that is damaged, too."""
        previous = None
        if phase:
            steps = self._saved_steps(phase - 1)
            if not steps:
                return ()
            try:
                previous = self._restore(reader, phase - 1, steps[0])
            except Damaged:
                return ()
        return () if reader.make_frozen is None else tuple(reader.make_frozen(phase, previous))

    def _check_same_run(self, path: pathlib.Path, meta: Mapping[str, Any], phase: int, step: int) -> None:
        if (meta["phase"], meta["step"]) != (self._phases[phase][0], step):
            raise Damaged(f"it says that it is step {meta['step']} of phase {meta['phase']!r}")
        if meta["seed"] != self._seed:
            raise CheckpointError(f"{path} belongs to a run with seed {meta['seed']}, this one has {self._seed}")
        for (name, steps), (was_name, was_steps) in zip(self._phases[:phase], meta["finished"], strict=True):
            if name != was_name or steps != was_steps:
                raise CheckpointError(
                    f"{path} follows {was_steps} steps of phase {was_name!r}, this run has {steps} of {name!r}; only "
                    "the last phase can be made longer, anything else needs another workdir"
                )

    def _put_aside(self, path: pathlib.Path) -> None:
        """Moves a damaged checkpoint out of the way, where it can still be looked at."""
        home = self.directory / "damaged"

        def move() -> None:
            if path.exists():
                home.mkdir(exist_ok=True)
                target = home / f"{path.parent.name}_{path.name}"
                shutil.rmtree(target, ignore_errors=True)
                path.rename(target)

        only_main(move)

    def _clean(self) -> None:
        """Removes what a killed process left half-written; the folder's lock is held, so nobody writes now."""
        for folder in (*self._folders, self.directory / "frozen"):
            for leftover in folder.glob("*orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)

    # Writing

    def save(
        self,
        phase: int,
        step: int,
        layout: Layout,
        live: Sequence[jax.Array],
        frozen: Sequence[jax.Array],
        seconds: Mapping[str, float],
    ) -> None:
        """Saves a state; returns as soon as arrays may be donated, where several processes write once all is on disk.

        Frozen leaves are written, and waited for, when they come for the first time; later checkpoints refer to them.

        Args:
          phase: the phase's place in the run.
          step: finished steps of it.
          layout: of the state.
          live: its live leaves.
          frozen: its frozen leaves.
          seconds: seconds spent in each phase so far.

        Raises:
          CheckpointError: if this checkpoint, or the one before it, can't be written. Earlier ones are intact.
        """
        path = self.path(phase, step)
        self.wait()
        with self._saving(path):
            if self._apart:
                only_main(lambda: self._open(phase))
            else:
                self._open(phase)
            meta = {
                "format": FORMAT,
                "phase": self._phases[phase][0],
                "step": step,
                "seed": self._seed,
                "finished": [list(finished) for finished in self._phases[:phase]],
                "seconds": dict(seconds),
                "frozen": self._frozen.save(layout, tuple(frozen)) if frozen else None,
                "leaves": describe(layout.live_paths, live, digests(live)),
            }

            alike(
                lambda: content_hash([meta["frozen"], meta["leaves"]]),
                f"the state after step {step} of phase {meta['phase']!r}",
                "what a process reads by itself, such as its images or --teacher, must be the same everywhere",
            )

            def save(args: Any) -> None:
                self._open(phase).save(step, args=args, force=True)

            write(path, layout.live_names, live, meta, save, self._apart)
        mirror = self._mirror()
        if mirror is not None:
            mirror.saved(path)

    def _mirror(self) -> Mirror | None:
        """What brings this process's checkpoints to an object store, where the run's workdir is in one."""
        mirror = mirror_of(self.directory.parent)
        if mirror is not None:
            mirror.log = self._log
        return mirror

    @contextlib.contextmanager
    def _saving(self, path: pathlib.Path) -> Iterator[None]:
        with self._failing(), writing(path):
            yield

    def _open(self, phase: int) -> ocp.CheckpointManager:
        """What writes a phase's checkpoints: all processes call it, or process 0 alone where they are apart."""
        if self._manager is None or self._manager_phase != phase:
            self.close()
            self._quiet.enter_context(quiet_orbax())
            make_folder = functools.partial(self._folders[phase].mkdir, parents=True, exist_ok=True)
            if self._apart:
                make_folder()
            else:
                only_main(make_folder)
            # In the background a failure of one of several would be told after the ten minutes for which orbax waits.
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                enable_async_checkpointing=self._apart or not several(),
                create=False,
                multiprocessing_options=alone() if self._apart else ocp.options.MultiprocessingOptions(),
            )
            self._manager = ocp.CheckpointManager(self._folders[phase], options=options, item_names=ITEMS)
            self._manager_phase = phase
        return self._manager

    def wait(self) -> None:
        """Waits until what was saved is on disk, and in the object store where the run's workdir is in one.

        Raises:
          CheckpointError: if it can't be written.
        """
        if not self._apart:
            self._on_disk()

        def brought_up() -> None:
            if self._apart:
                self._on_disk()
            mirror = self._mirror()
            if mirror is not None:
                mirror.wait()

        with self._failing():
            only_main(brought_up, CheckpointError)

    def _on_disk(self) -> None:
        if self._manager is not None:
            with self._saving(self._folders[self._manager_phase]):
                self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises what went wrong in the background so far; costs nothing.

        Raises:
          CheckpointError: if a checkpoint can't be written.
        """
        if self._manager is not None:
            with self._saving(self._folders[self._manager_phase]):
                self._manager.check_for_errors()
        mirror = self._mirror()
        if mirror is not None:
            with self._failing():
                mirror.check()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Notes a failure, after which the processes don't wait for each other any more."""
        try:
            yield
        except BaseException:
            self._failed = True
            raise

    def close(self) -> None:
        """Waits and lets go of the files."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            quiet = self._quiet.pop_all()
            _HUSHED.append(quiet)
            if self._failed and several() and not self._apart:  # closing waits for processes that don't come
                return
            with self._saving(self._folders[self._manager_phase]):
                manager.close()
            if not self._failed:
                _HUSHED.remove(quiet)
                quiet.close()
        mirror = self._mirror()
        if mirror is not None and not self._failed:
            mirror.wait()
