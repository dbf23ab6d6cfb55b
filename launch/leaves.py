"""A state as named leaves: what is live, what is frozen, and how both become the state again."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

FROZEN = "frozen"


def leaf_path(path: Sequence[Any]) -> tuple[str, ...]:
    """A pytree path as plain words: field names, dictionary keys and positions."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def leaf_name(path: Sequence[str]) -> str:
    """A leaf's name in messages and files, such as ``params/Dense_0/kernel``."""
    return "/".join(path) or "state"


class Layout:
    """The shape of a phase's state, known before any of it is computed.

    The leaves under the state's field ``frozen`` are kept apart from the others, which are live: frozen leaves are
    neither donated nor saved with every checkpoint.

    Args:
      state: the state, or its abstract value from ``jax.eval_shape``.

    Raises:
      ValueError: if two leaves have the same name.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.launch.leaves import Layout
      >>> state = {"params": jnp.ones(3), "frozen": {"teacher": jnp.zeros(2)}}
      >>> layout = Layout(state)
      >>> layout.live_names, layout.frozen_names
      (('params',), ('frozen/teacher',))
      >>> live, frozen = layout.split(state)
      >>> sorted(layout.merge(live, frozen))
      ['frozen', 'params']
    """

    def __init__(self, state: PyTree):
        leaves, self.treedef = jax.tree.flatten_with_path(state)
        paths = [leaf_path(path) for path, _ in leaves]
        names = [leaf_name(path) for path in paths]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two leaves of the state are both called {twice!r}")
        self._is_frozen = [path[:1] == (FROZEN,) for path in paths]
        abstract = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for _, leaf in leaves]
        self.live_paths, self.frozen_paths = self._parts(paths)
        self.live_names, self.frozen_names = self._parts(names)
        self.abstract_live, self.abstract_frozen = self._parts(abstract)

    def _parts(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        live = tuple(leaf for leaf, frozen in zip(leaves, self._is_frozen, strict=True) if not frozen)
        return live, tuple(leaf for leaf, frozen in zip(leaves, self._is_frozen, strict=True) if frozen)

    def split(self, state: PyTree) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The live and the frozen leaves of a state of this layout.

        Raises:
          TypeError: if its structure, or the shape or type of a live leaf, is another; the message names the first.
        """
        leaves, treedef = jax.tree.flatten(state)
        if treedef != self.treedef:
            raise TypeError(f"the state's structure changed from {self.treedef} to {treedef}")
        live, frozen = self._parts(leaves)
        for name, old, new in zip(self.live_names, self.abstract_live, live, strict=True):
            if (old.shape, old.dtype) != (new.shape, new.dtype):
                raise TypeError(
                    f"the state's leaf {name} changed from {old.dtype}{list(old.shape)} to "
                    f"{new.dtype}{list(new.shape)}; a step must keep every shape and type"
                )
        return live, frozen

    def merge(self, live: Sequence[Any], frozen: Sequence[Any]) -> PyTree:
        """The state with these leaves."""
        sources = (iter(live), iter(frozen))
        return jax.tree.unflatten(self.treedef, [next(sources[is_frozen]) for is_frozen in self._is_frozen])

    @property
    def abstract(self) -> PyTree:
        """The abstract state."""
        return self.merge(self.abstract_live, self.abstract_frozen)


def nest(paths: Sequence[Sequence[str]], leaves: Sequence[Any]) -> Any:
    """Nested dictionaries from leaves and their paths; a single leaf without a path is itself.

    Example:
      >>> from poise.launch.leaves import nest
      >>> nest([("a", "b"), ("a", "c")], [1, 2])
      {'a': {'b': 1, 'c': 2}}
    """
    if len(paths) == 1 and not paths[0]:
        return leaves[0]
    tree: dict[str, Any] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        node = tree
        for word in path[:-1]:
            node = node.setdefault(word, {})
        node[path[-1]] = leaf
    return tree


def is_key(leaf: Any) -> bool:
    """Whether a leaf holds typed random keys."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_data(leaf: jax.Array) -> jax.Array:
    """A leaf as plain numbers: typed keys become their bits."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def abstract_data(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape and type of :func:`to_data` of an abstract leaf."""
    if is_key(leaf):
        return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


@functools.cache
def _key_types() -> dict[str, tuple[Any, str]]:
    """The types of typed keys by name, such as ``key<fry>``, each with its generator."""
    types = {impl: jax.random.key(0, impl=impl).dtype for impl in ("threefry2x32", "rbg", "unsafe_rbg")}
    return {str(dtype): (dtype, impl) for impl, dtype in types.items()}


def from_data(data: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of :func:`to_data`, for a leaf of this type."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(data, impl=_key_types()[str(dtype)][1])
    return data


def dtype_named(name: str) -> Any:
    """The type that ``str(dtype)`` gave this name."""
    return _key_types()[name][0] if name.startswith("key<") else jax.numpy.dtype(name)


def host_scalar(value: Any) -> int | float | bool | list:
    """A metric, a scalar or one number a seed, as JSON writes it; every float16, bfloat16 and float32 exactly."""
    array = np.asarray(value)
    if array.dtype == bool or np.issubdtype(array.dtype, np.integer):
        return array.tolist()
    return array.astype(np.float64).tolist()
