"""What tests that start launchers as processes share."""

import os

import pytest


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """For the processes of a file of tests: real devices, and programs that are compiled once for all of them."""
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | settings
