import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.nets import activation_scales, integer_apply
from poise.quant import QuantRule, absmax_scale, dequantize_tree, export, fake_quantize, quantized_tensor


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


class Network(nn.Module):
    """One of each layer that has an integer form."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        x = nn.Conv(8, (3, 3), feature_group_count=2, padding=1, kernel_dilation=1)(x)
        x = x.reshape(x.shape[0], -1, 8)
        x = nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return nn.Dense(5)(x.mean(1))


@pytest.fixture(scope="module")
def setting():
    model, x = Network(), draw((3, 8, 8, 2))
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    quantized = export(params, {}, [QuantRule("kernel$", weight_bits=8, method="absmax")])
    return model, params, quantized, x


def test_weights_alone_give_the_fake_quantized_model_bit_for_bit(setting, quick_jit):
    model, _, quantized, x = setting
    got = quick_jit(lambda q, x: integer_apply(model, q, x, activations="none"))(quantized, x)
    np.testing.assert_array_equal(
        got, quick_jit(lambda q, x: model.apply({"params": dequantize_tree(q)}, x))(quantized, x)
    )


def test_integers_are_the_model_with_fake_quantized_activations(setting, quick_jit):
    model, params, quantized, x = setting

    def fake_activations(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Conv):
            axis = tuple(range(1, args[0].ndim))
        elif isinstance(context.module, nn.Dense):
            axis = -1
        elif isinstance(context.module, nn.DenseGeneral):
            count = len(context.module.axis) if isinstance(context.module.axis, tuple) else 1
            axis = tuple(range(-count, 0))
        else:
            return next_fun(*args, **kwargs)
        return next_fun(fake_quantize(args[0], absmax_scale(args[0], 8, axis), bits=8), *args[1:], **kwargs)

    with nn.intercept_methods(fake_activations):
        expected = quick_jit(model.apply)({"params": dequantize_tree(quantized)}, x)
    got = quick_jit(lambda q, x: integer_apply(model, q, x))(quantized, x)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))
    plain = quick_jit(model.apply)({"params": params}, x)
    assert 0 < float(jnp.abs(got - plain).max()) < 0.05 * float(jnp.abs(plain).max())


def test_exponents_may_be_traced(quick_jit):
    model, x = nn.Sequential([nn.Dense(6), nn.relu, nn.DenseGeneral((2, 2))]), draw((3, 8))
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    rules = [QuantRule("layers_0", weight_bits=4, method="power"), QuantRule("kernel", weight_bits=6, method="power")]
    exponents = {"layers_0/kernel": {"exponent": jnp.float32(0.5)}, "layers_2/kernel": {"exponent": jnp.float32(0.7)}}
    quantized = export(params, exponents, rules)
    expected = integer_apply(model, quantized, x)
    got = quick_jit(lambda q, x: integer_apply(model, q, x))(quantized, x)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_general_dense_layers_take_scalar_zero_points():
    model, x = nn.DenseGeneral((2, 3), use_bias=False), draw((4, 8))
    codes = jnp.round(4 * draw((8, 2, 3), 1)).clip(-8, 7).astype(jnp.int8)
    scalars = quantized_tensor(codes, jnp.float32(0.2), jnp.int8(3), bits=4)
    ones = quantized_tensor(codes, jnp.full((1, 1, 1), 0.2), jnp.full((1, 1, 1), 3), bits=4)
    expected = integer_apply(model, {"params": {"kernel": ones}}, x)
    np.testing.assert_allclose(integer_apply(model, {"params": {"kernel": scalars}}, x), expected, rtol=1e-6)


def test_every_product_with_a_kernel_is_an_integer_one(setting):
    model, _, quantized, x = setting
    jaxpr = str(jax.make_jaxpr(lambda q, x: integer_apply(model, q, x))(quantized, x))
    lines = [line for line in jaxpr.splitlines() if "dot_general[" in line or "conv_general_dilated[" in line]
    assert sum(":i32" in line for line in lines) == 7  # two convolutions, four of attention, one dense
    assert sum(":f32" in line for line in lines) == 2  # of attention itself


def test_fixed_scales_from_calibration(setting, quick_jit):
    model, params, quantized, x = setting
    scales = quick_jit(lambda params, *batches: activation_scales(model, {"params": params}, batches))(
        params, x[:2], x[2:]
    )
    assert len(scales) == 7
    largest = jnp.abs(x).max()
    np.testing.assert_allclose(scales["Conv_0"], 2 * largest / 255, rtol=1e-6)
    fixed = quick_jit(lambda q, x, scales: integer_apply(model, {"params": q.params}, x, activations=scales))
    got, plain = fixed(quantized, x, scales), quick_jit(model.apply)({"params": params}, x)
    error = float(jnp.abs(got - plain).max())
    assert 0 < error < 0.1 * float(jnp.abs(plain).max())
    coarse = fixed(quantized, x, {**scales, "Dense_0": jnp.float32(10)})
    assert float(jnp.abs(coarse - plain).max()) > 2 * error
    with pytest.raises(ValueError, match="batches must have at least one batch"):
        activation_scales(model, {"params": params}, [])
    with pytest.raises(ValueError, match="x must not be empty"):
        activation_scales(nn.Dense(2), nn.Dense(2).init(jax.random.key(0), x), [x[:0]])
    with pytest.raises(ValueError, match="activations must be one of dynamic, none"):
        integer_apply(model, quantized, x, activations="static")


class Odd(nn.Module):
    """Layers without an integer form, a stack of layers, and a layer in half precision."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 6, name="embed")(tokens)
        x = nn.ConvTranspose(6, (3,))(x)
        x = nn.Conv(6, (3,), padding="CIRCULAR")(x)
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack()(x, None)
        return nn.Dense(4, dtype=jnp.bfloat16)(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(6)(x)), None


@pytest.mark.slow
def test_other_layers_run_on_dequantized_weights_and_stacks_are_sliced(quick_jit):
    model, tokens = Odd(), jnp.arange(10).reshape(2, 5) % 7
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    rules = [QuantRule("kernel$|embedding$", weight_bits=8, method="absmax")]
    quantized = export(params, {}, rules)
    got = quick_jit(lambda q: integer_apply(model, q, tokens))(quantized)
    assert got.dtype == jnp.bfloat16
    plain = quick_jit(model.apply)({"params": params}, tokens)
    np.testing.assert_allclose(got.astype(jnp.float32), plain.astype(jnp.float32), atol=0.06)
    stacked = quantized.params["ScanLayer_0"]["Dense_0"]["kernel"]
    assert stacked.shape == (3, 6, 6)
    np.testing.assert_array_equal(
        quick_jit(lambda q: integer_apply(model, q, tokens, activations="none"))(quantized),
        quick_jit(lambda q: model.apply({"params": dequantize_tree(q)}, tokens))(quantized),
    )


def test_images_under_vmap_and_pmap():
    model, x = nn.Dense(4, use_bias=False), draw((3, 20))
    quantized = export({"kernel": draw((x.shape[-1], 4))}, {}, [QuantRule("kernel", weight_bits=4, method="absmax")])

    def one(q, row):
        return integer_apply(model, q, row[None])[0]

    expected = jax.jit(lambda q, x: integer_apply(model, q, x))(quantized, x)
    np.testing.assert_allclose(jax.jit(jax.vmap(one, (None, 0)))(quantized, x), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(jax.pmap(one, in_axes=(None, 0))(quantized, x), expected, rtol=0, atol=1e-5)
