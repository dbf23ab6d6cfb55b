import json

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.quant import (
    QuantRule,
    apply_weight_quant,
    dequantize_tree,
    export,
    init_weight_qparams,
    is_quantized,
    quantizers_of,
    reconstruct,
    tree_nbytes,
)

METHODS = ("absmax", "adaround", "flexround", "lrq", "lsq", "minmax", "mse", "nupes", "power", "statsq")


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def tree(dtype=jnp.float32):
    return {
        "fc1": {"kernel": draw((16, 8)).astype(dtype), "bias": draw(8, 1)},
        "fc2": {"kernel": draw((8, 6), 2).astype(dtype), "bias": draw(6, 3)},
    }


@pytest.mark.filterwarnings("ignore:at bits=2")
@pytest.mark.parametrize(
    ("method", "setting"),
    [
        pytest.param(method, setting, marks=() if (place + setting) % 2 else pytest.mark.slow)
        for place, method in enumerate(METHODS)
        for setting in (0, 1)
    ],
)
def test_what_is_exported_is_the_fake_quantized_model_bit_for_bit(method, setting):
    bits, axis, dtype = ((2, None, jnp.float32), (4, "channel", jnp.bfloat16))[setting]
    params = {"fc1": {"kernel": draw((16, 8)).at[:, 1].set(0).astype(dtype), "bias": draw(8, 1)}}
    rules = [QuantRule("kernel$", weight_bits=bits, method=method, axis=axis)]
    qparams = init_weight_qparams(params, rules)
    # as if trained: away from where the parameters start
    if method in ("lsq", "flexround", "lrq"):
        moved = {"step", "log_s1", "log_s2", "left", "right"}
        qparams = {
            path: {k: v * 1.07 + 0.01 * (k in ("left", "right")) if k in moved else v for k, v in values.items()}
            for path, values in qparams.items()
        }
    fake = apply_weight_quant(params, qparams, rules)
    quantized = export(params, qparams, rules)
    back = dequantize_tree(quantized)
    for layer in params:
        assert is_quantized(quantized.params[layer]["kernel"])
        assert back[layer]["kernel"].dtype == dtype
        if method != "statsq" or axis == "channel":  # which has no level at zero, but one for a channel of zeros
            np.testing.assert_array_equal(back[layer]["kernel"][:, 1], 0)
        np.testing.assert_array_equal(back[layer]["kernel"], fake[layer]["kernel"], err_msg=f"{bits} {axis} {dtype}")
        np.testing.assert_array_equal(back[layer]["bias"], params[layer]["bias"])
    shapes = [leaf.shape for leaf in jax.tree.leaves(quantized) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert (16, 8) not in shapes


def test_a_reconstructed_block_leaves_as_the_integers_that_were_learned():
    params = {"fc": {"kernel": draw((8, 5)), "bias": draw(5, 1)}}
    rules = [QuantRule("kernel$", weight_bits=3, method="flexround")]
    x = draw((32, 3), 2) @ draw((3, 8), 3)

    def apply(params, x):
        return x @ params["fc"]["kernel"] + params["fc"]["bias"]

    qparams, _ = reconstruct(
        apply,
        params,
        x,
        apply(params, x),
        quantizer=quantizers_of(params, rules),
        optimizer=optax.adam(1e-2),
        steps=20,
        key=jax.random.key(0),
    )
    quantized = export(params, qparams, rules)
    fake = apply_weight_quant(params, qparams, rules)
    np.testing.assert_array_equal(apply(dequantize_tree(quantized), x), apply(fake, x))
    np.testing.assert_allclose(
        quantized.params["fc"]["kernel"].scale, jnp.exp(qparams["fc/kernel"]["log_s1"]), rtol=1e-6
    )
    assert (apply(fake, x) != apply(apply_weight_quant(params, init_weight_qparams(params, rules), rules), x)).any()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_bytes_are_bits_over_32_of_the_floats_plus_scales(bits):
    params = {"fc": {"kernel": draw((256, 128))}}
    quantized = export(params, {}, [QuantRule("kernel", weight_bits=bits, method="statsq")])
    assert tree_nbytes(quantized) == tree_nbytes(params) * bits // 32 + 128 * 4
    if bits == 4:
        assert tree_nbytes(quantized) <= 0.14 * tree_nbytes(params)


def test_the_first_rule_wins_and_the_header_tells():
    params = tree()
    rules = [QuantRule("fc1", weight_bits=8, method="absmax"), QuantRule("kernel$", weight_bits=2)]
    header = json.loads(export(params, {}, rules).header)
    assert header["format"] == "poise-quantized"
    assert header["version"] == 1
    assert header["tensors"]["fc1/kernel"] == {
        "bits": 8,
        "dtype": "float32",
        "method": "absmax",
        "packed_axis": -2,
        "scheme": "uniform",
        "shape": [16, 8],
    }
    assert header["tensors"]["fc2/kernel"]["scheme"] == "half_integer"
    assert set(header["tensors"]) == {"fc1/kernel", "fc2/kernel"}


def test_the_tree_goes_through_jit_and_onto_devices():
    params = tree()
    quantized = export(params, {}, [QuantRule("kernel$", weight_bits=4, method="absmax")])
    eager = dequantize_tree(quantized)
    for result in (jax.jit(dequantize_tree)(quantized), dequantize_tree(jax.device_put(quantized, jax.devices()[3]))):
        jax.tree.map(np.testing.assert_array_equal, result, eager)
    half = dequantize_tree(quantized, jnp.bfloat16)
    assert half["fc1"]["kernel"].dtype == jnp.bfloat16
    assert half["fc1"]["bias"].dtype == jnp.float32


def test_a_module_of_nnx_too():
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    quantized = export(state, {}, [QuantRule("kernel", weight_bits=8, method="absmax")])
    back = nnx.merge(graph, dequantize_tree(quantized))
    x = draw((4, 16))
    error = jnp.abs(back(x) - model(x)).max()
    assert 0 < float(error) < 0.05


def test_bad_input_is_refused():
    params = tree()
    rules = [QuantRule("kernel$", weight_bits=4, method="lsq")]
    qparams = init_weight_qparams(params, rules)
    broken = jax.tree.map(lambda x: x, params)
    broken["fc2"]["kernel"] = broken["fc2"]["kernel"].at[0, 0].set(jnp.nan)
    unbounded = jax.tree.map(lambda x: x, params)
    unbounded["fc1"]["bias"] = unbounded["fc1"]["bias"].at[0].set(jnp.inf)
    lost = {"fc1/kernel": qparams["fc1/kernel"], "fc2/kernel": {"step": qparams["fc2/kernel"]["step"] * jnp.nan}}
    ptq = [QuantRule("kernel$", weight_bits=4, method="flexround")]
    far = [QuantRule("kernel", weight_bits=4, axis=5)]
    integer = {"fc": {"kernel": jnp.ones((3, 2), int)}}
    for message, call in {
        "params must be finite, got NaN or infinity in fc2/kernel": lambda: export(broken, qparams, rules),
        "params must be finite, got NaN or infinity in fc1/bias": lambda: export(unbounded, qparams, rules),
        "qparams must be finite, got NaN or infinity in step of fc2/kernel": lambda: export(params, lost, rules),
        "qparams must hold what 'lsq' needs for fc1/kernel": lambda: export(params, {}, rules),
        "qparams must hold what 'flexround' needs for fc1/kernel": lambda: export(params, {}, ptq),
        "qparams must hold nothing but what the rules quantize": lambda: export(params, qparams, rules[:0]),
        "rules must quantize at least one weight": lambda: export(params, {}, [QuantRule("nothing", weight_bits=4)]),
        "params must hold floats where a rule quantizes them": lambda: export(
            integer, {}, [QuantRule("k", weight_bits=4)]
        ),
        "fc1/kernel: axis must lie in": lambda: export(params, {}, far),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
