"""A machine that takes part in a run in an object store whose files another machine writes: it reads checkpoints."""

import pathlib
from collections.abc import Callable

from poise.launch.commits import digest_of, saved_there
from poise.launch.fetch import bring_all, keep_only, passed_over, telling
from poise.launch.mirror import WHOLE
from poise.launch.object_store import ObjectStore


class Follower:
    """An address, and the folder on this machine that gets the checkpoints of the run there; nothing goes up from it.

    Args:
      store: the address.
      folder: the folder, whose lock this process holds.
      log: gets sentences for the user.
    """

    def __init__(self, store: ObjectStore, folder: pathlib.Path, log: Callable[[str], None]):
        self._store, self._folder, self._log = store, folder, log
        self._digests: dict[pathlib.Path, tuple[tuple[int, int], str]] = {}

    def refresh(self) -> None:
        """Makes the folder's checkpoints those of the store, each file compared with its digest.

        Whatever else is there goes: rows and results of another life of the run are of no use to a follower, and what
        it had further than the store is never taken for such again. A checkpoint of the store that isn't whole is told
        of and not there; all processes find that when they read it.

        Raises:
          StoreError: if the store refuses.
        """
        (self._folder / WHOLE).unlink(missing_ok=True)
        with telling(self._log, f"bringing {self._store.address} down"):
            names = self._store.names()
            kept, damaged = bring_all(self._store, self._folder, saved_there(names), names, self._log, self._digest)
        for saved in sorted(damaged, reverse=True):
            self._log(passed_over(self._store.address, saved, damaged[saved]))
        keep_only(self._folder, kept)

    def _digest(self, path: pathlib.Path) -> str:
        """A file's digest, computed once as long as its size and time stay."""
        facts = path.stat()
        state = (facts.st_size, facts.st_mtime_ns)
        if self._digests.get(path, (None,))[0] != state:
            self._digests[path] = (state, digest_of(path))
        return self._digests[path][1]
