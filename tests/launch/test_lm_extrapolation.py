"""The page's table of losses by context length, as committed and, on demand, made again."""

import importlib.util
import json
import pathlib
import statistics
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "effects"


def holds(results):
    """What the page says of every seed."""
    for softmax, lssar, p3, lssa in zip(
        *(results["losses"][name] for name in ("softmax", "lssar_p15", "lssar_p3", "lssa")), strict=True
    ):
        assert lssar["loss_8x"] < softmax["loss_8x"] < p3["loss_8x"] < lssa["loss_8x"]
        assert softmax["loss_1x"] < lssar["loss_1x"] < 1.05 * softmax["loss_1x"]
        assert lssar["loss_8x"] / lssar["loss_1x"] < 1.1
        assert softmax["loss_8x"] / softmax["loss_1x"] > 1.15


def test_the_committed_results_are_what_the_page_says():
    results = json.loads((FOLDER / "lm_extrapolation.json").read_text())
    assert results["seeds"] == [1, 2, 3]
    assert str(int(results["rope_base"])) in results["loss_8x_on_validation_by_base"]
    holds(results)
    page = (FOLDER.parent / "methods" / "softplus_attention.md").read_text()
    for name, rows in results["losses"].items():
        means = (f"{statistics.mean(row[f'loss_{factor}x'] for row in rows):.3f}" for factor in (1, 2, 4, 8, 16))
        assert f"| `{name}` | {' | '.join(means)} |" in page


@pytest.mark.effects
def test_reweighting_keeps_the_loss_on_longer_texts(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("lm_extrapolation", FOLDER / "lm_extrapolation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["lm_extrapolation.py", "--folder", str(tmp_path / "runs")])
    module.main()
    holds(json.loads((tmp_path / "lm_extrapolation.json").read_text()))
