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

MODULES = {"builtins", "cloudpickle", "dill", "joblib", "marshal", "pickle", "runpy", "shelve", "subprocess", "yaml"}
CALLS = {"__import__", "compile", "eval", "exec"}  # as names: a method that is called so is something else
ATTRIBUTES = {"os.popen", "os.system", "pandas.read_pickle", "torch.load"}


def origins(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for, with dots."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dangers(tree: ast.AST) -> list[str]:
    """What in a program could run something that it read, with line numbers."""
    names, found = origins(tree), []
    imported = {name.partition(".")[0] for name in names.values()}
    found += [f"imports {name}" for name in sorted(imported & MODULES)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        first, _, rest = called.partition(".")
        whole = names.get(first, first) + ("." + rest if rest else "")
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        loads = whole in {"numpy.load", "jax.numpy.load"} and keywords.get("allow_pickle") != "False"
        spawns = whole.startswith(("os.exec", "os.spawn", "os.posix_spawn"))
        shell = keywords.get("shell", "False") != "False"
        if whole in CALLS or whole in ATTRIBUTES or loads or spawns or shell:
            found.append(f"{node.lineno}: calls {whole}")
        if keywords.get("allow_pickle", "False") != "False":
            found.append(f"{node.lineno}: allows pickles")
        arguments = {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
        if whole == "importlib.import_module" and arguments & MODULES:
            found.append(f"{node.lineno}: imports {arguments}")
    return found


def test_no_room_can_execute_what_it_reads():
    found = {str(file.relative_to(ROOT)): dangers(ast.parse(file.read_text(encoding="utf-8"))) for file in FILES}
    assert {file: lines for file, lines in found.items() if lines} == {}
    assert len(found) > 100


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import dill.source",
        "import os, subprocess as s",
        "from torch import load; load(f)",
        "import torch; torch.load(f)",
        "eval('1')",
        "import builtins; builtins.eval('1')",
        "import numpy as np; np.load(f)",
        "import numpy as np; np.load(f, allow_pickle=True)",
        "import jax.numpy as jnp; jnp.load(f, allow_pickle=True)",
        "from numpy import load; load(f)",
        "import pandas as pd; pd.read_pickle(f)",
        "import os; os.system('ls')",
        "from os import system; system('ls')",
        "import os; os.execv('ls', [])",
        "import importlib; importlib.import_module('pickle')",
        "run('ls', shell=True)",
    ],
)
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
