import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.nets import BlockStyle, UNetBlock, pixel_attention


def params_of(z, prefix):
    params = {}
    for key in z.files:
        if key.startswith(prefix) and not key.endswith("resample_filter"):
            layer, leaf = key.removeprefix(prefix).split(".")
            value = z[key]
            if leaf == "weight":
                leaf = "scale" if value.ndim == 1 else "kernel"
                value = value.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim])
            params.setdefault(layer, {})[leaf] = jnp.asarray(value)
    return {"params": params}


@pytest.mark.golden
@pytest.mark.golden_pattern("nets", "blocks*.npz")
def test_official_blocks(golden_file, quick_jit):
    z = np.load(golden_file)
    cases = {name: c for name, c in json.loads(str(z["config"])).items() if name.startswith("block_")}
    assert cases
    for case, config in cases.items():
        width = config.get("channels_per_head", 64)
        if config.get("num_heads"):
            width = config["out_channels"] // config["num_heads"]
        style = BlockStyle(
            skip_scale=config.get("skip_scale", 1),
            eps=config.get("eps", 1e-5),
            adaptive_scale=config.get("adaptive_scale", True),
            resample_proj=config.get("resample_proj", False),
            resample_filter=tuple(config.get("resample_filter", (1, 1))),
            channels_per_head=width,
        )
        flags = {key: config.get(key, False) for key in ("up", "down", "attention")}
        block = UNetBlock(config["out_channels"], style, **flags)
        x, emb = jnp.asarray(z[f"{case}/x"].transpose(0, 2, 3, 1)), jnp.asarray(z[f"{case}/emb"])
        variables = params_of(z, f"{case}/state_dict/")
        fresh = jax.eval_shape(block.init, jax.random.key(0), x, emb)
        assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, variables)
        with jax.default_matmul_precision("highest"):
            y = quick_jit(block.apply)(variables, x, emb)
        np.testing.assert_allclose(y.transpose(0, 3, 1, 2), z[f"{case}/y"], rtol=1e-5, atol=1e-5, err_msg=case)


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@settings(max_examples=10, deadline=None)
@given(heads=st.sampled_from([1, 2, 4]), seed=st.integers(0, 1000))
def test_attention_is_its_definition_and_equivariant(heads, seed):
    qkv = draw((1, 2, 3, 24), seed)
    out = pixel_attention(qkv, heads)
    parts = np.asarray(qkv, np.float64).reshape(6, heads, 8 // heads, 3)
    q, k, v = parts[..., 0], parts[..., 1], parts[..., 2]
    logits = np.einsum("nhc,mhc->hnm", q, k) / np.sqrt(8 // heads)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("hnm,mhc->nhc", weights, v).reshape(1, 2, 3, 8)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)

    order = np.random.default_rng(seed).permutation(6)
    shuffled = pixel_attention(qkv.reshape(1, 6, 24)[:, order].reshape(1, 2, 3, 24), heads)
    np.testing.assert_allclose(shuffled.reshape(6, 8), out.reshape(6, 8)[order], rtol=1e-4, atol=1e-6)


def test_attention_without_preference_is_the_mean():
    qkv = draw((2, 2, 2, 12)).reshape(2, 2, 2, 4, 3).at[..., :2].set(0).reshape(2, 2, 2, 12)
    values = qkv.reshape(2, 2, 2, 4, 3)[..., 2]
    expected = np.broadcast_to(values.mean((1, 2), keepdims=True), values.shape)
    np.testing.assert_allclose(pixel_attention(qkv, 1), expected, rtol=1e-5, atol=1e-6)


def test_attention_weights_in_bfloat16_sum_to_one():
    # 4096 pixels with equal logits: a softmax whose sum is taken in bfloat16 would stop growing at 256
    qkv = jnp.zeros((1, 64, 64, 1, 3), jnp.bfloat16).at[..., 2].set(1).reshape(1, 64, 64, 3)
    out = pixel_attention(qkv, 1)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), 1)


def test_contiguous_queries_keys_and_values_are_a_permutation():
    heads, channels, qkv = 2, 8, draw((2, 3, 3, 24))
    # column j * C + head * c_h + c of the contiguous layout is column (head * c_h + c) * 3 + j of the official one
    order = np.arange(3 * channels).reshape(channels, 3).T.ravel()
    q, k, v = jnp.split(qkv[..., order], 3, axis=-1)
    split = [part.reshape(2, 9, heads, channels // heads) for part in (q, k, v)]
    expected = jax.nn.dot_product_attention(*split).reshape(2, 3, 3, channels)
    np.testing.assert_allclose(pixel_attention(qkv, heads), expected, rtol=1e-5, atol=1e-6)


def test_bad_attention():
    with pytest.raises(ValueError, match="channels of qkv must be a multiple of 3 \\* num_heads=12, got 18"):
        pixel_attention(jnp.ones((1, 2, 2, 18)), 4)


def test_shortcut_has_weights_only_where_it_must():
    args = (jnp.ones((1, 4, 4, 8)), jnp.ones((1, 4)))

    def layers(features, **flags):
        style = BlockStyle(resample_proj=flags.pop("resample_proj", False))
        return set(jax.eval_shape(UNetBlock(features, style, **flags).init, jax.random.key(0), *args)["params"])

    base = {"norm0", "conv0", "affine", "norm1", "conv1"}
    assert layers(8) == layers(8, down=True) == layers(8, up=True) == base
    assert layers(12) == layers(12, up=True) == layers(8, down=True, resample_proj=True) == base | {"skip"}


def test_two_embeddings_in_one_batch_equal_single_calls(quick_jit, random_variables):
    block = UNetBlock(8, BlockStyle(channels_per_head=4), attention=True)
    x, emb = draw((2, 4, 4, 8)), draw((2, 6), seed=1)
    variables = random_variables(block, x, emb)
    apply = quick_jit(block.apply)
    both = apply(variables, x, emb)
    for i in (0, 1):
        single = apply(variables, x, jnp.tile(emb[i : i + 1], (2, 1)))
        np.testing.assert_allclose(both[i], single[i], rtol=1e-5, atol=1e-6)
    shared = quick_jit(block.apply)(variables, x, emb[:1])
    np.testing.assert_allclose(shared[0], both[0], rtol=1e-5, atol=1e-6)
    assert np.abs(shared[1] - both[1]).max() > 1e-3
