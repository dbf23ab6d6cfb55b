"""Every example in every docstring runs and gives what it says, with the shape annotations checked."""

import ast
import doctest
import importlib
import pathlib
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {folder: package for package, folder in SETUPTOOLS["package-dir"].items()}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def examples(file: pathlib.Path, name: str) -> list[doctest.DocTest]:
    """The examples of a file, read from its text: finders of objects miss whatever a decorator has wrapped."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if text and ">>>" in text:
            place = f"{name}.{getattr(node, 'name', '')}"
            found.append(doctest.DocTestParser().get_doctest(text, {}, place, str(file), getattr(node, "lineno", 0)))
    return found


def modules_with_examples() -> dict[str, list[doctest.DocTest]]:
    modules = {}
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            inner = file.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *(inner[:-1] if inner[-1] == "__init__" else inner)))
            if tests := examples(file, name):
                modules[name] = tests
    return modules


MODULES = modules_with_examples()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    report = []
    for test in MODULES[name]:
        test.globs = dict(vars(module))
        result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
        assert result.attempted > 0
        assert result.failed == 0, "".join(report)


def test_every_room_has_examples():
    assert {name.split(".")[1] for name in MODULES} == {package.split(".")[1] for package in FOLDERS.values()}
