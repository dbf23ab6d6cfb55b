"""Grids of returns: ends, widths, centers on atoms, dtypes, refused arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poise.rl import atoms, bin_centers, bin_edges

quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
bounds = st.tuples(st.floats(-100, 100, width=32), st.floats(0.25, 100, width=32)).map(lambda b: (b[0], b[0] + b[1]))


@pytest.mark.golden
@pytest.mark.golden_pattern("rl", "hl_gauss*.npz")
def test_official_bins(golden_file):
    data = np.load(golden_file)
    for case in sorted({name.partition("_")[0] for name in data.files}):
        low, high, m = (data[f"{case}_{name}"] for name in ("min", "max", "num_bins"))
        atol = 3e-7 * float(max(abs(low), abs(high)))  # a rounding or two of the greatest edge
        np.testing.assert_allclose(bin_edges(low, high, int(m)), data[f"{case}_support"], rtol=0, atol=atol)
        edges = bin_edges(low, high, int(m), centred=True)
        np.testing.assert_allclose(edges, data[f"{case}_centred_edges"], rtol=0, atol=atol)
        np.testing.assert_allclose(bin_centers(edges), data[f"{case}_centred_centres"], rtol=0, atol=atol)


@quick
@given(bounds, st.integers(2, 200))
def test_ends_are_exact_and_widths_equal(bounds, m):
    low, high = np.float32(bounds)
    if not low < high:
        return
    edges, points = np.asarray(bin_edges(low, high, m)), np.asarray(atoms(low, high, m))
    assert (edges[0], edges[-1], points[0], points[-1]) == (low, high, low, high)
    assert (len(edges), len(points)) == (m + 1, m)
    scale = max(abs(low), abs(high))
    np.testing.assert_allclose(np.diff(edges), (high - low) / m, rtol=0, atol=3e-7 * scale)
    centers = bin_centers(bin_edges(low, high, m, centred=True))
    np.testing.assert_allclose(centers, points, rtol=0, atol=4e-7 * (scale + high - low))


def test_outermost_centers_lie_half_a_bin_inside():
    np.testing.assert_array_equal(bin_centers(bin_edges(-1.0, 1.0, 4)), [-0.75, -0.25, 0.25, 0.75])


def test_dtypes_and_transformations():
    assert bin_edges(0, 1, 4).dtype == jnp.float32
    assert atoms(0, 1, 4, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    with jax.enable_x64():
        assert bin_centers(bin_edges(0, 1, 4)).dtype == jnp.float64
        assert atoms(0, 1, 4, dtype=jnp.float32).dtype == jnp.float32
    traced = jax.jit(lambda low, high: bin_centers(bin_edges(low, high, 4)))(0.0, 1.0)
    np.testing.assert_array_equal(traced, bin_centers(bin_edges(0.0, 1.0, 4)))
    assert jax.vmap(lambda high: atoms(0.0, high, 3))(jnp.array([1.0, 2.0])).tolist() == [[0, 0.5, 1], [0, 1, 2]]


@pytest.mark.parametrize("make", [bin_edges, atoms])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.0, 1.0, 1), ValueError, "must be at least 2, got 1"),
        ((0.0, 1.0, 2.5), TypeError, "num_(bins|atoms)"),
        ((1.0, 1.0, 4), ValueError, "v_min must be below v_max, got 1.0 and 1.0"),
        ((2.0, 1.0, 4), ValueError, "v_min must be below v_max"),
        ((float("nan"), 1.0, 4), ValueError, "v_min must lie in"),
        ((0.0, float("inf"), 4), ValueError, "v_max must lie in"),
    ],
)
def test_bad_arguments(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(*arguments)


@pytest.mark.parametrize("edges", [[0.0, 1.0, 1.0], [1.0, 0.0], [0.0, float("nan")], [0.0]])
def test_edges_must_increase(edges):
    with pytest.raises(ValueError, match="edges must"):
        bin_centers(jnp.array(edges))
