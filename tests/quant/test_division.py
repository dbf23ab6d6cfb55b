"""Division by a broadcast scale is rounded once, compiled or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.quant.division import divide


@pytest.mark.parametrize("shape", [(), (1, 1), (16, 1), (1, 64), (16, 64)])
def test_the_quotient_is_numpys(shape):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 64)).astype(np.float32)
    scale = rng.uniform(0.1, 1, shape).astype(np.float32)
    expected = x / scale
    assert (x * (1 / scale) != expected).any()  # what XLA makes of a plain division
    for function in (divide, jax.jit(divide), jax.jit(lambda x, _: divide(x, jnp.asarray(scale)))):
        np.testing.assert_array_equal(function(jnp.asarray(x), jnp.asarray(scale)), expected)
