"""How meshes and the layout of parameters are written down: ``data:4,fsdp:2`` and ``kernel$=-,fsdp;.*=``."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from poise.launch.config import ConfigError, nearest

DATA, FSDP, MODEL = "data", "fsdp", "model"
AXES = (DATA, FSDP, MODEL)
LEAF_AXES = (FSDP, MODEL)  # what a weight may be split over
FSDP_LEAST = 1024  # smaller leaves aren't worth splitting

Rules = Sequence[tuple[str, Sequence[str | None]]]


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
    """The sizes of a mesh's axes, in order.

    Batches are split over ``data`` and ``fsdp``, parameters over ``fsdp`` and ``model``. Where ``data`` isn't given it
    takes the devices that the others leave.

    Args:
      text: such as ``"data:4,fsdp:2"``; empty for all devices on ``data``.
      num_devices: the devices there are.

    Returns:
      Axis to size; ``data`` is always there.

    Raises:
      ConfigError: if the text is no mesh, or doesn't take all devices; the message has both numbers.

    Example:
      >>> from poise.launch.sharding import parse_mesh
      >>> parse_mesh("fsdp:2", num_devices=8)
      {'data': 4, 'fsdp': 2}
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (word.strip() for word in text.split(","))):
        name, colon, size = (word.strip() for word in part.partition(":"))
        if name not in AXES:
            raise ConfigError(f"mesh has the axes {', '.join(AXES)}, got {name!r}{nearest(name, AXES)}")
        if not colon or not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"mesh must give every axis a size, as in data:4,fsdp:2, got {part!r}")
        if name in sizes:
            raise ConfigError(f"mesh must give each axis once, got {text!r}")
        sizes[name] = int(size)
    taken = math.prod(sizes.values())
    if DATA not in sizes and num_devices % taken == 0:
        return {DATA: num_devices // taken, **sizes}
    if taken != num_devices:
        raise ConfigError(f"mesh must take all {num_devices} devices, got {text!r}, which takes {taken}")
    return sizes


def parse_rules(text: str) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    """Rules for the layout of a state's leaves, ``REGEX=AXIS,AXIS;REGEX=...``, a dash for a dimension left whole.

    Raises:
      ConfigError: if the text doesn't have this form.

    Example:
      >>> from poise.launch.sharding import parse_rules
      >>> parse_rules("kernel$=-,fsdp;.*=")
      (('kernel$', (None, 'fsdp')), ('.*', ()))
    """
    rules = []
    for part in filter(None, (word.strip() for word in text.split(";"))):
        pattern, equals, axes = part.rpartition("=")
        if not equals or not pattern:
            raise ConfigError(f"sharding must be rules of the form REGEX=AXIS,AXIS separated by ;, got {part!r}")
        words = [word.strip() for word in axes.split(",")] if axes.strip() else []
        for word in words:
            if word not in (*LEAF_AXES, "-"):
                raise ConfigError(f"sharding names the axes {', '.join(LEAF_AXES)} or -, got {word!r} in {part!r}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"sharding has the invalid pattern {pattern!r}: {error}") from error
        rules.append((pattern, tuple(None if word == "-" else word for word in words)))
    return tuple(rules)


class LeafSpecs:
    """The partition of every leaf of a state, by rules or, without, over ``fsdp`` by its largest divisible dimension.

    The first rule whose pattern is found in a leaf's name (``params/Dense_0/kernel``, ``optimizer/0/mu/...``) holds.
    Scalars and random keys are always whole.

    Args:
      sizes: of the mesh's axes.
      rules: pairs of a pattern and the axes of a leaf's dimensions, None for a dimension left whole.

    Raises:
      ConfigError: if a rule names an axis that the mesh hasn't, or ``model`` comes without rules.
    """

    def __init__(self, sizes: Mapping[str, int], rules: Rules = ()):
        self._sizes, self._rules = dict(sizes), [(pattern, tuple(axes)) for pattern, axes in rules]
        self._used = [False] * len(self._rules)
        for pattern, axes in self._rules:
            named = [axis for axis in axes if axis is not None]
            for axis in named:
                if axis not in sizes or axis not in LEAF_AXES:
                    known = ", ".join(axis for axis in sizes if axis in LEAF_AXES) or "none for weights"
                    raise ConfigError(f"sharding: the rule {pattern!r} names the axis {axis!r}, the mesh has {known}")
            if len(set(named)) < len(named):
                raise ConfigError(f"sharding: the rule {pattern!r} names an axis twice, in {','.join(named)}")
        if sizes.get(MODEL, 1) > 1 and not self._rules:
            raise ConfigError(f"mesh with {MODEL}:{sizes[MODEL]} needs rules for what is split over it, see sharding")

    @property
    def has_rules(self) -> bool:
        """Whether rules say how leaves lie."""
        return bool(self._rules)

    def spec(self, name: str, leaf: Any, is_key: bool = False) -> PartitionSpec:
        """The partition of a leaf.

        Raises:
          ConfigError: if there are rules and none fits, or the one that does splits a dimension unevenly.
        """
        if is_key or not leaf.ndim:
            return PartitionSpec()
        if not self._rules:
            return self._by_size(leaf.shape)
        for place, (pattern, axes) in enumerate(self._rules):
            if not re.search(pattern, name):
                continue
            self._used[place] = True
            if len(axes) > leaf.ndim:
                raise ConfigError(
                    f"sharding: the rule {pattern!r} has {len(axes)} dimensions, the leaf {name} has {leaf.ndim}"
                )
            for dimension, axis in zip(leaf.shape, axes, strict=False):
                if axis is not None and dimension % self._sizes[axis]:
                    raise ConfigError(
                        f"sharding: the rule {pattern!r} splits a dimension of {dimension} of the leaf {name} over "
                        f"{axis}:{self._sizes[axis]}, which doesn't divide it"
                    )
            return PartitionSpec(*axes)
        raise ConfigError(
            f"sharding: no rule fits the leaf {name} of shape {leaf.shape}; a last rule .*= leaves it whole"
        )

    def _by_size(self, shape: tuple[int, ...]) -> PartitionSpec:
        size = self._sizes.get(FSDP, 1)
        if size == 1 or math.prod(shape) < FSDP_LEAST:
            return PartitionSpec()
        divisible = [place for place, dimension in enumerate(shape) if dimension % size == 0]
        if not divisible:
            return PartitionSpec()
        place = max(divisible, key=lambda candidate: shape[candidate])
        return PartitionSpec(*[None] * place, FSDP)

    def check_all_used(self) -> None:
        """Makes sure that every rule fitted a leaf of some phase.

        Raises:
          ConfigError: naming the first that didn't.
        """
        for used, (pattern, _) in zip(self._used, self._rules, strict=True):
            if not used:
                raise ConfigError(f"sharding: the rule {pattern!r} fits no leaf that an earlier rule left")
