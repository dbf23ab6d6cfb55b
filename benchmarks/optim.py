"""Step time and memory of poise's optimizers beside the ones that a user would pick instead.

    python -m benchmarks.optim --sizes 1e6 1e7 1e8

Every row is one optimizer on one tree of parameters: a whole step (update and ``apply_updates``) under ``jit`` with
donated parameters and state. The optimizers of a comparison take turns in one process, so that a ratio is the median
over rounds of the quotient of two neighbours in time. Columns:

  ns/value   median time of a step over the number of parameters;
  ratio      of the times to the comparison's first optimizer, with quartiles; ``speedup`` is its inverse;
  bytes      that a step has to move per parameter: each buffer read or written once;
  copies     the time over that of a plain copy that moves the same number of bytes, measured in the same rounds;
  extra      bytes of temporary buffers per parameter, from the compiler's memory analysis;
  peak       bytes per parameter at the fullest moment: gradients, parameters, state and temporary buffers.

AdamP and SGDP look at most leaves that aren't scale-invariant for a shorter time, so they take part twice: "all
projected" stands for gradients that are orthogonal to the weights of every channel.

"in place" stands for ``compiler_options={"xla_cpu_copy_insertion_use_region_analysis": True}``: without it XLA's CPU
backend copies every buffer that two fusions read and one of them overwrites, such as Lion's momentum.

The official AdamP for PyTorch (``pip install torch adamp``) takes part if it is installed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.records import Tables, run_suite
from poise.optim import adamp, lion_kappa, sgdp

IN_PLACE = {"xla_cpu_copy_insertion_use_region_analysis": True}
FLOAT = 4
STILL = 1e-9  # a learning rate at which weights stay orthogonal to a gradient


class Contestant(NamedTuple):
    """One optimizer on one tree.

    Attributes:
      run: makes some steps and waits for the last.
      buffers: how many buffers of the parameters' size a step has to read or write.
      extra: bytes of temporary buffers, None if unknown.
      peak: bytes at the fullest moment, None if unknown.
    """

    run: Callable[[int], None]
    buffers: int
    extra: int | None = None
    peak: int | None = None


def leaf_shapes(size: int, leaves: int) -> list[tuple[int, int]]:
    """Equal matrices, about square, that have ``size`` entries or a little less in all."""
    columns = 2 ** int(np.log2(size / leaves) / 2)
    return [(max(1, size // leaves // columns), columns)] * leaves


def draw(shapes: list[tuple[int, int]], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def compiled_step(function: Callable, state: tuple, gradients: Any, buffers: int, in_place: bool) -> Contestant:
    """Compiles ``state, gradients -> state`` with the state donated."""
    step = (
        jax.jit(function, donate_argnums=0, keep_unused=True)
        .lower(state, gradients)
        .compile(IN_PLACE if in_place and jax.default_backend() == "cpu" else None)
    )
    memory = step.memory_analysis()
    held = [state]

    def run(steps: int) -> None:
        for _ in range(steps):
            held[0] = step(held[0], gradients)
        jax.block_until_ready(held[0])

    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    extra = memory.temp_size_in_bytes
    return Contestant(run, buffers, extra, peak + extra)


def with_optax(
    optimizer: optax.GradientTransformation, buffers: int, in_place: bool = False, orthogonal: bool = False
) -> Callable:
    """An optimizer; ``orthogonal``: gradients are orthogonal to each channel's weights, as scale-invariant ones are."""

    def enter(shapes: list[tuple[int, int]]) -> Contestant:
        parameters = jax.tree.map(jnp.array, draw(shapes, 0))
        gradients = jax.tree.map(jnp.array, draw(shapes, 1))
        if orthogonal:
            gradients = jax.tree.map(lambda g, p: g - p * (p * g).sum(0) / (p * p).sum(0), gradients, parameters)

        def step(carry, gradients):
            parameters, state = carry
            updates, state = optimizer.update(gradients, state, parameters)
            return optax.apply_updates(parameters, updates), state

        return compiled_step(step, (parameters, optimizer.init(parameters)), gradients, buffers, in_place)

    return enter


def plain_copy(shapes: list[tuple[int, int]]) -> Contestant:
    """Writes the negated gradients over the parameters: one buffer read, one written."""
    parameters, gradients = (jax.tree.map(jnp.array, draw(shapes, seed)) for seed in (0, 1))
    return compiled_step(lambda _, gradients: jax.tree.map(jnp.negative, gradients), parameters, gradients, 2, False)


