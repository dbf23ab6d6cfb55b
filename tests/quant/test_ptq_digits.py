"""The page's experiment, as committed and, on demand, run again."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "effects"


def holds(results):
    """The claims of the page about one run of the experiment."""
    mse = {
        int(bits): {name: np.array(row["mse"]) for name, row in rows.items()} for bits, rows in results["bits"].items()
    }
    for rows in mse.values():
        assert (rows["FlexRound"] < rows["AdaRound"]).all()
        assert (rows["AdaRound"] < rows["RTN"]).all()
    for bits in (3, 4):
        rows = mse[bits]
        assert rows["power"].mean() < rows["RTN, symmetric"].mean()
        assert (rows["NUPES"] < rows["power"]).all()
        assert (rows["FlexRound"] < rows["NUPES"]).all()


def test_the_committed_results_are_what_the_pages_say():
    results = json.loads((FOLDER / "ptq_digits.json").read_text())
    assert results["seeds"] == [0, 1, 2, 3, 4]
    holds(results)
    pages = [(FOLDER.parent / "methods" / f"{name}.md").read_text() for name in ("flexround", "power_quant")]
    for bits, rows in results["bits"].items():
        for name, row in rows.items():
            cells = (
                f"| {bits} | {name} | {min(row['mse']):.2f} to {max(row['mse']):.2f} | {np.mean(row['accuracy']):.3f} |"
            )
            assert any(cells in page for page in pages), cells


@pytest.mark.effects
def test_flexround_beats_adaround_beats_nearest_and_nupes_beats_power():
    spec = importlib.util.spec_from_file_location("ptq_digits", FOLDER / "ptq_digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    holds(module.experiment())
