"""A run's folder in an object store: it works in a folder of this machine, which is brought there and back.

Order is what keeps a run whole in a store that has no folders to rename:

- ``metrics.jsonl`` and all other files that changed go up first;
- then the files of a checkpoint, and of the frozen parts beside it;
- then, as one object that lists them with sizes and digests, ``.commits/<phase>/<step>.json``. Without it there is no
  checkpoint. So the rows up to a checkpoint's step are always there with it.
- A checkpoint that goes loses that object first, and its files after.

Where the run goes on from an older checkpoint than the store has, the later ones go before anything else is written.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from poise.launch.commits import (
    BEGUN,
    CHECKPOINT,
    CHECKPOINTS,
    FROZEN,
    Saved,
    commit_content,
    files_under,
    listed,
    others_in,
    saved_here,
    saved_there,
)
from poise.launch.config import ConfigError
from poise.launch.errors import LaunchError
from poise.launch.fetch import all_damaged, bring_all, bring_missing, keep_only, lost_there, passed_over, say, telling
from poise.launch.files import atomic_path
from poise.launch.lease import Lease, LeaseLost
from poise.launch.lock import workdir_lock
from poise.launch.object_store import ObjectStore, StoreError, at_once, checked_address, is_address
from poise.launch.workdir import workdir_path

_OWNER, WHOLE = ".owner", ".whole"

_States = dict[str, tuple[int, int]]  # sizes and times of files, by their names

_open: dict[pathlib.Path, "Mirror"] = {}


class Mirror:
    """An address, the folder on this machine that its run works in, and what is under way between them.

    Args:
      store: the address.
      folder: the folder, whose lock this process holds.
      log: gets sentences for the user.
    """

    def __init__(self, store: ObjectStore, folder: pathlib.Path, log: Callable[[str], None]):
        self._store, self._folder, self.log = store, folder, log
        token = folder / _OWNER
        if not token.is_file():
            with atomic_path(token) as temporary:
                temporary.write_text(os.urandom(16).hex(), encoding="utf-8")
        # the machine's name, too: a cache folder may be on a file system that several share
        self._owner = f"{token.read_text(encoding='utf-8')[:64]}@{socket.gethostname()}"
        self._lease = Lease(store, self._owner, log)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "upload")
        self._job: concurrent.futures.Future[None] | None = None
        self._failed = False
        self._given_up = threading.Event()
        self._there: dict[Saved, _States] = {}  # and of which files here each of them is a copy
        self._sent: _States = {}

    # Down

    def begin(self) -> None:
        """Takes the address and makes the folder what the run in it was left as.

        Raises:
          WorkdirLocked: if another launcher works there.
          ConfigError: if the address can't be read or written at all.
          StoreError: if the store refuses later, or the address is lost meanwhile.
          CheckpointError: if it has checkpoints and none of them is whole.
        """
        try:
            held = self._lease.take()
        except StoreError as error:
            raise ConfigError(f"the workdir cannot be used: {error}") from error
        try:
            names = self._store.names()
            self._there = {saved: {} for saved in saved_there(names)}
            with telling(self.log, f"bringing {self._store.address} down"):
                if not self._goes_on(held, names) or not self._fill(names):
                    self._bring_down(names)
            here = saved_here(self._folder)
            self._there |= {saved: self._states(saved) for saved in here if saved in self._there}
            (self._folder / WHOLE).write_text(str(self._lease.number), encoding="utf-8")
            if BEGUN in names:
                self._clean(names)
            else:
                self._adopt(names)
        except BaseException:
            with contextlib.suppress(StoreError):
                self._lease.end()
            raise

    def _goes_on(self, held: int, names: Mapping[str, Any]) -> bool:
        """Whether the folder is as far as the store is, or further: nobody else wrote there since it had all of it."""
        mark = self._folder / WHOLE
        if not held or not mark.is_file() or mark.read_text(encoding="utf-8") != str(held):
            return False
        here = saved_here(self._folder)
        if self._there and (not here or here[-1] < max(self._there)):
            return False
        # the rows of the store may end before a checkpoint that was not brought up
        return all((self._folder / name).is_file() for name in others_in(names) if name.endswith(".jsonl"))

    def _fill(self, names: Mapping[str, Any]) -> bool:
        """Brings down what is missing: a cache folder may have been swept, and later checkpoints here be damaged."""
        bring_missing(self._store, self._folder, self._there, names, self.log)
        return not self._there or bool(saved_here(self._folder))

    def _bring_down(self, names: Mapping[str, Any]) -> None:
        (self._folder / WHOLE).unlink(missing_ok=True)
        kept, damaged = bring_all(self._store, self._folder, self._there, names, self.log)
        if damaged and len(damaged) == len(self._there):
            from poise.launch.manifest import CheckpointError

            raise CheckpointError(all_damaged(self._store.address, damaged))
        for saved in sorted(damaged, reverse=True):
            self.log(passed_over(self._store.address, saved, damaged[saved]))
        others = others_in(names)
        if BEGUN not in names:  # whether they are whole is known when they are read
            others += [name for name in names if name.startswith(f"{CHECKPOINTS}/") and name not in kept]
        at_once(lambda name: self._store.get(name, self._folder / name), others)
        here = keep_only(self._folder, {*kept, *others}).items()
        self._sent |= {name: _state(path) for name, path in here if name in names}

    def _clean(self, names: Mapping[str, Any]) -> None:
        """Removes what an upload or a removal that was cut off left."""
        self._lease.check()
        known = {saved.folder for saved in self._there}
        inner = re.compile(rf"({CHECKPOINTS}/{CHECKPOINT.pattern})/.*")
        loose = [name for name in names if (match := inner.fullmatch(name)) and match[1] not in known]
        self._each(self._store.remove, loose)

    def _adopt(self, names: Mapping[str, Any]) -> None:
        """Takes checkpoints over that somebody copied there; their objects stay as they are."""
        self._lease.check()
        for saved in saved_here(self._folder):
            files = files_under(self._folder, saved.folder)
            if saved not in self._there and all(name in names for name in files):
                content = commit_content(listed(files), listed(self._frozen()))
                self._lease.check()
                self._store.write(saved.commit, content)
                self._there[saved] = self._states(saved)
        self._store.write(BEGUN, b"")

    def _states(self, saved: Saved) -> _States:
        """What changes when one of its files does: one that was damaged may have been put aside, and made again."""
        states = {}
        for name, path in files_under(self._folder, saved.folder).items():
            with contextlib.suppress(FileNotFoundError):
                states[name] = _state(path)
        return states

    def _is_another(self, saved: Saved) -> bool:
        """Whether a checkpoint here is not that of the store; one that is going away isn't another."""
        return not self._states(saved).items() <= self._there[saved].items()

    def _frozen(self) -> dict[str, pathlib.Path]:
        return files_under(self._folder, FROZEN)

    # Up

    def _each(self, action: Callable[[str], None], names: Iterable[str]) -> None:
        """Writes or removes several objects, as long as the address is this launcher's."""

        def one(name: str) -> None:
            self._lease.hold()
            action(name)

        at_once(one, names)

    def saved(self, path: pathlib.Path) -> None:
        """A checkpoint is being written to this path; as soon as it is complete it goes up, in the background."""
        self._given_up.clear()
        self._schedule(path)

    def give_up(self) -> None:
        """The checkpoint that is awaited will not come."""
        self._given_up.set()

    def _schedule(self, path: pathlib.Path | None) -> None:
        self._job = self._pool.submit(self._bring_up, path)

    def _bring_up(self, path: pathlib.Path | None) -> None:
        while path is not None and not path.is_dir():  # its name is the last that it gets
            if self._given_up.wait(0.02):
                return
        self._sync()
        if path is None:
            self._mend()

    def _sync(self) -> None:
        """Makes the store what the folder is, in the order that the module's description gives."""
        self._lease.check()
        here = saved_here(self._folder)
        if here:
            for saved in sorted(self._there, reverse=True):
                if saved > here[-1] or self._is_another(saved):
                    self._withdraw(saved)
        self._put_others()
        for saved in here:
            if saved not in self._there:
                self._commit(saved)
        if here:
            for saved in sorted(self._there.keys() - set(here)):
                self._withdraw(saved)

    def _put_others(self) -> None:
        """Whatever changed, from a copy, since some files grow while they are read; results come last."""
        changed = {}
        for name, path in files_under(self._folder, "", ("checkpoints", "data")).items():
            if any(part.startswith(".") for part in name.split("/")):
                continue
            with contextlib.suppress(FileNotFoundError):
                if self._sent.get(name) != _state(path):
                    changed[name] = path
        copy = self._folder / ".upload"
        try:
            for name in sorted(changed, key=lambda name: (name == "report.json", name)):
                with contextlib.suppress(FileNotFoundError):
                    state = _state(changed[name])
                    shutil.copyfile(changed[name], copy)
                    self._lease.hold()
                    self._store.put(copy, name)
                    self._sent[name] = state
        finally:
            copy.unlink(missing_ok=True)

    def _commit(self, saved: Saved) -> None:
        states = self._states(saved)  # of before: what changes while it goes up is another
        files, frozen = files_under(self._folder, saved.folder), self._frozen()
        self._lease.check()
        left = self._store.names(saved.folder)  # by an upload that was cut off
        self._each(self._store.remove, [name for name in left if name not in files])
        new = {name: path for name, path in frozen.items() if self._sent.get(name) != _state(path)}
        paths = {**new, **files}
        self._each(lambda name: self._store.put(paths[name], name), paths)
        self._sent |= {name: _state(path) for name, path in new.items()}
        content = commit_content(listed(files), listed(frozen))
        if not files or files_under(self._folder, saved.folder).keys() != files.keys():  # it is going away
            return
        self._lease.check()
        self._store.write(saved.commit, content)
        self._there[saved] = states

    def _withdraw(self, saved: Saved) -> None:
        self._lease.check()
        self._store.remove(saved.commit)
        del self._there[saved]
        self._each(self._store.remove, self._store.names(saved.folder))

    def _mend(self) -> None:
        """Puts up again what went missing in the store, or was cut off there, since a checkpoint listed it."""
        lost = lost_there(self._store, self._folder, self._there)
        if lost:
            self._lease.check()
            self._each(lambda name: self._store.put(lost[name], name), lost)
            self.log(f"{len(lost)} files of checkpoints were missing in {self._store.address} and are there again")

    def bring_up(self) -> None:
        """Brings up what changed, and what the store lost of its checkpoints, and waits until all is there.

        Raises:
          CheckpointError: if something can't be brought up, or the address was lost.
        """
        self.wait()
        self._schedule(None)
        self.wait()

    def check(self) -> None:
        """Raises what went wrong in the background so far; costs nothing.

        Raises:
          CheckpointError: if something can't be brought up, or the address was lost.
        """
        if self._job is not None and self._job.done():
            self.wait()
        lost = self._lease.lost()
        if lost is not None:
            self._raise(lost)

    def wait(self) -> None:
        """Waits until everything that was saved is in the store.

        Raises:
          CheckpointError: likewise.
        """
        if self._job is None:
            return
        try:
            with telling(self.log, f"bringing the checkpoint up to {self._store.address}"):
                self._job.result()
            self._job = None
        except (StoreError, OSError) as error:
            self._raise(error)

    def _raise(self, error: Exception) -> None:
        from poise.launch.manifest import CheckpointError

        self._failed, self._job = True, None
        if isinstance(error, LeaseLost):
            raise CheckpointError(str(error)) from error
        raise CheckpointError(
            f"the run can't be brought up to {self._store.address}: {error}; what is there is whole, this machine has "
            f"the rest in {self._folder}, and the same command goes on once that is mended"
        ) from error

    def end(self, failed: bool = False) -> None:
        """Brings up what changed since, and leaves the address.

        Args:
          failed: whether something else went wrong that is to be told instead.

        Raises:
          CheckpointError: if something can't be brought up.
        """
        try:
            self.give_up()
            if not self._failed and self._lease.lost() is None:
                self.bring_up()
        except LaunchError:
            if not failed:
                raise
        finally:
            self._pool.shutdown(wait=True)
            with contextlib.suppress(StoreError):
                self._lease.end()


