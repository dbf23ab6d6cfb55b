"""Time and accuracy of the two-pass softmax beside jax's.

    python benchmarks/softmax.py --shapes 64x4096 512x4096

Every row is one softmax on one shape of float32 numbers, uniform in [-30, 30], under ``jit``. The functions of a shape
take turns in one process. Columns:

  ns/value   median time over the number of values;
  ratio      to ``jax.nn.softmax``, the median of quotients of neighbours in time;
  error      the largest relative error against float64 among outputs above 1e-37, where it is largest: in the tails.

On a GPU or TPU the Pallas kernels take part. On a CPU no speed is to be gained: XLA fuses its own softmax well, and the
exponents cost extra arithmetic.
"""

import argparse
import functools
import json
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

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


def measure(shape: tuple[int, int], rounds: int) -> list[dict]:
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
        rows.append(
            {
                "shape": "x".join(map(str, shape)),
                "name": name,
                "ns/value": 1e9 * statistics.median(own) / x.size,
                "ratio": statistics.median(a / b for a, b in zip(own, first, strict=True)),
                "error": float(error),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["64x4096", "512x4096"], help="rows x columns")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", help="a file for the rows")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}")
    print("| shape | function | ns/value | ratio | error |\n|---|---|---|---|---|")
    rows = []
    for text in options.shapes:
        shape = tuple(map(int, text.split("x")))
        if len(shape) != 2:
            parser.error(f"--shapes must be like 64x4096, got {text}")
        for row in measure(shape, options.rounds):
            rows.append(row)
            print("| {shape} | {name} | {ns/value:.3g} | {ratio:.3g} | {error:.2g} |".format(**row), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
