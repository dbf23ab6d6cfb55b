"""The distribution: what is built, what is in it, what importing it loads, and what its documents claim."""

import hashlib
import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import build
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PYPROJECT["project"]["version"]
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
ROOMS = {package.removeprefix("poise."): folder for package, folder in SETUPTOOLS["package-dir"].items()}
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
PAGES = sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md"))
PUBLIC_API = ROOT / "tests" / "public_api.txt"


def build_in(source: pathlib.Path, kind: str, target: pathlib.Path) -> pathlib.Path:
    """Builds with the setuptools that is installed, so that nothing is downloaded."""
    return pathlib.Path(build.ProjectBuilder(source).build(kind, target))


def contents(wheel: pathlib.Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """A wheel and an sdist, built from a copy so that the checkout stays clean."""
    base = tmp_path_factory.mktemp("distributions")
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "venv")
    source = pathlib.Path(shutil.copytree(ROOT, base / "source", ignore=unwanted))
    return build_in(source, "wheel", base / "wheel"), build_in(source, "sdist", base / "sdist")


def test_packages_are_the_folders_that_hold_one():
    rooms = {path.parent for path in ROOT.glob("*/__init__.py")}
    folders = {path.parent for room in rooms for path in room.rglob("__init__.py")}
    expected = ["poise." + ".".join(folder.relative_to(ROOT).parts) for folder in folders]
    assert sorted(SETUPTOOLS["packages"]) == sorted(expected)
    assert {room.name: room.name for room in rooms} == ROOMS


def test_every_folder_of_code_is_a_package():
    for room in ROOMS.values():
        for file in (ROOT / room).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), f"{file.relative_to(ROOT)} would not be shipped"


def test_wheel_holds_poise_and_nothing_else(distributions):
    wheel = distributions[0]
    assert wheel.name == f"poise-{VERSION}-py3-none-any.whl"
    expected = {
        "poise/" + file.relative_to(ROOT).as_posix()
        for room in ROOMS.values()
        for file in [*(ROOT / room).rglob("*.py"), ROOT / room / "py.typed"]
    }
    names = contents(wheel).keys()
    code = {name for name in names if not name.startswith(f"poise-{VERSION}.dist-info/")}
    assert code == expected
    assert {f"poise/{room}/py.typed" for room in ROOMS} <= code
    assert "poise/__init__.py" not in code  # a namespace


def test_wheel_says_what_it_is(distributions):
    with zipfile.ZipFile(distributions[0]) as archive:
        information = archive.read(f"poise-{VERSION}.dist-info/METADATA").decode()
        license_text = archive.read(f"poise-{VERSION}.dist-info/licenses/LICENSE").decode()
    assert f"\nVersion: {VERSION}\n" in information
    assert f"\nRequires-Python: {PYPROJECT['project']['requires-python']}\n" in information
    assert "\nLicense-Expression: Apache-2.0\n" in information
    for requirement in PYPROJECT["project"]["dependencies"]:
        assert f"\nRequires-Dist: {requirement}\n" in information
    assert license_text == (ROOT / "LICENSE").read_text()


def test_sdist_builds_the_same_wheel(distributions, tmp_path):
    wheel, sdist = distributions
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    rebuilt = build_in(tmp_path / f"poise-{VERSION}", "wheel", tmp_path / "rebuilt")
    assert contents(rebuilt) == contents(wheel)


def test_sdist_holds_the_sources_alone(distributions):
    with tarfile.open(distributions[1]) as archive:
        top = {pathlib.PurePath(name).parts[1] for name in archive.getnames() if "/" in name}
    documents = {"CHANGELOG.md", "LICENSE", "README.md"}
    generated = {"PKG-INFO", "poise.egg-info", "setup.cfg"}
    assert top == {*ROOMS.values(), *documents, *generated, "MANIFEST.in", "pyproject.toml"}


