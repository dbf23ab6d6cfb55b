import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from sklearn.datasets import load_digits

import poise.nets
from poise.nets import EvoNorm, evonorm_b, evonorm_s

KINDS = ("B0", "B1", "B2", "S0", "S1", "S2")
every_kind = pytest.mark.parametrize("kind", KINDS)


def draw(shape=(3, 4, 5, 8), seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def function_of(kind, **options):
    """``(x, gamma, beta, v) -> y``."""
    if kind[0] == "S":
        return functools.partial(evonorm_s, kind, **{"groups": 4, **options})
    return lambda *args: evonorm_b(kind, *args, **options)[0]


@pytest.mark.golden
@pytest.mark.golden_pattern("attention", "evonorm_*.npz")
@every_kind
def test_port_of_pytorch_image_models(golden_file, kind):
    z = {name: jnp.asarray(value) for name, value in np.load(golden_file).items()}
    key = kind.lower()
    layer = EvoNorm(
        kind,
        groups=int(z["groups"]),
        momentum=1 - float(z["momentum"]),
        eps=float(z[f"{key}_eps"]),
        unbiased_running_var=True,
    )
    params = {"gamma": z["gamma"], "beta": z["beta"]} | ({"v": z["v1"]} if kind in ("B0", "S0") else {})
    stats = {"batch_stats": {"var": jnp.ones_like(z["gamma"])}} if kind[0] == "B" else {}

    @jax.jit
    def train(params, stats, x, cotangent):
        def total(params, x):
            y, changed = layer.apply({"params": params, **stats}, x, use_running_average=False, mutable="batch_stats")
            return jnp.vdot(y, cotangent), (y, changed)

        return jax.grad(total, (0, 1), has_aux=True)(params, x)

    (d_params, d_x), (y, stats) = train(params, stats, z["x1"], z["cotangent"])
    np.testing.assert_allclose(y, z[f"{key}_train_y1"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(d_x, z[f"{key}_dx1"], rtol=0, atol=2e-6)
    for name, golden in (("gamma", "gamma"), ("beta", "beta"), ("v", "v1")):
        if name in params:
            # sums over all positions, of order 10
            np.testing.assert_allclose(d_params[name], z[f"{key}_d{golden}"], rtol=1e-6, atol=4e-6)
    if kind[0] == "B":
        np.testing.assert_allclose(stats["batch_stats"]["var"], z[f"{key}_running_var_after_1"], rtol=0, atol=2e-6)
        _, (y, stats) = train(params, stats, z["x2"], z["cotangent"])
        np.testing.assert_allclose(y, z[f"{key}_train_y2"], rtol=0, atol=2e-6)
        np.testing.assert_allclose(stats["batch_stats"]["var"], z[f"{key}_running_var_after_2"], rtol=0, atol=2e-6)
        y = layer.apply({"params": params, **stats}, z["x1"], use_running_average=True)
        np.testing.assert_allclose(y, z[f"{key}_eval_y1"], rtol=0, atol=2e-6)
    linear = EvoNorm(kind, nonlinearity=False)
    variables = linear.init(jax.random.key(0), z["x1"])
    assert set(variables) == {"params"}
    assert set(variables["params"]) == {"gamma", "beta"}
    affine = {"params": {"gamma": z["gamma"], "beta": z["beta"]}}
    np.testing.assert_allclose(linear.apply(affine, z["x1"]), z[f"{key}_linear_y1"], rtol=0, atol=2e-6)


@every_kind
def test_six_names(kind):
    module = getattr(poise.nets, f"EvoNorm{kind}")
    x = draw()
    named, variables = module(groups=4, use_running_average=False).init_with_output(jax.random.key(0), x)
    plain = EvoNorm(kind, groups=4, use_running_average=False).init_with_output(jax.random.key(0), x)[0]
    np.testing.assert_array_equal(named, plain)
    assert ("batch_stats" in variables) == (kind[0] == "B")
    assert ("v" in variables["params"]) == (kind in ("B0", "S0"))


def test_special_cases():
    x, one, zero = draw(), jnp.ones(8), jnp.zeros(8)
    gate = functools.partial(evonorm_s, "S0", x, one, zero, groups=4, eps=1e-6)
    deviation = jnp.repeat(x.reshape(3, 20, 4, 2).std((1, 3)), 2, -1)[:, None, None]
    np.testing.assert_allclose(gate(0 * one), x / (2 * deviation), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gate(1e4 * one), jax.nn.relu(x) / deviation, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gate(one), evonorm_s("S1", x, one, zero, groups=4, eps=1e-6), rtol=1e-6)
    centred = x - x.reshape(3, 20, 4, 2).mean((1, 3)).repeat(2, -1)[:, None, None]
    s1, s2 = (evonorm_s(kind, centred, one, zero, groups=4) for kind in ("S1", "S2"))
    np.testing.assert_allclose(s1, s2, rtol=1e-4, atol=1e-6)
    each = evonorm_s("S1", x, one, zero, groups=8)
    np.testing.assert_allclose(each[..., 3:4], evonorm_s("S1", x[..., 3:4], one[:1], zero[:1], groups=1), rtol=1e-5)
    batch, instance = x.std((0, 1, 2)), x.std((1, 2), keepdims=True)
    flat, _ = evonorm_b("B0", x, one, zero, zero, eps=1e-8)
    np.testing.assert_allclose(flat, x / jnp.maximum(batch, instance), rtol=1e-5)
    low = x - 50  # far below zero the maximum is the batch's part in B1, the sample's in B2
    b1, _ = evonorm_b("B1", low, one, zero)
    np.testing.assert_allclose(b1, low / low.std((0, 1, 2)), rtol=1e-4)
    b2, _ = evonorm_b("B2", low, one, zero)
    np.testing.assert_allclose(b2, low / (jnp.sqrt(jnp.square(low).mean((1, 2), keepdims=True)) - low), rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.floats(0.1, 100), st.integers(0, 99))
def test_b0_does_not_see_the_scale(scale, seed):
    x, one, zero = draw(seed=seed), jnp.ones(8), jnp.zeros(8)
    y, variance = evonorm_b("B0", x, one, zero, one, eps=1e-12)
    scaled, other = evonorm_b("B0", scale * x, one, zero, one, eps=1e-12)
    # where v x + s_i and s_b are large against what cancels
    np.testing.assert_allclose(scaled, y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other, scale**2 * variance, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS[3:])
def test_samples_are_independent_without_batch_statistics(kind):
    x, one, zero = draw((5, 4, 4, 8)), jnp.ones(8), jnp.zeros(8)
    function = jax.jit(function_of(kind))
    whole = function(x, one, zero, one)
    order = np.array([3, 1, 4, 0, 2])
    np.testing.assert_array_equal(function(x[order], one, zero, one), whole[order])
    replaced = x.at[1:].set(100.0)
    np.testing.assert_array_equal(function(replaced, one, zero, one)[0], whole[0])


def test_running_variance_in_closed_form():
    layer = EvoNorm("B1", use_running_average=False, momentum=0.8)
    x = draw()
    variables = layer.init(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)
    for _ in range(5):
        _, changed = layer.apply(variables, x, mutable="batch_stats")
        variables = {**variables, **changed}
    expected = 0.8**5 + (1 - 0.8**5) * x.var((0, 1, 2))
    np.testing.assert_allclose(variables["batch_stats"]["var"], expected, rtol=1e-5)


def test_batch_over_devices_is_one_batch():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, one, zero = 3 + draw((16, 2, 2, 8)), jnp.ones(8), jnp.zeros(8)
    layer = EvoNorm("B0", use_running_average=False, axis_name="data", unbiased_running_var=True)
    variables = layer.init(jax.random.key(0), x)
    single = EvoNorm("B0", use_running_average=False, unbiased_running_var=True)

    def apply(x):
        y, changed = layer.apply(variables, x, mutable="batch_stats")
        return y, changed["batch_stats"]["var"]

    spread = jax.jit(jax.shard_map(apply, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P())))
    y, variance = spread(x)
    expected, changed = single.apply(variables, x, mutable="batch_stats")
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, changed["batch_stats"]["var"], rtol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(spread(x)[0])))(x)
    whole = jax.grad(lambda x: jnp.sum(jnp.sin(evonorm_b("B0", x, one, zero, one)[0])))(x)
    np.testing.assert_allclose(gradient, whole, rtol=1e-4, atol=1e-5)


