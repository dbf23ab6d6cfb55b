import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.quant import (
    QuantizedTensor,
    absmax_scale,
    dequantize_tensor,
    fake_quantize,
    integer_weights,
    is_quantized,
    power_fake_quantize,
    power_quantize,
    quantize,
    quantized_tensor,
    tensor_codes,
    tree_nbytes,
)


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.fixture
def tensor():
    w = draw((6, 5))
    scale = absmax_scale(w, 4, 0)
    return quantized_tensor(quantize(w, scale, bits=4), scale, bits=4, packed_axis=0)


@pytest.mark.golden
@pytest.mark.golden_pattern("quant", "qwix_qarray*.npz")
def test_arrays_of_qwix_convert_both_ways(golden_file):
    z = np.load(golden_file)
    for case, bits in (("int8", 8), ("int4", 4), ("int4_tile8", 4), ("int8_asym", 8)):
        zero = z.get(f"{case}_zero_point")
        tensor = quantized_tensor(
            jnp.asarray(z[f"{case}_qvalue"]),
            jnp.asarray(z[f"{case}_scale"]),
            None if zero is None else jnp.asarray(zero),
            bits=bits,
            packed_axis=0,
        )
        np.testing.assert_allclose(dequantize_tensor(tensor), z[f"{case}_dequant"], rtol=0, atol=1e-6, err_msg=case)
        np.testing.assert_array_equal(tensor_codes(tensor), z[f"{case}_qvalue"], err_msg=case)
        np.testing.assert_array_equal(tensor.scale, z[f"{case}_scale"], err_msg=case)
        if zero is not None:
            np.testing.assert_array_equal(tensor.zero_point, zero)


@pytest.mark.golden
@pytest.mark.golden_pattern("quant", "qwix_qarray*.npz")
def test_scales_and_codes_are_those_of_qwix(golden_file):
    z = np.load(golden_file)
    for case, bits in (("int8", 8), ("int4", 4)):
        scale = absmax_scale(jnp.asarray(z["w"]), bits, 0)
        np.testing.assert_allclose(scale, z[f"{case}_scale"], rtol=1e-6)
        codes = quantize(jnp.asarray(z["w"]), jnp.asarray(z[f"{case}_scale"]), bits=bits)
        np.testing.assert_array_equal(codes, z[f"{case}_qvalue"])


@pytest.mark.parametrize(
    ("bits", "dtype"), [(1, jnp.float32), (2, jnp.float32), (3, jnp.bfloat16), (5, jnp.float32), (8, jnp.bfloat16)]
)
def test_what_is_stored_is_the_fake_quantized_array(bits, dtype):
    w = draw((6, 5)).astype(dtype)
    scale = absmax_scale(w, bits, 0)
    tensor = quantized_tensor(quantize(w, scale, bits=bits), scale, bits=bits, packed_axis=0, dtype=dtype)
    got = dequantize_tensor(tensor)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, fake_quantize(w, scale, bits=bits))
    assert tensor.shape == w.shape
    assert tensor.size == w.size


def test_schemes_mean_what_they_say():
    codes, scale = jnp.array([[-2, -1, 0, 1]], jnp.int8), jnp.full((1, 1), 0.5)
    half = quantized_tensor(codes, scale, bits=2, scheme="half_integer")
    np.testing.assert_array_equal(dequantize_tensor(half), [[-1.5, -0.5, 0.5, 1.5]])
    w = draw((3, 8))
    codes, scale = power_quantize(w, 0.6, bits=4, axis=1)
    power = quantized_tensor(codes, scale, bits=4, scheme="power", exponent=jnp.float32(0.6))
    np.testing.assert_array_equal(dequantize_tensor(power), power_fake_quantize(w, 0.6, bits=4, axis=1))
    zero = quantized_tensor(jnp.array([[-8, 7]]), jnp.ones((1, 1)), jnp.full((1, 1), -3, jnp.int8), bits=4)
    np.testing.assert_array_equal(dequantize_tensor(zero), [[-5, 10]])


