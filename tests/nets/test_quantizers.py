"""Quantizers of activations: steps from the first batch, shifts, rules inside of unedited models, bad input."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.nets import LSQQuantizer, activation_quantization
from poise.quant import QuantRule, absmax_scale, apply_weight_quant, fake_quantize, lsq, lsq_init


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_steps_come_from_the_batch_of_init_and_stay():
    quantizer, x = LSQQuantizer(bits=3, axis=(0, 2)), draw(4, 5, 6)
    variables = quantizer.init(jax.random.key(0), x)
    step = lsq_init(x, bits=3, axis=(0, 2))
    np.testing.assert_allclose(variables["params"]["step"], step, rtol=1e-6)
    y, changed = quantizer.apply(variables, 10 * x, mutable=True)
    np.testing.assert_allclose(y, lsq(10 * x, step, bits=3, axis=(0, 2)), rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, changed, variables)


def test_without_a_sign_the_first_step_is_twice_as_long():
    x = jnp.abs(draw(4, 5))
    steps = [
        LSQQuantizer(2, signed=False, multiplier=m).init(jax.random.key(0), x)["params"]["step"] for m in (None, 2.0)
    ]
    np.testing.assert_allclose(steps[0], 2 * steps[1])


def test_shifts_are_learned_before_and_after(quick_jit):
    quantizer, x = LSQQuantizer(bits=2, shift=1, collection="quant"), draw(4, 5)
    variables = quantizer.init(jax.random.key(0), x)
    assert set(variables) == {"quant"}
    assert {name: leaf.shape for name, leaf in variables["quant"].items()} == {
        "shift_before": (5,),
        "step": (1, 1),
        "shift_after": (5,),
    }
    shifted = {"quant": variables["quant"] | {"shift_before": jnp.full(5, 0.3), "shift_after": jnp.full(5, -1.0)}}
    expected = lsq(x + 0.3, variables["quant"]["step"], bits=2, axis=None) - 1.0
    np.testing.assert_allclose(quantizer.apply(shifted, x), expected, rtol=1e-6)
    slopes = quick_jit(jax.grad(lambda v: (quantizer.apply(v, x) ** 2).sum()))(shifted)
    assert all(leaf.any() for leaf in jax.tree.leaves(slopes))


def test_bfloat16_activations_have_float32_steps():
    y, variables = LSQQuantizer(bits=4, shift=1).init_with_output(jax.random.key(0), draw(3, 4).astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


class Net(nn.Module):
    """Three layers, the last one called with its argument by name."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3,), name="conv")(x))
        x = nn.relu(nn.DenseGeneral(5, name="fc")(x))
        return nn.Dense(2, name="head")(inputs=x)


RULES = [
    QuantRule("head", weight_bits=8, act_bits=4, act_signed=False, method="absmax"),
    QuantRule("conv", weight_bits=2, act_bits=8, act_method="absmax", act_axis="channel"),
    QuantRule("fc", weight_bits=2, act_bits=2, act_axis="token", act_shift=True),
]


def test_rules_quantize_inside_of_an_unedited_model(quick_jit):
    """Layer by layer what it says, with weights and activations together, compiled."""
    x = draw(3, 6, 4)
    with nn.intercept_methods(activation_quantization(RULES)):
        variables = quick_jit(Net().init)(jax.random.key(0), x)
        params, quant = variables["params"], variables["quant"]

        def loss(params, quant):
            y = Net().apply({"params": apply_weight_quant(params, {}, RULES), "quant": quant}, x)
            return (y**2).sum(), y

        slopes, y = quick_jit(jax.grad(loss, (0, 1), has_aux=True))(params, quant)
    assert {name: leaf["act_quantizer"]["step"].shape for name, leaf in quant.items()} == {
        "fc": (1, 6, 1),
        "head": (1, 1, 1),
    }
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    assert slopes[1]["fc"]["act_quantizer"]["shift_before"].any()

    def layer_by_layer(params, quant):
        quantized = apply_weight_quant(params, {}, RULES)
        h = fake_quantize(x, absmax_scale(x, 8, (0, 1)), bits=8)
        h = nn.relu(nn.Conv(4, (3,)).apply({"params": quantized["conv"]}, h))
        h = lsq(h, quant["fc"]["act_quantizer"]["step"], bits=2, axis=(0, 2))
        h = nn.relu(nn.DenseGeneral(5).apply({"params": quantized["fc"]}, h))
        h = lsq(h, quant["head"]["act_quantizer"]["step"], bits=4, signed=False, axis=None)
        return nn.Dense(2).apply({"params": quantized["head"]}, h)

    np.testing.assert_allclose(y, quick_jit(layer_by_layer)(params, quant), rtol=0, atol=1e-5)


