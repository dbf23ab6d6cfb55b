"""Rules by path: precedence, groups, every method, linen and nnx trees, gradients, bad input."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from poise.quant import (
    QuantRule,
    absmax_scale,
    apply_weight_quant,
    fake_quantize,
    init_weight_qparams,
    lsq,
    lsq_init,
    match_rule,
    minmax_qparams,
    mse_qparams,
    quantized_weights,
    statsq,
)
from poise.quant.weight_methods import WEIGHT_METHODS


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


PARAMS = {"fc1": {"kernel": draw(6, 4), "bias": draw(4)}, "head": {"kernel": draw(4, 3), "bias": draw(3)}}


def test_the_first_match_wins_and_the_rest_is_left_alone():
    rules = [
        QuantRule("head/kernel", weight_bits=8, method="absmax"),
        QuantRule("head", weight_bits=1),
        QuantRule("fc1", weight_bits=2),
    ]
    quantized = apply_weight_quant(PARAMS, {}, rules)
    head, fc1 = PARAMS["head"]["kernel"], PARAMS["fc1"]["kernel"]
    np.testing.assert_array_equal(quantized["head"]["kernel"], fake_quantize(head, absmax_scale(head, 8, 0), bits=8))
    np.testing.assert_array_equal(quantized["fc1"]["kernel"], statsq(fc1, bits=2, axis=0))
    for layer in ("fc1", "head"):
        assert quantized[layer]["bias"] is PARAMS[layer]["bias"]
    assert apply_weight_quant(PARAMS, {}, [QuantRule("fc1"), QuantRule("fc1", weight_bits=2)])["fc1"]["kernel"] is fc1
    assert match_rule(rules, "norm/scale") is None


@pytest.mark.parametrize("method", ["absmax", "lsq", "minmax", "mse", "statsq"])
def test_methods_are_the_functions(method, quick_jit):
    w = PARAMS["fc1"]["kernel"]
    rules = [QuantRule("fc1", weight_bits=3, method=method)]
    qparams = init_weight_qparams(PARAMS, rules)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(qparams))
    apply = lambda p, q: apply_weight_quant(p, q, rules)["fc1"]["kernel"]  # noqa: E731
    quantized = quick_jit(apply)(PARAMS, qparams)
    expected = {
        "absmax": lambda: fake_quantize(w, absmax_scale(w, 3, 0), bits=3),
        "lsq": lambda: lsq(w, lsq_init(w, bits=3, axis=0), bits=3, axis=0),
        "minmax": lambda: fake_quantize(w, *minmax_qparams(w, 3, 0), bits=3, signed=False),
        "mse": lambda: fake_quantize(w, *mse_qparams(w, 3, 0), bits=3, signed=False),
        "statsq": lambda: statsq(w, bits=3, axis=0),
    }[method]()
    np.testing.assert_allclose(quantized, expected, rtol=1e-6, atol=1e-7)
    slopes = quick_jit(jax.grad(lambda p, q: apply(p, q).sum(), (0, 1)))(PARAMS, qparams)
    assert (slopes[0]["fc1"]["kernel"] != 0).mean() > 0.5
    if method == "lsq":
        assert slopes[1]["fc1/kernel"]["step"].any()
    else:
        assert not any(leaf.any() for leaf in jax.tree.leaves(slopes[1]))


def test_channels_of_flax_layers():
    """The output axes: two for a query, the window and inputs of a convolution are reduced over, tables have rows."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(7, 6)(tokens)
            x = nn.MultiHeadDotProductAttention(2)(x)
            return nn.Conv(5, (3,))(x)

    params = jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    axes = {name: axes for name, _, _, axes in quantized_weights(params, [QuantRule(".*", weight_bits=4)])}
    attention = "MultiHeadDotProductAttention_0"
    assert axes["Embed_0/embedding"] == (1,)
    assert axes[f"{attention}/query/kernel"] == (0,)
    assert axes[f"{attention}/out/kernel"] == (0, 1)
    assert axes["Conv_0/kernel"] == (0, 1)
    assert len(axes) == 6  # no bias


@pytest.mark.parametrize(("axis", "shape"), [("channel", (1, 4)), (None, (1, 1)), (1, (6, 1)), ((0, 1), (1, 1))])
def test_granularity(axis, shape):
    qparams = init_weight_qparams(PARAMS, [QuantRule("fc1", weight_bits=4, method="lsq", axis=axis)])
    assert qparams["fc1/kernel"]["step"].shape == shape


