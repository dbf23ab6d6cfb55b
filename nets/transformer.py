"""A decoder-only language model whose attention is an argument."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from poise.attention import KeyValueCache, attend_with_cache, init_cache, softplus_attention
from poise.core.arguments import check_count, check_range
from poise.nets.rotary import rotary_embedding

Caches = tuple[KeyValueCache, ...]


class CausalAttention(nn.Module):
    """Multi-head causal attention with rotary positions.

    Attributes:
      num_heads: query heads.
      key_heads: heads of keys and values, of which ``num_heads`` is a multiple.
      attention: :func:`poise.attention.softplus_attention`, :func:`poise.attention.dot_product_attention` or any
        function with their arguments.
      rope_base: of :func:`rotary_embedding`.
      out_std: of the initial output weights.
      dtype: of the computation; None for that of the input.
    """

    num_heads: int
    key_heads: int
    attention: Callable[..., Array]
    rope_base: float
    out_std: float
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Float[Array, "batch length width"], KeyValueCache | None]:
        """Attends to what came before, in the cache too if there is one, which is then returned longer."""
        width = x.shape[-1]
        head = width // self.num_heads

        def project(name: str, heads: int) -> Array:
            init = nn.initializers.normal(width**-0.5)
            return nn.DenseGeneral((heads, head), use_bias=False, kernel_init=init, dtype=self.dtype, name=name)(x)

        query, key = (
            rotary_embedding(project(name, heads), positions, self.rope_base)
            for name, heads in (("query", self.num_heads), ("key", self.key_heads))
        )
        value = project("value", self.key_heads)
        if cache is None:
            out = self.attention(query, key, value, is_causal=True, segment_ids=segment_ids)
        else:
            out, cache = attend_with_cache(query, key, value, cache, attention=self.attention)
        init = nn.initializers.normal(self.out_std)
        out = nn.DenseGeneral(width, (-2, -1), use_bias=False, kernel_init=init, dtype=self.dtype, name="out")(out)
        return out, cache


class Transformer(nn.Module):
    r"""A small decoder-only language model: rotary positions, normalization before each part, one table of tokens.

    A layer is $x \leftarrow x + \mathrm{attention}(\mathrm{RMSNorm}(x))$, then
    $x \leftarrow x + W_2\,\mathrm{gelu}(W_1\mathrm{RMSNorm}(x))$. Logits are inner products with the tokens'
    embeddings. There are no biases and no positions but the rotary ones, so a sequence may be of any length; whether
    the model makes sense of it is up to ``attention``.

    Attributes:
      vocab_size: the number of tokens.
      num_layers: layers.
      num_heads: query heads; they divide the width into even parts.
      width: of the residual stream.
      key_heads: heads of keys and values; None for ``num_heads``.
      mlp_ratio: the hidden width of an MLP over the width.
      attention: :func:`poise.attention.softplus_attention`, :func:`poise.attention.dot_product_attention` or any
        function with their arguments, options bound with ``functools.partial``.
      rope_base: of :func:`rotary_embedding`.
      dtype: of the computation; parameters are float32.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> from poise.attention import softplus_attention
      >>> from poise.nets import Transformer
      >>> model = Transformer(50, 1, 2, 16, attention=functools.partial(softplus_attention, power=3.0))
      >>> tokens = jnp.arange(12).reshape(2, 6)
      >>> logits, variables = model.init_with_output(jax.random.key(0), tokens)
      >>> logits.shape
      (2, 6, 50)

    References:
      Vaswani et al., *Attention Is All You Need*, https://arxiv.org/abs/1706.03762; Xiong et al., *On Layer
      Normalization in the Transformer Architecture*, https://arxiv.org/abs/2002.04745; Press and Wolf, *Using the
      Output Embedding to Improve Language Models*, https://arxiv.org/abs/1608.05859
    """

    vocab_size: int
    num_layers: int = 4
    num_heads: int = 4
    width: int = 128
    key_heads: int | None = None
    mlp_ratio: int = 4
    attention: Callable[..., Array] = softplus_attention
    rope_base: float = 10_000.0
    dtype: Any = None

    def _check(self) -> int:
        for name in ("vocab_size", "num_layers", "num_heads", "width", "mlp_ratio"):
            check_count(name, getattr(self, name))
        check_range("rope_base", self.rope_base, 0.0, open_low=True)
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width must be an even multiple of num_heads={self.num_heads}, got {self.width}")
        key_heads = self.num_heads if self.key_heads is None else self.key_heads
        check_count("key_heads", key_heads)
        if self.num_heads % key_heads:
            raise ValueError(f"key_heads must divide num_heads={self.num_heads}, got {key_heads}")
        return key_heads

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
        cache: Caches | None = None,
    ) -> Any:
        """Logits ``[batch, length, vocab_size]`` of each next token, at least float32.

        Args:
          tokens: from 0 to ``vocab_size - 1``.
          segment_ids: several texts in one sequence: only equal ones see each other.
          cache: what :meth:`init_cache` makes, one per layer, for tokens that continue earlier ones; then a pair of
            logits and the longer caches is returned.

        Raises:
          ValueError: if an attribute is out of range, or segments come with a cache.
        """
        key_heads = self._check()
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids must be None with a cache: a cache holds one text")
        batch, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        if cache is not None:
            positions = positions + cache[0].num_keys[:, None]
        deep = (2 * self.num_layers) ** -0.5
        embed = nn.Embed(
            self.vocab_size,
            self.width,
            embedding_init=nn.initializers.normal(self.width**-0.5),
            dtype=self.dtype,
            name="embed",
        )
        x = embed(tokens) * self.width**0.5
        caches = []
        for layer in range(self.num_layers):
            normal = nn.RMSNorm(dtype=self.dtype, name=f"attention_norm_{layer}")(x)
            update, longer = CausalAttention(
                self.num_heads,
                key_heads,
                self.attention,
                self.rope_base,
                deep * self.width**-0.5,
                self.dtype,
                name=f"attention_{layer}",
            )(normal, positions, segment_ids, None if cache is None else cache[layer])
            caches.append(longer)
            x = x + update
            hidden = self.mlp_ratio * self.width
            normal = nn.RMSNorm(dtype=self.dtype, name=f"mlp_norm_{layer}")(x)
            up = self._dense(hidden, self.width**-0.5, f"mlp_in_{layer}")(normal)
            x = x + self._dense(self.width, deep * hidden**-0.5, f"mlp_out_{layer}")(jax.nn.gelu(up))
        x = nn.RMSNorm(dtype=self.dtype, name="norm")(x)
        logits = embed.attend(x)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return logits if cache is None else (logits, tuple(caches))

    def _dense(self, features: int, std: float, name: str) -> nn.Dense:
        init = nn.initializers.normal(std)
        return nn.Dense(features, use_bias=False, kernel_init=init, dtype=self.dtype, name=name)

    def init_cache(self, batch: int, max_length: int) -> Caches:
        """Empty caches for ``max_length`` tokens, one per layer."""
        dtype = jnp.float32 if self.dtype is None else self.dtype
        one = init_cache(batch, max_length, self._check(), self.width // self.num_heads, dtype=dtype)
        return (one,) * self.num_layers
