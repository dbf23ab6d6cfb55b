"""Ratios, bins and weights: parity, normalisation, devices, extremes, errors."""

import inspect
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.fdistill import (
    DIVERGENCES,
    RatioBins,
    bin_index,
    divergence,
    effective_sample_size,
    fastgen_weight,
    from_function,
    init_ratio_bins,
    log_ratio,
    normalize_log_ratio,
    normalized_weight,
    scale,
)

FASTGEN = {
    "kl": lambda: divergence("forward_kl"),
    "js": lambda: divergence("jensen_shannon"),
    "sf": lambda: divergence("softened_reverse_kl"),
    "jf": lambda: divergence("jeffreys"),
    "sh": lambda: scale(divergence("squared_hellinger"), 4.0),
    "neyman": lambda: scale(divergence("neyman_chi2"), 0.5),
}


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "fastgen_h*.npz")
@pytest.mark.parametrize("name", FASTGEN)
def test_fastgen(golden_file, name):
    data = np.load(golden_file)
    logits = [jnp.asarray(data[f"logits{call}"]) for call in range(2)]
    options = {
        "sigma_range": (float(data["min_t"]), float(data["max_t"])),
        "ratio_range": (float(data["ratio_lower"]), float(data["ratio_upper"])),
    }
    for kind, decay in [("ema", float(data["ratio_ema_rate"])), ("noema", 0.0)]:
        bins = init_ratio_bins(int(data["bin_num"]))
        for call in range(2):
            with jax.enable_x64():  # levels are float64 there, which decides at the edges of bins
                h, bins = fastgen_weight(
                    FASTGEN[name](), logits[call], jnp.asarray(data[f"t{call}"]), bins, decay=decay, **options
                )
            assert h.dtype == bins.log_mean.dtype == jnp.float32
            np.testing.assert_allclose(h, data[f"{name}_bin{kind}_h{call}"], rtol=5e-6)
            np.testing.assert_allclose(jnp.exp(bins.log_mean), data[f"bins_after{call}_{kind}"], rtol=5e-6)
    for call in range(2):
        h, bins = fastgen_weight(FASTGEN[name](), logits[call], ratio_range=options["ratio_range"])
        np.testing.assert_allclose(h, data[f"{name}_raw_h{call}"], rtol=5e-6)
        assert bins is None