def test_any_apply_function_takes_the_tree(quick_jit):
    """The loss sees quantized weights; its gradient trains the float ones and the steps."""
    model, x = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(1)]), draw(8, 3)
    params = quick_jit(model.init)(jax.random.key(0), x)["params"]
    rules = [QuantRule("kernel", weight_bits=2, method="lsq")]
    qparams = init_weight_qparams(params, rules)

    def loss(params, qparams):
        return jnp.mean((model.apply({"params": apply_weight_quant(params, qparams, rules)}, x) - 1.0) ** 2)

    slopes = quick_jit(jax.grad(loss, (0, 1)))(params, qparams)
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(slopes))


def test_an_nnx_model(quick_jit):
    graph, params = nnx.split(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    rules = [QuantRule("kernel", weight_bits=3, method="lsq")]
    qparams, x = init_weight_qparams(params, rules), draw(2, 6)
    quantized = nnx.merge(graph, apply_weight_quant(params, qparams, rules))
    kernel = params["kernel"][...]
    expected = x @ lsq(kernel, lsq_init(kernel, bits=3, axis=0), bits=3, axis=0)
    np.testing.assert_allclose(quantized(x), expected, rtol=0, atol=1e-6)
    slope = quick_jit(jax.grad(lambda p: nnx.merge(graph, apply_weight_quant(p, qparams, rules))(x).sum()))(params)
    assert slope["kernel"][...].any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "("}, "path must be a regular expression"),
        ({"weight_bits": 9}, r"weight_bits must be in \[1, 8\], got 9"),
        *[
            ({"weight_bits": 1, "method": method}, rf"weight_bits must be in \[2, 8\] for method='{method}', got 1")
            for method in ("lsq", "power", "adaround", "flexround", "lrq", "nupes")
        ],
        ({"weight_bits": 1, "method": "absmax"}, r"weight_bits must be in \[2, 8\] for method='absmax', got 1"),
        (
            {"act_bits": 1, "act_method": "absmax"},
            r"act_bits must be in \[2, 8\] for act_method='absmax' with a sign, got 1",
        ),
        ({"act_bits": 1}, r"act_bits must be in \[2, 8\] for act_method='lsq' with a sign, got 1"),
        ({"act_bits": 0}, r"act_bits must be in \[1, 8\], got 0"),
        ({"method": "other"}, "method must be one of absmax, .*got 'other'"),
        ({"axis": "row"}, "axis must be one of channel, got 'row'"),
        ({"act_axis": "row"}, "act_axis must be one of channel, token"),
        ({"act_method": "statsq"}, "act_method must be one of"),
        ({"act_method": "absmax", "act_signed": False}, "act_signed must be True"),
    ],
)
def test_bad_rules(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantRule(**{"path": ".*"} | fields)


def test_bad_trees():
    rules = [QuantRule("fc1", weight_bits=2, method="lsq")]
    with pytest.raises(ValueError, match="qparams must hold 'step' of fc1/kernel for the method 'lsq'"):
        apply_weight_quant(PARAMS, {}, rules)
    with pytest.raises(ValueError, match=r"nothing but what the rules quantize, got \['fc9/kernel'\]"):
        apply_weight_quant(PARAMS, {"fc9/kernel": {}} | init_weight_qparams(PARAMS, rules), rules)
    broken = {"fc1": {"kernel": PARAMS["fc1"]["kernel"].at[0, 0].set(jnp.nan)}}
    with pytest.raises(ValueError, match="fc1/kernel: x must be finite, got 1 entries"):
        init_weight_qparams(broken, rules)
    with pytest.raises(ValueError, match=r"params must hold floats .* got int32 at fc1"):
        init_weight_qparams({"fc1": jnp.ones((2, 2), jnp.int32)}, rules)


@pytest.mark.parametrize("method", sorted(WEIGHT_METHODS))
def test_least_bits_are_those_that_a_method_takes(method):
    least = WEIGHT_METHODS[method].least_bits
    rules = [QuantRule("fc1", weight_bits=least, method=method)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of exponents at 2 bits
        quantized = apply_weight_quant(PARAMS, init_weight_qparams(PARAMS, rules), rules)
    kernel = np.asarray(quantized["fc1"]["kernel"])
    assert np.isfinite(kernel).all()
    assert max(np.unique(column).size for column in kernel.T) <= 2**least
    assert QuantRule("fc1", weight_bits=None, method=method).weight_bits is None
