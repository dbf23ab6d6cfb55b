"""What every metric that compares two sample sets must do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from poise.metrics import energy_distance, frechet_distance, mmd2, mode_coverage, prdc, sliced_wasserstein

DIRECTIONS = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0].astype(np.float32)

METRICS = {
    "prdc": functools.partial(prdc, k=3, block_size=8),
    "frechet_distance": frechet_distance,
    "mmd2": functools.partial(mmd2, bandwidths=[0.5, 1.0, 2.0], block_size=8),
    "mmd2_unbiased": functools.partial(mmd2, bandwidths=(1.5,), unbiased=True, block_size=8),
    "sliced_wasserstein_1": functools.partial(sliced_wasserstein, projections=DIRECTIONS, p=1),
    "sliced_wasserstein_2": functools.partial(sliced_wasserstein, projections=DIRECTIONS, p=2, block_size=2),
    "energy_distance": functools.partial(energy_distance, block_size=8),
}
# In mode coverage the second set are the centers, whose order matters.
PAIRWISE = {**METRICS, "mode_coverage": functools.partial(mode_coverage, radius=1.0, min_share=0.02, block_size=8)}
NAMES = {
    "prdc": ("real", "fake"),
    "frechet_distance": ("features1", "features2"),
    "mode_coverage": ("samples", "centers"),
}
every_metric = pytest.mark.parametrize("name", METRICS)
every_pairwise = pytest.mark.parametrize("name", PAIRWISE)


def sets(n=29, m=23, dim=3, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, dim)), dtype), jnp.asarray(1.2 * rng.normal(size=(m, dim)) + 0.3, dtype)


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


@every_pairwise
def test_jit_gives_the_same(name):
    x, y = sets()
    assert_close(jax.jit(PAIRWISE[name])(x, y), PAIRWISE[name](x, y))


@every_pairwise
def test_vmap_is_a_loop(name):
    pairs = [sets(seed=seed) for seed in range(3)]
    xs, ys = (jnp.stack(side) for side in zip(*pairs, strict=True))
    looped = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(PAIRWISE[name](x, y) for x, y in pairs))
    assert_close(jax.vmap(PAIRWISE[name])(xs, ys), looped)


@every_pairwise
def test_gradients_are_finite_also_where_samples_coincide(name):
    x, y = sets(n=23)
    y = y.at[:7].set(x[:7])

    def total(x, y):
        return sum(leaf.sum() for leaf in jax.tree.leaves(PAIRWISE[name](x, y)))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))
    for first, second in ((x, y), (x, x), (jnp.ones_like(x), jnp.ones_like(x))):
        for gradient in gradients(first, second):
            assert np.isfinite(gradient).all()


@every_pairwise
def test_scan_over_batches(name):
    pairs = [sets(seed=seed) for seed in range(2)]
    xs, ys = (jnp.stack(side) for side in zip(*pairs, strict=True))
    _, scanned = jax.lax.scan(lambda carry, pair: (carry, PAIRWISE[name](*pair)), None, (xs, ys))
    assert_close(jax.tree.map(lambda leaf: leaf[1], scanned), PAIRWISE[name](*pairs[1]))


@every_pairwise
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        x, y = sets(dtype=dtype)
        result = PAIRWISE[name](x, y)
        expected = jnp.promote_types(dtype, "float32").name
        assert {leaf.dtype.name for leaf in jax.tree.leaves(result)} == {expected}
        # 16-bit samples are measured as the float32 numbers that they are.
        assert_close(result, PAIRWISE[name](x.astype(expected), y.astype(expected)), rtol=1e-6, atol=1e-7)


@every_pairwise
def test_numpy_arrays_are_welcome(name):
    x, y = sets()
    assert_close(PAIRWISE[name](np.asarray(x), np.asarray(y)), PAIRWISE[name](x, y), rtol=0, atol=0)


@every_pairwise
def test_sharded_samples_give_the_same(name):
    x, y = sets(n=32, m=24)
    sharding = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), P("data"))
    sharded = jax.jit(PAIRWISE[name])(jax.device_put(x, sharding), jax.device_put(y, sharding))
    assert_close(sharded, PAIRWISE[name](x, y))


@every_metric
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_order_of_samples_does_not_matter(name, seed):
    x, y = sets(seed=seed)
    rng = np.random.default_rng(seed)
    assert_close(METRICS[name](rng.permutation(x), rng.permutation(y)), METRICS[name](x, y))


@every_metric
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(-20, 20))
def test_a_common_shift_does_not_matter(name, seed, shift):
    x, y = sets(seed=seed)
    x, y = (
        jnp.round(z * 64) / 64 for z in (x, y)
    )  # so that adding the shift is exact, and no neighbours change places
    shift = round(shift * 64) / 64
    assert_close(METRICS[name](x + shift, y + shift), METRICS[name](x, y), rtol=2e-4, atol=2e-5)


POWERS = {"prdc": 0, "energy_distance": 1, "sliced_wasserstein_1": 1, "frechet_distance": 2, "sliced_wasserstein_2": 2}


@pytest.mark.parametrize(("name", "power"), POWERS.items())
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), exponent=st.integers(-8, 8))
def test_scaling_the_samples(name, power, seed, exponent):
    x, y = sets(seed=seed)
    scale = 2.0**exponent
    scaled = jax.tree.map(lambda leaf: leaf / scale**power, METRICS[name](x * scale, y * scale))
    assert_close(scaled, METRICS[name](x, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["energy_distance", "frechet_distance", "mmd2", "mmd2_unbiased", "sliced_wasserstein_2"]
)
def test_symmetric(name):
    x, y = sets()
    assert_close(METRICS[name](x, y), METRICS[name](y, x))


@pytest.mark.parametrize("dim", [64, 2048])
@pytest.mark.parametrize(
    "metric",
    [
        prdc,
        functools.partial(mmd2, bandwidths=[1.0, 2.0, 4.0, 8.0]),
        functools.partial(mmd2, bandwidths=[1.0, 2.0], unbiased=True),
        energy_distance,
    ],
    ids=["prdc", "mmd2", "mmd2_unbiased", "energy_distance"],
)
def test_fifty_thousand_against_fifty_thousand_fit_in_two_gigabytes(metric, dim):
    samples = jax.ShapeDtypeStruct((50_000, dim), jnp.float32)
    used = jax.jit(metric).lower(samples, samples).compile().memory_analysis()
    assert used.temp_size_in_bytes <= 2.1 * 128 * 50_000 * 4  # what the docstrings promise
    assert used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes < 2e9


@pytest.mark.parametrize("count", [128, 129, 500])
@pytest.mark.parametrize("metric", [prdc, energy_distance], ids=["prdc", "energy_distance"])
def test_no_number_of_rows_makes_differences_of_all_pairs_stay_in_memory(metric, count):
    samples = jax.ShapeDtypeStruct((count, 1024), jnp.float32)
    used = jax.jit(metric).lower(samples, samples).compile().memory_analysis().temp_size_in_bytes
    assert used < 16 * count**2 * 4  # bytes; the differences would take 1024 * count**2 * 4


@every_pairwise
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x[0], "2 axes"),
        (lambda x: x[None], "2 axes"),
        (lambda x: x[:, :0], "feature"),
        (lambda x: x[:0], "samples"),
        (lambda x: x.at[3, 1].set(jnp.nan), "finite"),
        (lambda x: x.at[0, 0].set(jnp.inf), "finite"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_bad_samples_are_named(name, change, words, place, without_shape_checks):
    arguments = list(sets())
    arguments[place] = change(arguments[place])
    argument = NAMES.get(name, ("x", "y"))[place]
    with pytest.raises(ValueError, match=rf"{argument}\b.*{words}"):
        PAIRWISE[name](*arguments)


@every_pairwise
def test_a_single_sample_is_too_few(name, without_shape_checks):
    x, y = sets()
    first, second = NAMES.get(name, ("x", "y"))
    with pytest.raises(ValueError, match=f"{first} must hold at least 2 samples"):
        PAIRWISE[name](x[:1], y)
    if name != "mode_coverage":
        with pytest.raises(ValueError, match=f"{second} must hold at least 2 samples"):
            PAIRWISE[name](x, y[:1])


@every_pairwise
def test_different_numbers_of_features(name, without_shape_checks):
    x, y = sets()
    first, second = NAMES.get(name, ("x", "y"))
    with pytest.raises(ValueError, match=rf"{first} and {second}.*\(29, 3\).*\(23, 2\)"):
        PAIRWISE[name](x, y[:, :2])


@every_pairwise
def test_integers_are_no_features(name, without_shape_checks):
    x, y = sets()
    with pytest.raises(TypeError, match=rf"{NAMES.get(name, ('x', 'y'))[0]} .*floating.*int32"):
        PAIRWISE[name](x.astype(jnp.int32), y)


@pytest.mark.parametrize("name", ["prdc", "mmd2", "energy_distance", "sliced_wasserstein_2", "mode_coverage"])
def test_block_size_below_one(name):
    x, y = sets()
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        PAIRWISE[name](x, y, block_size=0)


@pytest.mark.parametrize(
    "name", ["prdc", "mmd2", "mmd2_unbiased", "energy_distance", "sliced_wasserstein_2", "mode_coverage"]
)
@pytest.mark.parametrize("block_size", [3, 1000])
def test_block_size_changes_nothing(name, block_size):
    x, y = sets()
    assert_close(PAIRWISE[name](x, y, block_size=block_size), PAIRWISE[name](x, y), rtol=1e-6)
