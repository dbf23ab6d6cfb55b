"""`python -m poise.launch` lists every command, without importing any."""

import pathlib
import subprocess
import sys

import poise.launch


def test_every_command_is_listed_with_its_sentence():
    folder = pathlib.Path(poise.launch.__file__).parent
    commands = {
        path.stem for path in folder.glob("*.py") if "run_tool(" in path.read_text() or " launch(" in path.read_text()
    }
    run = subprocess.run([sys.executable, "-m", "poise.launch"], capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=1) for line in run.stdout.splitlines() if line.startswith("  ")]
    listed = {name for name, _ in lines}
    assert {"distill", "value", "qat", "report"} <= listed == commands - {"main"}
    assert all(sentence.endswith(".") and 20 < len(sentence) < 130 for _, sentence in lines)


IMPORTS = """
import runpy, sys
try:
    runpy.run_module("poise.launch", run_name="__main__")
except SystemExit:
    assert "jax" not in sys.modules
else:
    raise AssertionError("it should exit")
"""


def test_nothing_heavy_is_imported():
    run = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
