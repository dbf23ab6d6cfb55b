"""Compilation that costs little."""

import functools

import jax
import jax.numpy as jnp
import pytest

OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


@functools.cache
def known_options():
    """Not every version of XLA knows all of these options."""
    options = dict(OPTIONS)
    while options:
        try:
            jax.jit(jnp.negative, compiler_options=options)(1.0)
        except jax.errors.JaxRuntimeError:
            options.popitem()
        else:
            break
    return options


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """The many small programs of these tests are compiled without much optimization."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def quick_jit():
    """`jax.jit` that spends a fifth of the time on optimizing: these programs run once or twice."""
    return functools.partial(jax.jit, compiler_options=known_options())
