"""Imports only go down: the rooms' floors, what each floor may know, and no circle anywhere."""

import ast
import graphlib
import pathlib
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
ROOMS = {package.removeprefix("poise."): folder for package, folder in SETUPTOOLS["package-dir"].items()}

FLOORS = {
    "core": 0,
    "attention": 1,
    "ensembles": 1,
    "losses": 1,
    "metrics": 1,
    "optim": 1,
    "quant": 1,
    "weighting": 1,
    "nets": 2,
    "dynamics": 3,
    "fdistill": 3,
    "rl": 3,
    "launch": 4,
}
SIDEWAYS = {("quant", "optim")}  # within a floor only where a method needs it
LAUNCH_FLOOR = 4

ARRAYS = {"jax", "jaxtyping", "numpy"}
LIBRARIES = ARRAYS | {"chex", "flax", "optax"}
# Files, logs, processes and command lines are the launchers' business.
OUTSIDE_WORLD = {
    "argparse",
    "io",
    "logging",
    "os",
    "pathlib",
    "shutil",
    "socket",
    "subprocess",
    "tempfile",
    "threading",
}


def module_of(file: pathlib.Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("poise", *(parts[:-1] if parts[-1] == "__init__" else parts)))


FILES = {module_of(file): file for folder in ROOMS.values() for file in sorted((ROOT / folder).rglob("*.py"))}
every_module = pytest.mark.parametrize("module", FILES)


def imports(module: str, at_import_only: bool = False) -> set[str]:
    """The modules that a module names in its imports, also inside functions unless `at_import_only`."""

    def statements(node):
        for child in ast.iter_child_nodes(node):
            if at_import_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if at_import_only and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            yield child
            yield from statements(child)

    found = set()
    for node in statements(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively; poise is only imported by its full name"
            # What is imported from a package may be a module itself.
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (named & FILES.keys()) or {node.module}
    return found


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_a_floor():
    assert ROOMS.keys() <= FLOORS.keys(), "a new room needs its floor here and in the documentation"


@every_module
def test_imports_go_down(module):
    room = room_of(module)
    for name in imports(module):
        if name.partition(".")[0] != "poise":
            continue
        assert name in FILES, f"{module} imports {name}, which does not exist"
        other = room_of(name)
        allowed = other == room or FLOORS[other] < FLOORS[room] or (room, other) in SIDEWAYS
        assert allowed, f"{module} on floor {FLOORS[room]} imports {name} on floor {FLOORS[other]}"


def test_no_circle_between_rooms():
    graph = {room: set() for room in ROOMS}
    for module in FILES:
        others = {room_of(name) for name in imports(module) if name in FILES}
        graph[room_of(module)] |= others - {room_of(module)}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(ROOMS)


def test_no_circle_between_modules():
    graph = {module: imports(module, at_import_only=True) & FILES.keys() for module in FILES}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(FILES)


@every_module
def test_each_floor_knows_only_its_libraries(module):
    floor = FLOORS[room_of(module)]
    if floor == LAUNCH_FLOOR:
        return
    top_level = {name.partition(".")[0] for name in imports(module)} - {"poise"}
    libraries = top_level - sys.stdlib_module_names
    allowed = LIBRARIES if floor else ARRAYS
    assert libraries <= allowed, f"{module} on floor {floor} may not know {sorted(libraries - allowed)}"
    assert not top_level & OUTSIDE_WORLD, f"{module}: {sorted(top_level & OUTSIDE_WORLD)} belong to poise.launch"


@every_module
def test_modules_with_parameters_are_defined_in_nets_alone(module):
    if FLOORS[room_of(module)] == LAUNCH_FLOOR or room_of(module) == "nets":
        return
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            assert not bases & {"nn.Module", "nnx.Module", "linen.Module", "Module"}, f"{module}.{node.name}"
    if FLOORS[room_of(module)] < FLOORS["nets"]:
        assert not {name for name in imports(module) if name.startswith(("flax.linen", "flax.nnx"))}
