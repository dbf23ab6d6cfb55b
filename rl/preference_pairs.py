"""What every loss on pairs of a chosen and a rejected text shares: margins, empty texts, the logistic loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from poise.core.arguments import check_range
from poise.rl.token_logprobs import as_mask, sequence_logprob


def check_beta(beta: ArrayLike) -> None:
    """Raises unless the strength of the reference is positive."""
    check_range("beta", beta, 0.0, open_low=True, open_high=True)


def check_same_shape(shape: tuple[int, ...], **arrays: Array) -> None:
    """Raises a ValueError that names the first array of another shape."""
    for name, array in arrays.items():
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {array.shape}")


def log_ratio(policy: Array, ref: Array, mask: Array, name: str, length_normalize: bool = False) -> Array:
    """The sum over counted tokens of the policy's log-probability minus the reference's."""
    check_same_shape(policy.shape, **{f"ref_{name}": ref})
    as_mask(f"{name}_mask", mask, policy.shape)
    own = sequence_logprob(policy, mask, length_normalize=length_normalize)
    return own - sequence_logprob(ref, mask, length_normalize=length_normalize)


def comparable(chosen_mask: Array, rejected_mask: Array) -> Bool[Array, "*batch"]:
    """Whether both texts of a pair have a token that counts."""
    if chosen_mask.shape[:-1] != rejected_mask.shape[:-1]:
        raise ValueError(
            f"rejected_mask must have the batch shape {chosen_mask.shape[:-1]} of chosen_mask, "
            f"got {rejected_mask.shape[:-1]}"
        )
    return jnp.any(chosen_mask != 0, axis=-1) & jnp.any(rejected_mask != 0, axis=-1)


def pair_margin(chosen: Array, rejected: Array, chosen_mask: Array, rejected_mask: Array) -> Float[Array, "*batch"]:
    """Chosen minus rejected; 0 without a gradient where there is nothing to compare."""
    return jnp.where(comparable(chosen_mask, rejected_mask), chosen - rejected, 0)


def logistic(margin: ArrayLike) -> Array:
    r"""The loss $-\log\mathrm{sigmoid}(z)$."""
    return jax.nn.softplus(-jnp.asarray(margin))


def smoothed_logistic(margin: ArrayLike, label_smoothing: ArrayLike) -> Array:
    r"""$-(1-\epsilon)\log\mathrm{sigmoid}(z) - \epsilon\log\mathrm{sigmoid}(-z)$, for labels that may be wrong."""
    margin = jnp.asarray(margin)
    eps = jnp.asarray(label_smoothing, margin.dtype)
    return (1 - eps) * logistic(margin) + eps * logistic(-margin)
