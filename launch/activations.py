"""A transformer's logits together with what its layers computed on the way."""

from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from poise.nets import Transformer


class Activations(NamedTuple):
    """What the layers of a :class:`poise.nets.Transformer` computed, ``[layers, batch, tokens, width]`` each.

    Attributes:
      attention: what attention adds to the residual stream.
      mlp: what the MLP adds to it.
      residual: the stream after each layer.
    """

    attention: Float[Array, "layers batch tokens width"]
    mlp: Float[Array, "layers batch tokens width"]
    residual: Float[Array, "layers batch tokens width"]


def with_activations(
    model: Transformer, params: PyTree, tokens: Int[Array, "batch length"]
) -> tuple[Float[Array, "batch length vocab"], Activations]:
    """Runs the model and keeps what flows through it.

    Args:
      model: the decoder.
      params: its variables.
      tokens: what it reads.

    Returns:
      Logits, and the activations.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.launch.activations import with_activations
      >>> from poise.nets import Transformer
      >>> model, tokens = Transformer(7, num_layers=1, num_heads=2, width=8), jnp.zeros((1, 3), jnp.int32)
      >>> logits, seen = with_activations(model, model.init(jax.random.key(0), tokens), tokens)
      >>> logits.shape, seen.residual.shape
      ((1, 3, 7), (1, 1, 3, 8))
    """
    parts = {"embed", *(f"{kind}_{layer}" for layer in range(model.num_layers) for kind in ("attention", "mlp_out"))}
    logits, kept = cast(Any, model).apply(
        params,
        tokens,
        capture_intermediates=lambda module, method: method == "__call__" and module.name in parts,
        mutable=["intermediates"],
    )
    outputs = {name: found["__call__"][0] for name, found in kept["intermediates"].items() if name in parts}
    attention = jnp.stack([outputs[f"attention_{layer}"][0] for layer in range(model.num_layers)])
    mlp = jnp.stack([outputs[f"mlp_out_{layer}"] for layer in range(model.num_layers)])
    start = outputs["embed"] * model.width**0.5
    return logits, Activations(attention, mlp, start + jnp.cumsum(attention + mlp, axis=0))