@pytest.mark.parametrize("exponent", [0.5, 0.7])
def test_integer_factors_of_every_scheme(exponent):
    codes, scale = power_quantize(draw((3, 8)), exponent, bits=4)
    tensor = quantized_tensor(codes, scale, bits=4, scheme="power", exponent=jnp.float32(exponent))
    factors, factor_scale, zero = integer_weights(tensor)
    assert factors.dtype == jnp.int8
    assert zero is None
    error = np.abs(factors * factor_scale - dequantize_tensor(tensor)).max()
    assert error <= (1e-6 if exponent == 0.5 else float(scale.max()) / 127 / 2 + 1e-6)
    half = quantized_tensor(jnp.array([-4, 3]), jnp.float32(2), bits=3, scheme="half_integer")
    np.testing.assert_array_equal(integer_weights(half)[0], [-7, 7])
    with pytest.raises(ValueError, match="bits must be at most 7"):
        integer_weights(quantized_tensor(jnp.array([0]), jnp.float32(2), bits=8, scheme="half_integer"))


def test_groups_share_scales():
    scale = jnp.array([[1.0], [10.0]])
    tensor = quantized_tensor(jnp.ones((4, 3), int), scale, bits=2, packed_axis=0)
    np.testing.assert_array_equal(dequantize_tensor(tensor)[:, 0], [1, 1, 10, 10])


def test_is_a_pytree_under_every_transformation(tensor):
    eager = dequantize_tensor(tensor)
    np.testing.assert_array_equal(jax.jit(dequantize_tensor)(tensor), eager)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), tensor, tensor)
    assert stacked.shape == (2, 6, 5)
    np.testing.assert_array_equal(jax.vmap(dequantize_tensor)(stacked)[1], eager)
    np.testing.assert_array_equal(jax.pmap(dequantize_tensor)(stacked)[1], eager)
    gradient = jax.grad(lambda t: dequantize_tensor(t).sum(), allow_int=True)(tensor)
    np.testing.assert_allclose(gradient.scale, tensor_codes(tensor).sum(0, keepdims=True))
    leaves, structure = jax.tree.flatten(tensor)
    assert len(leaves) == 2
    assert isinstance(jax.tree.unflatten(structure, [object(), None]), QuantizedTensor)
    assert is_quantized(tensor)
    assert not is_quantized(eager)


def test_sharded_over_the_columns(tensor):
    mesh = jax.make_mesh((5,), ("x",), devices=jax.devices()[:5])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    placed = jax.device_put(tensor, sharding)
    assert placed.codes.addressable_shards[0].data.shape == (3, 1)
    np.testing.assert_array_equal(jax.jit(dequantize_tensor)(placed), dequantize_tensor(tensor))


def test_bytes_are_counted_as_they_are():
    scale = jnp.ones((1, 32))
    tensor = quantized_tensor(jnp.zeros((64, 32), jnp.int8), scale, bits=4, packed_axis=0)
    assert tensor.nbytes == 64 * 32 // 2 + 32 * 4
    assert tree_nbytes({"a": tensor, "b": jnp.ones(3, jnp.bfloat16)}) == tensor.nbytes + 6


def test_what_does_not_belong_together_is_refused():
    codes, scale = jnp.zeros((4, 6), jnp.int8), jnp.ones((1, 6))
    for message, call in {
        "bits must be in": lambda: quantized_tensor(codes, scale, bits=9),
        "scheme must be one of": lambda: quantized_tensor(codes, scale, bits=4, scheme="log"),
        "packed_axis must lie in": lambda: quantized_tensor(codes, scale, bits=4, packed_axis=2),
        "scale must be a scalar or divide": lambda: quantized_tensor(codes, jnp.ones((3, 6)), bits=4),
        "scale must be floating": lambda: quantized_tensor(codes, jnp.ones((1, 6), int), bits=4),
        "scale must be finite": lambda: quantized_tensor(codes, scale * jnp.nan, bits=4),
        "exponent is for scheme='power'": lambda: quantized_tensor(codes, scale, bits=4, exponent=jnp.float32(1)),
        "zero_point must have the scale's shape": lambda: quantized_tensor(codes, scale, jnp.zeros(6, int), bits=4),
        "zero_point must lie in": lambda: quantized_tensor(codes, scale, jnp.full((1, 6), 9), bits=4),
        "zero_point is for scheme='uniform'": lambda: quantized_tensor(
            codes, scale, jnp.zeros((1, 6), int), bits=4, scheme="half_integer"
        ),
        "codes must lie in": lambda: quantized_tensor(codes + 8, scale, bits=4),
        "codes must have at least one axis": lambda: quantized_tensor(jnp.array(1), jnp.float32(1), bits=4),
        "codes must be integers": lambda: quantized_tensor(scale, scale, bits=4),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
