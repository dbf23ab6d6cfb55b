"""Integer products, reconstruction and files of quantized weights beside what a user would do without them.

    python -m benchmarks.quant --sizes 256 1024 2048

Three comparisons, each a table:

  products     ``x @ w`` for x of [rows, size] and w of [size, size]: float32; int8 weights with activations quantized
               on the fly, each row by its own scale or all by a fixed one; the same with weights packed at 4 bits and
               fewer; int8 codes times int8 codes and nothing else; weights dequantized on the fly. Contestants
               take turns in one process; a ratio is the median over rounds of the quotient of two neighbours in time.
  reconstruct  steps a second of FlexRound on one dense layer: ``poise.quant.reconstruct`` (one scan, compilation
               counted apart) and the same loop written in PyTorch, eager, if torch is installed.
  files        bytes in memory and on disk of one layer's weights, float32 and exported at 1 to 8 bits.
"""

import argparse
import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.records import Row, Tables, run_suite
from poise.launch.quantized_files import save_quantized
from poise.quant import (
    FlexRound,
    QuantRule,
    absmax_scale,
    dequantize_tensor,
    export,
    int8_dot,
    quantize_activations,
    reconstruct,
    tree_nbytes,
)


def draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def exported(w: jax.Array, bits: int) -> Any:
    return export({"kernel": w}, {}, [QuantRule("kernel", weight_bits=bits, method="absmax" if bits > 1 else "statsq")])


def rounds_of(contestants: dict[str, Callable[[], Any]], seconds: float, rounds: int) -> dict[str, list[float]]:
    """Times per call; the contestants take turns, every other round in the opposite order."""
    calls = {}
    for name, run in contestants.items():
        jax.block_until_ready(run())
        start = time.perf_counter()
        jax.block_until_ready(run())
        calls[name] = max(1, int(seconds / rounds / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name, run in list(contestants.items())[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            for _ in range(calls[name]):
                out = run()
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / calls[name])
    return times


def products(size: int, rows: int, seconds: float, rounds: int) -> list[Row]:
    w, x = jnp.asarray(draw((size, size), 0)), jnp.asarray(draw((rows, size), 1))
    matmul, integers = jax.jit(jnp.matmul), jax.jit(int8_dot)
    on_the_fly = jax.jit(lambda x, tensor: x @ dequantize_tensor(tensor))
    with_scale = jax.jit(lambda x, tensor, scale: int8_dot(x, tensor, scale=scale))
    codes_alone = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.int32))
    contestants: dict[str, Callable[[], Any]] = {"float32": lambda: matmul(x, w)}
    weights = {"float32": w}
    for bits in (8, 4, 3, 2, 1):
        tensor = exported(w, bits).params["kernel"]
        weights[f"int8 dot, {bits} bits"] = tensor
        contestants[f"int8 dot, {bits} bits"] = lambda tensor=tensor: integers(x, tensor)
    fixed, eight = absmax_scale(x, 8, None), weights["int8 dot, 8 bits"]
    codes = quantize_activations(x, None, fixed)[0]
    weights |= {"int8 dot, 8 bits, fixed scale": eight, "codes times codes alone": eight}
    contestants["int8 dot, 8 bits, fixed scale"] = lambda: with_scale(x, eight, fixed)
    contestants["codes times codes alone"] = lambda: codes_alone(codes, eight.codes)
    for bits in (8, 4):
        tensor = exported(w, bits).params["kernel"]
        weights[f"dequantized, {bits} bits"] = tensor
        contestants[f"dequantized, {bits} bits"] = lambda tensor=tensor: on_the_fly(x, tensor)
    times = rounds_of(contestants, seconds, rounds)
    return [
        {
            "path": name,
            "milliseconds": statistics.median(values) * 1e3,
            "speedup": statistics.median(a / b for a, b in zip(times["float32"], values, strict=True)),
            "bytes/weight": tree_nbytes(weights[name]) / size**2,
        }
        for name, values in times.items()
    ]


