"""The gallery of optimizers: what its page says is what was measured, and its script runs."""

import importlib
import inspect
import json
import pathlib
import re

import jax
import numpy as np
import pytest

import poise.optim

ROOT = pathlib.Path(__file__).parents[2]
EFFECTS = ROOT / "docs" / "effects"
RESULTS = json.loads((EFFECTS / "optim_gallery.json").read_text())
PAGE = (ROOT / "docs" / "methods" / "gallery.md").read_text()


@pytest.fixture(name="gallery")
def gallery_script(monkeypatch):
    monkeypatch.syspath_prepend(EFFECTS)
    return importlib.import_module("optim_gallery")


def test_the_tables_of_the_page_are_those_of_the_results(gallery):
    tables = importlib.import_module("optim_gallery_tables").tables(RESULTS)
    assert set(tables) == {"valley", "constraint", "free", "same", "cone", "angle"}
    for name, table in tables.items():
        assert f"\n\n{table}\n\n" in PAGE, f"the table {name} is not that of optim_gallery.json"
    assert PAGE.count("\n|---") == len(tables)
    for figure in ("valley", "constraint", "cone", "angle"):
        assert f"(../effects/optim_gallery_{figure}.png)" in PAGE
        assert (EFFECTS / f"optim_gallery_{figure}.png").stat().st_size > 10_000


# Functions that are parts, measures, or runs of what the gallery shows.
ELSEWHERE = {
    "adamp_view",
    "batch_perceptron",
    "companded_scales",
    "companding",
    "companding_bound",
    "companding_grad",
    "companding_inverse",
    "effective_sample_size_from_log_weights",
    "flax_channel_axes",
    "iterations_to_separate",
    "lion_kappa_constraint_violation",
    "lion_kappa_lyapunov",
    "lion_kappa_stationarity_gap",
    "logistic_gd",
    "meco_init",
    "normalized_logistic_weights",
    "path_of_rule",
    "prox_wgsef",
    "sso_step",
    "wgsef_conjugate",
    "wgsef_penalty",
    "wgsef_top_k_mask",
}


def test_every_optimizer_and_kappa_has_a_panel_or_a_reason():
    functions = {name for name in poise.optim.__all__ if inspect.isfunction(getattr(poise.optim, name))}
    shown = {name for name in functions if re.search(rf"\b{name}\b", PAGE)}
    assert functions - shown == ELSEWHERE
    words = {re.match(r"\w+", name).group() for name in [*RESULTS["constraint"], *RESULTS["same"]]}
    assert set(poise.optim.kappas.__all__) - {"Kappa", "MatrixAxes"} <= words


def test_lion_kappa_ended_at_the_minimum_of_its_problem(gallery):
    """The minimum that scipy found is stationary for Lion-kappa, which came from outside and ended there, inside."""
    rows = {name: row for name, row in RESULTS["constraint"].items() if "gap_of_minimum" in row}
    assert len(rows) == len(gallery.KAPPAS) + 1
    for name, row in rows.items():
        assert abs(row["gap_of_minimum"]) < 1e-6, name
        assert row["distance"] < 1e-3, name
        before, after = row["outside"]
        assert (before > 0.5) == (name != "squared_l2"), name
        assert after < 1e-9, name
        assert np.linalg.norm(np.array(row["minimum"]) - gallery.FREE_MINIMUM) > 0.4
    assert max(RESULTS["same"].values()) < 1e-12
    assert all(row["loss"] < 0.2 for row in RESULTS["valley"].values())
    assert RESULTS["angle"]["adamp"]["length"] < 1.2 < 2 < RESULTS["angle"]["optax.adamw"]["length"]
    assert RESULTS["angle"]["sgdp"]["length"] < 1.5 < 5 < RESULTS["angle"]["optax.sgd, nesterov"]["length"]


@pytest.mark.slow
def test_the_script_runs_on_a_few_optimizers(gallery, monkeypatch, tmp_path):
    monkeypatch.setattr(gallery, "RATES", np.array([1e-3, 1e-2]))
    monkeypatch.setattr(gallery, "SPINNERS", {"sgdp": gallery.SPINNERS["sgdp"]})
    names = ("sign", "nuclear", "apply_prox, ball", "optax.adamw")
    run = gallery.experiment(steps=40, names=names)
    results = gallery.summary(run)
    assert set(results["constraint"]) == set(names)
    assert set(results["valley"]) == {"sign", "nuclear", "optax.adamw", "armijo_gradient_descent", "sso"}
    assert results["same"] == {"top_k(2) is sign": 0.0, "optax.lion is sign": 0.0}
    assert len(run.ball["sign"]) == 41
    starts = {name: path[0].tolist() for name, (path, _) in run.valley.items()}
    assert all(start == gallery.VALLEY_START.tolist() for start in starts.values())
    assert all(np.isfinite(path).all() for path in run.ball.values())
    # half a cosine from 0.1 down to 0 is worth half of 40 steps of 0.1
    distance = np.maximum(np.abs(run.ball["sign"]) - 1, 0).max(1)
    rates = 0.05 * (1 + np.cos(np.pi * np.arange(40) / 40))
    assert (distance[1:] <= (1 - rates) * distance[:-1] + 1e-12).all()
    assert results["constraint"]["sign"]["minimum"] == pytest.approx([1.0, 0.76], abs=1e-7)
    importlib.import_module("optim_gallery_figures").draw(run, results, tmp_path)
    assert len(list(tmp_path.glob("optim_gallery_*.png"))) == 4


@pytest.mark.effects
def test_effect_the_whole_gallery_gives_the_results_that_are_shown(gallery):
    with jax.enable_x64(False):
        results = gallery.summary(gallery.experiment())
    assert results["cone"] == RESULTS["cone"]
    for name, row in results["constraint"].items():
        np.testing.assert_allclose(row["end"], RESULTS["constraint"][name]["end"], atol=1e-3)
        assert row.get("distance", 0) < max(2e-3, 1.1 * RESULTS["constraint"][name].get("distance", 0))
    for name, row in results["valley"].items():
        assert row["rate"] == RESULTS["valley"][name]["rate"]
    for name, row in results["angle"].items():
        assert row["length"] == pytest.approx(RESULTS["angle"][name]["length"], rel=1e-3)
