"""Launchers: flags, data, devices, the training loop, checkpoints and metric writers; the only place with I/O.

Importing this package loads neither jax nor anything else that is slow, so that ``--help`` answers at once; each name
loads its module when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "ConfigError": "config",
    "LaunchError": "errors",
    "field": "config",
    "parse_config": "config",
    "settle_config": "config",
    "validate": "config",
}

if TYPE_CHECKING:
    from poise.launch.config import ConfigError, field, parse_config, settle_config, validate
    from poise.launch.errors import LaunchError

__all__ = ["ConfigError", "LaunchError", "field", "parse_config", "settle_config", "validate"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"poise.launch.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'poise.launch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
