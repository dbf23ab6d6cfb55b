"""The group sparse envelope and its proximal map: reference solutions, optimality, special cases, real training."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from poise.optim import (
    WGSEFRule,
    apply_prox,
    prox_wgsef,
    wgsef,
    wgsef_conjugate,
    wgsef_penalty,
    wgsef_top_k_mask,
)
from poise.optim.capped_shares import capped_shares

quick = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10**6)


@pytest.mark.golden
@pytest.mark.golden_pattern("optim", "wgsef_*.npz")
def test_interior_point_solver(golden_file):
    """Value, proximal map and shares of every case, to the accuracy of the solver."""
    data = np.load(golden_file)
    ids, d = data["group_id"], data["group_weights"]

    @jax.jit
    @jax.vmap
    def ours(t, k, lam):
        norms = jnp.sqrt(d * jax.ops.segment_sum(t**2, ids, len(d)))
        return prox_wgsef(t, lam, ids, k, d), wgsef(t, ids, k, d), capped_shares(norms, lam * d, k), norms

    with jax.enable_x64():
        out = ours(*(jnp.asarray(data[key]) for key in ("t", "k", "lam")))
        prox, value, shares, norms = jax.tree.map(np.asarray, out)
    np.testing.assert_allclose(prox, data["prox"], rtol=0, atol=5e-5)
    np.testing.assert_allclose(value, data["value"], rtol=5e-5)
    np.testing.assert_allclose(np.where(norms > 0, shares, 0), np.where(norms > 0, data["u"], 0), rtol=0, atol=5e-5)


def random_case(seed):
    """Twelve numbers in five groups with weights."""
    rng = np.random.default_rng(seed)
    ids = np.repeat(np.arange(5), [1, 2, 2, 3, 4])
    return rng.standard_normal(12) * rng.lognormal(size=5)[ids], rng.uniform(0.3, 3.0, 5), rng.lognormal()


IDS = np.repeat(np.arange(5), [1, 2, 2, 3, 4])
value_and_slope = jax.jit(jax.value_and_grad(lambda x, k, d: wgsef(x, IDS, k, d)))
half_l1_squared = jax.jit(lambda x: wgsef(x, "weights", 1))
prox = jax.jit(lambda t, lam, k, d: prox_wgsef(t, lam, IDS, k, d))
conjugate = jax.jit(lambda y, d: jnp.stack([wgsef_conjugate(y, IDS, k, d) for k in range(1, 6)]))


def group_norms(x):
    return np.sqrt(np.bincount(IDS, np.asarray(x) ** 2))


@quick
@given(seeds, st.integers(1, 5))
def test_prox_is_optimal(seed, k):
    """(t - x)/lam is a subgradient at x: Fenchel's equality holds there, to rounding."""
    with jax.enable_x64():
        t, d, lam = random_case(seed)
        x = np.asarray(prox(t, lam, k, d))
        y = (t - x) / lam
        value, slope = value_and_slope(x, k, d)
        gap = value + conjugate(y, d)[k - 1] - x @ y
        assert abs(gap) < 1e-12 * (1 + abs(x @ y))
        # and the smooth description: lam * gradient + x = t where the gradient exists
        active = np.repeat(group_norms(x) > 0, np.bincount(IDS))
        np.testing.assert_allclose((x + lam * slope)[active], t[active], rtol=1e-9)


@quick
@given(seeds, st.integers(1, 5))
def test_fenchel_young_and_the_order_in_k(seed, k):
    """Above its affine minorants, decreasing in k, equal to the weighted square with k nonzero groups, homogeneous."""
    with jax.enable_x64():
        x, d, lam = random_case(seed)
        y, _, _ = random_case(seed + 1)
        values = [float(value_and_slope(x, j, d)[0]) for j in range(1, 6)]
        assert values[k - 1] + conjugate(y, d)[k - 1] >= x @ y - 1e-12
        assert all(a >= b - 1e-12 * a for a, b in itertools.pairwise(values))
        half_squares = 0.5 * (d * group_norms(x) ** 2)
        assert values[-1] == pytest.approx(half_squares.sum(), rel=1e-13)
        sparse = np.where(k > IDS, x, 0)
        assert float(value_and_slope(sparse, k, d)[0]) == pytest.approx(half_squares[:k].sum(), rel=1e-13)
        assert float(value_and_slope(lam * x, k, d)[0]) == pytest.approx(lam**2 * values[k - 1], rel=1e-12)


