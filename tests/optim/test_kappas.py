"""Kappas: the references, Fenchel-Young, what the directions have in common, and each one's special cases."""

import functools
import json

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from poise.optim import kappas
from poise.optim.kappas import Kappa, MatrixAxes

SHAPE = (3, 4)
KAPPAS = {
    "sign": kappas.sign(),
    "lp_1p5": kappas.lp(1.5),
    "lp_2": kappas.lp(2.0),
    "lp_4": kappas.lp(4.0),
    "dead_zone": kappas.dead_zone(0.3),
    "top_k": kappas.top_k(2),
    "huber": kappas.huber(0.3),
    "linf": kappas.linf(),
    "group_l2": kappas.group_l2(axis=0),
    "group_ids": kappas.group_l2(group_ids=[0, 1, 0, 2, 2, 2, 0, 1, 4, 4, 4, 4]),
    "squared_l2": kappas.squared_l2(),
    "relativistic": kappas.relativistic(0.3),
    "tanh": kappas.tanh(2.0),
    "softsign": kappas.softsign(0.3),
    "arctan": kappas.arctan(2.0),
    "log_sum_exp": kappas.log_sum_exp(),
    "nuclear": kappas.nuclear(),
    "spectral": kappas.spectral(),
}
NORMS = ("sign", "lp_1p5", "lp_2", "lp_4", "top_k", "linf", "group_l2", "group_ids", "nuclear", "spectral")
SMOOTH = ("relativistic", "tanh", "softsign", "arctan", "squared_l2")  # with an invertible gradient

every = pytest.mark.parametrize("name", KAPPAS)


def momentum(seed, shape=SHAPE, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def close(actual, expected, rtol=1e-12, atol=1e-12):
    np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(expected, np.float64), rtol=rtol, atol=atol)


def all_of(kappa):
    """Everything that a kappa says about momenta, compiled once."""

    def evaluate(m):
        direction = kappa.grad(m)
        probe = jnp.cos(jnp.arange(m.size, dtype=m.dtype)).reshape(m.shape)
        return {
            "value": kappa.value(m),
            "grad": direction,
            "derivative": jax.grad(kappa.value)(m),
            "pullback": jax.grad(lambda m: jnp.vdot(probe, kappa.grad(m)))(m),
            "conjugate": kappa.conjugate(direction),
            "conjugate_derivative": jax.grad(kappa.conjugate)(direction),
            "violation": kappa.violation(direction),
            "outside": (kappa.conjugate(1.001 * direction), kappa.violation(3 * direction)),
            "inside": (kappa.conjugate(0.999 * direction), kappa.violation(0.999 * direction)),
        }

    return jax.jit(lambda m, points: (jax.vmap(evaluate)(m), jax.vmap(jax.vmap(kappa.violation))(points)))


# Rows: two momenta, the first one's negative, zero, and the first one very large and very small.
MOMENTA = np.stack(
    [momentum(0), momentum(1), -momentum(0), np.zeros(SHAPE), 2.0**800 * momentum(0), 2.0**-800 * momentum(0)]
)


# Ten pairs of points, and a point between those of each pair.
PAIRS, PLACES = 3 * momentum(2, (2, 10, *SHAPE)), np.linspace(0.05, 0.95, 10)
POINTS = np.stack([*PAIRS, PLACES[:, None, None] * PAIRS[0] + (1 - PLACES[:, None, None]) * PAIRS[1]])


@functools.cache
def all_facts(name):
    with jax.enable_x64():
        return jax.tree.map(np.asarray, all_of(KAPPAS[name])(MOMENTA, POINTS))


def facts(name):
    return all_facts(name)[0]


@pytest.mark.golden
@pytest.mark.golden_pattern("optim", "lion_kappa*.npz")
def test_golden(golden_file, reference_kappas):
    data = np.load(golden_file, allow_pickle=False)
    hparams = json.loads(str(data["hparams"]))
    with jax.enable_x64():
        for name, kappa in reference_kappas(hparams).items():
            matrix = name in ("nuclear", "spectral")
            tolerance = 1e-8 if matrix else 1e-10
            shape = hparams["matrix_shape"] if matrix else [-1]

            @jax.jit
            def evaluate(m, y, kappa=kappa, shape=shape):
                m, y = (x.reshape(len(x), *shape) for x in (m, y))
                return jax.vmap(kappa.value)(m), jax.vmap(kappa.grad)(m), jax.vmap(kappa.conjugate)(y)

            value, grad, conjugate = evaluate(data["m_probe"], data[f"{name}_conj_arg"])
            close(value, data[f"{name}_value"], 0, tolerance)
            close(grad.reshape(len(grad), -1), data[f"{name}_grad"], 0, tolerance)
            close(conjugate, data[f"{name}_conj"], 0, tolerance)


