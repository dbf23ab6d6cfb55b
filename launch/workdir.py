"""A run's folder: made, tried out, and settled by the one configuration that it belongs to."""

import dataclasses
import json
import os
import pathlib
import tempfile
from typing import Any

from poise.launch.agreement import agree, from_main
from poise.launch.config import ConfigError, config_fields
from poise.launch.files import atomic_path
from poise.launch.object_store import checked_address, is_address, make_private, scratch_folder

CONFIG_FILE, DATA_FILE = "config.json", "data.json"


def _plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))


def workdir_path(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """A run's folder as an absolute path; of an address in an object store the folder on this machine behind it.

    Raises:
      ConfigError: if it is empty, or an address in no store that is known.
    """
    text = os.fspath(workdir)
    if not text:
        raise ConfigError("workdir must name a folder, got an empty text")
    if is_address(text):
        return scratch_folder(checked_address(text))
    return pathlib.Path(text).expanduser().absolute()


def prepare_workdir(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Makes a run's folder where there is none and makes sure that it can be written to.

    Raises:
      ConfigError: naming the folder and why it cannot be used.
    """
    path = workdir_path(workdir)
    try:
        if is_address(workdir):
            make_private(path)
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"the workdir {path} cannot be written to: {error.strerror or error}") from error
    return path


def settle_config(config: Any, workdir: str | os.PathLike[str]) -> None:
    """Writes the resolved configuration into the run's folder, or agrees with the one that is there.

    A folder holds one run. Its ``config.json`` decides: fields of role ``run`` must equal those in it, fields of role
    ``execution`` may differ and are written anew. A ``run`` field that the file does not know counts as its default.

    Args:
      config: the configuration; a dataclass whose fields are declared with :func:`field`.
      workdir: the run's folder; made if it is not there.

    Raises:
      ConfigError: if the folder cannot be written to, its configuration is damaged, or a ``run`` field differs; the
        message names each such field with both values.

    Example:
      >>> import dataclasses, pathlib, tempfile
      >>> from poise.launch.config import field
      >>> from poise.launch.workdir import settle_config
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     batch_size: int = field(128, "images per step", minimum=1)
      >>> with tempfile.TemporaryDirectory() as workdir:
      ...     settle_config(Config(), workdir)
      ...     print((pathlib.Path(workdir) / "config.json").read_text().strip())
      {
        "batch_size": 128
      }
    """
    fields = config_fields(type(config))
    path = prepare_workdir(workdir) / CONFIG_FILE
    current = _plain(config)
    if path.exists():
        previous = _read(path)
        defaults = {name: json.loads(json.dumps(entry.default)) for name, (entry, _, _) in fields.items()}
        differences = [
            f"{name} was {json.dumps(previous.get(name, defaults[name]))} and is now {json.dumps(current[name])}"
            for name, (_, _, metadata) in fields.items()
            if metadata["role"] == "run" and previous.get(name, defaults[name]) != current[name]
        ]
        differences += [f"{name} was set and does not exist now" for name in previous if name not in fields]
        if differences:
            raise ConfigError(
                f"the workdir {path.parent} holds a run with another configuration: {'; '.join(differences)}; "
                "use the same values to resume it, or another workdir"
            )
        if previous == current:
            return
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(current, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error


def settle_data(facts: dict[str, Any], workdir: str | os.PathLike[str]) -> None:
    """Notes in the run's folder, in ``data.json``, which data it is made with, or makes sure that it is the same still.

    Process 0 alone looks into the folder; every process compares its own data with what is noted there.

    Args:
      facts: plain values by name, such as a digest.
      workdir: the run's folder.

    Raises:
      ConfigError: if the data is another, or the note is damaged.
    """
    path = pathlib.Path(workdir) / DATA_FILE

    def noted() -> dict[str, Any]:
        if not path.exists():
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return _read(path)

    there = from_main(noted)

    def compare() -> None:
        if there != facts:
            raise ConfigError(f"the data has changed since the run in {workdir} began; use another workdir")

    agree(compare)


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        previous = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}); restore it, or delete it if you know that the flags are the run's"
        ) from error
    if not isinstance(previous, dict):
        raise ConfigError(f"{path} is damaged (it holds no JSON object); restore it or use another workdir")
    return previous
