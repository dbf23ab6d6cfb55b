"""HL-Gauss, two-hot and categorical targets: official values, closed forms, symmetries, targets off the support."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import special, stats

from poise import rl
from poise.rl import atoms, bin_centers, bin_edges

# Compiled, since every test calls them on many small arrays.
hl_gauss_probs, two_hot_probs, categorical_projection = map(
    jax.jit, (rl.hl_gauss_probs, rl.two_hot_probs, rl.categorical_projection)
)
quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
mean = jax.jit(functools.partial(rl.expected_value, probs=True))
Z, EDGES = atoms(-2.0, 3.0, 11), bin_edges(-2.0, 3.0, 10)
WIDTH = 0.5


def cases(data):
    return sorted({name.partition("_")[0] for name in data.files})


@pytest.mark.golden
@pytest.mark.golden_pattern("rl", "hl_gauss*.npz")
def test_official_hl_gauss(golden_file):
    data = np.load(golden_file)
    for case in cases(data):
        part = {name.removeprefix(f"{case}_"): data[name] for name in data.files if name.startswith(f"{case}_")}
        edges, sigma, span = np.asarray(part["support"]), part["sigma"], float(part["max"] - part["min"])
        probs = hl_gauss_probs(np.asarray(part["target"]), edges, sigma)
        np.testing.assert_allclose(probs, part["probs"], rtol=0, atol=5e-6)
        np.testing.assert_allclose(
            mean(probs, bin_centers(jnp.asarray(edges))), part["decoded"], rtol=0, atol=3e-6 * span
        )
        outside = hl_gauss_probs(np.asarray(part["oob_target"]), edges, sigma)
        np.testing.assert_allclose(outside, part["oob_probs"], rtol=0, atol=5e-6)
        wide = np.asarray(part["centred_edges"])
        centred = hl_gauss_probs(np.asarray(part["target"]), wide, sigma)
        np.testing.assert_allclose(centred, part["centred_probs"], rtol=0, atol=5e-6)


@pytest.mark.golden
@pytest.mark.golden_pattern("rl", "categorical_projection*.npz")
def test_official_projections(golden_file):
    data = np.load(golden_file)
    for case in cases(data):
        part = {name.removeprefix(f"{case}_"): data[name] for name in data.files if name.startswith(f"{case}_")}
        grid = np.asarray(part["atoms"])
        next_probs = special.softmax(part["next_logits"], axis=-1)
        q = mean(next_probs, grid)
        np.testing.assert_allclose(q, part["next_q"], rtol=0, atol=3e-6 * float(grid[-1] - grid[0]))
        np.testing.assert_array_equal(np.argmax(q, -1), part["next_action"])
        chosen = next_probs[np.arange(len(q)), part["next_action"]]
        moved = part["reward"][:, None] + part["discount"][:, None] * grid
        ours = categorical_projection(moved, chosen, grid)
        np.testing.assert_allclose(ours, part["target_probs_rlax"], rtol=0, atol=5e-6)
        np.testing.assert_allclose(ours, part["target_probs_dopamine"], rtol=0, atol=5e-6)
        # The reference adds 1e-5 to its denominator.
        pair = two_hot_probs(np.asarray(part["twohot_scalar"]), grid)
        np.testing.assert_allclose(pair, part["twohot_probs_rlax"], rtol=0, atol=5e-5)


@jax.jit
def all_probs(y, sigma):
    spread = jax.random.dirichlet(jax.random.key(0), jnp.ones(11), y.shape)
    return hl_gauss_probs(y, EDGES, sigma), two_hot_probs(y, Z), categorical_projection(y[..., None] + Z, spread, Z)


one_by_one = jax.jit(jax.vmap(all_probs, in_axes=(0, None)))


@quick
@given(st.lists(st.floats(-50, 50, width=32), min_size=4, max_size=4), st.floats(0.05, 2.0))
def test_probabilities_whatever_the_target(values, sigma):
    y = np.array(values, np.float32)
    batched, single = all_probs(y, sigma), one_by_one(y[:, None], sigma)
    for probs in batched:
        assert np.all(np.asarray(probs) >= 0)
        np.testing.assert_allclose(np.sum(probs, -1), 1, rtol=0, atol=2e-6)
    for probs, one in zip(batched[:2], single[:2], strict=True):  # the third draws by shape
        np.testing.assert_allclose(probs, one[:, 0], rtol=0, atol=1e-7)


def test_hl_gauss_is_a_truncated_normal():
    with jax.enable_x64():
        edges, y = np.sort(np.random.default_rng(0).uniform(-2, 3, 8)), np.array([-1.0, 0.3, 2.2])
        probs = hl_gauss_probs(jnp.asarray(y), jnp.asarray(edges), 0.7)
        y = np.clip(y, edges[0], edges[-1])
        normal = stats.truncnorm((edges[0] - y) / 0.7, (edges[-1] - y) / 0.7, y, 0.7)
        expected = np.diff([normal.cdf(edge) for edge in edges], axis=0).T
    np.testing.assert_allclose(probs, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("ratio", "tolerance"), [(0.75, 0.02), (0.25, 0.02)])
def test_mean_error_in_the_interior(ratio, tolerance):
    """At most (w/pi) exp(-2 pi^2 rho^2), and that much at the worst place."""
    with jax.enable_x64():
        edges = bin_edges(-20.0, 20.0, 80)
        assert edges.dtype == jnp.float64
        y = jnp.linspace(-0.5, 0.5, 201)
        error = jnp.abs(mean(hl_gauss_probs(y, edges, ratio * WIDTH), bin_centers(edges)) - y).max() / WIDTH
    bound = np.exp(-2 * np.pi**2 * ratio**2) / np.pi
    assert bound * (1 - tolerance) < error < bound * (1 + tolerance)


def test_mean_at_the_ends():
    """A half normal: HL-Gauss is drawn inside there; two-hot and the projection are not."""
    edges, sigma = bin_edges(0.0, 10.0, 1000), 0.75
    top = mean(hl_gauss_probs(jnp.array([0.0, 10.0]), edges, sigma), bin_centers(edges))
    offset = sigma * np.sqrt(2 / np.pi)
    np.testing.assert_allclose(top, [offset, 10 - offset], rtol=0, atol=2e-4)
    ends = jnp.array([-2.0, 3.0])
    np.testing.assert_array_equal(mean(two_hot_probs(ends, Z), Z), ends)
    point = jnp.zeros(11).at[4].set(1.0)
    np.testing.assert_array_equal(mean(categorical_projection(jnp.full(11, 3.0), point, Z), Z), 3.0)


def test_narrow_and_wide_gaussians():
    y = jnp.array([-1.9, 0.26, 2.7])
    holder = jnp.searchsorted(EDGES, y) - 1
    np.testing.assert_array_equal(hl_gauss_probs(y, EDGES, 1e-6), jax.nn.one_hot(holder, 10))
    np.testing.assert_allclose(hl_gauss_probs(y, EDGES, 1e6), jnp.full((3, 10), 0.1), rtol=0, atol=1e-6)


def test_reflection_and_shift():
    y = jnp.linspace(-2.0, 3.0, 13)
    reflected = hl_gauss_probs(1.0 - y, EDGES, 0.375)
    np.testing.assert_allclose(reflected, hl_gauss_probs(y, EDGES, 0.375)[:, ::-1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(two_hot_probs(1.0 - y, Z), two_hot_probs(y, Z)[:, ::-1], rtol=0, atol=1e-6)
    wide = bin_edges(-20.0, 20.0, 80)
    shifted = hl_gauss_probs(y + WIDTH, wide, 0.375)
    np.testing.assert_allclose(shifted[:, 1:], hl_gauss_probs(y, wide, 0.375)[:, :-1], rtol=0, atol=2e-6)


@quick
@given(st.floats(-2, 3, width=32))
def test_two_hot_decodes_to_its_value(y):
    probs = two_hot_probs(jnp.float32(y), Z)
    np.testing.assert_allclose(mean(probs, Z), y, rtol=0, atol=1e-6)
    assert int((probs > 0).sum()) <= 2


def test_two_hot_on_atoms_is_one_hot():
    np.testing.assert_array_equal(two_hot_probs(Z, Z), jnp.eye(11))
    uneven = jnp.array([0.0, 1.0, 10.0, 11.0])
    np.testing.assert_array_equal(two_hot_probs(uneven, uneven), jnp.eye(4))
    np.testing.assert_allclose(two_hot_probs(jnp.array(4.0), uneven), [0, 2 / 3, 1 / 3, 0], rtol=1e-6)


def test_projection_special_cases():
    key = jax.random.key(0)
    q = jax.random.dirichlet(key, jnp.ones(11), (5,))
    r = jnp.linspace(-3.0, 4.0, 5)
    terminal = categorical_projection(jnp.broadcast_to(r[:, None], (5, 11)), q, Z)
    np.testing.assert_allclose(terminal, two_hot_probs(r, Z), rtol=0, atol=1e-6)
    np.testing.assert_allclose(categorical_projection(Z, q, Z), q, rtol=0, atol=1e-6)
    inside = categorical_projection(0.3 + 0.7 * Z, q, Z)
    np.testing.assert_allclose(mean(inside, Z), 0.3 + 0.7 * mean(q, Z), rtol=0, atol=1e-5)
    moved = 0.5 - 0.9 * Z
    both = categorical_projection(moved, 0.25 * q[0] + 0.75 * q[1], Z)
    parts = 0.25 * categorical_projection(moved, q[0], Z) + 0.75 * categorical_projection(moved, q[1], Z)
    np.testing.assert_allclose(both, parts, rtol=0, atol=1e-6)


def test_targets_off_the_support_are_clipped():
    far = jnp.array([-1e30, -2.1, 3.1, 3e38])
    ends = jnp.array([-2.0, -2.0, 3.0, 3.0])
    np.testing.assert_array_equal(hl_gauss_probs(far, EDGES, 0.375), hl_gauss_probs(ends, EDGES, 0.375))
    np.testing.assert_array_equal(two_hot_probs(far, Z), two_hot_probs(ends, Z))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_targets_that_are_not_finite_belong_to_no_bin(bad):
    y = jnp.array([bad, 1.0])
    for probs in (
        hl_gauss_probs(y, EDGES, 0.375),
        two_hot_probs(y, Z),
        categorical_projection(y[:, None] + Z, jnp.full(11, 1 / 11), Z),
    ):
        assert bool(jnp.isnan(probs[0]).all())
        assert bool(jnp.isfinite(probs[1]).all())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_dtypes(dtype):
    with jax.enable_x64():
        y, wide = jnp.array([0.5, 1.0], dtype), jnp.promote_types(dtype, jnp.float32)
        grid = atoms(-2.0, 3.0, 11, dtype=jnp.float64)
        assert hl_gauss_probs(y, bin_edges(-2.0, 3.0, 10), 0.375).dtype == wide
        assert two_hot_probs(y, grid).dtype == wide
        assert categorical_projection(y[:, None], jnp.ones((2, 1), dtype), grid).dtype == wide


def test_transformations():
    y = jnp.array([0.3, 0.9])

    def total(y, sigma):
        return jnp.sum(mean(hl_gauss_probs(y, EDGES, sigma), bin_centers(EDGES)))

    slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(y, 0.375)
    np.testing.assert_allclose(slopes[0], 1, rtol=0, atol=2e-3)  # the mean follows the target
    assert bool(jnp.isfinite(slopes[1]))
    _, probs = jax.lax.scan(lambda c, v: (c, two_hot_probs(v, Z)), 0, y)
    np.testing.assert_array_equal(probs, two_hot_probs(y, Z))
    inside = jax.grad(lambda v: mean(two_hot_probs(v, Z), Z))(0.3)
    np.testing.assert_allclose(inside, 1, rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_sigma_must_be_positive(sigma):
    with pytest.raises(ValueError, match="sigma must lie in"):
        rl.hl_gauss_probs(jnp.zeros(2), EDGES, sigma)


def test_grids_must_increase():
    with pytest.raises(ValueError, match="edges must increase"):
        rl.hl_gauss_probs(jnp.zeros(2), EDGES[::-1], 0.1)
    with pytest.raises(ValueError, match="atoms must increase"):
        rl.two_hot_probs(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(ValueError, match="atoms must be a vector of 2 or more"):
        rl.categorical_projection(jnp.zeros(2), jnp.ones(2), jnp.zeros(1))