def test_a_trained_model_is_calibrated_later_and_its_parameters_are_the_same(quick_jit):
    x = draw(3, 6, 4)
    params = quick_jit(lambda x: Net().init(jax.random.key(0), x))(x)["params"]
    with nn.intercept_methods(activation_quantization(RULES)):
        _, calibrated = quick_jit(lambda p, x: Net().apply({"params": p}, x, mutable=["quant"]))(params, x)
        fresh = quick_jit(lambda x: Net().init(jax.random.key(0), x))(x)
    assert fresh["quant"]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), {"params": params, **calibrated}, fresh)


def test_entries_are_quantized_at_random_where_there_is_a_stream_of_keys(quick_jit):
    """With probability 1 and without the stream it is plain quantization, with 0 the layers see floats."""
    x = draw(3, 6, 4)
    with nn.intercept_methods(activation_quantization(RULES)):
        variables = quick_jit(Net().init)(jax.random.key(0), x)
        plain = quick_jit(Net().apply)(variables, x)

    @quick_jit
    def run(drop, seed):
        with nn.intercept_methods(activation_quantization(RULES, drop=drop)):
            mixed = Net().apply(variables, x, rngs={"qdrop": jax.random.key(seed)})
            return mixed, Net().apply(variables, x), Net().apply(variables, x, rngs={"dropout": jax.random.key(seed)})

    floats = quick_jit(Net().apply)({"params": variables["params"]}, x)
    for drop, expected in ((1.0, plain), (0.0, floats)):
        mixed, *without = run(drop, 0)
        np.testing.assert_allclose(mixed, expected, rtol=0, atol=1e-6)
        for y in without:
            np.testing.assert_allclose(y, plain, rtol=0, atol=1e-6)
    one, again, other = (run(0.5, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert (one != plain).any()


class Twins(nn.Module):
    """Two layers that hand on what they get."""

    @nn.compact
    def __call__(self, x):
        same = nn.initializers.constant(jnp.eye(x.shape[-1]))
        return [nn.Dense(x.shape[-1], use_bias=False, kernel_init=same, name=name)(x) for name in ("one", "two")]


def test_each_layer_draws_its_own_entries_with_the_probability():
    x = draw(40, 50)
    with nn.intercept_methods(activation_quantization([QuantRule(".*", act_bits=2)], drop=0.3)):
        plain, variables = Twins().init_with_output(jax.random.key(0), x)
        mixed = Twins().apply(variables, x, rngs={"qdrop": jax.random.key(1)})
    chosen = [np.isclose(y, whole, rtol=1e-6) for y, whole in zip(mixed, plain, strict=True)]
    for y, whole, rows in zip(mixed, plain, chosen, strict=True):
        np.testing.assert_allclose(y, np.where(rows, whole, x), rtol=1e-6)
        assert 0.25 < rows.mean() < 0.35
    assert (chosen[0] != chosen[1]).any()


def test_layers_without_a_rule_are_left_alone():
    x = draw(3, 6, 4)
    with nn.intercept_methods(activation_quantization([QuantRule("nothing", act_bits=2), QuantRule(".*")])):
        y, variables = Net().init_with_output(jax.random.key(0), x)
    assert set(variables) == {"params"}
    np.testing.assert_array_equal(y, Net().apply(variables, x))


def test_bad_input():
    for quantizer, x, message in [
        (LSQQuantizer(bits=1), jnp.ones((2, 3)), r"bits must be in \[2, 8\], got 1"),
        (LSQQuantizer(bits=4, shift=3), jnp.ones((2, 3)), "shift must lie in"),
        (LSQQuantizer(bits=4, axis=2), jnp.ones((2, 3)), "axis must lie in"),
        (LSQQuantizer(bits=4), jnp.ones((0, 3)), "x must not be empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantizer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="drop must lie in"):
        activation_quantization(RULES, drop=1.5)


def test_another_number_of_tokens_is_refused():
    quantizer, x = LSQQuantizer(bits=4, axis=(0, 2), collection="quant"), draw(2, 5, 3)
    variables = quantizer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"step must have the shape \(1, 4, 1\)"):
        quantizer.apply(variables, x[:, :4])
