import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.nets import rotary_embedding


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(0, 500), st.floats(10, 1e6))
def test_products_depend_on_the_distance_alone(seed, shift, base):
    query, key = jax.random.normal(jax.random.key(seed), (2, 5, 3, 8))
    places, others = jnp.arange(5), jnp.array([0, 2, 4, 6, 8])

    def products(shift):
        q, k = rotary_embedding(query, places + shift, base), rotary_embedding(key, others + shift, base)
        return jnp.einsum("tnd,snd->nts", q, k)

    # float32 knows an angle of 500 to 3e-5
    np.testing.assert_allclose(products(shift), products(0), atol=2e-3)
    turned = rotary_embedding(query, places + shift, base)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(query, axis=-1), rtol=1e-5)


def test_angles_are_those_of_the_paper():
    x = jnp.concatenate([jnp.ones((6, 1, 4)), jnp.zeros((6, 1, 4))], -1)
    turned = rotary_embedding(x, jnp.arange(6), base=100.0)[:, 0]
    angles = np.arange(6)[:, None] * 100.0 ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(turned, np.concatenate([np.cos(angles), np.sin(angles)], -1), atol=1e-6)
    np.testing.assert_array_equal(turned[0], x[0, 0])


def test_dtypes_batches_and_bad_input():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    half = rotary_embedding(x.astype(jnp.bfloat16), positions)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), rotary_embedding(x, positions), rtol=0.02, atol=0.02)
    np.testing.assert_allclose(
        jax.vmap(rotary_embedding)(x, positions), jax.jit(rotary_embedding)(x, positions), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="the width of x must be even, got 7"):
        rotary_embedding(x[..., :7], positions)
    with pytest.raises(ValueError, match="base must lie in"):
        rotary_embedding(x, positions, -1.0)
