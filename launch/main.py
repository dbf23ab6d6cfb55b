"""The frame around every launcher: flags, folder, lock, one sentence for each failure, and the exit code."""

import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from poise.launch.agreement import main_first, several
from poise.launch.claim import claimed_by_all
from poise.launch.config import ConfigError, parse_config
from poise.launch.errors import LaunchError
from poise.launch.hosts import end, join_hosts, lost, same_everywhere
from poise.launch.profiling import StepProfile
from poise.launch.signals import Interrupted
from poise.launch.workdir import settle_config, workdir_path


def launch(
    cls: type,
    recipes: Mapping[str, Mapping[str, Any]],
    argv: Sequence[str],
    run: Callable[[Any, pathlib.Path], None],
    *,
    prog: str,
    description: str,
    check: Callable[[Any], None] | None = None,
) -> int:
    """Reads the flags, claims the working directory, runs, and turns what happened into an exit code.

    Args:
      cls: the launcher's configuration dataclass, with a field ``workdir``.
      recipes: its named presets.
      argv: the command line without the program's name.
      run: ``(config, workdir) -> None``, the run itself.
      prog: the module's name, as in ``poise.launch.distill``.
      description: what the launcher does, for ``--help``.
      check: looks at what the settings name (data, weights) and raises before anything is written.

    Returns:
      0 when the run finished, or was stopped by SIGTERM and saved; 130 after Ctrl-C; 2 for settings or a folder that
      cannot be used, before anything was written; 1 for any other failure that has a sentence of its own. Of several
      processes, one that fails leaves the interpreter at once instead, and the others end with code 1 or by SIGABRT.
    """
    config = parse_config(cls, recipes, argv, prog=prog, description=description)

    def look() -> None:
        if check is not None:
            try:
                check(config)
            except LaunchError as error:
                raise ConfigError(str(error)) from error

    def body() -> None:
        if not config.workdir:
            raise ConfigError("--workdir must name the run's folder, such as --workdir=runs/digits")
        workdir = workdir_path(config.workdir)
        StepProfile(getattr(config, "profile_steps", ()), workdir)  # which says what is wrong with them
        if join_hosts(config):
            set_up_jax(config)  # before the first word between processes
            same_everywhere(config)
        main_first(look)
        with claimed_by_all(config.workdir, settle=lambda: settle_config(config, workdir)):
            set_up_jax(config)
            run(config, workdir)

    return _exit_code(body, prog, "; the same command goes on from the last checkpoint")


def run_tool(
    cls: type,
    recipes: Mapping[str, Mapping[str, Any]],
    argv: Sequence[str],
    run: Callable[[Any], None],
    *,
    prog: str,
    description: str,
) -> int:
    """The same for a command that has no run of its own: reads the flags, runs, and gives the exit code.

    Args:
      cls: the command's configuration dataclass.
      recipes: its named presets.
      argv: the command line without the program's name.
      run: ``config -> None``.
      prog: the module's name, as in ``poise.launch.sample``.
      description: what the command does, for ``--help``.

    Returns:
      0 when it finished; 130 after Ctrl-C; 2 for settings that cannot be used; 1 for any other failure that has a
      sentence of its own.
    """
    config = parse_config(cls, recipes, argv, prog=prog, description=description)

    def body() -> None:
        set_up_jax(config)
        run(config)

    return _exit_code(body, prog, "")


def _exit_code(body: Callable[[], None], prog: str, and_then: str) -> int:
    # The training loop puts its own handler in this one's place, outside of it a stop loses nothing.
    previous = signal.signal(signal.SIGTERM, _stop_at_once)
    code, alone = 0, False
    try:
        body()
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped{and_then}", file=sys.stderr)
        code, alone = 130, True
    except Interrupted as stopped:
        print(f"{prog}: {stopped}{and_then}", file=sys.stderr)
        code, alone = stopped.exit_code, isinstance(stopped, _AtOnce)
    except LaunchError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        code, alone = 2 if isinstance(error, ConfigError) else 1, True
    except OSError as error:  # a full disk, a folder that went away
        where = f"{error.filename}: " if error.filename else ""
        print(f"{prog}: {where}{error.strerror or error}{and_then}", file=sys.stderr)
        code, alone = 1, True
    except Exception as error:  # a bug, unless another process is gone
        if not several():
            raise
        gone = lost(error)
        print(f"{prog}: {gone}{and_then}" if gone else traceback.format_exc(), file=sys.stderr)
        code, alone = 1, True
    finally:
        signal.signal(signal.SIGTERM, previous)
    return end(prog, code, alone)


class _AtOnce(Interrupted):
    """A stop of this process alone, outside of the training loop."""


def _stop_at_once(signum: int, frame: FrameType | None) -> None:
    raise _AtOnce(signum, "stopped")


def set_up_jax(config: Any) -> None:
    """The compilation cache, before anything is compiled."""
    if getattr(config, "jax_cache_dir", ""):
        import jax

        jax.config.update("jax_compilation_cache_dir", os.path.abspath(config.jax_cache_dir))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