@every
def test_fenchel_young_holds_with_equality_at_the_direction(name):
    fact = facts(name)
    inner = np.einsum("aij,bij->ab", MOMENTA[:4], fact["grad"][:4])
    gap = fact["value"][:4, None] + fact["conjugate"][None, :4] - inner
    close(np.diagonal(gap), 0)
    assert gap.min() >= -1e-12
    assert gap[0, 1] > 1e-3


@every
def test_grad_is_the_derivative_of_value(name):
    fact = facts(name)
    close(fact["grad"][:2], fact["derivative"][:2], 1e-10)


@pytest.mark.parametrize("name", SMOOTH)
def test_conjugate_has_the_inverse_gradient(name):
    close(facts(name)["conjugate_derivative"][:2], MOMENTA[:2], 1e-9)


@every
def test_directions_lie_in_the_domain_and_norms_reach_its_boundary(name):
    fact = facts(name)
    assert np.isfinite(fact["conjugate"][:4]).all()
    assert (fact["violation"] <= 1e-13).all()
    if name in NORMS:
        conjugate, violation = (x[:2] for x in fact["outside"])
        assert (conjugate == np.inf).all()
        close(violation, 2)
        for inside in fact["inside"]:
            assert (inside == 0).all()


@pytest.mark.parametrize("name", [name for name in KAPPAS if name != "log_sum_exp"])
def test_directions_are_odd_bit_for_bit(name):
    grad = facts(name)["grad"]
    np.testing.assert_array_equal(grad[2], -grad[0])


@pytest.mark.parametrize("name", NORMS)
def test_norms_ignore_the_scale_of_the_momentum(name):
    fact = facts(name)
    for row, scale in ((4, 2.0**800), (5, 2.0**-800)):
        close(fact["grad"][row], fact["grad"][0])
        close(fact["value"][row] / scale, fact["value"][0])


@every
def test_zero_momentum_gives_no_nan_and_no_direction(name):
    fact = jax.tree.map(lambda x: x[3], facts(name))
    close(fact["grad"], 1 / 12 if name == "log_sum_exp" else 0)
    close(fact["value"], np.log(12) if name == "log_sum_exp" else 0)
    assert np.isfinite(fact["derivative"]).all()
    assert np.isfinite(fact["pullback"]).all()


@every
def test_large_and_small_momenta_give_finite_directions(name):
    grad = facts(name)["grad"]
    assert np.isfinite(grad).all()


@every
def test_violation_is_convex(name):
    first, second, between = all_facts(name)[1]
    assert (between <= PLACES * first + (1 - PLACES) * second + 1e-12).all()
    assert (first > 0).any() == (name != "squared_l2")


@every
def test_dtypes(name):
    kappa = KAPPAS[name]
    with jax.enable_x64():
        for dtype in ("float16", "float64"):
            leaf = jax.ShapeDtypeStruct(SHAPE, dtype)
            assert jax.eval_shape(kappa.grad, leaf) == leaf
            scalar = jax.ShapeDtypeStruct((), "float64" if dtype == "float64" else "float32")
            for function in (kappa.value, kappa.conjugate, kappa.violation):
                assert jax.eval_shape(function, leaf) == scalar


@every
def test_bfloat16_is_float32_rounded(name):
    kappa, m = KAPPAS[name], jnp.asarray(momentum(4), jnp.bfloat16)

    @jax.jit
    def evaluate(m):
        wide = m.astype(jnp.float32)
        return (kappa.grad(m), kappa.value(m)), (kappa.grad(wide), kappa.value(wide)), kappa.conjugate(kappa.grad(m))

    (direction, value), (exact, exact_value), conjugate = evaluate(m)
    close(direction, exact, 2**-7, 1e-6)
    close(value, exact_value, 1e-6)
    assert np.isfinite(conjugate)  # rounding of the direction doesn't put it outside