@every_kind
@pytest.mark.parametrize("shape", [(2, 7, 8), (2, 3, 2, 2, 8), (2, 1, 1, 8)])
def test_any_number_of_spatial_axes(kind, shape):
    x = draw(shape)
    one, zero = jnp.ones(8), jnp.zeros(8)
    function = function_of(kind)
    flat = function(x.reshape(2, -1, 1, 8), one, zero, one).reshape(shape)
    np.testing.assert_allclose(function(x, one, zero, one), flat, rtol=1e-5, atol=1e-6)


@every_kind
def test_dtypes_constant_images_and_gradients(kind):
    one, zero = jnp.ones(8), jnp.zeros(8)
    function = jax.jit(function_of(kind))
    gradient = jax.jit(jax.grad(lambda x, *args: function_of(kind)(x, *args).sum()))
    for x in (jnp.zeros((2, 3, 3, 8)), jnp.full((2, 3, 3, 8), 7.0), jnp.full((1, 1, 1, 8), -2.0)):
        assert np.isfinite(function(x, one, zero, one)).all()
        assert np.isfinite(gradient(x, one, zero, one)).all()
    x = draw()
    half = x.astype(jnp.bfloat16)
    y = function(half, one, zero, one)
    assert y.dtype == jnp.bfloat16
    expected = function(half.astype(jnp.float32), one, zero, one)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)  # rounded once, at the end
    with jax.enable_x64():
        wide = [jnp.asarray(a, jnp.float64) for a in (x, one, zero, one)]
        assert function_of(kind)(*wide).dtype == jnp.float64
        check_grads(lambda *a: function_of(kind)(*map(jnp.asarray, a)), wide, 1, ("rev",), 1e-5, 1e-5)
    np.testing.assert_allclose(
        jax.vmap(function)(x[None], *3 * (one[None],))[0], function(x, one, one, one), rtol=1e-5, atol=1e-6
    )


