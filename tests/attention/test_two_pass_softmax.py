import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from poise.attention import two_pass_log_softmax, two_pass_logsumexp, two_pass_softmax

IMPLEMENTATIONS = {
    "xla": {},
    "xla_blocked": {"block_size": 100},
    "pallas_interpret": {"block_size": 128},
}
FUNCTIONS = {
    "softmax": (two_pass_softmax, jax.nn.softmax),
    "log_softmax": (two_pass_log_softmax, jax.nn.log_softmax),
    "logsumexp": (two_pass_logsumexp, jax.nn.logsumexp),
}
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def compiled(function, implementation, **options):
    return jax.jit(
        functools.partial(function, implementation=implementation, **IMPLEMENTATIONS[implementation], **options)
    )


@pytest.mark.golden
@pytest.mark.golden_pattern("attention", "two_pass_*.npz")
@every_implementation
def test_official_kernels(golden_file, implementation):
    z = np.load(golden_file)
    softmax = compiled(two_pass_softmax, implementation)
    logsumexp = compiled(two_pass_logsumexp, implementation)
    for case in [name.removeprefix("x_") for name in z if name.startswith("x_") and name != "x_elem"]:
        x = jnp.asarray(z[f"x_{case}"])
        y = softmax(x)
        for name in [name for name in z if name.startswith(f"softmax_{case}_")]:
            np.testing.assert_allclose(y, z[name], rtol=1e-6, atol=1e-37, err_msg=name)
        np.testing.assert_allclose(logsumexp(x), z[f"logsumexp_{case}_f64"], rtol=1e-6)


@every_implementation
def test_tails_are_more_accurate_than_those_of_a_subtracted_maximum(implementation):
    x = jnp.asarray(np.random.default_rng(0).uniform(-55, 25, (4, 999)), jnp.float32)
    exact = np.exp(np.asarray(x, np.float64) - np.logaddexp.reduce(np.asarray(x, np.float64), 1, keepdims=True))
    error = np.abs(np.asarray(compiled(two_pass_softmax, implementation)(x)) / exact - 1).max()
    assert error < 7e-7
    assert np.abs(np.asarray(jax.nn.softmax(x)) / exact - 1).max() > 3 * error


@every_function
@every_implementation
@pytest.mark.parametrize("axis", [-1, 0, (0, 2), (2, 1, 0)])
def test_axes_and_where(name, implementation, axis, quick_jit):
    function, other = FUNCTIONS[name]
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(0, 5, (5, 3, 7)), jnp.float32)
    where = jnp.asarray(rng.random((5, 3, 7)) < 0.6)
    run = quick_jit(
        lambda x: [
            function(x, axis, w, implementation=implementation, **IMPLEMENTATIONS[implementation])
            for w in (None, where)
        ]
    )
    for result, selected in zip(run(x), (None, where), strict=True):
        expected = other(x, axis=axis, where=selected)
        np.testing.assert_allclose(result, expected, rtol=5e-6, atol=1e-6)


@every_implementation
def test_infinite_and_broken_entries(implementation):
    inf, nan = np.inf, np.nan
    x = jnp.array([[1.0, -inf, 1.0], [-inf, -inf, -inf], [inf, 0.0, 1.0], [nan, 0.0, 1.0], [3e38, -3e38, 0.0]])
    y = compiled(two_pass_softmax, implementation)(x)
    np.testing.assert_allclose(y[:4], [[0.5, 0, 0.5], [0, 0, 0], [nan] * 3, [nan] * 3], rtol=1e-6)
    np.testing.assert_array_equal(y[4] > 0, [True, False, False])
    assert np.isfinite(y[4]).all()
    logs = compiled(two_pass_log_softmax, implementation)(x[:2])
    np.testing.assert_allclose(logs, [[-np.log(2), -inf, -np.log(2)], [-inf] * 3], rtol=1e-6)
    np.testing.assert_allclose(compiled(two_pass_logsumexp, implementation)(x[:2]), [1 + np.log(2), -inf], rtol=1e-6)
    for function in (two_pass_softmax, two_pass_logsumexp):
        gradient = jax.grad(lambda x, f=function: jnp.where(jnp.isfinite(y := f(x)), y, 0).sum())(x[:2])
        assert np.isfinite(gradient).all()


@every_implementation
def test_enormous_entries_stay_finite(implementation):
    rng = np.random.default_rng(2)
    softmax, log_softmax = (compiled(f, implementation) for f in (two_pass_softmax, two_pass_log_softmax))
    for low, high in ((-1000, 1000), (90, 100), (-22_000, 22_000), (1e6, 1e6 + 50)):
        x = jnp.asarray(rng.uniform(low, high, (2, 300)), jnp.float32)
        y = softmax(x)
        np.testing.assert_allclose(y.sum(-1), 1, rtol=2e-6)
        # the logarithm is only as good as its argument's last digit
        np.testing.assert_allclose(log_softmax(x).max(-1), jnp.log(y.max(-1)), atol=max(1e-5, 2e-7 * abs(high)))


