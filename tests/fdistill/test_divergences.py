"""The divergence family: table, weights, identities, limits, errors."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.fdistill import (
    DIVERGENCES,
    FDivergence,
    alpha,
    divergence,
    f_divergence,
    f_weight,
    from_function,
    scale,
    skew_js,
)

FAMILY = [*DIVERGENCES, "alpha(-1.5)", "alpha(0.3)", "alpha(0.7)", "skew_js(0.2)"]
RATIOS = np.exp(np.linspace(-6, 6, 25))


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "fdiv_table*.npz")
def test_table(golden_file):
    data = np.load(golden_file)
    with jax.enable_x64():
        r = jnp.asarray(data["r"])
        for row, name in enumerate(data["names"]):
            div = divergence(str(name))
            np.testing.assert_allclose(div.f(r), data["f"][row], rtol=1e-10, atol=1e-14)
            np.testing.assert_allclose(div.f_prime(r), data["fp"][row], rtol=1e-10, atol=1e-14)
            np.testing.assert_allclose(div.f_second(r), data["fpp"][row], rtol=1e-10)
            np.testing.assert_allclose(f_weight(div, jnp.log(r)), data["h"][row], rtol=1e-10)


@pytest.mark.parametrize("name", FAMILY)
def test_weight_is_r_squared_times_second_derivative(name):
    with jax.enable_x64():
        div = divergence(name)
        r = jnp.asarray(RATIOS)
        first, second = jax.vmap(jax.grad(div.f)), jax.vmap(jax.grad(jax.grad(div.f)))
        np.testing.assert_allclose(div.f_prime(r), first(r), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(div.f_second(r), second(r), rtol=1e-8)
        np.testing.assert_allclose(f_weight(div, jnp.log(r)), r**2 * second(r), rtol=1e-8)
        np.testing.assert_allclose(div.f(jnp.ones(())), 0.0, atol=1e-15)
        np.testing.assert_allclose(div.weight_at_one, f_weight(div, jnp.zeros(1))[0], rtol=1e-14)
        assert np.all(np.asarray(div.f_second(r)) > 0)
        chord = (div.f(r[2:]) + div.f(r[:-2])) / 2 - div.f((r[2:] + r[:-2]) / 2)
        assert np.all(np.asarray(chord) > 0)


DUALS = [
    ("reverse_kl", "forward_kl"),
    ("pearson_chi2", "neyman_chi2"),
    ("jensen_shannon", "jensen_shannon"),
    ("squared_hellinger", "squared_hellinger"),
    ("jeffreys", "jeffreys"),
    ("triangular", "triangular"),
    ("alpha(0.3)", "alpha(0.7)"),
    ("skew_js(0.2)", "skew_js(0.8)"),
]


@pytest.mark.parametrize(("name", "dual"), DUALS)
def test_duality(name, dual):
    with jax.enable_x64():
        l = jnp.log(jnp.asarray(RATIOS))
        np.testing.assert_allclose(
            f_weight(divergence(dual), l), jnp.exp(l) * f_weight(divergence(name), -l), rtol=1e-12
        )
        # and D_f(p||q) = D_f*(q||p)
        log_p, log_q = _random_pair(3)
        zeros = jnp.zeros_like(log_p)
        np.testing.assert_allclose(
            f_divergence(divergence(name), log_p, log_q, zeros),
            f_divergence(divergence(dual), log_q, log_p, zeros),
            rtol=1e-12,
        )


def test_dual_of_the_softened_reverse_kl():
    with jax.enable_x64():
        l = jnp.log(jnp.asarray(RATIOS))
        r = jnp.exp(l)
        np.testing.assert_allclose(r * f_weight(divergence("sf"), -l), r**2 / (r + 1), rtol=1e-12)


def test_sums_of_weights():
    with jax.enable_x64():
        l = jnp.linspace(-30, 30, 41)
        h = {name: f_weight(divergence(name), l) for name in DIVERGENCES}
        np.testing.assert_allclose(h["jensen_shannon"] + h["softened_reverse_kl"], h["reverse_kl"], rtol=1e-14)
        np.testing.assert_allclose(h["reverse_kl"] + h["forward_kl"], h["jeffreys"], rtol=1e-14)
        np.testing.assert_allclose(h["jensen_shannon"], jax.nn.sigmoid(l), rtol=1e-14)
        np.testing.assert_allclose(h["softened_reverse_kl"], jax.nn.sigmoid(-l), rtol=1e-14)


@pytest.mark.parametrize(
    ("family", "named", "factor"),
    [
        (lambda: alpha(0.5), "squared_hellinger", 4.0),
        (lambda: alpha(2.0), "pearson_chi2", 0.5),
        (lambda: alpha(-1.0), "neyman_chi2", 0.5),
        (lambda: skew_js(0.5), "jensen_shannon", 0.5),
        (lambda: scale(divergence("sh"), 4.0), "squared_hellinger", 4.0),
    ],
)
def test_members_of_the_families(family, named, factor):
    with jax.enable_x64():
        r = jnp.asarray(RATIOS)
        member, div = family(), divergence(named)
        # alpha's generator differs by a multiple of r - 1, which the weight and the divergence don't feel.
        np.testing.assert_allclose(member.f_second(r), factor * div.f_second(r), rtol=1e-12)
        np.testing.assert_allclose(f_weight(member, jnp.log(r)), factor * f_weight(div, jnp.log(r)), rtol=1e-12)
        log_p, log_q = _random_pair(0)
        zeros = jnp.zeros_like(log_p)
        np.testing.assert_allclose(
            f_divergence(member, log_p, log_q, zeros), factor * f_divergence(div, log_p, log_q, zeros), rtol=1e-11
        )


@pytest.mark.parametrize(("a", "limit"), [(1e-9, "reverse_kl"), (-1e-9, "reverse_kl"), (1 + 1e-9, "forward_kl")])
def test_alpha_approaches_its_limits_without_cancellation(a, limit):
    with jax.enable_x64():
        r = jnp.asarray(RATIOS)
        near, div = alpha(a), divergence(limit)
        shift = (r - 1) * (div.f_prime(jnp.ones(())) - near.f_prime(jnp.ones(())))
        np.testing.assert_allclose(near.f(r), div.f(r) - shift, rtol=1e-7, atol=1e-12)
        log_p, log_q = _random_pair(1)
        zeros = jnp.zeros_like(log_p)
        np.testing.assert_allclose(
            f_divergence(near, log_p, log_q, zeros), f_divergence(div, log_p, log_q, zeros), rtol=1e-7
        )
    assert alpha(0).name == "reverse_kl"
    assert alpha(1.0).name == "forward_kl"


def _random_pair(seed, n=12):
    p, q = jax.random.dirichlet(jax.random.key(seed), jnp.ones(n), (2,), dtype=jnp.float64)
    return jnp.log(p), jnp.log(q)


@pytest.mark.parametrize("name", FAMILY)
def test_divergence_of_finite_distributions(name):
    with jax.enable_x64():
        div = divergence(name)
        log_p, log_q = _random_pair(2)
        zeros = jnp.zeros_like(log_p)
        direct = jnp.sum(jnp.exp(log_q) * div.f(jnp.exp(log_p - log_q)))
        np.testing.assert_allclose(f_divergence(div, log_p, log_q, zeros), direct, rtol=1e-12)
        assert float(direct) > 0
        np.testing.assert_allclose(f_divergence(div, log_p, log_p, zeros), 0.0, atol=1e-15)
        # close pairs: every divergence is f''(1)/2 times chi^2
        step = 1e-4 * jnp.sin(jnp.arange(12.0))
        p = jnp.exp(log_q) * (1 + step - jnp.sum(jnp.exp(log_q) * step))
        chi2 = jnp.sum((p - jnp.exp(log_q)) ** 2 / jnp.exp(log_q))
        close = f_divergence(div, jnp.log(p), log_q, zeros)
        np.testing.assert_allclose(close, div.weight_at_one / 2 * chi2, rtol=2e-3)


@pytest.mark.parametrize("name", FAMILY)
def test_zero_and_underflowing_densities(name):
    div = divergence(name)
    inf = jnp.inf
    zeros = jnp.zeros(3)
    overlap = jnp.log(jnp.array([0.5, 0.5, 0.0]))
    for log_p, log_q in [
        (overlap, jnp.array([-inf, math.log(0.5), math.log(0.5)])),
        (jnp.array([0.0, -2000.0, -90.0]), jnp.array([-1300.0, 0.0, -90.0])),
        (jnp.array([0.0, -inf, -80.0]), jnp.array([0.0, -inf, -160.0])),
    ]:
        value = float(f_divergence(div, log_p, log_q, zeros))
        assert not math.isnan(value)
        assert value > -1e-6
        if div.bounded:
            assert math.isfinite(value)
    # a node of no measure counts for nothing, even where the integrand is infinite
    nothing = f_divergence(div, jnp.array([0.0, 0.0]), jnp.array([0.0, -inf]), jnp.array([0.0, -inf]))
    np.testing.assert_allclose(nothing, 0.0, atol=1e-7)


def test_divergences_of_disjoint_distributions():
    log_p, log_q, zeros = jnp.array([0.0, -jnp.inf]), jnp.array([-jnp.inf, 0.0]), jnp.zeros(2)
    limits = {
        "jensen_shannon": 2 * math.log(2),
        "squared_hellinger": 1.0,
        "triangular": 2.0,
        "skew_js(0.5)": math.log(2),
    }
    for name in FAMILY:
        div = divergence(name)
        value = float(f_divergence(div, log_p, log_q, zeros))
        if name in limits:
            np.testing.assert_allclose(value, limits[name], rtol=1e-6)
        assert math.isfinite(value) == div.bounded


@pytest.mark.parametrize("name", FAMILY)
def test_far_points_stay_exact(name):
    # p = q = e^-1300 underflows even in float64, but the log of the measure brings it back.
    with jax.enable_x64():
        div = divergence(name)
        log_p, log_q = _random_pair(5)
        far = jnp.full_like(log_p, -1300.0)
        np.testing.assert_allclose(
            f_divergence(div, log_p + far, log_q + far, -far),
            f_divergence(div, log_p, log_q, jnp.zeros_like(log_p)),
            rtol=1e-9,
        )


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_ratios_give_no_nan(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        l = jnp.array([-80.0, -10.0, 0.0, 10.0, 80.0], dtype)
        h = f_weight(divergence(name), l)
        assert h.dtype == dtype
        assert not np.any(np.isnan(h))
        assert np.all(np.isfinite(np.asarray(divergence(name).log_weight(l))))
        gradient = jax.grad(lambda x: divergence(name).log_weight(x).sum())(l)
        assert np.all(np.isfinite(gradient))


def test_half_precision_is_widened():
    assert f_weight(divergence("js"), jnp.zeros(2, jnp.bfloat16)).dtype == jnp.float32


GENERATORS = {
    "forward_kl": lambda r: r * jnp.log(r),
    "reverse_kl": lambda r: -jnp.log(r),
    "jensen_shannon": lambda r: r * jnp.log(r) - (r + 1) * jnp.log((r + 1) / 2),
    "squared_hellinger": lambda r: 1 - jnp.sqrt(r),
    "pearson_chi2": lambda r: (r - 1) ** 2,
    "neyman_chi2": lambda r: (r - 1) ** 2 / r,
    "triangular": lambda r: (r - 1) ** 2 / (r + 1),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_from_function(name):
    div, own = divergence(name), from_function(GENERATORS[name], name)
    np.testing.assert_allclose(own.weight_at_one, div.weight_at_one, rtol=1e-12)
    l = jnp.array([-12.0, -7.0, -1.0, 0.0, 1.0, 7.0, 12.0])
    np.testing.assert_allclose(f_weight(own, l), f_weight(div, l), rtol=2e-5)
    gradients = [jax.grad(lambda x, d=d: d.log_weight(x).sum())(l) for d in (own, div)]
    np.testing.assert_allclose(*gradients, atol=1e-3)
    with jax.enable_x64():
        l = jnp.linspace(-10.0, 10.0, 41)
        np.testing.assert_allclose(own.log_weight(l), div.log_weight(l), atol=2e-7)
        l = jnp.linspace(-90.0, 90.0, 19)  # the tails are power laws, up to what is left of the slope at 12
        np.testing.assert_allclose(own.log_weight(l), div.log_weight(l), atol=3e-3)
        log_p, log_q = _random_pair(4)
        zeros = jnp.zeros_like(log_p)
        np.testing.assert_allclose(
            f_divergence(own, log_p, log_q, zeros), f_divergence(div, log_p, log_q, zeros), rtol=1e-12
        )
        assert not math.isnan(
            float(f_divergence(own, jnp.array([0.0, -jnp.inf]), jnp.array([-jnp.inf, 0.0]), zeros[:2]))
        )


def test_adding_a_multiple_of_r_minus_one_changes_no_weight():
    shifted = from_function(lambda r: r * jnp.log(r) + 3 * (r - 1))
    l = jnp.linspace(-3.0, 3.0, 7)
    np.testing.assert_allclose(f_weight(shifted, l), f_weight(divergence("forward_kl"), l), rtol=1e-5)


def test_from_function_works_while_tracing():
    @jax.jit
    def weight(l):
        return f_weight(from_function(lambda r: r * jnp.log(r)), l)

    np.testing.assert_allclose(weight(jnp.array([1.0])), [math.e], rtol=1e-5)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda r: r * jnp.log(r) + 1, "vanish at 1"),
        (lambda r: jnp.log(r), "convex"),
        (lambda r: (r - 1) ** 3 + (r - 1) ** 2, "convex"),
        (lambda r: (r - 1) ** 2 - 2 * jnp.abs(r - 1), "convex"),
        (lambda r: jnp.abs(r - 1) / 2, "twice differentiable"),
        (lambda r: jnp.log(r - 0.5) * 0 + (r - 1) ** 2, "finite"),
    ],
)
def test_from_function_rejects(f, message):
    with pytest.raises(ValueError, match=message):
        from_function(f)


def test_aliases():
    expected = {
        "rkl": "reverse_kl",
        "softened_rkl": "softened_reverse_kl",
        "sf": "softened_reverse_kl",
        "js": "jensen_shannon",
        "sh": "squared_hellinger",
        "kl": "forward_kl",
        "fkl": "forward_kl",
        "jf": "jeffreys",
        "jeffreys": "jeffreys",
        "neyman": "neyman_chi2",
        "pearson": "pearson_chi2",
        "JS": "jensen_shannon",
    }
    assert {alias: divergence(alias).name for alias in expected} == expected
    assert divergence("alpha", a=0.3).name == divergence("alpha(0.3)").name == divergence("alpha(a=0.3)").name
    assert divergence("skew_js", pi=0.25).weight_at_one == divergence("skew_js(0.25)").weight_at_one == 0.1875
    js = divergence("js")
    assert divergence(js) is js
    assert isinstance(js, FDivergence)
    assert len(DIVERGENCES) == 9


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: divergence("forwardkl"), ValueError, "nearest is 'forward_kl'"),
        (lambda: divergence("hello"), ValueError, "jensen_shannon"),
        (lambda: divergence("tv"), ValueError, "not twice differentiable"),
        (lambda: divergence("total_variation"), ValueError, "not twice differentiable"),
        (lambda: divergence("alpha"), TypeError, "takes the parameter a"),
        (lambda: divergence("skew_js", a=1.0), TypeError, "takes the parameter pi"),
        (lambda: divergence("js", a=1.0), TypeError, "takes no parameters"),
        (lambda: divergence("alpha(0.5)", a=1.0), TypeError, "in its name already"),
        (lambda: skew_js(0.0), ValueError, r"pi must lie in \(0, 1\), got 0.0"),
        (lambda: skew_js(1.0), ValueError, "pi must lie"),
        (lambda: skew_js(float("nan")), ValueError, "pi must lie"),
        (lambda: alpha(float("inf")), ValueError, "a must be finite"),
        (lambda: scale(divergence("js"), -1.0), ValueError, "factor must lie"),
        (lambda: inspect.unwrap(divergence)(3), TypeError, "string or an FDivergence"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(FAMILY),
    st.lists(st.floats(-20, 20, width=32), min_size=4, max_size=4),
)
def test_transformations(name, values):
    div = divergence(name)
    l = jnp.asarray(values, jnp.float32)
    h = f_weight(div, l)
    np.testing.assert_allclose(jax.jit(lambda x: f_weight(div, x))(l), h, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda x: f_weight(div, x))(l), h, rtol=1e-5)
    assert np.all(np.asarray(h) >= 0)
