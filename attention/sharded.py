"""Attention with the keys spread over devices."""

from typing import Any

import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, ArrayLike, Float

from poise.attention.blocks import Plan
from poise.attention.chunked import chunked_softplus
from poise.attention.chunked_softmax import chunked_softmax
from poise.attention.inputs import prepare
from poise.attention.softplus_attention import check_blocks, check_softplus_arguments, finish
from poise.core.arguments import check_choice

WEIGHTINGS = ("softplus", "softmax")


def sharded_attention(
    query: Float[Array, "batch queries heads width"],
    key: Float[Array, "batch keys key_heads width"],
    value: Float[Array, "batch keys key_heads value_width"],
    *,
    mesh: Mesh,
    axis_name: str,
    batch_axis: str | None = None,
    weighting: str = "softplus",
    mask: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    segment_ids: Any = None,
    power: float | int = 15.0,
    reweight: bool = True,
    offset_min_keys: int = 4,
    qk_norm: bool | None = None,
    scale: Any = None,
    block_size: int | tuple[int, int] | None = None,
) -> Float[Array, "batch queries heads value_width"]:
    r"""Softplus or softmax attention over sequences that are spread over a mesh axis, with the same results.

    Each device goes through its own keys and values in blocks, for all queries. Keys and values stay where they are;
    what travels is the queries, the row statistics (the sum and the maximum of softplus, then the sum of weights) and
    the weighted values. Backward, the derivatives of keys and values stay where they are, too. Call it under ``jit``
    with arguments that are sharded or not; it is a ``shard_map`` inside. The mesh's axes are taken as automatic ones;
    arguments whose type carries a sharding over explicit axes go through :func:`jax.sharding.auto_axes` first.

    Args:
      query: ``[batch, queries, heads, width]``.
      key: ``[batch, keys, key_heads, width]``.
      value: ``[batch, keys, key_heads, value_width]``.
      mesh: the devices.
      axis_name: the mesh axis that the keys are spread over.
      batch_axis: the mesh axis that the batch is spread over, or None.
      weighting: ``"softplus"`` or ``"softmax"``.
      mask: as in :func:`poise.attention.softplus_attention`; its keys are spread, too.
      is_causal: as there.
      query_seq_lengths: as there.
      key_value_seq_lengths: as there.
      local_window_size: as there.
      segment_ids: as there.
      power: as there.
      reweight: as there; has no meaning for softmax.
      offset_min_keys: as there.
      qk_norm: as there; None is True for softplus and False for softmax.
      scale: as there, or as in :func:`poise.attention.dot_product_attention`.
      block_size: as there.

    Returns:
      ``[batch, queries, heads, value_width]``, sharded as the query's batch.

    Raises:
      ValueError: if an axis is not one of the mesh, the batch is no multiple of its devices, or as there.
      TypeError: as there.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.attention import sharded_attention, softplus_attention
      >>> mesh = jax.make_mesh((jax.device_count(),), ("sequence",))
      >>> x = jax.random.normal(jax.random.key(0), (1, 16, 2, 4))
      >>> spread = sharded_attention(x, x, x, mesh=mesh, axis_name="sequence", is_causal=True)
      >>> bool(jnp.allclose(spread, softplus_attention(x, x, x, is_causal=True), atol=1e-5))
      True
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    for name, axis in (("axis_name", axis_name), ("batch_axis", batch_axis)):
        if axis is not None:
            check_choice(name, axis, mesh.axis_names)
    if axis_name is None or axis_name == batch_axis:
        raise ValueError(f"axis_name must be a mesh axis other than batch_axis, got {axis_name!r}")
    softplus = weighting == "softplus"
    qk_norm = softplus if qk_norm is None else qk_norm
    exponent = check_softplus_arguments(power, offset_min_keys, reweight, qk_norm, None)
    query = jnp.asarray(query)
    if query.ndim != 4:
        raise ValueError(f"query must have the axes [batch, length, heads, width], got shape {query.shape}")
    if batch_axis is not None and query.shape[0] % mesh.shape[batch_axis]:
        raise ValueError(
            f"the batch of query must be a multiple of the {mesh.shape[batch_axis]} devices of batch_axis, "
            f"got {query.shape[0]}"
        )
    rows, extent = prepare(
        query,
        key,
        value,
        mask=mask,
        bias=None,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        segment_ids=segment_ids,
        qk_norm=qk_norm,
        scale=scale,
        default_scale="length" if softplus else query.shape[-1] ** -0.5,
    )
    shards = mesh.shape[axis_name]
    blocks = check_blocks(block_size, extent.num_queries, -(-extent.num_keys // shards))
    plan = Plan(extent, exponent if softplus else None, offset_min_keys, *blocks, mesh, axis_name, batch_axis)
    attend = chunked_softplus if softplus else chunked_softmax
    out, statistics = attend(rows, plan)
    return finish(out, statistics, rows.broken, query, False)
