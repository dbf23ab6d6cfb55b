"""Every notebook runs from its first cell to its last, at a size that takes seconds."""

import json
import pathlib
import re

import matplotlib
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(notebook, kind):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


# One calls a launcher, which test_distill_launcher.py runs at the same size: a minute and a half.
TIERS = {path: pytest.mark.effects if path.stem == "distillation" else pytest.mark.slow for path in NOTEBOOKS}


@pytest.mark.parametrize("path", [pytest.param(path, marks=tier, id=path.stem) for path, tier in TIERS.items()])
def test_it_runs(path, tmp_path, monkeypatch):
    """The numbers of the cell tagged `sizes` give way to those in the notebook's field `smoke`."""
    notebook = read(path)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    scope, smoke = {"__name__": "__main__"}, notebook["metadata"]["smoke"]
    for number, cell in enumerate(cells(notebook, "code"), 1):
        code = "".join(cell["source"])
        if "sizes" in cell["metadata"].get("tags", []):
            for name, value in smoke.items():
                code, found = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", code)
                assert found == 1, name
        exec(compile(code, f"cell {number}", "exec"), scope)
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_it_is_committed_with_the_outputs_of_a_whole_run(path):
    notebook = read(path)
    code = cells(notebook, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert cells(notebook, "markdown")[0]["source"][0].startswith("# ")


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3
