"""What the divergences do: mode-seeking ones collapse on a mode where the others cover both."""

import importlib.util
import pathlib

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "docs" / "effects" / "fdistill_mixture.py"
SEEKING, COVERING = (
    ("reverse_kl", "softened_reverse_kl"),
    ("jensen_shannon", "squared_hellinger", "forward_kl", "jeffreys"),
)


@pytest.fixture(scope="module")
def experiments():
    spec = importlib.util.spec_from_file_location("fdistill_mixture", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("reverse_kl", 1.998, 0.504),
        ("softened_reverse_kl", 1.999, 0.502),
        ("jensen_shannon", 0.0, 2.04),
        ("forward_kl", 0.0, 4.25**0.5),
    ],
)
def test_the_exact_gradient_leads_one_way_or_the_other(experiments, name, mean, std):
    run = experiments.exact_run(name)
    np.testing.assert_allclose(run[-1], [mean, std], atol=0.005)


def test_noise_alone_cures_the_collapse(experiments):
    np.testing.assert_allclose(experiments.exact_run("reverse_kl", (0.3, 1.0, 3.0))[-1], [0.0, 1.91], atol=0.005)


def test_variances_of_the_weights(experiments):
    """The closed forms for two unit Gaussians: h = r^a has relative variance exp(a^2 d^2) - 1."""
    gaps = np.array([0.5, 1.0, 2.0])
    found = experiments.variances(gaps)
    np.testing.assert_allclose(found["forward_kl"], np.expm1(gaps**2), rtol=1e-6)
    np.testing.assert_allclose(found["squared_hellinger"], np.expm1(gaps**2 / 4), rtol=1e-6)
    np.testing.assert_allclose(found["jeffreys"], np.expm1(gaps**2) / 4, rtol=1e-6)
    np.testing.assert_allclose(found["reverse_kl"], 0.0, atol=1e-12)
    np.testing.assert_allclose(found["jensen_shannon"][-1], 1.2242, rtol=1e-4)
    np.testing.assert_allclose(found["softened_reverse_kl"][-1], 0.10295, rtol=1e-4)


def test_the_weight_is_small_where_the_scores_disagree(experiments):
    found = []
    for sigma in (0.05, 0.2, 0.5, 1.0):
        ell, weight, distance = experiments.weights_and_scores(sigma)
        found.append(experiments.spearman(ell, distance))
        assert experiments.spearman(weight, distance) == pytest.approx(
            found[-1], abs=1e-3
        )  # h increases with the ratio
    np.testing.assert_allclose(found, [-0.93, -0.91, -0.82, -0.64], atol=0.02)


def check(experiments, name, seeds):
    """Every seed ends as the divergence lets expect."""
    found = experiments.summary(experiments.plane_run(name, seeds))
    if name in SEEKING:
        assert found["smaller_share"]["max"] < 0.02, found
        assert abs(found["bias"]["mean"] - 1.5) < 0.1, found
        assert found["largest_scale"]["max"] < 0.6, found
    else:
        assert found["smaller_share"]["min"] > 0.35, found
        assert 1.3 < found["largest_scale"]["min"] <= found["largest_scale"]["max"] < 1.8, found
    assert 0.3 < found["smallest_scale"]["min"] <= found["smallest_scale"]["max"] < 0.5, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon"])
def test_one_seed_with_everything_learned(experiments, name):
    check(experiments, name, 1)


@pytest.mark.effects
@pytest.mark.parametrize("name", SEEKING + COVERING)
def test_five_seeds_with_everything_learned(experiments, name):
    check(experiments, name, 5)
