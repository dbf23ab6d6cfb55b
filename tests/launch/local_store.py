"""An object store in a folder, for tests: the addresses ``gs://...`` of a process lead there.

Like the real ones it writes objects whole or not at all, knows no folders, and creates an object only where there is
none if asked to. Every change is counted, and it can end the process after a given number of them, or refuse.
"""

import datetime
import os
import pathlib
import signal
import threading
import time

import fsspec
from fsspec.spec import AbstractFileSystem

_LOCK = threading.Lock()


class Gone(BaseException):
    """What a test stops at as a killed process would."""


class LocalStore(AbstractFileSystem):
    """Objects are files whose names are those of the objects, with ``/`` written as ``%2F``."""

    protocol = "gs"
    cachable = False
    home: pathlib.Path
    changes: list[str] = []  # noqa: RUF012
    kill_after = -1  # changes; SIGKILL comes instead of the one after them
    gone_after = -1  # likewise, but the store is gone for this process from then on
    refuse = ""  # writes of names with this in them fail
    slow = 0.0  # seconds that an upload takes

    def _file(self, path):
        return self.home / self._strip_protocol(path).replace("%", "%25").replace("/", "%2F")

    def _change(self, path):
        if self.refuse and self.refuse in path:
            raise PermissionError(13, "Permission denied", path)
        time.sleep(self.slow)
        with _LOCK:
            if len(self.changes) == self.kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            if len(self.changes) == self.gone_after:
                raise Gone
            type(self).changes.append(path)

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **kwargs):
        start, found = self._strip_protocol(path), {}
        for file in sorted(self.home.iterdir()):
            name = file.name.replace("%2F", "/").replace("%25", "%")
            if name == start or name.startswith(f"{start}/"):
                facts = file.stat()
                written = datetime.datetime.fromtimestamp(facts.st_mtime, datetime.UTC)
                found[name] = {"name": name, "size": facts.st_size, "type": "file", "updated": written.isoformat()}
        return found if detail else list(found)

    def cat_file(self, path, start=None, end=None, **kwargs):
        return self._file(path).read_bytes()

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self._change(path)
        temporary = self.home.with_name(f"{self.home.name}.{threading.get_ident()}")
        temporary.write_bytes(value)
        if mode == "create":
            os.link(temporary, self._file(path))
            temporary.unlink()
        else:
            temporary.replace(self._file(path))

    def put_file(self, lpath, rpath, callback=None, mode="overwrite", **kwargs):
        self.pipe_file(rpath, pathlib.Path(lpath).read_bytes(), mode)

    def get_file(self, rpath, lpath, callback=None, outfile=None, **kwargs):
        pathlib.Path(lpath).write_bytes(self.cat_file(rpath))

    def rm_file(self, path):
        self._change(path)
        self._file(path).unlink()


def use(home, **settings):
    """From now on ``gs://`` is that folder in this process."""
    home = pathlib.Path(home)
    home.mkdir(parents=True, exist_ok=True)
    for name, value in {
        "changes": [],
        "kill_after": -1,
        "gone_after": -1,
        "refuse": "",
        "slow": 0.0,
        **settings,
        "home": home,
    }.items():
        setattr(LocalStore, name, value)
    fsspec.register_implementation("gs", LocalStore, clobber=True)