def with_torch(w: np.ndarray, x: np.ndarray, bits: int, steps: int, batch: int) -> Callable[[], float] | None:
    """FlexRound with one grid size for each output, per-channel asymmetric, as the papers' code does it."""
    try:
        import torch
    except ImportError:
        return None
    weight, inputs = torch.from_numpy(w.T.copy()), torch.from_numpy(x)
    target = inputs @ weight.T
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    zero = (-low / scale).round().clamp(0, 2**bits - 1)

    def run() -> float:
        factors = [scale.log(), torch.zeros_like(weight), torch.zeros_like(scale)]
        factors = [factor.clone().requires_grad_() for factor in factors]
        optimizer = torch.optim.Adam(factors, lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randperm(len(inputs))[:batch]
            ratio = weight / sum(factors).exp()
            codes = ratio + (ratio.round() - ratio).detach()
            quantized = torch.maximum(torch.minimum(codes, 2**bits - 1 - zero), -zero) * factors[0].exp()
            loss = (inputs[rows] @ quantized.T - target[rows]).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return float(loss.detach())

    return run


def reconstruction(size: int, steps: int, batch: int, bits: int = 4) -> list[Row]:
    w, x = draw((size, size), 0), draw((4 * batch, size), 1)
    params, inputs = {"kernel": jnp.asarray(w)}, jnp.asarray(x)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def dense(params, x):
        return x @ params["kernel"]

    target = dense(params, inputs)

    def ours() -> float:
        _, losses = reconstruct(
            dense,
            params,
            inputs,
            target,
            quantizer=FlexRound(bits),
            optimizer=optimizer,
            steps=steps,
            key=jax.random.key(0),
            batch_size=batch,
        )
        return float(losses[-1])

    contestants = {"PyTorch": with_torch(w, x, bits, steps, batch), "poise": ours}
    rows = []
    for name, run in contestants.items():
        if run is None:
            continue
        times = []
        for _ in range(4):
            start = time.perf_counter()
            loss = run()
            times.append(time.perf_counter() - start)
        rows.append(
            {
                "library": name,
                "steps/s": steps / statistics.median(times[1:]),
                "first run s": times[0],
                "last loss": loss,
            }
        )
    for row in rows:
        row["speedup"] = row["steps/s"] / rows[0]["steps/s"]
    return rows


def files(size: int) -> list[Row]:
    from safetensors.numpy import save_file

    w = draw((size, size), 0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.safetensors"
        save_file({"kernel": w}, path)
        rows.append({"bits": "float32", "memory": w.nbytes, "disk": path.stat().st_size})
        for bits in (8, 4, 3, 2, 1):
            quantized = exported(jnp.asarray(w), bits)
            save_quantized(path, quantized)
            rows.append({"bits": str(bits), "memory": tree_nbytes(quantized), "disk": path.stat().st_size})
    for row in rows:
        row["of float32"] = row["disk"] / rows[0]["disk"]
    return rows


def tables(options: argparse.Namespace) -> Tables:
    for what in options.only or ("products", "reconstruct", "files"):
        for size in options.sizes:
            if what == "products":
                for rows in options.rows:
                    title = f"products, {rows} rows by {size} x {size}"
                    yield title, products(size, rows, options.seconds, options.rounds)
            elif what == "reconstruct":
                title = f"reconstruct, {size} x {size}, {options.steps} steps of {options.batch} examples"
                yield title, reconstruction(size, options.steps, options.batch)
            else:
                yield f"files, {size} x {size}", files(size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024], help="inputs and features of the layer")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 1024], help="rows of x")
    parser.add_argument("--steps", type=int, default=500, help="of a reconstruction")
    parser.add_argument("--batch", type=int, default=32, help="examples of its step")
    parser.add_argument(
        "--only", nargs="+", choices=("products", "reconstruct", "files"), help="some of the comparisons"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="that each product runs")
    parser.add_argument("--rounds", type=int, default=15, help="turns that they take in that time")
    run_suite("quant", parser, tables, peers=("torch",))


if __name__ == "__main__":
    main()
