"""Time, memory and arithmetic of softplus attention beside softmax attention.

    python -m benchmarks.attention --lengths 1024 2048 4096
    python -m benchmarks.attention --memory --lengths 8192 16384 32768

Every row is one attention function at one length: causal, one batch, forward, and forward with backward, under ``jit``.
The functions of a length take turns in one process; a time is the median over rounds. Columns:

  forward, both   milliseconds;
  ratio           of times to the first function's, the median of quotients of neighbours in time;
  speedup         the inverse of that of both;
  GFLOP/s         of the multiplications and additions that the method needs, a causal call counting half;
  share           of the peak given by ``--peak`` (TFLOP/s), if it is;
  MiB             of temporary buffers, forward with backward, from the compiler's memory analysis.

``--memory`` compiles without running, so that it also shows what would not fit. On a GPU, jax's cuDNN attention (in
bfloat16) and the Pallas kernels take part.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.records import Row, Tables, run_suite
from poise.attention import dot_product_attention, softplus_attention


class Cost(NamedTuple):
    """Multiply-adds per score: (of d, of the value width) forward and backward."""

    forward: tuple[int, int]
    backward: tuple[int, int]


SOFTMAX = Cost((1, 1), (3, 2))
LSSA = Cost((1, 1), (3, 2))
LSSAR = Cost((2, 1), (4, 3))
LSSA_KERNELS = Cost((1, 1), (5, 3))
LSSAR_KERNELS = Cost((2, 1), (5, 3))


def contestants() -> dict[str, tuple[Callable[..., Any], Cost, Any]]:
    """Functions by name, what they compute and in which dtype."""
    xla = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    chunked = {"implementation": "xla_chunked"}
    found = {
        "jax softmax, xla": (xla, SOFTMAX, jnp.float32),
        "softmax, chunked": (functools.partial(dot_product_attention, **chunked), SOFTMAX, jnp.float32),
        "LSSA, xla": (
            functools.partial(softplus_attention, reweight=False, implementation="xla"),
            SOFTMAX,
            jnp.float32,
        ),
        "LSSA, chunked": (functools.partial(softplus_attention, reweight=False, **chunked), LSSA, jnp.float32),
        "LSSAR, xla": (functools.partial(softplus_attention, implementation="xla"), SOFTMAX, jnp.float32),
        "LSSAR, chunked": (functools.partial(softplus_attention, **chunked), LSSAR, jnp.float32),
    }
    if jax.default_backend() == "gpu":
        cudnn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        found["jax softmax, cudnn"] = (cudnn, SOFTMAX, jnp.bfloat16)
    if jax.default_backend() in ("gpu", "tpu"):
        kernels = {"implementation": "pallas"}
        plain = functools.partial(softplus_attention, reweight=False, **kernels)
        found["LSSA, pallas"] = (plain, LSSA_KERNELS, jnp.float32)
        found["LSSAR, pallas"] = (functools.partial(softplus_attention, **kernels), LSSAR_KERNELS, jnp.float32)
    return found


def operations(cost: Cost, length: int, heads: int, width: int, backward: bool) -> float:
    """Floating-point operations of a causal call with equal widths."""
    per_score = sum(cost.forward) + (sum(cost.backward) if backward else 0)
    return 2 * per_score * width * heads * length * (length + 1) / 2


def compiled(function: Callable, args: tuple, backward: bool) -> Any:
    attend = functools.partial(function, is_causal=True)
    if backward:

        def run(*arrays):
            return jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), (0, 1, 2))(*arrays)

    else:
        run = attend
    return jax.jit(run).lower(*args).compile()


def measure(names: list[str], length: int, options: argparse.Namespace) -> list[Row]:
    known = contestants()
    shape = (1, length, options.heads, options.width)
    programs: dict[str, list[Any]] = {}
    for name in names:
        function, _, dtype = known[name]
        keys = jax.random.split(jax.random.key(0), 3)
        args = tuple(jax.random.normal(key, shape, dtype) for key in keys)
        if options.memory:
            args = tuple(jax.ShapeDtypeStruct(shape, dtype) for _ in range(3))
        programs[name] = [(compiled(function, args, backward), args) for backward in (False, True)]

    times: dict[str, list[list[float]]] = {name: [[], []] for name in names}
    for _ in range(0 if options.memory else options.rounds + 1):
        for name in names:
            for part, (program, args) in enumerate(programs[name]):
                start = time.perf_counter()
                jax.block_until_ready(program(*args))
                times[name][part].append(time.perf_counter() - start)

    rows = []
    for name in names:
        memory = programs[name][1][0].memory_analysis()
        row: Row = {"function": name}
        if not options.memory:
            for part, label in enumerate(("forward", "both")):
                own, first = times[name][part][1:], times[names[0]][part][1:]  # the first round warms up
                median = statistics.median(own)
                rate = operations(known[name][1], length, options.heads, options.width, bool(part)) / median
                row[f"{label} ms"] = 1e3 * median
                row[f"{label} ratio"] = statistics.median(a / b for a, b in zip(own, first, strict=True))
                row[f"{label} GFLOP/s"] = rate / 1e9
                if options.peak:
                    row[f"{label} share"] = rate / (1e12 * options.peak)
            row["speedup"] = 1 / row["both ratio"]
        row["MiB"] = None if memory is None else memory.temp_size_in_bytes / 2**20
        rows.append(row)
    return rows


def tables(options: argparse.Namespace) -> Tables:
    names = options.only or list(contestants())
    what = "memory" if options.memory else "causal attention"
    for length in options.lengths:
        yield f"{what}, length {length}, {options.heads} heads of {options.width}", measure(names, length, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 8192])
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(contestants()), help="the first is what ratios are to")
    parser.add_argument("--memory", action="store_true", help="compile alone")
    parser.add_argument("--peak", type=float, help="TFLOP/s that the device can do at most")
    run_suite("attention", parser, tables)


if __name__ == "__main__":
    main()
