"""The public faces: what they name exists, is documented and annotated, and the annotations are really checked."""

import dataclasses
import importlib
import inspect
import pathlib
import tomllib
import types

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from flax import linen as nn

from poise.core import fold_in_examples
from poise.metrics import moments, prdc

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
FACES = {package: importlib.import_module(package) for package in PACKAGES}
PUBLIC = [pytest.param(face, name, id=f"{package}.{name}") for package, face in FACES.items() for name in face.__all__]
every_name = pytest.mark.parametrize(("face", "name"), PUBLIC)


def is_alias(thing) -> bool:
    return isinstance(thing, types.GenericAlias) or (
        inspect.isclass(thing) and thing.__module__.startswith("jaxtyping")
    )


def is_record(thing) -> bool:
    """A named tuple, a dataclass without behaviour of a network, or a protocol: documented by its attributes."""
    plain = dataclasses.is_dataclass(thing) and not issubclass(thing, nn.Module)
    return issubclass(thing, tuple) or plain or getattr(thing, "_is_protocol", False)


@pytest.mark.parametrize("package", PACKAGES)
def test_faces_list_their_names_once_and_say_what_they_are(package):
    face = FACES[package]
    assert face.__doc__
    assert len(set(face.__all__)) == len(face.__all__)


@every_name
def test_names_exist_and_are_documented(face, name):
    thing = getattr(face, name)
    if isinstance(thing, types.ModuleType):
        assert thing.__doc__
        return
    if not (inspect.isclass(thing) or callable(thing)) or not hasattr(thing, "__module__") or is_alias(thing):
        return  # a constant or a type alias has no docstring of its own
    text = inspect.getdoc(thing)
    assert text, f"{name} has no docstring"
    if inspect.isclass(thing) and (issubclass(thing, BaseException) or is_record(thing)):
        return
    assert "Example" in text, f"{name} has no Example"
    assert ">>>" in text, f"the Example of {name} does not run"


@every_name
def test_functions_are_annotated(face, name):
    thing = getattr(face, name)
    if not inspect.isroutine(inspect.unwrap(thing)):
        return
    signature = inspect.signature(thing)
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    assert not bare, f"{name} has no annotation for {bare}"
    assert signature.return_annotation is not signature.empty, f"{name} does not say what it returns"


def test_a_wrong_shape_is_caught():
    samples = jnp.ones((6, 2))
    with pytest.raises(jaxtyping.TypeCheckError, match="real"):
        prdc(samples[0], samples, k=1)
    with pytest.raises(jaxtyping.TypeCheckError, match="fake"):
        prdc(samples, samples[:, :1], k=1)  # each has a right shape, but not together


def test_a_wrong_dtype_or_type_is_caught():
    with pytest.raises(jaxtyping.TypeCheckError, match="features"):
        moments(jnp.ones((6, 2), jnp.int32))
    with pytest.raises(jaxtyping.TypeCheckError, match="batch_size"):
        fold_in_examples(jax.random.key(0), batch_size=2.0)


def test_a_wrong_shape_is_caught_under_jit():
    with pytest.raises(jaxtyping.TypeCheckError, match="features"):
        jax.jit(moments)(jnp.ones(6))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_function_of_a_face_is_checked(package):
    """The import hook wraps each function; one that was imported before it would not be."""
    functions = [getattr(FACES[package], name) for name in FACES[package].__all__]
    for function in filter(inspect.isfunction, functions):
        assert hasattr(function, "__wrapped__"), f"{function.__qualname__} runs unchecked"
