import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.nets import ResampleConv, downsample, upsample

BOTH_FILTERS = pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])


@pytest.mark.golden
@pytest.mark.golden_pattern("nets", "blocks*.npz")
def test_official_layers(golden_file):
    z = np.load(golden_file)
    cases = {name: c for name, c in json.loads(str(z["config"])).items() if name.startswith("conv_")}
    assert cases
    for case, config in cases.items():
        layer = ResampleConv(
            config["out_channels"],
            config["kernel"],
            config["up"],
            config["down"],
            tuple(config["resample_filter"]),
            config["fused_resample"],
        )
        x = jnp.asarray(z[f"{case}/x"].transpose(0, 2, 3, 1))
        params = {}
        if config["kernel"]:
            kernel = z[f"{case}/state_dict/weight"].transpose(2, 3, 1, 0)
            params = {"params": {"kernel": kernel, "bias": z[f"{case}/state_dict/bias"]}}
        with jax.default_matmul_precision("highest"):
            y = layer.apply(params, x)
        np.testing.assert_allclose(y.transpose(0, 3, 1, 2), z[f"{case}/y"], rtol=1e-5, atol=1e-5, err_msg=case)


def images(shape=(2, 6, 8, 3), seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_shortest_filter_is_block_mean_and_repetition():
    x = images()
    blocks = np.asarray(x).reshape(2, 3, 2, 4, 2, 3)
    np.testing.assert_allclose(downsample(x), blocks.mean((2, 4)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(upsample(x), np.asarray(x).repeat(2, 1).repeat(2, 2))
    np.testing.assert_allclose(downsample(upsample(x)), x, rtol=1e-6)


@BOTH_FILTERS
def test_constants_are_kept_inside(taps):
    x = jnp.full((1, 8, 8, 1), 2.5)
    np.testing.assert_allclose(downsample(x, taps)[:, 1:-1, 1:-1], 2.5)
    np.testing.assert_allclose(upsample(x, taps)[:, 1:-1, 1:-1], 2.5)


def resample_matrix(size, taps, padding, up):
    """The definition along one axis: rows of outputs, columns of inputs."""
    g = np.array(taps) / sum(taps)
    outputs = 2 * size - 2 - 2 * padding + len(g) if up else (size + 2 * padding - len(g)) // 2 + 1
    matrix = np.zeros((outputs, size))
    for o, i in itertools.product(range(outputs), range(size)):
        tap = o + padding - 2 * i if up else i + padding - 2 * o
        if 0 <= tap < len(g):
            matrix[o, i] = g[tap] * (2 if up else 1)
    return matrix


@settings(max_examples=12, deadline=None)
@given(
    taps=st.sampled_from([(1, 1), (1, 2), (1, 3, 3, 1), (1, 2, 3, 4), (1, 0, 2, 5, 1, 1)]),
    padding=st.sampled_from([None, 0, 1]),
    up=st.booleans(),
)
def test_definition(taps, padding, up):
    x = images((1, 6, 8, 2))
    pad = (len(taps) - 1) // 2 if padding is None else padding
    if pad >= len(taps) - 1:
        return
    rows, columns = (resample_matrix(size, taps, pad, up) for size in (6, 8))
    expected = np.einsum("oh,pw,bhwc->bopc", rows, columns, x)
    resample = jax.jit(upsample if up else downsample, static_argnums=(1, 2))
    np.testing.assert_allclose(resample(x, taps, padding), expected, rtol=1e-4, atol=1e-6)


@BOTH_FILTERS
def test_down_is_the_adjoint_of_up(taps):
    x, y = images((1, 4, 4, 2)), images((1, 8, 8, 2), seed=1)
    np.testing.assert_allclose(jnp.vdot(upsample(x, taps), y), 4 * jnp.vdot(x, downsample(y, taps)), rtol=1e-4)


def test_when_fused_and_plain_agree():
    x = images((2, 8, 8, 4))
    for taps, size, up in itertools.product([(1, 1), (1, 3, 3, 1)], (1, 3), (True, False)):
        plain = ResampleConv(5, size, up=up, down=not up, resample_filter=taps)
        fused = plain.clone(fused=True)
        rng = np.random.default_rng(0)
        kernel = rng.standard_normal((size, size, 4, 5)).astype(np.float32)
        params = {"params": {"kernel": kernel, "bias": rng.standard_normal(5).astype(np.float32)}}
        difference = np.abs(plain.apply(params, x) - fused.apply(params, x))
        same = size == 1 or (up and len(taps) == 2)
        assert (difference.max() < 1e-5) == same, (taps, size, up)


def test_dtype_is_kept():
    x = images().astype(jnp.bfloat16)
    assert downsample(x, (1, 3, 3, 1)).dtype == upsample(x, (1, 3, 3, 1)).dtype == downsample(x).dtype == jnp.bfloat16
    layer = ResampleConv(3, 3, down=True)
    assert layer.apply(layer.init(jax.random.key(0), x), x).dtype == jnp.bfloat16


def test_bad_input():
    x = images()
    with pytest.raises(ValueError, match="resample_filter must have an even number of taps"):
        downsample(x, (1, 2, 1))
    with pytest.raises(ValueError, match="sum other than 0"):
        upsample(x, (1, -1))
    with pytest.raises(ValueError, match="x must have an even height and width"):
        downsample(x[:, :5])
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="kernel_size must be 0, 1 or 3, got 5"):
        ResampleConv(3, 5).init(key, x)
    with pytest.raises(ValueError, match="up and down exclude each other"):
        ResampleConv(3, 3, up=True, down=True).init(key, x)
    with pytest.raises(ValueError, match="features must be 3 for kernel_size 0, got 4"):
        ResampleConv(4, 0, up=True).init(key, x)
