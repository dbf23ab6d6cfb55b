"""How a checkpoint is written: by all processes together, or by process 0 with what it gathers of the others."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from poise.launch.agreement import only_main
from poise.launch.errors import LaunchError
from poise.launch.gather import gathered
from poise.launch.manifest import CheckpointError, in_short, obstacle_of, save_args


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Says of any failure below where it happened and what to do.

    Raises:
      CheckpointError: instead of any error that has no sentence of its own.
    """
    try:
        yield
    except LaunchError:
        raise
    except Exception as error:
        reason = obstacle_of(error) or in_short(error)
        raise CheckpointError(
            f"the checkpoint {path} can't be written: {reason}; earlier checkpoints are intact, the "
            "same command goes on from the newest of them once that is mended"
        ) from error


def write(
    path: pathlib.Path,
    names: Sequence[str],
    leaves: Sequence[jax.Array],
    meta: dict[str, Any],
    save: Callable[[Any], Any],
    apart: bool,
) -> None:
    """Writes leaves and their description; all processes take part.

    Args:
      path: where they go, for messages.
      names: of the leaves.
      leaves: the leaves.
      meta: their description.
      save: gets what orbax saves.
      apart: whether process 0 alone writes, and calls ``save``.

    Raises:
      CheckpointError: if process 0 can't write them.
    """
    if not apart:
        save(save_args(names, leaves, meta))
        return
    whole = gathered(leaves)

    def by_itself() -> None:
        with writing(path):
            save(save_args(names, whole, meta))

    only_main(by_itself, CheckpointError)