@quick
@given(seeds, st.integers(1, 5))
def test_prox_is_firmly_nonexpansive(seed, k):
    with jax.enable_x64():
        a, d, lam = random_case(seed)
        b, _, _ = random_case(seed + 1)
        x, y = np.asarray(prox(a, lam, k, d)), np.asarray(prox(b, lam, k, d))
        assert ((x - y) ** 2).sum() <= (x - y) @ (a - b) + 1e-12


@quick
@given(seeds)
def test_special_cases(seed):
    """k = 1 with single weights is half the squared l1 norm; all k groups is ridge; the limits in lambda."""
    with jax.enable_x64():
        t, d, lam = random_case(seed)
        assert float(half_l1_squared(t)) == pytest.approx(0.5 * np.abs(t).sum() ** 2, rel=1e-12)
        np.testing.assert_allclose(prox(t, lam, 5, d), t / (1 + lam * d[IDS]), rtol=1e-13)
        np.testing.assert_array_equal(prox(t, 0.0, 2, d), t)
        order = np.argsort(-group_norms(t) / np.sqrt(d))
        shrunk = group_norms(prox(t, 1e9, 2, d))
        assert sorted(np.flatnonzero(shrunk)) == sorted(order[:2])


@quick
@given(seeds, st.integers(1, 30), st.floats(0.0, 3.0))
def test_shares_add_up(seed, k, spread):
    """Whatever the range of strengths, over up to 60 orders of magnitude, the shares lie in [0, 1] and sum to k."""
    with jax.enable_x64():
        rng = np.random.default_rng(seed)
        s, c = 10.0 ** rng.uniform(-10 * spread, 10 * spread, 40), rng.uniform(0, 5, 40)
        s[30:] = 0
        u = np.asarray(shares_of(s, c, k))
        assert (u >= 0).all()
        assert (u <= 1).all()
        assert u.sum() == pytest.approx(k, rel=1e-9)
        assert (u[30:] == 0).all()
        single = np.asarray(shares_of(s.astype(np.float32) + 0, c.astype(np.float32), k))
        assert single.sum() == pytest.approx(min(k, (single > 0).sum()), rel=1e-5)


shares_of = jax.jit(capped_shares)


@jax.jit
def filters_with_derivatives(t, lam):
    run = lambda t: prox_wgsef(t, lam, "filters", 2)  # noqa: E731
    by_t = jax.grad(lambda t: run(t).astype(jnp.float32).sum())(t)
    return run(t), by_t, jax.grad(lambda x: wgsef(x, "filters", 2))(t)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_zeros_ties_and_dtypes(dtype):
    """All zero gives zero; equal groups share; nothing is NaN, nor is any derivative."""
    for t in (jnp.zeros((3, 4), dtype), jnp.ones((3, 4), dtype), jnp.zeros((3, 4), dtype).at[0, 0].set(2)):
        for lam in (0.0, 0.5):
            out = filters_with_derivatives(t, lam)
            assert {x.dtype for x in out} == {jnp.dtype(dtype)}
            assert all(bool(jnp.isfinite(x).all()) for x in out)
            assert bool((out[0] == 0).all()) == bool((t == 0).all())
    tied, _, _ = filters_with_derivatives(jnp.ones((3, 4), dtype), 1e4)
    assert (tied == tied[0, 0]).all()


def test_derivatives_are_difference_quotients():
    with jax.enable_x64():
        t, d, lam = random_case(11)
        weighted = jax.jit(jax.value_and_grad(lambda t: (prox_wgsef(t, lam, IDS, 2, d) * np.arange(12)).sum()))
        for function in (lambda t: value_and_slope(t, 2, d), weighted):
            by_t = function(t)[1]
            for i in (0, 4, 11):
                bump = 1e-6 * np.eye(12)[i]
                quotient = (function(t + bump)[0] - function(t - bump)[0]) / 2e-6
                assert float(by_t[i]) == pytest.approx(float(quotient), rel=1e-5, abs=1e-7)


def test_sharded_groups_stay_sharded():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    t = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    shrink = jax.jit(lambda t: prox_wgsef(t, 0.2, "filters", 3))
    expected = shrink(t)
    with jax.set_mesh(mesh):
        for spec in (("model", None), (None, "model")):
            placed = jax.device_put(t, jax.NamedSharding(mesh, jax.P(*spec)))
            x = shrink(placed)
            assert jax.typeof(x) == jax.typeof(placed)
            np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


