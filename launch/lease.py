"""One launcher per address: a lease that its holder renews, since an object store has no locks.

The holders of an address are numbered. Holder ``n`` has the object ``.lease/<n>``, which it alone writes: every
20 seconds while it lives, and once more when it leaves. Who comes next creates ``.lease/<n + 1>``, which the store
lets only one of several do. Whoever finds a number above its own has lost the address and begins no write any more:
it looks with each sign of life, before each checkpoint, and before each object if its last look is a minute ago.

What this doesn't promise: the store asks no writer for its lease. A holder that was frozen for over two minutes ends
the writes that were under way when it thaws, and only then finds that it has lost.
"""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from poise.launch.lock import WorkdirLocked
from poise.launch.object_store import MissingObject, ObjectStore, StoreError, in_words

RENEW_SECONDS, EXPIRES_SECONDS, WATCH_SECONDS = 20.0, 120.0, 2.0
_LOOK_SECONDS = 60.0  # who has not looked for so long may have been frozen
FOLDER = ".lease"


class LeaseLost(StoreError):
    """The address is this launcher's no more: another one took it over, or no sign of life can be given."""


class Lease:
    """The right to write under an address.

    Args:
      store: the address.
      owner: who asks: the same words for the same folder of the same machine, whose lock it holds.
      log: gets a sentence when there is something to wait for.
      clock: seconds from any origin; never goes back.
      sleep: waits for some seconds.
    """

    def __init__(
        self,
        store: ObjectStore,
        owner: str,
        log: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._store, self._log, self._clock, self._sleep = store, log, clock, sleep
        self._owner, self._facts = owner, {"owner": owner, "host": socket.gethostname(), "pid": os.getpid()}
        self.number, self._count = 0, 0
        self._lost: LeaseLost | None = None
        self._looked = clock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._writing = threading.Lock()

    def take(self) -> int:
        """Takes the address, from a holder that left at once, from one that gives no sign after two minutes.

        A holder that is alive shows it within 20 seconds. One with the same ``owner`` is gone for certain.

        Returns:
          The number that this owner has held the address under all the time since somebody else did; 0 where
          somebody else held it last, or nobody.

        Raises:
          WorkdirLocked: if another launcher works there.
          StoreError: if the store can't be reached or refuses.
        """
        watched: tuple[int, dict[str, Any]] | None = None
        since = 0.0
        while True:
            last = self._last()
            if last is not None and last[1].get("owner") == self._owner:
                count = last[1].get("count")
                self.number, self._count = last[0], count if isinstance(count, int) else 0
                self._write()
                self._start()
                return self.number
            if last is not None and not last[1].get("left"):
                if watched is None:
                    age = self._age(last[0])
                    watched, since = last, self._clock() - age
                    self._log(
                        f"{self._store.address} was held by {_who(last[1])}, whose last sign came {age:.0f} s ago; "
                        f"waiting for another one, or for {EXPIRES_SECONDS:.0f} s without"
                    )
                elif last != watched:
                    raise WorkdirLocked(
                        f"another launcher ({_who(last[1])}) works in {self._store.address}; wait until it ends or "
                        "use another workdir"
                    )
                left = EXPIRES_SECONDS - (self._clock() - since)
                if left > 0:
                    self._sleep(min(WATCH_SECONDS, left))
                    continue
            self.number = 1 if last is None else last[0] + 1
            if self._store.create(self._name(self.number), self._content()):
                break  # or else somebody was quicker, and is looked at as everybody
        for number in self._numbers():
            if number < self.number:
                self._store.remove(self._name(number))
        self._start()
        return 0

    @staticmethod
    def _name(number: int) -> str:
        return f"{FOLDER}/{number:08d}.json"

    def _numbers(self) -> list[int]:
        names = self._store.names(FOLDER)
        found = (re.fullmatch(rf"{re.escape(FOLDER)}/([0-9]{{8,}})\.json", name) for name in names)
        return sorted(number for number in (int(match[1]) for match in found if match) if self._name(number) in names)

    def _last(self) -> tuple[int, dict[str, Any]] | None:
        """The last holder; what isn't written as it should be counts as one of unknown name."""
        numbers = self._numbers()
        if not numbers:
            return None
        try:
            content = json.loads(self._store.read(self._name(numbers[-1])))
        except MissingObject:
            return self._last()
        except (ValueError, TypeError, RecursionError):
            content = None
        return numbers[-1], content if isinstance(content, dict) else {}

    def _age(self, number: int) -> float:
        """Seconds since the holder's last sign, by the store's clock alone; 0 where it tells no times."""
        probe = f"{FOLDER}/clock-{os.urandom(8).hex()}"
        self._store.write(probe, b"")
        try:
            entries = self._store.names(FOLDER)
        finally:
            self._store.remove(probe)
        times = [entries[name].modified if name in entries else None for name in (probe, self._name(number))]
        return max(0.0, times[0] - times[1]) if times[0] is not None and times[1] is not None else 0.0

    def _content(self, left: bool = False) -> bytes:
        return json.dumps(self._facts | {"count": self._count} | ({"left": True} if left else {})).encode()

    def _write(self, left: bool = False) -> None:
        with self._writing:
            if left or not self._ended.is_set():
                self._count += 1
                self._store.write(self._name(self.number), self._content(left))

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                self.check()
                self._write()
            except LeaseLost:
                return
            except StoreError:  # a store that is away for a while; whatever must be written says so itself
                continue
            except Exception as error:
                self._lost = LeaseLost(f"{self._store.address} can't be held any more: {in_words(error)}")
                return

    def lost(self) -> LeaseLost | None:
        """What was found by the last look, which costs nothing."""
        return self._lost

    def check(self) -> None:
        """Looks whether the address is still this launcher's.

        Raises:
          LeaseLost: if somebody else has taken it over.
        """
        now = self._clock()
        numbers = [] if self._lost else self._numbers()
        if numbers and numbers[-1] > self.number:
            last = self._last()
            self._lost = LeaseLost(
                f"{self._store.address} was taken over by another launcher ({_who(last[1] if last else {})}) while "
                "this one gave no sign for two minutes; nothing more is written there"
            )
        if self._lost:
            raise self._lost
        self._looked = now

    def hold(self) -> None:
        """Makes sure before a write that the address is this launcher's, by the last look unless that is long ago.

        Raises:
          LeaseLost: if somebody else has taken it over.
        """
        if self._lost or self._clock() - self._looked > _LOOK_SECONDS:
            self.check()

    def end(self) -> None:
        """Leaves the address to whoever comes, at once.

        Raises:
          StoreError: if the store can't be told; then it finds out by itself.
        """
        self._ended.set()
        if self._thread is not None and self._lost is None:
            self._write(left=True)


def _who(facts: dict[str, Any]) -> str:
    host, pid = facts.get("host"), facts.get("pid")
    return f"process {pid} on {host[:80]}" if isinstance(host, str) and isinstance(pid, int) else "unknown"
