"""Time and accuracy of the two-pass softmax beside jax's.

    python -m benchmarks.softmax --shapes 64x4096 512x4096

Every row is one softmax on one shape of float32 numbers, uniform in [-30, 30], under ``jit``. The functions of a shape
take turns in one process. Columns:

  ns/value   median time over the number of values;
  ratio      of the times to ``jax.nn.softmax``'s, the median of quotients of neighbours; ``speedup`` is its inverse;
  error      the largest relative error against float64 among outputs above 1e-37, where it is largest: in the tails.

On a GPU or TPU the Pallas kernels take part. On a CPU no speed is to be gained: XLA fuses its own softmax well, and the
exponents cost extra arithmetic.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.records import Row, Tables, run_suite
from poise.attention import two_pass_softmax


def contestants() -> dict:
    found = {
        "jax.nn.softmax": jax.nn.softmax,
        "two-pass, xla": functools.partial(two_pass_softmax, implementation="xla"),
        "two-pass, blocked": functools.partial(two_pass_softmax, implementation="xla_blocked"),
    }
    if jax.default_backend() in ("gpu", "tpu"):
        found["two-pass, pallas"] = functools.partial(two_pass_softmax, implementation="pallas")
    return found


def measure(shape: tuple[int, int], rounds: int) -> list[Row]:
    x = np.random.default_rng(0).uniform(-30, 30, shape).astype(np.float32)
    exact = np.exp(x - np.logaddexp.reduce(x.astype(np.float64), 1, keepdims=True))
    device = jnp.asarray(x)
    functions = {name: jax.jit(function) for name, function in contestants().items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function(device).block_until_ready()
            times[name].append(time.perf_counter() - start)
    rows = []
    for name, function in functions.items():
        own, first = times[name][1:], times["jax.nn.softmax"][1:]  # the first round compiles
        error = np.abs(np.asarray(function(device), np.float64) / exact - 1)[exact > 1e-37].max()
        ratio = statistics.median(a / b for a, b in zip(own, first, strict=True))
        nanoseconds = 1e9 * statistics.median(own) / x.size
        rows.append(
            {"function": name, "ns/value": nanoseconds, "ratio": ratio, "speedup": 1 / ratio, "error": float(error)}
        )
    return rows


def shape_of(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def tables(options: argparse.Namespace) -> Tables:
    for shape in options.shapes:
        yield f"softmax, {shape[0]} rows of {shape[1]}", measure(shape, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=[(64, 4096), (512, 4096)], help="such as 64x4096")
    parser.add_argument("--rounds", type=int, default=20)
    run_suite("softmax", parser, tables)


if __name__ == "__main__":
    main()