def _state(path: pathlib.Path) -> tuple[int, int]:
    """What changes when a file does."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def mirror_of(folder: pathlib.Path) -> Mirror | None:
    """The mirror whose run works in a folder, in this process; None for a folder that is only one."""
    return _open.get(folder)


@contextlib.contextmanager
def claimed_workdir(workdir: str | os.PathLike[str], log: Callable[[str], None] = say) -> Iterator[None]:
    """Holds a run's place for this process: a folder by its lock, an address by its lease, brought down and back up.

    It may be claimed again within, by the address or by the folder that stands for it.

    Args:
      workdir: a folder that is there, or an address, whose folder (:func:`poise.launch.workdir.workdir_path`) is there.
      log: gets sentences for the user.

    Yields:
      Nothing.

    Raises:
      WorkdirLocked: if another launcher works there.
      ConfigError: if an address can't be used.
      StoreError: if the store refuses what the run in it needs.
      CheckpointError: if it has no checkpoint that is whole, or what was made can't be brought up.

    Example:
      >>> import tempfile
      >>> from poise.launch.mirror import claimed_workdir
      >>> with tempfile.TemporaryDirectory() as workdir, claimed_workdir(workdir), claimed_workdir(workdir):
      ...     print("held")
      held
    """
    path = workdir_path(workdir)
    with workdir_lock(path):
        if not is_address(workdir) or path in _open:
            yield
            return
        mirror = Mirror(ObjectStore(checked_address(workdir)), path, log)
        mirror.begin()
        _open[path] = mirror
        try:
            yield
        except BaseException:
            mirror.end(failed=True)
            raise
        else:
            mirror.end()
        finally:
            del _open[path]
