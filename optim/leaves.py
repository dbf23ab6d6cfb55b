"""Leaves of parameter trees: their names by path, and the places where there is none."""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, KeyPath, SequenceKey

_T = TypeVar("_T")


def is_absent(x: Any) -> bool:
    """Whether a node of a tree stands for no array at all: None, or what ``optax.masked`` leaves behind."""
    return x is None or isinstance(x, optax.MaskedNode)


def path_names(path: KeyPath) -> tuple[str, ...]:
    """The names along a path, the same for linen and nnx trees.

    Boxes around an array (``nnx.Param``, ``linen.Partitioned``) add a last attribute ``value``, which is left out.
    """
    names = []
    for key in path:
        match key:
            case DictKey(key=name) | FlattenedIndexKey(key=name):
                names.append(str(name))
            case SequenceKey(idx=name):
                names.append(str(name))
            case GetAttrKey(name=name):
                names.append(name)
            case _:
                names.append(str(key))
    if path and isinstance(path[-1], GetAttrKey) and path[-1].name in ("value", "raw_value"):
        names.pop()
    return tuple(names)


def find_rule(rules: Mapping[str, _T] | None, names: tuple[str, ...], default: _T) -> _T:
    """The value of the first pattern that ``re.search`` finds in ``"a/b/kernel"``, else the default."""
    for pattern, value in (rules or {}).items():
        if re.search(pattern, "/".join(names)):
            return value
    return default


def resolve_mask(mask: Any, params: Any) -> Any:
    """A tree of booleans with the structure of the parameters, from a mask as optax takes them.

    Args:
      mask: None (all True), a boolean, a tree of booleans that may be a prefix of the parameters', or a function of the
        parameters that returns one.
      params: the parameters.
    """
    if callable(mask):
        mask = mask(params)
    if mask is None:
        mask = True
    return jax.tree.map(lambda chosen, part: jax.tree.map(lambda _: bool(chosen), part), mask, params)


def sum_dtype(*arrays: Any) -> jnp.dtype:
    """The dtype in which sums over these arrays are taken: theirs, but at least float32."""
    return jnp.promote_types(jnp.result_type(*(a.dtype for a in arrays)), jnp.float32)


def next_count(count: Array) -> Array:
    """One more, but never past the largest integer."""
    return jnp.asarray(optax.safe_increment(count))


def unzip(field_of: Callable[[Any], Any], tree: Any, kind: type) -> Any:
    """Takes one field out of a tree whose leaves are records of a given class."""
    return jax.tree.map(field_of, tree, is_leaf=lambda x: isinstance(x, kind))
