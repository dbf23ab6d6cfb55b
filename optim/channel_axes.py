"""Which axes of a weight count its output channels, and which are stacks of separate weights."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
from jaxtyping import PyTree

from poise.optim.leaves import find_rule, is_absent, path_names


class ChannelAxes(NamedTuple):
    """The axes of one leaf by which it is seen as rows, one row per output channel.

    Attributes:
      channel: the axes that together index the rows: ``(-1,)`` for a Flax kernel, ``(0,)`` for an embedding table,
        ``(-2, -1)`` for the query, key and value kernels ``(features, heads, head_dim)`` of an attention layer.
      batch: the axes of a stack of weights (``nn.scan``, ``nn.vmap``); every slice is treated as a leaf of its own.

    Example:
      >>> from poise.optim import ChannelAxes
      >>> ChannelAxes()
      ChannelAxes(channel=(-1,), batch=())
      >>> ChannelAxes(channel=(-1,), batch=(0,))
      ChannelAxes(channel=(-1,), batch=(0,))
    """

    channel: tuple[int, ...] = (-1,)
    batch: tuple[int, ...] = ()


ChannelAxesTree: TypeAlias = ChannelAxes | PyTree | Callable[[PyTree], PyTree] | None


class RowGeometry(NamedTuple):
    """A checked :class:`ChannelAxes` of one shape: nonnegative axes, and the numbers of values in a row."""

    channel: tuple[int, ...]
    within: tuple[int, ...]
    batch: tuple[int, ...]
    row_size: int
    slice_size: int


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, ChannelAxes)


def check_channel_axes(channel_axes: ChannelAxesTree) -> None:
    """Raises if a spec is wrong whatever the shape: no channel axis, an axis twice, or something that is no integer."""
    if channel_axes is None or (callable(channel_axes) and not isinstance(channel_axes, ChannelAxes)):
        return
    for spec in jax.tree.leaves(channel_axes, is_leaf=_is_spec):
        if spec is None:
            continue
        if not isinstance(spec, ChannelAxes):
            raise TypeError(f"channel_axes must consist of ChannelAxes and None, got {spec!r}")
        axes = (*spec.channel, *spec.batch)
        if not all(isinstance(axis, int) for axis in axes):
            raise TypeError(f"channel_axes must hold tuples of integers, got {spec}")
        if not spec.channel:
            raise ValueError(f"channel_axes must name at least one channel axis, got {spec}")
        if len(set(axes)) != len(axes):
            raise ValueError(f"channel_axes must name every axis at most once, got {spec}")


def row_geometry(shape: tuple[int, ...], spec: ChannelAxes | None, where: str = "") -> RowGeometry | None:
    """Resolves a spec for a shape; None if the leaf is a vector or a scalar (per slice), empty, or exempt.

    Raises:
      ValueError: if an axis is out of range, or named twice once negative ones are counted from the front.
    """
    rank = len(shape)
    if spec is None or rank - len(spec.batch) < 2:
        return None
    axes = (*spec.channel, *spec.batch)
    if any(not -rank <= axis < rank for axis in axes):
        raise ValueError(f"channel_axes must lie in [{-rank}, {rank - 1}] for shape {shape}, got {spec}{where}")
    channel, batch = (tuple(sorted(axis % rank for axis in group)) for group in (spec.channel, spec.batch))
    if len({*channel, *batch}) != len(axes):
        raise ValueError(f"channel_axes must name every axis at most once, got {spec} for shape {shape}{where}")
    within = tuple(axis for axis in range(rank) if axis not in channel and axis not in batch)
    row_size, slice_size = 1, 1
    for axis in range(rank):
        row_size *= shape[axis] if axis in within else 1
        slice_size *= 1 if axis in batch else shape[axis]
    if not all(shape):
        return None
    return RowGeometry(channel, within, batch, row_size, slice_size)


def resolve_channel_axes(channel_axes: ChannelAxesTree, params: PyTree) -> PyTree:
    """A tree of specs that lines up with the parameters, from one spec, a tree, a function or None."""
    if callable(channel_axes) and not isinstance(channel_axes, ChannelAxes):
        channel_axes = channel_axes(params)
        check_channel_axes(channel_axes)
    if channel_axes is None:
        channel_axes = ChannelAxes()
    if isinstance(channel_axes, ChannelAxes):
        return jax.tree.map(lambda _: channel_axes, params, is_leaf=is_absent)
    return jax.tree.map(
        lambda p, spec: None if is_absent(p) else _unboxed(spec), params, channel_axes, is_leaf=is_absent
    )


def _unboxed(spec: Any) -> ChannelAxes | None:
    """The spec inside of an ``nnx.Param``: ``nnx.Optimizer`` hands over trees of bare arrays."""
    return spec if _is_spec(spec) else jax.tree.leaves(spec, is_leaf=_is_spec)[0]


_STACKS = re.compile(r"^(Scan|Vmap)[A-Z]")  # the names that linen gives to lifted modules: ScanBlock_0, VmapDense_0


def flax_channel_axes(
    params: PyTree,
    *,
    stacked: Mapping[str, int | tuple[int, ...]] | None = None,
    overrides: Mapping[str, ChannelAxes | None] | None = None,
) -> PyTree:
    """Finds the channel axes of every leaf of a Flax parameter tree, linen or nnx, by its path.

    A leaf called ``kernel`` has its outputs last: one axis for Dense, Conv (grouped ones too), ConvTranspose and the
    attention's ``out``; all output axes for DenseGeneral and the attention's ``query``, ``key`` and ``value``. How many
    there are is read off the ``bias`` of the same layer, whose shape they are; layers without one are known by name,
    and otherwise have one. A bias that fits the last axis but one marks a ``ConvTranspose`` with
    ``transpose_kernel=True``. A leaf called ``embedding`` has one row per entry of the table. ``bias``, ``scale`` and
    whatever is a vector or a scalar are exempt. Any other leaf has its channels last.

    Axes of a stack are found by linen's own names of lifted modules (``ScanBlock_0``, ``VmapDense_0``: axis 0, one for
    each level), by a bias that is stacked as well, or are named in ``stacked``.

    Args:
      params: the parameter tree: arrays or ``jax.ShapeDtypeStruct``.
      stacked: regular expressions, searched in ``"decoder/layers/kernel"``, and the axes of the stack there. The first
        that is found holds and replaces the detection; ``()`` means no stack.
      overrides: regular expressions and the spec to use there, None for never; the first that is found holds.

    Returns:
      A tree of the same structure with a :class:`ChannelAxes` or None for each leaf.

    Raises:
      ValueError: if an axis named in ``stacked`` or ``overrides`` is out of range or named twice.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from poise.optim import flax_channel_axes
      >>> model = nn.Sequential([nn.Embed(10, 4), nn.MultiHeadDotProductAttention(2), nn.Dense(3)])
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 5), int))["params"]
      >>> specs = flax_channel_axes(params)
      >>> specs["layers_0"]["embedding"].channel, specs["layers_1"]["query"]["kernel"].channel
      ((0,), (-2, -1))
      >>> specs["layers_1"]["out"]["kernel"].channel, specs["layers_2"]["kernel"].channel, specs["layers_2"]["bias"]
      ((-1,), (-1,), None)
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    shapes = {path_names(path): tuple(leaf.shape) for path, leaf in flat}
    specs = []
    for path, leaf in flat:
        names = path_names(path)
        spec = _leaf_channel_axes(names, tuple(leaf.shape), shapes, stacked)
        spec = find_rule(overrides, names, spec)
        check_channel_axes(spec)
        row_geometry(tuple(leaf.shape), spec, f" at {'/'.join(names)}")
        specs.append(spec)
    return jax.tree.unflatten(treedef, specs)


