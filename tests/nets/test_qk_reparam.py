"""Attention with the product of query and key weights quantized: the official numbers, invariance, annealing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.nets import QKReparamSelfAttention, SelfAttention
from poise.quant import high_confidence_mask, qk_product

LAYERS = {"query": "q", "key": "k", "value": "v", "proj": "proj"}


def variables_of(data, kind):
    """Parameters or gradients of the official layer under the names used here."""
    official = lambda name: jnp.asarray(data[f"{kind}/{name}"])  # noqa: E731
    tokens, heads = data["x"].shape[1], int(data["num_heads"])

    def quantizer(step, shape, before, after, shift=(-1,)):
        return {
            "step": official(step).reshape(shape),
            "shift_before": official(f"{before}.bias").reshape(shift),
            "shift_after": official(f"{after}.bias").reshape(shift),
        }

    params = {ours: {"kernel": official(f"{theirs}.weight").T} for ours, theirs in LAYERS.items()}
    for layer in ("value", "proj"):
        params[layer]["bias"] = official(f"{LAYERS[layer]}.bias")
    quant = {
        "input_quantizer": quantizer(
            "quant_x_4_qkv.input_quant_fn.s",
            (1, tokens, 1),
            "quant_x_4_qkv.move_b4",
            "quant_x_4_qkv.move_aft",
        ),
        "product_quantizer": quantizer(
            "quan_a_qkx_fn.s", (1, tokens, heads, 1), "move_qkx_b4", "move_qkx_aft", (heads, -1)
        ),
        "value_quantizer": quantizer("quan_a_v_fn.s", (1, 1, -1), "move_v_b4", "move_v_aft"),
        "softmax_quantizer": {"step": official("quan_a_softmax_fn.s").reshape(1, 1, tokens, 1)},
        "proj_quantizer": quantizer("proj.input_quant_fn.s", (1, tokens, 1), "proj.move_b4", "proj.move_aft"),
    }
    return {"params": params, "quant": quant}


@pytest.mark.golden
@pytest.mark.golden_pattern("quant", "qkr_attention*.npz")
def test_official_layer(golden_file, quick_jit):
    """Outputs, gradients of the input, of all weights, steps and shifts."""
    data = np.load(golden_file)
    bits = int(data["bits"])
    attention = QKReparamSelfAttention(int(data["num_heads"]), weight_bits=bits, act_bits=bits)
    variables, x = variables_of(data, "param"), jnp.asarray(data["x"])
    y, slopes, dx = quick_jit(lambda v, x, g: (attention.apply(v, x), *jax.vjp(attention.apply, v, x)[1](g)))(
        variables, x, data["g"]
    )
    np.testing.assert_allclose(y, data["y"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(dx, data["dx"], rtol=0, atol=2e-6)
    expected = variables_of(data, "grad")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), slopes, expected)


@pytest.fixture(scope="module")
def layer(quick_jit):
    """A layer of two heads at 4 bits, compiled, its input and its variables."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 8)), jnp.float32)
    attention = QKReparamSelfAttention(2, weight_bits=4, act_bits=8)
    return quick_jit(attention.apply), x, quick_jit(attention.init)(jax.random.key(0), x)


def with_params(variables, **layers):
    params = {name: {**variables["params"][name], **layers.get(name, {})} for name in variables["params"]}
    return {**variables, "params": params}


def test_a_change_of_basis_in_each_head_changes_nothing(layer):
    apply, x, variables = layer
    rng, turn = np.random.default_rng(1), np.zeros((8, 8), np.float32)
    for head in range(2):
        turn[4 * head : 4 * head + 4, 4 * head : 4 * head + 4] = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    turned = {name: {"kernel": variables["params"][name]["kernel"] @ turn} for name in ("query", "key")}
    assert max(float(jnp.abs(turned[n]["kernel"] - variables["params"][n]["kernel"]).max()) for n in turned) > 0.1
    y = apply(variables, x)
    np.testing.assert_allclose(apply(with_params(variables, **turned), x), y, rtol=0, atol=1e-5)
    only_query = apply(with_params(variables, query=turned["query"]), x)
    assert jnp.abs(only_query - y).max() > 1e-3


def test_at_8_bits_it_is_close_to_attention_in_full_precision(layer, quick_jit):
    """Only close: StatsQ clips normal weights at 1.6 standard deviations."""
    _, x, variables = layer
    expected, full = quick_jit(SelfAttention(2).init_with_output)(jax.random.key(2), x)
    kernels = {name: {"kernel": full["params"][name]["kernel"]} for name in full["params"]}
    params = with_params(variables, **kernels)["params"]
    attention = QKReparamSelfAttention(2, weight_bits=8, act_bits=8)
    y, _ = quick_jit(lambda params: attention.apply({"params": params}, x, mutable=["quant"]))(params)
    assert np.corrcoef(np.ravel(y), np.ravel(expected))[0, 1] > 0.97


def test_annealing_stops_the_gradient_of_confident_entries_of_the_product(layer, quick_jit):
    """With all entries frozen none reaches query and key; the released behaviour trains them as before."""
    _, x, variables = layer

    def slopes(**options):
        attention = QKReparamSelfAttention(2, weight_bits=4, act_bits=8, **options)
        grads = quick_jit(jax.grad(lambda v: (attention.apply(v, x) ** 2).sum()))(variables)["params"]
        return np.stack([grads["query"]["kernel"], grads["key"]["kernel"]])

    free, released = slopes(), slopes(boundary_range=0.0, freeze_product=False)
    np.testing.assert_array_equal(free, released)
    assert free.any()
    product = qk_product(*(variables["params"][name]["kernel"].T for name in ("query", "key")), 2)
    assert high_confidence_mask(product, bits=4, boundary_range=0.0, axis=1).all()
    assert not slopes(boundary_range=0.0).any()
    partly = slopes(boundary_range=0.2)
    assert partly.any()
    assert np.abs(partly - free).max() > 1e-3 * np.abs(free).max()


def test_bfloat16_and_vmap(layer):
    apply, x, variables = layer
    y = apply(variables, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(y, np.float32)).all()
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), variables)
    several = jax.vmap(apply, (0, None))(stacked, x)
    np.testing.assert_allclose(several[1], apply(variables, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide the width 8 of x, got 3"),
        ({"weight_bits": 9}, r"weight_bits must be in \[1, 8\], got 9"),
        ({"act_bits": 1}, r"act_bits must be in \[2, 8\], got 1"),
        ({"boundary_range": 0.7}, r"boundary_range must lie in \[0, 0.5\]"),
    ],
)
def test_bad_input(options, message):
    attention = QKReparamSelfAttention(**{"num_heads": 2, "weight_bits": 2, "act_bits": 2} | options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(attention.init, jax.random.key(0), jnp.ones((2, 5, 8)))