def test_log_ratio_averages_heads_and_clips():
    logits = jax.random.normal(jax.random.key(0), (6, 3))
    np.testing.assert_allclose(log_ratio(logits), logits.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(log_ratio(jnp.tile(logits, (1, 2))), log_ratio(logits), rtol=1e-6)  # a head twice
    far = jnp.array([[30.0], [-30.0], [jnp.inf]])
    assert log_ratio(far).tolist() == [10.0, -10.0, 10.0]
    assert log_ratio(far, clip=None).tolist() == [30.0, -30.0, jnp.inf]
    np.testing.assert_allclose(jnp.exp(log_ratio(far, ratio_range=(0.1, 20.0))), [20.0, 0.1, 20.0], rtol=1e-6)
    assert log_ratio(jnp.ones((2, 1), jnp.bfloat16)).dtype == jnp.float32


def test_no_gradient_passes():
    div = divergence("js")
    sigma = jnp.array([0.1, 0.2, 30.0])

    def weights(logits, bins):
        ell, bins, calibration = normalize_log_ratio(log_ratio(logits), bin_index(sigma), bins, 0.9)
        h = normalized_weight(div, ell)
        return (h**2).sum() + calibration.sum() + bins.log_mean.sum() + effective_sample_size(h)

    gradients = jax.grad(weights, argnums=(0, 1))(jnp.array([[1.0], [2.0], [-1.0]]), init_ratio_bins(10))
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", [*DIVERGENCES, "alpha(0.7)", "skew_js(0.1)"])
def test_mean_weight_is_one(name):
    div = divergence(name)
    for seed, spread in [(0, 1.0), (1, 30.0)]:
        ell = spread * jax.random.normal(jax.random.key(seed), (64,))
        h = normalized_weight(div, ell)
        np.testing.assert_allclose(h.mean(), 1.0, rtol=1e-6)
        np.testing.assert_allclose(normalized_weight(scale(div, 7.0), ell), h, rtol=5e-5)
    extreme = normalized_weight(div, jnp.array([-80.0, 80.0, 0.0, 80.0]))
    assert np.all(np.isfinite(extreme))
    np.testing.assert_allclose(extreme.mean(), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(normalized_weight(div, jnp.full(5, 3.0)), np.ones(5))  # equal ratios: exactly 1


def test_reverse_kl_is_unweighted_exactly():
    ell = 20 * jax.random.normal(jax.random.key(0), (33,))
    np.testing.assert_array_equal(normalized_weight(divergence("reverse_kl"), ell), np.ones(33, np.float32))


def test_single_example_warns_and_is_unweighted():
    with pytest.warns(UserWarning, match="plain reverse-KL"):
        h = normalized_weight(divergence("js"), jnp.array([3.0]))
    assert h.tolist() == [1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normalized_weight(divergence("reverse_kl"), jnp.array([3.0]))
        normalized_weight(divergence("js"), jnp.array([3.0, 1.0]))


def test_custom_generator_gives_the_named_weights():
    ell = jax.random.normal(jax.random.key(0), (20,))
    own = from_function(lambda r: r * jnp.log(r) + 2 * (r - 1))
    np.testing.assert_allclose(normalized_weight(own, ell), normalized_weight(divergence("forward_kl"), ell), rtol=1e-5)


def test_bins_cut_the_karras_index_evenly():
    with jax.enable_x64():
        i = (jnp.arange(1000) + 0.5) / 1000
        sigma = (0.002 ** (1 / 7) + i * (80.0 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
        counts = jnp.bincount(bin_index(sigma, num_bins=8), length=8)
        assert counts.tolist() == [125] * 8
        linear = bin_index(sigma, kind="linear")
        np.testing.assert_array_equal(linear, np.clip(np.floor((np.asarray(sigma) - 0.002) / (79.998 / 10)), 0, 9))
        assert 0.63 < float(jnp.mean(linear == 0)) < 0.66
    ends = jnp.array([0.0, 0.002, 80.0, 1e4])
    for kind in ("karras", "linear"):
        assert bin_index(ends, kind=kind).tolist() == [0, 0, 9, 9]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_bins_follow_their_recursion(decay):
    key = jax.random.key(3)
    bins = init_ratio_bins(4)
    expected = np.ones(4)
    for step in range(4):
        ell = jax.random.normal(jax.random.fold_in(key, step), (10,))
        index = jax.random.randint(jax.random.fold_in(key, 100 + step), (10,), 0, 3 + step % 2)
        ratio = np.exp(np.asarray(ell, np.float64))
        normalized, bins, calibration = normalize_log_ratio(ell, index, bins, decay)
        for b in range(4):
            inside = ratio[np.asarray(index) == b]
            np.testing.assert_allclose(calibration[b], inside.mean() if inside.size else 1.0, rtol=1e-5)
            if inside.size:
                expected[b] = decay * expected[b] + (1 - decay) * inside.mean()
        np.testing.assert_allclose(jnp.exp(bins.log_mean), expected, rtol=1e-5)
        np.testing.assert_allclose(jnp.exp(normalized), ratio / expected[np.asarray(index)], rtol=1e-5)


def test_bins_survive_extremes_and_empty_bins():
    ell = jnp.array([80.0, -80.0, 700.0, -700.0, 0.0])
    normalized, bins, calibration = normalize_log_ratio(ell, jnp.array([0, 0, 1, 2, 2]), init_ratio_bins(5), 0.0)
    assert np.all(np.isfinite(normalized))
    assert np.all(np.isfinite(bins.log_mean))
    assert not np.any(np.isnan(calibration))
    assert calibration[3:].tolist() == [1.0, 1.0]
    assert bins.log_mean[3:].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(normalized[2], 0.0, atol=1e-4)  # alone in its bin


@pytest.mark.parametrize(
    ("name", "eps", "mapped"), [("jensen_shannon", 0.0, jax.pmap), ("pearson_chi2", 1e-6, jax.vmap)]
)
def test_devices_agree_with_one(name, eps, mapped):
    div = divergence(name)
    ell = 3 * jax.random.normal(jax.random.key(0), (32,))
    index = jax.random.randint(jax.random.key(1), (32,), 0, 4)
    bins = init_ratio_bins(5)

    def weigh(ell, index, axis_name):
        ell, new, calibration = normalize_log_ratio(ell, index, bins, 0.5, axis_name, eps)
        h = normalized_weight(div, ell, axis_name, eps)
        return h, (new.log_mean, calibration, effective_sample_size(h, axis_name))

    h, rest = weigh(ell, index, None)
    spread = mapped(lambda l, i: weigh(l, i, "data"), axis_name="data")
    h8, rest8 = spread(ell.reshape(8, 4), index.reshape(8, 4))
    np.testing.assert_allclose(h8.reshape(-1), h, rtol=1e-5)
    for one, eight in zip(rest, rest8, strict=True):
        np.testing.assert_allclose(eight, np.broadcast_to(one, eight.shape), rtol=1e-5, atol=1e-6)


def test_one_example_on_each_of_eight_devices_is_a_batch_of_eight():
    ell = jnp.linspace(-2.0, 2.0, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        h = jax.vmap(lambda l: normalized_weight(divergence("js"), l, "data"), axis_name="data")(ell[:, None])
    np.testing.assert_allclose(h[:, 0], normalized_weight(divergence("js"), ell), rtol=1e-6)


def test_expected_ratio_is_one_under_the_student():
    # r = p/q of two Gaussians, sampled from q: the calibration is 1 to Monte Carlo error.
    x = jax.random.normal(jax.random.key(0), (20000,))
    ell = 0.5 * x - 0.125  # log N(x; .5, 1) - log N(x; 0, 1)
    _, _, calibration = normalize_log_ratio(ell, jnp.arange(20000) % 2, init_ratio_bins(2), 0.0)
    np.testing.assert_allclose(calibration, 1.0, atol=4 * math.sqrt((math.exp(0.25) - 1) / 10000))


@pytest.mark.parametrize(
    ("name", "value"),
    [("reverse_kl", 0.0), ("jensen_shannon", 1.2242), ("softened_reverse_kl", 0.10295), ("triangular", 1.5547)],
)
def test_variance_of_weights_between_unit_gaussians_two_apart(name, value):
    with jax.enable_x64():
        x = jnp.linspace(-14.0, 14.0, 4001)
        q = jnp.exp(-0.5 * x**2)
        h = jnp.exp(divergence(name).log_weight(2.0 * x - 2.0))
        first, second = (q * h).sum() / q.sum(), (q * h**2).sum() / q.sum()
        np.testing.assert_allclose(second / first**2 - 1, value, rtol=5e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "exponent"),
    [("forward_kl", 1.0), ("squared_hellinger", 0.25), ("pearson_chi2", 4.0), ("neyman_chi2", 1.0), ("jeffreys", None)],
)
@pytest.mark.parametrize("gap", [0.5, 1.5])
def test_closed_forms_of_the_variance(name, exponent, gap):
    with jax.enable_x64():
        x = jnp.linspace(-16.0, 16.0, 4001)
        q = jnp.exp(-0.5 * x**2)
        h = jnp.exp(divergence(name).log_weight(gap * x - gap**2 / 2))
        first, second = (q * h).sum() / q.sum(), (q * h**2).sum() / q.sum()
        expected = math.expm1(gap**2) / 4 if exponent is None else math.expm1(exponent * gap**2)
        np.testing.assert_allclose(second / first**2 - 1, expected, rtol=1e-9)


def test_effective_sample_size():
    assert float(effective_sample_size(jnp.ones(7))) == 7.0
    assert float(effective_sample_size(jnp.array([0.0, 3.0, 0.0]))) == 1.0
    assert float(effective_sample_size(jnp.zeros(3))) == 0.0
    h = jnp.array([0.5, 1.5, 2.0])
    np.testing.assert_allclose(effective_sample_size(h), 16 / 6.5, rtol=1e-6)
    np.testing.assert_allclose(effective_sample_size(1e30 * h), 16 / 6.5, rtol=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(-15, 15, width=32), min_size=6, max_size=6), st.sampled_from(DIVERGENCES), st.randoms())
def test_permutations(values, name, random):
    div = divergence(name)
    order = list(range(len(values)))
    random.shuffle(order)
    ell, order = jnp.asarray(values, jnp.float32), jnp.asarray(order)
    index = jnp.arange(len(values)) % 3

    def weigh(ell, index):
        ell, _, _ = normalize_log_ratio(ell, index, init_ratio_bins(3), 0.5)
        return normalized_weight(div, ell)

    np.testing.assert_allclose(weigh(ell[order], index[order]), weigh(ell, index)[order], rtol=1e-4, atol=1e-30)
    np.testing.assert_allclose(jax.jit(weigh)(ell, index), weigh(ell, index), rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inspect.unwrap(log_ratio)(jnp.ones(3)), r"logits must have shape \[batch, heads\]"),
        (lambda: log_ratio(jnp.ones((3, 0))), "at least one head"),
        (lambda: log_ratio(jnp.ones((3, 1)), clip=0.0), "clip must lie"),
        (lambda: log_ratio(jnp.ones((3, 1)), ratio_range=(0.0, 1.0)), r"ratio_range\[0\] must lie"),
        (lambda: log_ratio(jnp.ones((3, 1)), ratio_range=(2.0, 1.0)), r"ratio_range\[1\] must lie"),
        (lambda: init_ratio_bins(0), "num_bins must be at least 1"),
        (lambda: bin_index(jnp.ones(3), num_bins=0), "num_bins must be at least 1"),
        (lambda: bin_index(jnp.ones(3), (1.0, 1.0)), r"sigma_range\[1\] must lie"),
        (lambda: bin_index(jnp.ones(3), kind="log"), "kind must be one of karras, linear"),
        (lambda: bin_index(jnp.ones(3), rho=0.0), "rho must lie"),
        (lambda: normalize_log_ratio(jnp.ones(3), jnp.zeros(3, int), init_ratio_bins(2), 1.0), "decay must lie"),
        (lambda: normalize_log_ratio(jnp.ones(3), jnp.zeros(3, int), init_ratio_bins(2), -0.1), "decay must lie"),
        (
            lambda: inspect.unwrap(normalize_log_ratio)(jnp.ones(3), jnp.zeros(2, int), init_ratio_bins(2), 0.5),
            "log_ratio and index",
        ),
        (lambda: normalized_weight(divergence("js"), jnp.ones(3), eps=-1.0), "eps must lie"),
        (lambda: inspect.unwrap(normalized_weight)(divergence("js"), jnp.ones((3, 1))), "log_ratio must have shape"),
        (lambda: inspect.unwrap(effective_sample_size)(jnp.ones((3, 1))), "weight must have shape"),
        (lambda: fastgen_weight(divergence("js"), jnp.ones((3, 1)), bins=init_ratio_bins(2)), "sigma must be given"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bins_scan():
    def body(bins, ell):
        normalized, bins, _ = normalize_log_ratio(ell, jnp.zeros(4, jnp.int32), bins, 0.9)
        return bins, normalized

    bins, _ = jax.lax.scan(body, init_ratio_bins(2), jnp.full((200, 4), 1.5))
    assert isinstance(bins, RatioBins)
    np.testing.assert_allclose(bins.log_mean, [1.5, 0.0], atol=1e-5)
