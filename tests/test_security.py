"""Nothing that comes from a file is ever executed: no unpickling, no evaluation of text, no shell."""

import ast
import json
import os
import pathlib
import tomllib

import jax.numpy as jnp
import numpy as np
import pytest

from poise.launch import ConfigError, load_quantized, save_quantized
from poise.launch.evaluate import read_statistics
from poise.quant import QuantRule, export

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
FILES = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]

CALLS = {"__import__", "compile", "eval", "exec"}  # of builtins: a method of that name is something else
MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "subprocess", "yaml"}
ATTRIBUTES = {("os", "popen"), ("os", "system"), ("pandas", "read_pickle"), ("torch", "load")}


def dangers(tree: ast.AST) -> list[str]:
    """What in a program could run something that it read, with line numbers."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"{node.lineno}: imports {name}" for name in names if name.partition(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in CALLS:
            found.append(f"{node.lineno}: calls {node.func.id}")
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            place = (node.func.value.id, node.func.attr)
            if place in ATTRIBUTES:
                found.append(f"{node.lineno}: calls {'.'.join(place)}")
            refused = any(k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in node.keywords)
            if place in {("np", "load"), ("numpy", "load")} and not refused:
                found.append(f"{node.lineno}: calls np.load without allow_pickle=False")
        if any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords):
            found.append(f"{node.lineno}: a shell")
    return found


def test_no_room_can_execute_what_it_reads():
    found = {str(file.relative_to(ROOT)): dangers(ast.parse(file.read_text(encoding="utf-8"))) for file in FILES}
    assert {file: lines for file, lines in found.items() if lines} == {}
    assert len(found) > 100


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from torch import load; import dill.source", "eval('1')", "np.load(f)",
     "np.load(f, allow_pickle=True)", "os.system('ls')", "run('ls', shell=True)"],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(code):
    assert dangers(ast.parse(code))


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: pathlib.Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_pickled_statistics_are_refused_and_not_executed(tmp_path):
    np.savez(tmp_path / "reference.npz", mu=np.array([Trap(tmp_path / "executed")], dtype=object), sigma=np.eye(1))
    with pytest.raises(ConfigError, match=r"reference.npz holds no arrays mu and sigma: Object arrays"):
        read_statistics(str(tmp_path / "reference.npz"))
    assert not (tmp_path / "executed").exists()
    trap = np.load(tmp_path / "reference.npz", allow_pickle=True)["mu"]
    assert (tmp_path / "executed").exists(), trap  # the trap would have worked


def test_a_quantized_file_that_names_code_is_only_text(tmp_path):
    path = tmp_path / "model.safetensors"
    quantized = export({"kernel": jnp.ones((4, 2))}, {}, [QuantRule("kernel", weight_bits=4)])
    save_quantized(path, quantized)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    hostile = f"__import__('os').mkdir({str(tmp_path / 'executed')!r})"
    header["__metadata__"] = {name: hostile for name in header["__metadata__"]}
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_quantized(path)
    assert not (tmp_path / "executed").exists()