def _leaf_channel_axes(
    names: tuple[str, ...],
    shape: tuple[int, ...],
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
    stacked: Mapping[str, int | tuple[int, ...]] | None,
) -> ChannelAxes | None:
    name, parent = names[-1] if names else "", names[-2] if len(names) > 1 else ""
    rank = len(shape)
    if name in ("bias", "scale"):
        return None
    bias = shapes.get((*names[:-1], "bias")) if name == "kernel" else None
    levels = sum(bool(_STACKS.match(part)) for part in names[:-1])
    batch = find_rule(stacked, names, tuple(range(levels)))
    batch = (batch,) if isinstance(batch, int) else tuple(batch)
    if any(not -rank <= axis < rank for axis in batch):
        raise ValueError(f"stacked must name axes in [{-rank}, {rank - 1}] at {'/'.join(names)}, got {batch}")
    batch = tuple(axis % rank for axis in batch)
    if not batch and bias is not None and len(bias) > 1:
        a_stack = bias[0] == shape[0] and bias[1:] == shape[rank - len(bias) + 1 :]
        if a_stack and bias != shape[rank - len(bias) :]:
            batch = (0,)
    own = [axis for axis in range(rank) if axis not in batch]
    if len(own) < 2:
        return None
    own_shape = tuple(shape[axis] for axis in own)
    if name == "embedding":
        return ChannelAxes((own[0],), batch)
    outputs = 1
    if bias is not None:
        own_bias = tuple(size for axis, size in enumerate(bias) if axis not in batch)
        if 0 < len(own_bias) < len(own) and own_bias == own_shape[-len(own_bias) :]:
            outputs = len(own_bias)
        elif own_bias == own_shape[-2:-1]:
            return ChannelAxes((own[-2] - rank,), batch)
    elif name == "kernel" and parent in ("query", "key", "value") and len(own) == 3:
        outputs = 2
    return ChannelAxes(tuple(axis - rank for axis in own[-outputs:]), batch)