@pytest.mark.parametrize(
    "name",
    ["sign", "lp_4", "linf", "top_k", "group_l2", "group_ids", "log_sum_exp", "nuclear"],
)
def test_explicit_sharding_gives_the_same_direction_with_the_leafs_sharding(name):
    m = momentum(5, (8, 2), np.float32)
    kappa = kappas.group_l2(group_ids=np.arange(16) // 5) if name == "group_ids" else KAPPAS[name]
    evaluate = jax.jit(lambda m: (kappa.grad(m), kappa.value(m), kappa.conjugate(0.1 * m), kappa.violation(m)))
    expected = evaluate(m)
    with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))):
        leaf = jax.device_put(m, jax.NamedSharding(jax.sharding.get_mesh(), jax.P("x")))
        actual = evaluate(leaf)
        assert jax.typeof(actual[0]) == jax.typeof(leaf)
        jax.tree.map(lambda a, b: close(a, b, 1e-5, 1e-6), actual, expected)


ELEMENTWISE_OR_WHOLE = [
    name for name in KAPPAS if name not in ("top_k", "group_l2", "group_ids", "nuclear", "spectral", "squared_l2")
]


@jax.jit
def every_violation_of_directions(m):
    return {name: KAPPAS[name].violation(KAPPAS[name].grad(m)) for name in ELEMENTWISE_OR_WHOLE}


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    m=st.sampled_from([(), (1,), (2, 1, 3)]).flatmap(
        lambda shape: hypothesis.extra.numpy.arrays(np.float32, shape, elements=st.floats(-1e3, 1e3, width=32))
    )
)
def test_any_values_give_directions_in_the_domain(m):
    for name, violation in every_violation_of_directions(m).items():
        assert violation <= 1e-5, name


def test_limits_are_the_sign():
    m = jnp.asarray(momentum(6, dtype=np.float32))
    nearly = (
        kappas.huber(1e-6), kappas.relativistic(1e-6), kappas.softsign(1e-6), kappas.tanh(1e6), kappas.arctan(1e6),
        kappas.lp(1 + 1e-6), kappas.dead_zone(1e-6), kappas.top_k(m.size), kappas.group_l2(axis=()),
    )  # fmt: skip
    for direction in jax.jit(lambda m: [kappa.grad(m) for kappa in nearly])(m):
        close(direction, jnp.sign(m), 0, 1e-4)
    np.testing.assert_array_equal(kappas.lp(1.0).grad(m), jnp.sign(m))
    np.testing.assert_array_equal(kappas.lp(np.inf).grad(m), kappas.linf().grad(m))


def test_values_are_accurate_near_zero_and_far_out():
    of_curvature_two = (kappas.tanh(2.0), kappas.relativistic(0.5), kappas.huber(0.5))
    values = jax.jit(lambda m: [jax.vmap(kappa.value)(m) for kappa in (*of_curvature_two, kappas.arctan(2.0))])
    for near, far in values(jnp.array([1e-4, 1e30]))[:-1]:
        close(near, 1e-8, 1e-5, 0)
        close(far, 1e30, 1e-6)
    close(values(jnp.array([1e-4, 1e30]))[-1][1], 1e30, 1e-6)
    close(kappas.relativistic(0.5).grad(jnp.array([1e30, 1e-30])), [1.0, 2e-30], 1e-6, 0)
    assert np.isfinite(kappas.huber(1e-8).grad(jnp.zeros(3, jnp.float16))).all()


def test_ties_move_the_first_coordinates_and_nan_stays():
    directions = jax.jit(
        lambda m: [
            kappa.grad(m)
            for kappa in (kappas.linf(), kappas.top_k(2), kappas.sign(), kappas.dead_zone(0.1), kappas.huber(0.1))
        ]
    )
    m = np.array([[0.0, -2.0], [2.0, 2.0]])
    greatest, two, *_ = directions(m)
    assert greatest.tolist() == [[0.0, -1.0], [0.0, 0.0]]
    assert two.tolist() == [[0.0, -1.0], [1.0, 0.0]]
    m[0, 0] = np.nan
    assert all(np.isnan(direction).any() for direction in directions(m))