@every_function
@every_implementation
def test_derivatives(name, implementation):
    function, other = FUNCTIONS[name]
    function = functools.partial(function, implementation=implementation, **IMPLEMENTATIONS[implementation])
    rng = np.random.default_rng(3)
    x, tangent = (jnp.asarray(rng.normal(0, 2, (2, 9)), jnp.float32) for _ in range(2))
    out, forward = jax.jit(lambda x, t: jax.jvp(function, (x,), (t,)))(x, tangent)
    expected, expected_forward = (
        jax.jvp(other, (x,), (tangent,))
        if name != "logsumexp"
        else jax.jvp(functools.partial(other, axis=-1), (x,), (tangent,))
    )
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(forward, expected_forward, rtol=1e-5, atol=1e-6)
    cotangent = jnp.asarray(rng.normal(size=out.shape), jnp.float32)
    backward = jax.jit(lambda x, c: jax.vjp(function, x)[1](c)[0])(x, cotangent)
    np.testing.assert_allclose(jnp.vdot(backward, tangent), jnp.vdot(cotangent, forward), rtol=1e-4, atol=1e-5)
    if implementation == "xla":
        with jax.enable_x64():
            check_grads(
                lambda x: function(jnp.asarray(x)), (jnp.asarray(x, jnp.float64),), order=2, atol=1e-6, rtol=1e-6
            )


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 99), columns=st.integers(1, 40), block_size=st.integers(1, 50))
def test_blocks_of_any_size(quick_jit, seed, columns, block_size):
    x = jnp.asarray(np.random.default_rng(seed).normal(0, 30, (3, columns)), jnp.float32)
    expected = two_pass_softmax(x)
    for implementation in ("xla_blocked", "pallas_interpret"):
        function = functools.partial(two_pass_softmax, implementation=implementation, block_size=block_size)
        y = quick_jit(function)(x)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-37)


@every_function
def test_spread_over_devices(name, quick_jit):
    function, _ = FUNCTIONS[name]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.asarray(np.random.default_rng(4).normal(0, 100, (3, 32)), jnp.float32)
    cotangent = jnp.asarray(np.random.default_rng(5).normal(size=function(x).shape), jnp.float32)
    spec = P() if name == "logsumexp" else P(None, "data")
    spread = jax.shard_map(
        functools.partial(function, axis_name="data"), mesh=mesh, in_specs=P(None, "data"), out_specs=spec
    )
    np.testing.assert_allclose(quick_jit(spread)(x), function(x), rtol=1e-5, atol=1e-6)
    gradient = quick_jit(jax.grad(lambda x: jnp.vdot(spread(x), cotangent)))(x)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: jnp.vdot(function(x), cotangent))(x), rtol=1e-4, atol=1e-6)


@every_function
def test_dtypes_vmap_and_scan(name):
    function, _ = FUNCTIONS[name]
    x = jnp.asarray(np.random.default_rng(6).normal(0, 3, (2, 3, 11)), jnp.float32)
    for dtype in (jnp.bfloat16, jnp.float16):
        half = x.astype(dtype)
        out = function(half)
        assert out.dtype == dtype
        np.testing.assert_array_equal(out, function(half.astype(jnp.float32)).astype(dtype))
    function = jax.jit(function)
    with jax.enable_x64():
        wide = function(jnp.asarray(x, jnp.float64))
        assert wide.dtype == jnp.float64
        np.testing.assert_allclose(wide, FUNCTIONS[name][1](jnp.asarray(x, jnp.float64), axis=-1), rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(function)(x), function(x), rtol=1e-6)
    _, scanned = jax.lax.scan(lambda carry, row: (carry, function(row)), None, x)
    np.testing.assert_allclose(scanned, function(x), rtol=1e-6)


@every_function
def test_bad_input(name):
    function, _ = FUNCTIONS[name]
    function = function.__wrapped__ if hasattr(function, "__wrapped__") else function
    x = jnp.ones((2, 3))
    with pytest.raises(TypeError, match="x must have a floating dtype, got int32"):
        function(jnp.ones(3, jnp.int32))
    with pytest.raises(ValueError, match="axis must name different axes of x, which has 2, got 2"):
        function(x, 2)
    with pytest.raises(ValueError, match="axis must name different axes"):
        function(x, (0, -2))
    with pytest.raises(ValueError, match="axis must not be empty"):
        function(jnp.ones((2, 0)))
    with pytest.raises(TypeError, match="where must be boolean"):
        function(x, where=jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="where must broadcast to x"):
        function(x, where=jnp.ones((2, 4), bool))
    with pytest.raises(ValueError, match="implementation must be one of xla, xla_blocked, pallas, pallas_interpret"):
        function(x, implementation="cuda")
    with pytest.raises(ValueError, match="block_size is not for implementation='xla'"):
        function(x, block_size=3)
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="implementation='pallas' needs a GPU or TPU, this is cpu: use 'xla'"):
            function(x, implementation="pallas")
