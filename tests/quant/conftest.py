"""Compilation that costs little."""

import functools

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture(scope="session")
def quick_jit():
    """`jax.jit` that spends less time on optimizing: these programs run once or twice."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(jnp.negative, compiler_options=options)(1.0)
    except jax.errors.JaxRuntimeError:  # the second option is not known to every version of XLA
        options.popitem()
    return functools.partial(jax.jit, compiler_options=options)
