"""What the training loop costs beside the bare jitted step, and how fast its sources of data are.

    python -m benchmarks.loop --width 512

A perceptron is trained by AdamW on images of 28x28 pixels. The bare step is compiled with donated state and called on
one batch that lies on the device, its metrics never looked at; ``poise.launch.fit`` draws a fresh batch for every step,
writes a row of metrics for it and makes sure that everything is finite. The contestants take turns; compilation and the
last checkpoint are left out. Columns:

  ms         a step, the median over rounds;
  speedup    to the bare step; 0.98 is an overhead of two percent.

The second table is of batches alone, in images per second; a folder is of PNG files.
"""

import argparse
import io
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
from poise.core import Algorithm
from poise.launch import Console, InMemory, Phase, fit
from poise.launch.data import Prefetched, Shuffled
from poise.launch.image_sets import FolderImages

PIXELS, CLASSES, EXAMPLES, WARM_UP = 28, 10, 10_000, 10


def arrays(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (number, PIXELS, PIXELS, 1)).astype(np.uint8)
    return {"image": images, "label": rng.integers(0, CLASSES, number).astype(np.int32)}


def perceptron(width: int) -> Algorithm:
    optimizer = optax.adamw(1e-3)

    def init(key, batch):
        sizes = [(PIXELS * PIXELS, width), (width, width), (width, CLASSES)]
        keys = jax.random.split(key, len(sizes))
        params = [jax.random.normal(k, size) / size[0] ** 0.5 for k, size in zip(keys, sizes, strict=True)]
        return params, optimizer.init(params)

    def step(state, batch, key):
        params, opt_state = state

        def loss(params):
            x = batch["image"].reshape(len(batch["image"]), -1).astype(jnp.float32) / 255
            for kernel in params[:-1]:
                x = jax.nn.relu(x @ kernel)
            return optax.softmax_cross_entropy_with_integer_labels(x @ params[-1], batch["label"]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": value}

    return Algorithm(init, step)


class Clocked:
    """A source that notes when each batch is asked for."""

    def __init__(self, data: Any):
        self._data, self.batch_axis, self.batch_size = data, data.batch_axis, data.batch_size
        self.times: dict[int, float] = {}

    def batch(self, step: int) -> Any:
        self.times[step] = time.perf_counter()
        return self._data.batch(step)


def bare(algorithm: Algorithm, data: InMemory) -> Callable[[int], float]:
    batch = jax.device_put(data.batch(0))
    state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), jax.jit(algorithm.init)(jax.random.key(0), batch))
    step = jax.jit(algorithm.step, donate_argnums=0).lower(state, batch, jax.random.key(1)).compile()
    held, key = [state], jax.random.key(1)

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            held[0], metrics = step(held[0], batch, key)
        jax.block_until_ready((held[0], metrics))
        return (time.perf_counter() - start) / steps

    return run


def with_fit(algorithm: Algorithm, make_data: Callable[[int], Any], save_every: int) -> Callable[[int], float]:
    def run(steps: int) -> float:
        data = Clocked(make_data(steps + WARM_UP + 1))
        with tempfile.TemporaryDirectory() as workdir:
            fit(
                [Phase("train", lambda previous: algorithm, data, steps + WARM_UP + 1)],
                workdir=workdir,
                seed=0,
                save_every=save_every,
                save_every_seconds=0,
                tensorboard=False,
                console=Console(io.StringIO()),
            )
        return (data.times[steps + WARM_UP] - data.times[WARM_UP]) / steps

    return run


def steps_of(options: argparse.Namespace) -> list[Row]:
    algorithm, data = perceptron(options.width), InMemory(arrays(EXAMPLES), options.batch, seed=0)
    contestants = {
        "bare step": bare(algorithm, data),
        "fit": with_fit(algorithm, lambda steps: data, 0),
        "fit, batches ahead": with_fit(algorithm, lambda steps: Prefetched(data, steps), 0),
        "fit, 4 checkpoints": with_fit(algorithm, lambda steps: data, options.steps // 4),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(options.rounds):
        for name, run in list(contestants.items())[:: -1 if turn % 2 else 1]:
            times[name].append(run(options.steps))
    first = times["bare step"]
    return [
        {
            "loop": name,
            "ms": 1e3 * statistics.median(own),
            "speedup": statistics.median(b / a for a, b in zip(own, first, strict=True)),
        }
        for name, own in times.items()
    ]


def sources(options: argparse.Namespace) -> list[Row]:
    from PIL import Image

    found, rates = arrays(1000), {}
    with tempfile.TemporaryDirectory() as folder:
        for i, image in enumerate(found["image"]):
            Image.fromarray(image[..., 0]).save(pathlib.Path(folder) / f"{i}.png")
        files = FolderImages(folder)
        folder_data = Shuffled(files.read, len(files), options.batch, seed=0)
        for name, data in (("in memory", InMemory(found, options.batch, seed=0)), ("folder", folder_data)):
            start, number = time.perf_counter(), 0
            while time.perf_counter() - start < options.seconds:
                data.batch(number)
                number += 1
            rates[name] = number * options.batch / (time.perf_counter() - start)
    return [{"source": name, "images/s": rate} for name, rate in rates.items()]


def tables(options: argparse.Namespace) -> Tables:
    yield f"the loop, perceptron of width {options.width}, batches of {options.batch}", steps_of(options)
    yield f"batches of {options.batch} images of {PIXELS}x{PIXELS}", sources(options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="of the perceptron's layers")
    parser.add_argument("--batch", type=int, default=512, help="images in a batch")
    parser.add_argument("--steps", type=int, default=200, help="that are timed, of each contestant in each round")
    parser.add_argument("--rounds", type=int, default=5, help="turns that they take")
    parser.add_argument("--seconds", type=float, default=2.0, help="that each source is read")
    run_suite("loop", parser, tables)


if __name__ == "__main__":
    main()
