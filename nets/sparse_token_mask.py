"""Learned, sparse weights of tokens from the hidden states of a frozen language model."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.core.arguments import check_count, check_range


class SparseTokenMask(nn.Module):
    r"""The masks of SparsePO: one number per token, at least 0 and often exactly 0.

    $$m_t = \mathrm{relu}\Big(\sum_jv_j\,\mathrm{relu}\big(w_j\cdot\mathrm{LN}(h_{j,t})+b_j\big)\Big),$$

    $h_j$ the hidden states of layer $j$ of the *reference*, one layer normalization for all of them. What it weighs is
    a context: at position $t$ the model has seen nothing but the tokens before the one that is predicted there. One
    instance for rewards and divergences is the common mask, two are independent ones.

    Where every relu is off no gradient reaches anything, for a context as for a whole mask. So $b$ and $v$ start at
    positive constants and $w$ so small that $w_j\cdot\mathrm{LN}(h)$ has a standard deviation of 0.1: a fresh mask is
    nearly the same everywhere. :func:`poise.rl.mask_sparsity` tells whether it has died later.

    Attributes:
      num_layers: number of layers whose hidden states are used; the embeddings are usually left out.
      dropout: rate of dropout on the layers' outputs and on the mask.
      epsilon: of the layer normalization; that of the language model.
      bias_init: where $b$ starts.
      mixer_init: where $v$ starts.
      dtype: of the computation; None keeps that of the hidden states.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import SparseTokenMask
      >>> mask, hidden = SparseTokenMask(num_layers=2), jax.random.normal(jax.random.key(0), (2, 3, 7, 16))
      >>> variables = mask.init(jax.random.key(1), hidden)
      >>> weights = mask.apply(variables, hidden)
      >>> weights.shape, bool((weights >= 0).all())
      ((3, 7), True)

    References:
      Christopoulou et al., SparsePO, https://arxiv.org/abs/2410.05102. The official code starts all parameters at
      random, so that a mask may be dead from the beginning.
    """

    num_layers: int
    dropout: float | int = 0.01
    epsilon: float | int = 1e-5
    bias_init: float | int = 0.5
    mixer_init: float | int = 0.5
    dtype: Any = None

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "layers *batch tokens features"], *, train: bool = False
    ) -> Float[Array, "*batch tokens"]:
        """Computes the weights.

        Args:
          hidden: hidden states of the reference; no gradient flows into them.
          train: whether dropout is on; it takes the rng ``dropout``.

        Returns:
          Weights of the tokens, at least 0 and without an upper bound.

        Raises:
          TypeError: if ``num_layers`` is no integer.
          ValueError: if the hidden states are of another number of layers, or a setting is out of range.
        """
        check_count("num_layers", self.num_layers)
        check_range("dropout", self.dropout, 0.0, 1.0, open_high=True)
        if hidden.shape[0] != self.num_layers:
            raise ValueError(f"hidden must hold {self.num_layers} layers, got shape {hidden.shape}")
        hidden = jax.lax.stop_gradient(hidden)
        dtype = jnp.dtype(hidden.dtype if self.dtype is None else self.dtype)
        param_dtype = jnp.promote_types(dtype, jnp.float32)
        norm = nn.LayerNorm(
            epsilon=self.epsilon, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False, name="norm"
        )
        features, layers = hidden.shape[-1], self.num_layers
        kernel_init = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal", in_axis=-1, out_axis=0)
        kernel = self.param("kernel", kernel_init, (layers, features), param_dtype)
        bias = self.param("bias", nn.initializers.constant(self.bias_init), (layers,), param_dtype)
        mixer = self.param("mixer", nn.initializers.constant(self.mixer_init), (layers,), param_dtype)
        scores = jnp.einsum("l...d,ld->...l", norm(hidden), kernel.astype(dtype)) + bias.astype(dtype)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        return drop(nn.relu(jnp.sum(drop(nn.relu(scores)) * mixer.astype(dtype), axis=-1)))