def with_torch(name: str, buffers: int) -> Callable | None:
    try:
        import torch

        if name == "AdamP":
            from adamp import AdamP as kind
        else:
            kind = torch.optim.AdamW
    except ImportError:
        return None
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    options = {} if name == "AdamP" else {"fused": True}

    def enter(shapes: list[tuple[int, int]]) -> Contestant:
        parameters = [torch.nn.Parameter(torch.from_numpy(x).to(device)) for x in draw(shapes, 0)]
        for parameter, gradient in zip(parameters, draw(shapes, 1), strict=True):
            parameter.grad = torch.from_numpy(gradient).to(device)
        optimizer = kind(parameters, lr=1e-3, weight_decay=1e-4, **options)

        def run(steps: int) -> None:
            for _ in range(steps):
                optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()

        return Contestant(run, buffers)

    return enter


def comparisons() -> dict[str, dict[str, Callable | None]]:
    """The first of each is what the others are compared with. Buffers: gradient, parameters and state, in and out."""
    return {
        "lion": {
            "optax.lion": with_optax(optax.lion(1e-3), 5),
            "lion_kappa": with_optax(lion_kappa(1e-3), 5),
            "optax.lion in place": with_optax(optax.lion(1e-3), 5, in_place=True),
            "lion_kappa in place": with_optax(lion_kappa(1e-3), 5, in_place=True),
            "optax.adamw": with_optax(optax.adamw(1e-3), 7),
        },
        "adamp": {
            "optax.adamw": with_optax(optax.adamw(1e-3), 7),
            "adamp": with_optax(adamp(1e-3, weight_decay=1e-4), 7),
            "adamp, all projected": with_optax(adamp(STILL, weight_decay=1e-4), 7, orthogonal=True),
            "torch AdamW fused": with_torch("AdamW", 7),
            "torch AdamP": with_torch("AdamP", 7),
        },
        "sgdp": {
            "optax.sgd": with_optax(optax.sgd(1e-3, momentum=0.9), 5),
            "sgdp": with_optax(sgdp(1e-3, momentum=0.9), 5),
            "sgdp, all projected": with_optax(sgdp(STILL, momentum=0.9), 5, orthogonal=True),
        },
    }


def measure(entries: dict[str, Callable | None], size: int, leaves: int, seconds: float, rounds: int) -> list[dict]:
    shapes = leaf_shapes(size, leaves)
    count = sum(np.prod(shape) for shape in shapes)
    field = {name: entry for name, entry in entries.items() if entry is not None} | {"plain copy": plain_copy}
    contestants = {name: enter(shapes) for name, enter in field.items()}
    steps = {}
    for name, contestant in contestants.items():
        contestant.run(2)
        start = time.perf_counter()
        contestant.run(1)
        steps[name] = max(1, int(seconds / rounds / (time.perf_counter() - start)))
    times = {name: [] for name in contestants}
    for turn in range(rounds):
        for name, contestant in list(contestants.items())[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            contestant.run(steps[name])
            times[name].append((time.perf_counter() - start) / steps[name])
    first = next(iter(entries))

    def quotients(name: str, other: str) -> list[float]:
        return [a / b for a, b in zip(times[name], times[other], strict=True)]

    rows = []
    for name, contestant in contestants.items():
        ratios = quotients(name, first)
        rows.append(
            {
                "optimizer": name,
                "ns/value": statistics.median(times[name]) / count * 1e9,
                "ratio": statistics.median(ratios),
                "quartiles": [float(q) for q in np.quantile(ratios, [0.25, 0.75])],
                "speedup": 1 / statistics.median(ratios),
                "bytes": contestant.buffers * FLOAT,
                "copies": statistics.median(quotients(name, "plain copy")) * 2 / contestant.buffers,
                "extra": None if contestant.extra is None else float(contestant.extra / count),
                "peak": None if contestant.peak is None else float(contestant.peak / count),
            }
        )
    return rows


def tables(options: argparse.Namespace) -> Tables:
    for title, entries in comparisons().items():
        if options.only and title not in options.only:
            continue
        for size in options.sizes:
            for leaves in options.leaves:
                rows = measure(entries, int(size), leaves, options.seconds, options.rounds)
                yield f"{title}, {int(size):,} values in {leaves} leaves", rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 1e7], help="numbers of parameters")
    parser.add_argument("--leaves", type=int, nargs="+", default=[4, 400], help="numbers of leaves they come in")
    parser.add_argument("--only", nargs="+", choices=sorted(comparisons()), help="some of the comparisons")
    parser.add_argument("--seconds", type=float, default=2.0, help="that each optimizer runs per tree")
    parser.add_argument("--rounds", type=int, default=15, help="turns that they take in that time")
    run_suite("optim", parser, tables, peers=("torch", "adamp"))


if __name__ == "__main__":
    main()
