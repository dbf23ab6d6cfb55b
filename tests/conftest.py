"""Shared set-up: 8 simulated devices, compilation and garbage that cost little, and the folder of golden files."""

import functools
import gc
import importlib.metadata
import os
import pathlib

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

# By itself XLA splits each program for threads that compile it together, which costs more than it saves: the suite's
# processes have all cores already.
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"

# Most tests run a program once or twice: optimizing it takes longer than what that saves. The last flag is gone from
# jaxlib 0.11 on, and XLA aborts at flags that it doesn't know.
QUICK = " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"

GOLDEN = pathlib.Path(os.environ.get("POISE_GOLDEN", pathlib.Path(__file__).parent / "golden"))


def pytest_configure(config):
    """The quick tier compiles quickly; other tests train for long, or are run alone and as users' programs are."""
    if config.option.markexpr == "not slow and not effects":
        os.environ["XLA_FLAGS"] += QUICK


gc.set_threshold(50_000, 50, 100)  # JAX makes many objects that live long: looking at them all the time takes a tenth


@pytest.fixture(autouse=True, scope="module")
def programs_end_with_their_file():
    """Compiled programs of one test file serve no other; thousands of them take gigabytes and slow each sweep."""
    import jax

    yield
    jax.clear_caches()
    gc.collect()
    gc.freeze()


def golden_files(area: str, pattern: str) -> list[pathlib.Path]:
    """The golden files of an area that match a pattern, in order; the folder may be flat."""
    return sorted((GOLDEN / area).glob(pattern)) or sorted(GOLDEN.glob(pattern))


def pytest_generate_tests(metafunc):
    """Fills the argument `golden_file` of tests with the marker `golden_pattern("area", "name_*.npz")`."""
    marker = metafunc.definition.get_closest_marker("golden_pattern")
    if marker and "golden_file" in metafunc.fixturenames:
        files = golden_files(*marker.args)
        metafunc.parametrize("golden_file", files, ids=[file.stem for file in files])


@pytest.fixture(scope="session")
def quick_jit():
    """`jax.jit` that spends less time on optimizing, for programs that run once or twice."""
    import jax
    import jax.numpy as jnp

    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(jnp.negative, compiler_options=options)(1.0)
    except jax.errors.JaxRuntimeError:  # the second option is not known to every version of XLA
        options.popitem()
    return functools.partial(jax.jit, compiler_options=options)
