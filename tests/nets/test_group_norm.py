import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.nets import GroupNorm, group_count


@pytest.mark.golden
@pytest.mark.golden_pattern("nets", "blocks*.npz")
def test_official_layer(golden_file):
    z = np.load(golden_file)
    cases = {name: c for name, c in json.loads(str(z["config"])).items() if name.startswith("group_norm_")}
    assert cases
    for case, config in cases.items():
        x = jnp.asarray(z[f"{case}/x"].transpose(0, 2, 3, 1))
        params = {"scale": z[f"{case}/state_dict/weight"], "bias": z[f"{case}/state_dict/bias"]}
        y = GroupNorm(config["eps"]).apply({"params": params}, x)
        # two float32 implementations with a variance of centred values differ by up to 1.4e-5 here
        np.testing.assert_allclose(y.transpose(0, 3, 1, 2), z[f"{case}/y"], rtol=1e-5, atol=5e-5, err_msg=case)


@settings(max_examples=10, deadline=None)
@given(groups=st.sampled_from([1, 4]), scale=st.floats(0.1, 10), shift=st.floats(-3, 3), seed=st.integers(0, 99))
def test_definition_and_invariance(groups, scale, shift, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 3, 4, 8)).astype(np.float32)
    params = {"scale": rng.standard_normal(8).astype(np.float32), "bias": rng.standard_normal(8).astype(np.float32)}
    normalize = jax.jit(GroupNorm(1e-8, groups).apply)
    y = normalize({"params": params}, jnp.asarray(x))
    parts = x.astype(np.float64).reshape(2, 12, groups, 8 // groups)
    mean, variance = parts.mean((1, 3), keepdims=True), parts.var((1, 3), keepdims=True)
    expected = ((parts - mean) / np.sqrt(variance + 1e-8)).reshape(x.shape) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    moved = normalize({"params": params}, jnp.asarray(scale * x + shift, jnp.float32))
    np.testing.assert_allclose(moved, y, rtol=1e-3, atol=2e-4)


def test_constant_image_gives_the_bias():
    params = {"scale": jnp.full(4, 2.0), "bias": jnp.arange(4.0)}

    def total(x):
        return GroupNorm().apply({"params": params}, x).sum()

    x = jnp.full((2, 3, 3, 4), 7.0)
    y = GroupNorm().apply({"params": params}, x)
    np.testing.assert_array_equal(y, np.broadcast_to(np.arange(4.0), y.shape))
    assert np.isfinite(jax.grad(total)(x)).all()


def test_dtypes():
    params = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    x = 100 + np.random.default_rng(0).standard_normal((2, 16, 16, 8)).astype(np.float32)
    half = jnp.asarray(x, jnp.bfloat16)
    y = GroupNorm().apply({"params": params}, half)
    assert y.dtype == jnp.bfloat16
    expected = GroupNorm().apply({"params": params}, half.astype(jnp.float32))
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)  # rounded once, at the end
    with jax.enable_x64():
        wide = jax.random.normal(jax.random.key(0), (1, 2, 2, 8), jnp.float64)
        assert GroupNorm().apply({"params": params}, wide).dtype == jnp.float64


def test_group_rule():
    assert [group_count(c) for c in (4, 8, 20, 124, 128, 256, 768)] == [1, 2, 5, 31, 32, 32, 32]
    for channels in (0, 3, 9, 130):
        with pytest.raises(ValueError, match=f"num_channels must be at least 4 and divisible by .*, got {channels}"):
            group_count(channels)
    with pytest.raises(ValueError, match="divisible by num_groups=3"):
        GroupNorm(num_groups=3).init(jax.random.key(0), jnp.ones((1, 2, 2, 8)))