def test_bad_input():
    x, one, zero = draw(), jnp.ones(8), jnp.zeros(8)
    with pytest.raises(ValueError, match="kind must be one of B0, B1, B2, S0, S1, S2, got 'S3'"):
        EvoNorm("S3").init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="groups must divide the 8 channels of x, got 3"):
        evonorm_s("S1", x, one, zero, groups=3)
    with pytest.raises(ValueError, match="at least one spatial axis"):
        evonorm_s("S1", x[:, 0, 0], one, zero, groups=4)
    with pytest.raises(ValueError, match="v must be given for kind B0"):
        evonorm_b("B0", x, one, zero)
    with pytest.raises(ValueError, match="v must be given for kind S0"):
        evonorm_s("S0", x, one, zero, groups=4)
    with pytest.raises(ValueError, match=r"eps must lie in \(0, inf\], got 0.0"):
        evonorm_b("B1", x, one, zero, eps=0.0)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got 1.5"):
        EvoNorm("B1", momentum=1.5).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="kind must be one of B0, B1, B2, got 'S0'"):
        evonorm_b("S0", x, one, zero)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["B0", "S0"])
def test_a_small_network_learns_digits(kind):
    data = load_digits()
    images = jnp.asarray(data.images[..., None] / 8 - 1, jnp.float32)
    labels = jnp.asarray(data.target)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            for features in (8, 16):
                x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
                x = EvoNorm(kind, groups=4, use_running_average=not train)(x)
            return nn.Dense(10)(x.reshape(x.shape[0], -1))

    net = Net()
    variables = net.init(jax.random.key(0), images[:2], True)
    params, stats = variables["params"], {"batch_stats": variables.get("batch_stats", {})}
    optimizer = optax.sgd(0.2)

    @jax.jit
    def step(carry, index):
        params, stats, state = carry

        def loss(params):
            logits, changed = net.apply({"params": params, **stats}, images[index], True, mutable="batch_stats")
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[index]).mean(), changed

        gradients, changed = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), {**stats, **changed}, state

    carry = params, stats, optimizer.init(params)
    for index in np.random.default_rng(0).integers(0, 1200, (400, 32)):
        carry = step(carry, index)
    logits = net.apply({"params": carry[0], **carry[1]}, images[1200:], False)
    assert float((logits.argmax(-1) == labels[1200:]).mean()) >= 0.9
