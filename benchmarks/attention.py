"""Time, memory and arithmetic of softplus attention beside softmax attention.

    python -m benchmarks.attention --lengths 1024 2048 4096
    python -m benchmarks.attention --memory --lengths 8192 16384 32768

Every row is one attention function at one length: causal, one batch, forward, and forward with backward, under ``jit``.
The functions of a length take turns in one process; a time is the median over rounds. Columns:

  forward, backward, both  milliseconds; backward is what both take beyond forward;
  ratio                    of times to the first function's, the median of quotients of neighbours in time;
  GFLOP/s                  of the multiplications and additions that the method needs, a causal call counting half;
  share                    of what a large matrix product of the same type reaches in this process;
  speedup                  the inverse of the ratio of both;
  MiB                      of temporary buffers, forward with backward, from the compiler's memory analysis.

What needs more than ``--most`` MiB is not run. ``--memory`` runs nothing and shows that column alone. On a GPU, jax's
cuDNN attention (in bfloat16) and the Pallas kernels take part.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.records import Row, Tables, matrix_product_flops, run_suite
from poise.attention import dot_product_attention, softplus_attention


class Cost(NamedTuple):
    """Multiply-adds per score: (of d, of the value width) forward and backward."""

    forward: tuple[int, int]
    backward: tuple[int, int]


TIMED = ("forward ms", "backward ms", "both ms", "forward ratio", "forward GFLOP/s", "forward share", "both ratio",
         "both GFLOP/s", "both share", "speedup")  # fmt: skip
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


def measure(names: list[str], length: int, options: argparse.Namespace, peaks: dict[Any, float]) -> list[Row]:
    known = contestants()
    shape = (1, length, options.heads, options.width)
    programs: dict[str, list[Any]] = {}
    needs: dict[str, float | None] = {}
    for name in names:
        function, _, dtype = known[name]
        abstract = tuple(jax.ShapeDtypeStruct(shape, dtype) for _ in range(3))
        programs[name] = [compiled(function, abstract, backward) for backward in (False, True)]
        memory = programs[name][1].memory_analysis()
        needs[name] = None if memory is None else memory.temp_size_in_bytes / 2**20
    runs = [] if options.memory else [name for name in names if (needs[name] or 0) <= options.most]

    times: dict[str, list[list[float]]] = {name: [[], []] for name in runs}
    keys = jax.random.split(jax.random.key(0), 3)
    for _ in range(options.rounds + 1):
        for name in runs:
            args = tuple(jax.random.normal(key, shape, known[name][2]) for key in keys)
            jax.block_until_ready(args)
            for part, program in enumerate(programs[name]):
                start = time.perf_counter()
                jax.block_until_ready(program(*args))
                times[name][part].append(time.perf_counter() - start)

    def ratio(name: str, part: int) -> float | None:
        if names[0] not in runs:
            return None
        own, first = times[name][part][1:], times[names[0]][part][1:]  # the first round warms up
        return statistics.median(a / b for a, b in zip(own, first, strict=True))

    rows = []
    for name in names:
        row: Row = {"function": name, **({} if options.memory else dict.fromkeys(TIMED))}
        if name in runs:
            forward, both = (statistics.median(values[1:]) for values in times[name])
            row |= {"forward ms": 1e3 * forward, "backward ms": 1e3 * (both - forward), "both ms": 1e3 * both}
            for part, (label, seconds) in enumerate((("forward", forward), ("both", both))):
                rate = operations(known[name][1], length, options.heads, options.width, bool(part)) / seconds
                row[f"{label} ratio"] = ratio(name, part)
                row[f"{label} GFLOP/s"] = rate / 1e9
                row[f"{label} share"] = rate / peaks[known[name][2]]
            row["speedup"] = None if row["both ratio"] is None else 1 / row["both ratio"]
        row["MiB"] = needs[name]
        rows.append(row)
    return rows


def tables(options: argparse.Namespace) -> Tables:
    names = options.only or list(contestants())
    what = "memory" if options.memory else "causal attention"
    types = {} if options.memory else {contestants()[name][2] for name in names}
    peaks = {dtype: matrix_product_flops(jnp.dtype(dtype).name) for dtype in types}
    for length in options.lengths:
        rows = measure(names, length, options, peaks)
        yield f"{what}, length {length}, {options.heads} heads of {options.width}", rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 8192, 32768])
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(contestants()), help="the first is what ratios are to")
    parser.add_argument("--memory", action="store_true", help="compile alone")
    parser.add_argument("--most", type=float, default=4096, help="MiB of temporary buffers that are tried")
    run_suite("attention", parser, tables)


if __name__ == "__main__":
    main()