HEAVY = {
    "array_record",
    "grain",
    "matplotlib",
    "orbax",
    "safetensors",
    "scipy.stats",
    "sklearn",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
    "tqdm",
}
LIBRARIES = ["chex", "flax.linen", "jax", "jaxtyping", "optax"]
ROOMS_IN_ORDER = sorted(f"poise.{room}" for room in ROOMS)
IMPORTS = ["poise.launch", "jax", "jaxtyping", "poise.core", "chex", "flax.linen", "optax", *ROOMS_IN_ORDER]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The modules that each of IMPORTS adds, in that order, in a fresh interpreter."""
    script = """if True:
        import importlib, json, sys
        added, before = {}, set(sys.modules)
        for name in sys.argv[1:]:
            importlib.import_module(name)
            added[name] = added.get(name, []) + sorted(set(sys.modules) - before)
            before = set(sys.modules)
        print(json.dumps(added))
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command, folder = [sys.executable, "-c", script, *IMPORTS], tmp_path_factory.mktemp("imports")
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return {name: set(modules) for name, modules in json.loads(result.stdout).items()}


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_importing_a_room_loads_no_more_than_it_needs(room, loaded):
    name = f"poise.{room}"
    assert name in set().union(*loaded.values())  # some come with another one
    assert not loaded[name] & HEAVY
    assert not any(module.startswith("poise.launch.") for module in loaded[name])  # what launchers are made of
    # Of others' modules only parts of the libraries that load when they are first used.
    others = sorted(module for module in loaded[name] if not module.startswith("poise"))
    assert len(others) <= 20, f"{name} loads {len(others)} modules besides {', '.join(LIBRARIES)}: {others}"


def test_importing_the_launchers_or_the_contract_loads_nothing_slow(loaded):
    assert not loaded["poise.launch"] & (HEAVY | {"absl", "flax", "jax", "numpy", "optax"})
    assert "jax" in loaded["jax"]
    assert not loaded["poise.core"] & {"absl", "chex", "flax", "optax"}


def public_names() -> list[str]:
    """Every public name with its package, sorted."""
    modules = [importlib.import_module(package) for package in SETUPTOOLS["packages"]]
    return sorted(f"{module.__name__}.{name}" for module in modules for name in module.__all__)


def test_public_names_are_those_of_the_list():
    listed = PUBLIC_API.read_text().splitlines()
    came, went = sorted(set(public_names()) - set(listed)), sorted(set(listed) - set(public_names()))
    changed = f"public names that came: {', '.join(came) or 'none'}; that went: {', '.join(went) or 'none'}"
    assert listed == public_names(), (
        f"{changed}. If that is meant, `python tests/test_package.py` writes tests/public_api.txt anew; tell users in"
        " CHANGELOG.md, and see the policy on names that go in CONTRIBUTING.md"
    )


def test_public_names_exist():
    for name in public_names():
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), f"{name} is in __all__ and doesn't exist"


@pytest.mark.parametrize("document", [*DOCUMENTS, *PAGES])
def test_links_and_paths_of_a_document_exist(document):
    text, folder = (ROOT / document).read_text(), (ROOT / document).parent
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link and not link.startswith("#")]
    sources = re.findall(r"""(?:src|href)=["']([^"']+)["']""", text)
    # Code in backticks that is a path: a folder with a slash behind it, or a file in a folder; `runs/` is output.
    quoted = re.findall(r"`([\w.-]+(?:/[\w.-]+)*(?:/|/[\w-]*\.\w+))`", text)
    for path in [*links, *(s for s in sources if "://" not in s)]:
        assert (folder / path.partition("#")[0]).exists(), f"{document} links to {path}, which does not exist"
    if document in DOCUMENTS:  # pages name files of a run, too
        for path in (q for q in quoted if not q.startswith("runs/")):
            assert (ROOT / path).exists(), f"{document} names {path}, which does not exist"


@pytest.mark.parametrize("document", [*DOCUMENTS, *PAGES])
def test_commands_of_a_document_name_modules_that_exist(document):
    for module in re.findall(r"python3? -m (poise\.[\w.]+)", (ROOT / document).read_text()):
        place = ROOT.joinpath(*module.removeprefix("poise.").split("."))
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), f"{document} runs {module}"


def test_the_site_lists_every_page_once():
    listed = re.findall(r"^ +- (?:.*: )?([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(f"docs/{page}" for page in listed) == PAGES


def test_changelog_begins_with_this_version():
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert versions[0] == VERSION
    assert len(set(versions)) == len(versions)


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    fields = dict(re.findall(r"^([\w-]+): (\S.*)$", citation, flags=re.MULTILINE))
    assert fields["version"] == VERSION
    assert fields["license"] == PYPROJECT["project"]["license"]
    assert re.findall(r"^  - name: (.*)$", citation, flags=re.MULTILINE) == [
        author["name"] for author in PYPROJECT["project"]["authors"]
    ]


def test_tests_mirror_the_rooms():
    for folder in (ROOT / "tests").iterdir():
        if folder.is_dir() and any(folder.glob("test_*.py")):
            assert folder.name in {*ROOMS, "benchmarks", "docs", "notebooks"}, f"tests/{folder.name} mirrors no room"


if __name__ == "__main__":
    PUBLIC_API.write_text("".join(f"{name}\n" for name in public_names()))
