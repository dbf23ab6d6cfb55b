"""Launchers: flags, data, devices, the training loop, checkpoints and metric writers; the only place with I/O.

Importing this package loads neither jax nor anything else that is slow, so that ``--help`` answers at once; each name
loads its module when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "CheckpointError": "manifest",
    "ConfigError": "config",
    "Console": "progress",
    "Data": "data",
    "DataError": "data",
    "DeviceError": "devices",
    "FitResult": "loop",
    "HostError": "agreement",
    "InMemory": "data",
    "Interrupted": "signals",
    "LaunchError": "errors",
    "NoData": "data",
    "NonFiniteError": "loop",
    "Phase": "phase",
    "Student": "export",
    "Writer": "writers",
    "batch_indices": "data",
    "field": "config",
    "fit": "loop",
    "load_classifier": "integer_classifier",
    "load_quantized": "quantized_files",
    "load_student": "export",
    "parse_config": "config",
    "restore_tree": "checkpoint_tree",
    "save_quantized": "quantized_files",
    "save_student": "export",
    "settle_config": "workdir",
    "validate": "config",
    "workdir_lock": "lock",
}

if TYPE_CHECKING:
    from poise.launch.agreement import HostError
    from poise.launch.checkpoint_tree import restore_tree
    from poise.launch.config import ConfigError, field, parse_config, validate
    from poise.launch.data import Data, DataError, InMemory, NoData, batch_indices
    from poise.launch.devices import DeviceError
    from poise.launch.errors import LaunchError
    from poise.launch.export import Student, load_student, save_student
    from poise.launch.integer_classifier import load_classifier
    from poise.launch.lock import workdir_lock
    from poise.launch.loop import FitResult, NonFiniteError, fit
    from poise.launch.manifest import CheckpointError
    from poise.launch.phase import Phase
    from poise.launch.progress import Console
    from poise.launch.quantized_files import load_quantized, save_quantized
    from poise.launch.signals import Interrupted
    from poise.launch.workdir import settle_config
    from poise.launch.writers import Writer

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Console",
    "Data",
    "DataError",
    "DeviceError",
    "FitResult",
    "HostError",
    "InMemory",
    "Interrupted",
    "LaunchError",
    "NoData",
    "NonFiniteError",
    "Phase",
    "Student",
    "Writer",
    "batch_indices",
    "field",
    "fit",
    "load_classifier",
    "load_quantized",
    "load_student",
    "parse_config",
    "restore_tree",
    "save_quantized",
    "save_student",
    "settle_config",
    "validate",
    "workdir_lock",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"poise.launch.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'poise.launch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
