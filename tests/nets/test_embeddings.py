import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.nets import FourierEmbedding, PositionalEmbedding, positional_embedding


@pytest.mark.golden
@pytest.mark.golden_pattern("nets", "blocks*.npz")
def test_official_layers(golden_file):
    z = np.load(golden_file)
    cases = json.loads(str(z["config"]))
    kinds = set()
    for case, config in cases.items():
        kind = case.split("_")[0]
        if kind == "positional":
            module = PositionalEmbedding(config["num_channels"], config["endpoint"], config["max_positions"])
            variables = {}
        elif kind == "fourier":
            module = FourierEmbedding(config["num_channels"], config["scale"])
            variables = {"constants": {"freqs": jnp.asarray(z[f"{case}/freqs"])}}
        else:
            continue
        kinds.add(kind)
        y = module.apply(variables, jnp.asarray(z[f"{case}/x"]))
        # arguments of up to 999 lose digits of their angle
        np.testing.assert_allclose(y, z[f"{case}/y"], rtol=1e-5, atol=2e-5, err_msg=case)
    assert kinds == {"positional", "fourier"}


@settings(max_examples=20, deadline=None)
@given(half=st.integers(2, 8), endpoint=st.booleans(), value=st.floats(-5, 5))
def test_definition(half, endpoint, value):
    y = positional_embedding(jnp.full((2, 3), value), 2 * half, endpoint)
    assert y.shape == (2, 3, 2 * half)
    angles = value * 10000.0 ** (-np.arange(half) / (half - endpoint))
    np.testing.assert_allclose(y[1, 2], np.concatenate([np.cos(angles), np.sin(angles)]), rtol=1e-4, atol=1e-5)


def test_dtypes():
    assert positional_embedding(jnp.ones(2, jnp.bfloat16), 4).dtype == jnp.float32
    with jax.enable_x64():
        assert positional_embedding(jnp.ones(2, jnp.float64), 4).dtype == jnp.float64


def test_frequencies_have_the_scale_and_stay():
    layer = FourierEmbedding(4096, scale=3.0)
    variables = layer.init(jax.random.key(0), jnp.ones(1))
    assert set(variables) == {"constants"}
    assert abs(variables["constants"]["freqs"].std() - 3) < 0.15
    again = layer.init(jax.random.key(1), jnp.ones(1))
    assert (variables["constants"]["freqs"] != again["constants"]["freqs"]).all()


@pytest.mark.parametrize(("channels", "endpoint"), [(3, False), (0, False), (2, True), (7, True)])
def test_bad_sizes(channels, endpoint):
    with pytest.raises(ValueError, match=f"num_channels must be even and at least .*, got {channels}"):
        positional_embedding(jnp.ones(2), channels, endpoint)
    if not endpoint:
        with pytest.raises(ValueError, match=f"num_channels must be even and at least 2, got {channels}"):
            FourierEmbedding(channels).init(jax.random.key(0), jnp.ones(2))
