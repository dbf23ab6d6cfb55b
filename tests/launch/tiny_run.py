"""A run of three phases that takes a second: a line is fitted, then warmed up and refitted against its frozen copy.

Its states hold what real ones do: parameters, optimizer states, averages, typed keys, counters, booleans, half
precision, empty arrays and frozen networks. As a script it can kill itself at a random moment, fill its disk or be
stopped by signals.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import signal
import sys
import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from poise.core import Algorithm, fold_in_examples
from poise.launch.checkpoint_tree import restore_tree
from poise.launch.data import InMemory
from poise.launch.errors import LaunchError
from poise.launch.loop import fit
from poise.launch.phase import Phase
from poise.launch.signals import Interrupted

STEPS = {"teacher": 12, "warmup": 4, "student": 12}


class Teacher(NamedTuple):
    params: Any
    optimizer: Any
    average: Any
    count: jax.Array
    half: jax.Array
    improving: jax.Array
    key: jax.Array
    nothing: jax.Array


class Student(NamedTuple):
    params: Any
    optimizer: Any
    average: Any
    frozen: Any
    count: jax.Array


def predict(params, x):
    return x @ params["w"] + params["b"]


def data(batch_size=8, cycle=None, width=3):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, width)).astype(np.float32)
    weights = np.resize(np.array([1.0, -2.0, 0.5], np.float32), width)
    return InMemory({"x": x, "y": x @ weights + 0.3}, batch_size, 7, cycle)


def teacher(nan_at=None):
    optimizer = optax.adamw(1e-2)

    def init(key, batch):
        params = {"w": 0.1 * jax.random.normal(key, batch["x"].shape[1:]), "b": jnp.zeros(())}
        return Teacher(
            params=params,
            optimizer=optimizer.init(params),
            average=params,
            count=jnp.zeros((), jnp.int32),
            half=jnp.ones(5, jnp.bfloat16),
            improving=jnp.array(False),
            key=jax.random.split(key, 2000),
            nothing=jnp.zeros((0, 3)),
        )

    def step(state, batch, key):
        noise = jax.vmap(lambda k: jax.random.normal(k, batch["x"].shape[1:]))(fold_in_examples(key, len(batch["x"])))

        def loss_fn(params):
            return jnp.mean((predict(params, batch["x"] + 0.1 * noise) - batch["y"]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        if nan_at is not None:
            params["w"] = jnp.where(state.count + 1 == nan_at, params["w"].at[1].set(jnp.nan), params["w"])
        new = Teacher(
            params=params,
            optimizer=optimizer_state,
            average=jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, state.average, params),
            count=state.count + 1,
            half=state.half * jnp.bfloat16(0.99),
            improving=loss < 1.0,
            key=jax.vmap(lambda k: jax.random.fold_in(k, state.count))(state.key),
            nothing=state.nothing,
        )
        return new, {"loss": loss, "grad_norm": optax.tree.norm(grads), "improving": loss < 1.0}

    return Algorithm(init, step)


def student(previous, move):
    optimizer = optax.adam(1e-2)

    def init(key, batch):
        if isinstance(previous, Student):
            return previous
        params = previous.average
        return Student(params, optimizer.init(params), params, {"teacher": previous.average}, jnp.zeros((), jnp.int32))

    def step(state, batch, key):
        metrics = {}
        for cycle in range(batch["x"].shape[0]):
            keys = fold_in_examples(jax.random.fold_in(key, cycle), batch["x"].shape[1])
            noise = jax.vmap(lambda k: jax.random.normal(k, batch["x"].shape[2:]))(keys)
            x = batch["x"][cycle] + noise

            def loss_fn(params, x=x):
                return jnp.mean((predict(params, x) - predict(state.frozen["teacher"], x) - 1.0) ** 2)

            loss, grads = jax.value_and_grad(loss_fn)(state.params)
            updates, optimizer_state = optimizer.update(grads, state.optimizer)
            params = optax.apply_updates(state.params, updates) if move else state.params
            average = jax.tree.map(lambda a, p: 0.8 * a + 0.2 * p, state.average, params)
            state = Student(params, optimizer_state, average, state.frozen, state.count + 1)
            metrics[f"loss_{cycle}"] = loss
        return state, metrics

    return Algorithm(init, step)


def phases(steps=None, nan_at=None, batch_size=8, after_evaluation=lambda: None, width=3):
    steps = STEPS | (steps or {})

    def evaluate(state, key):
        x = jax.random.normal(key, (16, width))
        gap = predict(state.average, x) - predict(state.frozen["teacher"], x)
        after_evaluation()
        return {"gap": jnp.mean(gap), "nothing": None}

    return (
        Phase("teacher", lambda _: teacher(nan_at), data(batch_size, width=width), steps["teacher"]),
        Phase("warmup", lambda previous: student(previous, False), data(batch_size, 2, width), steps["warmup"]),
        Phase(
            "student",
            lambda previous: student(previous, True),
            data(batch_size, 2, width),
            steps["student"],
            evaluate=evaluate,
            evaluate_every=3,
        ),
    )


class At:
    """A writer that does something after a given number of rows."""

    def __init__(self, row, action):
        self.rows, self.row, self.action = 0, row, action

    def begin(self, phases, restored):
        pass

    def write(self, phase, step, values):
        self.rows += 1
        if self.rows == self.row:
            self.action()

    def images(self, phase, step, images):
        pass

    def flush(self):
        pass

    def close(self):
        pass


def kill_soon(seconds):
    """SIGKILL from a thread, so that it may come at any moment of what follows."""

    def kill():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def run(workdir, *, writers=(), seed=3, save_every=5, check_every=10, devices=None, **options):
    settings = dict(save_every_seconds=0, keep=2, check_every=check_every, devices=devices or jax.devices()[:1])
    return fit(phases(**options), workdir=workdir, seed=seed, save_every=save_every, writers=writers, **settings)


def final_bits(workdir):
    """Everything that two equal runs must share: the metrics' bytes, and the bits of the last checkpoint."""
    leaves = jax.tree.leaves_with_path(restore_tree(workdir))
    bits = {}
    for path, leaf in leaves:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        bits[jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    return (pathlib.Path(workdir) / "metrics.jsonl").read_bytes(), bits


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--kill", help="row,seconds: SIGKILL that long after that row (counted in this process)")
    parser.add_argument("--signal", help="row,number: sends this process a signal at that row")
    parser.add_argument("--file-limit", type=int, help="bytes that no file may exceed, as on a full disk, from --at on")
    parser.add_argument("--at", type=int, default=1)
    parser.add_argument("--slow", type=float, default=0.0, help="seconds each evaluation takes")
    arguments = parser.parse_args()
    writers = []
    if arguments.kill:
        row, seconds = arguments.kill.split(",")
        writers.append(At(int(row), lambda: kill_soon(random.random() * float(seconds))))
    if arguments.signal:
        row, number = map(int, arguments.signal.split(","))
        writers.append(At(row, lambda: os.kill(os.getpid(), number)))
    if arguments.file_limit is not None:
        limit = (arguments.file_limit, resource.RLIM_INFINITY)
        writers.append(At(arguments.at, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)))
    try:
        result = run(arguments.workdir, writers=writers, after_evaluation=lambda: time.sleep(arguments.slow))
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except LaunchError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"steps_trained": result.steps_trained, "restored": result.restored}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