def test_groups_by_axis_and_by_number_agree():
    m = jnp.asarray(momentum(7, dtype=np.float32))
    labelled = kappas.group_l2(group_ids=np.tile(np.arange(4), 3))
    close(labelled.grad(m), kappas.group_l2(axis=0).grad(m), 1e-6)
    close(labelled.value(m), kappas.group_l2(axis=0).value(m), 1e-6)
    close(kappas.group_l2(axis=(0, 1)).grad(m), kappas.lp(2.0).grad(m), 1e-6)
    tiny = m.at[:, 1].multiply(2.0**-110)
    close(jnp.linalg.norm(labelled.grad(tiny), axis=0), np.ones(4), 1e-6)


def test_log_sum_exp_lives_on_the_simplex():
    kappa = kappas.log_sum_exp()
    assert kappa.conjugate(jnp.array([0.5, 0.6])) == np.inf
    assert kappa.conjugate(jnp.array([1.5, -0.5])) == np.inf
    assert kappa.conjugate(jnp.array([1.0, 0.0])) == 0
    close(kappa.violation(jnp.array([1.5, -0.5])), 0.5)


class TestMatrices:
    def test_nuclear_direction_is_the_polar_factor(self):
        with jax.enable_x64():
            for shape in ((2, 3), (3, 2), (3, 3)):
                m = momentum(8, shape)
                close(kappas.nuclear().grad(jnp.asarray(m)), scipy.linalg.polar(m)[0])
                close(kappas.nuclear().value(jnp.asarray(m)), np.linalg.norm(m, "nuc"))
                close(kappas.spectral().value(jnp.asarray(m)), np.linalg.norm(m, 2))

    def test_rank_deficient_momentum_moves_its_range_only(self):
        m = jnp.asarray(np.outer([1.0, 2.0, 2.0], [3.0, 4.0]), jnp.float32)
        expected = np.outer([1 / 3, 2 / 3, 2 / 3], [0.6, 0.8])
        close(kappas.nuclear().grad(m), expected, 1e-5, 1e-6)
        close(kappas.spectral().grad(m), expected, 1e-5, 1e-6)

    @pytest.mark.parametrize("make", [kappas.nuclear, kappas.spectral])
    def test_kernels_of_convolutions_and_stacks(self, make):
        kernel = momentum(9, (2, 2, 3, 4), np.float32)
        stacked = make(MatrixAxes(reduction=(-2,), output=(-1,)))
        heads = make(MatrixAxes(reduction=(2,), output=(0, 3)))  # axes that aren't neighbours

        @jax.jit
        def pairs(kernel):
            each = jax.vmap(jax.vmap(lambda m: (make().value(m), make().grad(m), make().violation(m))))(kernel)
            across = jax.vmap(make().grad)(kernel.transpose(1, 2, 0, 3).reshape(2, 3, 8))
            return (
                (make().grad(kernel), make().grad(kernel.reshape(12, 4)).reshape(kernel.shape)),
                (stacked.value(kernel), each[0].sum()),
                (stacked.grad(kernel), each[1]),
                (stacked.violation(kernel), each[2].max()),
                (heads.grad(kernel), across.reshape(2, 3, 2, 4).transpose(2, 0, 1, 3)),
            )

        for actual, expected in pairs(kernel):
            close(actual, expected, 1e-5, 1e-6)

    @pytest.mark.parametrize("make", [kappas.nuclear, kappas.spectral])
    @pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4)])
    def test_derivative_of_the_direction(self, make, shape):
        with jax.enable_x64():
            m, dm, probe = (momentum(seed, shape) for seed in (10, 11, 12))

            @jax.jit
            def evaluate(m, dm, probe):
                grad = make().grad
                numeric = (grad(m + 1e-6 * dm) - grad(m - 1e-6 * dm)) / 2e-6
                return numeric, jax.jvp(grad, (m,), (dm,))[1], jax.vjp(grad, m)[1](probe)[0]

            numeric, pushed, pulled = evaluate(m, dm, probe)
            close(pushed, numeric, 1e-7, 1e-8)
            close(np.vdot(pulled, dm), np.vdot(probe, pushed), 1e-10, 1e-10)

    def test_derivative_where_singular_values_coincide_or_vanish(self):
        with jax.enable_x64():
            grad = jax.jit(kappas.nuclear().grad)
            push = jax.jit(lambda m, dm: jax.jvp(kappas.nuclear().grad, (m,), (dm,))[1])
            dm = momentum(13, (3, 3))
            close(push(jnp.eye(3), dm), (dm - dm.T) / 2, 1e-9, 1e-9)
            left, right, dleft = momentum(14, (3, 2)), momentum(15, (2, 3)), momentum(16, (3, 2))
            numeric = (grad((left + 1e-6 * dleft) @ right) - grad((left - 1e-6 * dleft) @ right)) / 2e-6
            close(push(left @ right, dleft @ right), numeric, 1e-6, 1e-7)  # along matrices of rank 2

    @pytest.mark.parametrize("make", [kappas.nuclear, kappas.spectral])
    def test_derivative_is_finite_at_degenerate_matrices(self, make):
        probe = momentum(17, (3, 3), np.float32)
        degenerate = np.stack([np.eye(3), np.zeros((3, 3)), np.ones((3, 3))]).astype(np.float32)
        assert np.isfinite(jax.jit(jax.vmap(jax.grad(lambda m: jnp.vdot(probe, make().grad(m)))))(degenerate)).all()

    def test_fallback_takes_biases(self):
        kappa = kappas.nuclear(fallback=kappas.huber(0.5))
        bias = jnp.array([0.25, -3.0])
        for member in Kappa._fields:
            close(getattr(kappa, member)(bias), getattr(kappas.huber(0.5), member)(bias), 1e-6)
        own = Kappa(lambda m: jnp.sum(m**2) / 2, lambda m: m, lambda y: jnp.where(jnp.all(y < 2), 0.0, jnp.inf))
        assert kappas.nuclear(fallback=own).violation(bias) == 0
        assert kappas.nuclear(fallback=own).violation(bias + 2) == np.inf
        with pytest.raises(ValueError, match=r"shape \(2,\).*fallback"):
            kappas.nuclear().grad(bias)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: kappas.lp(0.5), ValueError, r"p must lie in \[1, inf\], got 0.5"),
        (lambda: kappas.lp(np.nan), ValueError, "p must"),
        (lambda: kappas.huber(0.0), ValueError, "eps must .*got 0.0"),
        (lambda: kappas.dead_zone(-1.0), ValueError, "eps must .*got -1.0"),
        (lambda: kappas.relativistic(np.inf), ValueError, "eps must .*got inf"),
        (lambda: kappas.softsign(np.nan), ValueError, "eps must .*got nan"),
        (lambda: kappas.tanh(0), ValueError, "slope must .*got 0"),
        (lambda: kappas.arctan(-2), ValueError, "slope must .*got -2"),
        (lambda: kappas.top_k(0), ValueError, "k must be at least 1, got 0"),
        (lambda: kappas.top_k(1.5), TypeError, "k must be an integer, got 1.5"),
        (lambda: kappas.top_k(7).grad(jnp.zeros(6)), ValueError, r"k=7 for a leaf of shape \(6,\)"),
        (lambda: kappas.group_l2(axis=1.5), TypeError, "axis"),
        (lambda: kappas.group_l2(axis=2).grad(jnp.zeros((2, 2))), ValueError, r"got 2 for a leaf of shape \(2, 2\)"),
        (lambda: kappas.group_l2(group_ids=[0, -1]), ValueError, "group_ids must be at least 0"),
        (lambda: kappas.group_l2(group_ids=[0, 1]).grad(jnp.zeros(3)), ValueError, r"got 2 for a leaf of shape \(3,\)"),
        (lambda: kappas.nuclear(MatrixAxes((0,), (0,))), ValueError, "axes must name each axis once"),
        (lambda: kappas.nuclear(MatrixAxes((0,), (-2,))).grad(jnp.zeros((2, 2))), ValueError, "once"),
        (lambda: kappas.nuclear(MatrixAxes((0,), (2,))).grad(jnp.zeros((2, 2))), ValueError, "range"),
        (lambda: kappas.spectral((0, 1)), TypeError, "axes must be a MatrixAxes"),
        (lambda: kappas.spectral(fallback=jnp.sign), TypeError, "fallback must be a Kappa"),
    ],
)
def test_bad_input(make, error, message):
    # Under the suite's check of annotations a TypeError may come from there, with a message of its own.
    with pytest.raises(error, match=message if error is ValueError else None):
        make()


def test_parameters_may_be_traced():
    m = jnp.asarray(momentum(19, dtype=np.float32))
    for make, parameter in ((kappas.huber, 0.4), (kappas.lp, 3.0), (kappas.tanh, 1.5)):
        close(jax.jit(lambda x, make=make: make(x).grad(m))(parameter), make(parameter).grad(m), 1e-5, 1e-6)