def test_penalty_over_a_tree():
    """Each rule reaches its leaf with its own numbers; both have closed forms here."""
    conv = jnp.arange(1.0, 49.0).reshape(2, 2, 3, 4)
    params = {"Dense_0": {"kernel": jnp.ones((3, 1)), "bias": jnp.ones(3)}, "Conv_0": {"kernel": conv}}
    rules = {"Dense_0/kernel": WGSEFRule("rows", 1, 0.5), "Conv": WGSEFRule("filters", 4, 2.0, "size")}
    penalty = wgsef_penalty(rules)
    value, x = jax.jit(lambda p: (penalty.value(p), penalty.prox(p, 0.1)))(params)
    np.testing.assert_allclose(value, 0.5 * 0.5 * 3**2 + 2.0 * 0.5 * 12 * (conv**2).sum(), rtol=1e-6)
    np.testing.assert_allclose(x["Conv_0"]["kernel"], conv / (1 + 0.1 * 2.0 * 12), rtol=1e-6)
    np.testing.assert_allclose(x["Dense_0"]["kernel"], jnp.ones((3, 1)) / (1 + 0.05 * 3), rtol=1e-6)
    assert (x["Dense_0"]["bias"] == 1).all()
    params["Dense_0"]["kernel"] = jnp.array([[0.0], [1.0], [2.0]])
    assert {k: int(v) for k, v in penalty.active_groups(params).items()} == {"Dense_0/kernel": 2, "Conv_0/kernel": 4}
    support = penalty.support(params)
    assert support["Dense_0"]["kernel"].tolist() == [[False], [False], [True]]
    assert support["Dense_0"]["bias"].all()
    with pytest.raises(ValueError, match=r"none for \['LSTM'\]"):
        wgsef_penalty({**rules, "LSTM": WGSEFRule("rows", 1)}).active_groups(params)


def test_penalty_of_an_nnx_model():
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    penalty = wgsef_penalty({"^kernel$": WGSEFRule("rows", 1, 100.0)})
    assert int(jax.jit(lambda state: penalty.active_groups(penalty.prox(state, 1.0)))(state)["kernel"]) == 1


def test_tends_to_k_groups_as_the_penalty_grows():
    """Softmax regression on digits with one group per pixel: nonzero groups fall towards k, never below, and the
    refitted survivors of a moderate penalty classify about as well as all pixels."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images[:1000] / 16.0, jnp.float32), jnp.asarray(labels[:1000])
    x_test, y_test = jnp.asarray(images[1000:] / 16.0, jnp.float32), labels[1000:]

    def loss(w):
        return optax.softmax_cross_entropy_with_integer_labels(x @ w, y).mean()

    @functools.partial(jax.jit, static_argnames="k")
    def train(lam, k):
        tx = optax.chain(optax.sgd(0.5), apply_prox(wgsef_penalty({"": WGSEFRule("rows", k, lam)}).prox, 0.5))
        return fit(tx, jnp.zeros((64, 10)), 200)

    def fit(tx, w, steps):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (w, tx.init(w)), length=steps)[0][0]

    @jax.jit
    def refit(mask):
        keep = apply_prox(lambda w, _: jnp.where(mask, w, 0), 0.0)
        return fit(optax.chain(optax.sgd(0.5), keep), jnp.zeros((64, 10)), 300)

    def accuracy(w):
        return float((np.asarray(x_test @ w).argmax(1) == y_test).mean())

    results = {}
    for k in (20,):
        weights = [train(lam, k) for lam in (0.05, 0.5, 5.0)]
        counts = [int((jnp.abs(w).max(1) > 0).sum()) for w in weights]
        refitted = refit(wgsef_top_k_mask(weights[0], "rows", k))
        results[k] = counts, accuracy(refitted)
        assert counts[0] > counts[2] >= k
        assert counts[2] <= k + 2
        assert sorted(counts, reverse=True) == counts
    everything = accuracy(refit(jnp.ones((64, 10), bool)))
    print("groups for lam = 0.05, 0.5, 5 and accuracy of k refitted pixels:", results, "all pixels:", everything)
    assert results[20][1] > everything - 0.1


@pytest.mark.parametrize("k", [0, 5])
def test_bad_k(k):
    for run in (wgsef, wgsef_conjugate, wgsef_top_k_mask, lambda t, *args: prox_wgsef(t, 0.1, *args)):
        with pytest.raises(ValueError, match=rf"k must be in \[1, 4\], got {k}"):
            run(jnp.ones((3, 4)), "filters", k)


def test_bad_penalties():
    with pytest.raises(ValueError, match="lam must lie"):
        prox_wgsef(jnp.ones(3), -1.0, "weights", 1)
    with pytest.raises(ValueError, match="at least one pattern"):
        wgsef_penalty({})
    with pytest.raises(ValueError, match="lam of 'a' must lie"):
        wgsef_penalty({"a": WGSEFRule("rows", 1, -1.0)})
