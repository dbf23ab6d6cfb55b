"""Throughput of f-distill and of the teacher's sampler beside the same written in PyTorch.

    python -m benchmarks.fdistill --size digits

Both sides hold the same networks: poise's teacher is copied into PyTorch's, and the outputs are compared before
anything is timed. A cycle is one update of the student and five of its critics; images per second count the student's
images and the real ones that a cycle takes. The contestants take turns in one process, so that a ratio is the median
over rounds of the quotient of two neighbours in time. Run it on a machine that does nothing else: PyTorch's threads
wait for each other. Columns:

  images/s   median over the rounds;
  speedup    to eager PyTorch, with quartiles; the sampler has a table of its own;
  compile s  seconds before the first cycle was done;
  of peak    the floating point operations that XLA counts for poise's program, per second, over those of the largest
             matrix product that the same library reached in this process;
  MiB        the peak of the process in MiB over what it held before its first cycle, each contestant in a process of
             its own (on a GPU: what its library reports).

``--compiled`` lets PyTorch compile its networks, where that works.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from benchmarks.records import Row, Tables, matrix_product_flops, run_suite
from benchmarks.torch_fdistill import TorchDistillation
from poise.fdistill import FDistillConfig, Optimizers, f_distill, karras_sigmas, many_steps
from poise.nets import RatioHead, edm_network, to_state_dict

ON_GPU = jax.default_backend() == "gpu"
SIZES = {  # the launcher's digits, and CIFAR-10's network
    "digits": {"size": 8, "channels": 1, "width": 16, "mult": (1, 2), "blocks": 1, "attention": (4,), "batch": 128},
    "cifar10": {
        "size": 32,
        "channels": 3,
        "width": 128,
        "mult": (2, 2, 2),
        "blocks": 4,
        "attention": (16,),
        "batch": 64,
    },
    "tiny": {"size": 8, "channels": 1, "width": 8, "mult": (1,), "blocks": 1, "attention": (), "batch": 8},
}
CLASSES, SAMPLER_STEPS = 10, 18


class Contestant(NamedTuple):
    """One library's cycle and sampler.

    Attributes:
      cycle: makes some cycles and waits for the last.
      sample: draws a batch with the teacher and waits for it.
      compile_seconds: until the first cycle was done.
      flops: of a cycle, None if unknown.
    """

    cycle: Callable[[int], None]
    sample: Callable[[], None]
    compile_seconds: float
    flops: float | None = None


class Problem:
    """The data, networks and settings that both sides share."""

    def __init__(self, size: str, precision: str):
        self.shape, self.precision = SIZES[size], precision
        shape = self.shape
        self.batch = shape["batch"]
        self.architecture = {
            "model_type": "SongUNet",
            "img_resolution": shape["size"],
            "img_channels": shape["channels"],
            "label_dim": CLASSES,
            "model_channels": shape["width"],
            "channel_mult": shape["mult"],
            "num_blocks": shape["blocks"],
            "attn_resolutions": shape["attention"],
            "dropout": 0.0,
        }
        self.net = edm_network(self.architecture, jnp.bfloat16 if precision == "bfloat16" else None)
        self.image_shape = (shape["size"], shape["size"], shape["channels"])
        x, labels = jnp.zeros((1, *self.image_shape)), jnp.zeros((1,), jnp.int32)
        variables = self.net.init(jax.random.key(0), x, jnp.ones(1), labels)
        # Fresh networks end in near-zero layers; some noise makes the comparison of outputs mean something.
        leaves, structure = jax.tree.flatten(variables)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noisy = [leaf + 0.02 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
        self.variables = jax.tree.unflatten(structure, noisy)
        self.config = FDistillConfig(
            sigma_min=0.02, sigma_max=5.0, gan_weight=1e-2, ratio_range=None, ema_decays=(0.98,), fake_updates=5
        )
        rng = np.random.default_rng(0)
        updates = self.config.fake_updates
        self.images = rng.normal(0, 0.5, (updates, self.batch, *self.image_shape)).astype(np.float32)
        self.labels = rng.integers(0, CLASSES, (updates, self.batch)).astype(np.int32)

    def for_torch(self, compiled: bool) -> TorchDistillation:
        """The peer, with the same teacher."""
        shape = self.shape
        network = {
            "size": shape["size"],
            "channels": shape["channels"],
            "classes": CLASSES,
            "width": shape["width"],
            "mult": shape["mult"],
            "blocks": shape["blocks"],
            "attn_resolutions": shape["attention"],
        }
        official = to_state_dict(self.variables, self.architecture)
        weights = {name: value for name, value in official.items() if not name.endswith("resample_filter")}
        return TorchDistillation(network, weights, self.config, "cuda" if ON_GPU else "cpu", compiled, self.precision)


def largest_difference(problem: Problem) -> float:
    """Between the two teachers' outputs, in float32."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, *problem.image_shape)).astype(np.float32)
    sigma = np.array([0.05, 0.5, 2.0, 40.0], np.float32)
    labels = np.eye(CLASSES, dtype=np.float32)[:4]
    net = edm_network(problem.architecture)
    ours = net.apply(problem.variables, x, sigma, labels)
    peer = problem.for_torch(False)
    with torch.no_grad():
        inputs = (torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(sigma), torch.from_numpy(labels))
        theirs = peer.teacher(*(value.to(peer.device) for value in inputs))[0].cpu().numpy()
    return float(np.abs(np.asarray(ours) - theirs.transpose(0, 2, 3, 1)).max())


def poise(problem: Problem) -> Contestant:
    clip = optax.clip_by_global_norm(10.0)
    optimizers = Optimizers(
        student=optax.chain(clip, optax.adamw(1e-3, weight_decay=0.0)),
        fake=optax.chain(clip, optax.adamw(1e-3, weight_decay=0.0)),
        head=optax.adamw(1e-3, b1=0.5, weight_decay=0.0),
    )
    head = RatioHead(label_dim=CLASSES)
    algorithm = f_distill(problem.net, head, problem.config, optimizers, teacher=problem.variables)
    batch = {"image": jnp.asarray(problem.images), "label": jnp.asarray(problem.labels)}
    start = time.perf_counter()
    state = jax.jit(algorithm.init)(jax.random.key(2), batch)
    state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)  # no buffer twice, so that all can be donated
    frozen, key = state.frozen, jax.random.key(3)

    def step(live, frozen, batch, key, index):
        new, metrics = algorithm.step(live._replace(frozen=frozen), batch, jax.random.fold_in(key, index))
        return new._replace(frozen=()), metrics

    held = [state._replace(frozen=())]
    compiled = jax.jit(step, donate_argnums=0).lower(held[0], frozen, batch, key, 0).compile()
    count = [0]

    def cycle(number: int) -> None:
        for _ in range(number):
            held[0], metrics = compiled(held[0], frozen, batch, key, count[0])
            count[0] += 1
        jax.block_until_ready((held[0], metrics))

    cycle(1)
    seconds = time.perf_counter() - start
    sampler = jax.jit(
        lambda variables, z, labels: many_steps(problem.net, variables, z, labels, num_steps=SAMPLER_STEPS)
    )
    z = jax.random.normal(key, (problem.batch, *problem.image_shape))

    def sample() -> None:
        sampler(problem.variables, z, batch["label"][0]).block_until_ready()

    return Contestant(cycle, sample, seconds, compiled.cost_analysis().get("flops"))


def pytorch(problem: Problem, compiled: bool) -> Contestant:
    torch.manual_seed(0)
    start = time.perf_counter()
    peer = problem.for_torch(compiled)
    images = torch.from_numpy(problem.images.transpose(0, 1, 4, 2, 3).copy()).to(peer.device)
    labels = torch.nn.functional.one_hot(torch.from_numpy(problem.labels).long(), CLASSES).float().to(peer.device)
    wait = torch.cuda.synchronize if ON_GPU else lambda: None

    def cycle(number: int) -> None:
        for _ in range(number):
            peer.cycle(images, labels)
        wait()

    cycle(1)
    seconds = time.perf_counter() - start
    grid = torch.from_numpy(np.array(karras_sigmas(SAMPLER_STEPS))).to(peer.device)
    grid = torch.cat([grid, grid.new_zeros(1)]) if float(grid[-1]) > 0 else grid

    def sample() -> None:
        peer.sample(torch.randn(images.shape[1:], device=peer.device), labels[0], grid)
        wait()

    return Contestant(cycle, sample, seconds)


def contestants(compiled: bool) -> dict[str, Callable[[Problem], Contestant]]:
    """By name; the ratios are to the first."""
    found = {"PyTorch eager": lambda problem: pytorch(problem, False), "poise": poise}
    return {**found, "PyTorch compiled": lambda problem: pytorch(problem, True)} if compiled else found


def memory_of(name: str, size: str, precision: str, compiled: bool) -> float | None:
    """MiB that a contestant's cycles need beyond what its process held before, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe(duplex=False)
    process = context.Process(target=_measure_memory, args=(child, name, size, precision, compiled))
    process.start()
    child.close()
    try:
        return parent.recv()
    except EOFError:
        return None
    finally:
        process.join()


def _measure_memory(pipe, name: str, size: str, precision: str, compiled: bool) -> None:
    problem = Problem(size, precision)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak, which a new process takes over from the one that started it
    before = _peak_mib()
    contestant = contestants(compiled)[name](problem)
    contestant.cycle(3)
    if not ON_GPU:
        pipe.send(_peak_mib() - before)
    elif name == "poise":
        pipe.send(jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20)
    else:
        pipe.send(torch.cuda.max_memory_allocated() / 2**20)


def _peak_mib() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM:"))


def measure(size: str, precision: str, compiled: bool, rounds: int) -> Tables:
    problem = Problem(size, precision)
    difference = largest_difference(problem)
    assert difference < 1e-3, f"the two networks differ by {difference}"
    field = {name: make(problem) for name, make in contestants(compiled).items()}
    times: dict[str, dict[str, list[float]]] = {name: {"cycle": [], "sample": []} for name in field}
    for contestant in field.values():
        contestant.cycle(1)
        contestant.sample()
    for turn in range(rounds):
        for name, contestant in list(field.items())[:: -1 if turn % 2 else 1]:
            for what, action in (("cycle", lambda c=contestant: c.cycle(1)), ("sample", contestant.sample)):
                start = time.perf_counter()
                action()
                times[name][what].append(time.perf_counter() - start)
    peak = matrix_product_flops(precision)
    images = {"cycle": problem.batch * (1 + problem.config.fake_updates), "sample": problem.batch}

    def rows(what: str) -> list[Row]:
        first = next(iter(times.values()))[what]
        found = []
        for name in field:
            ours = times[name][what]
            ratios = [b / a for a, b in zip(ours, first, strict=True)]
            found.append(
                {
                    "library": name,
                    "images/s": images[what] / statistics.median(ours),
                    "speedup": statistics.median(ratios),
                    "quartiles": [float(q) for q in np.quantile(ratios, [0.25, 0.75])],
                }
            )
        return found

    cycles = rows("cycle")
    for row, (name, contestant) in zip(cycles, field.items(), strict=True):
        seconds = statistics.median(times[name]["cycle"])
        row["compile s"] = contestant.compile_seconds
        row["of peak"] = None if contestant.flops is None else contestant.flops / seconds / peak
        row["MiB"] = memory_of(name, size, precision, compiled)
    setting = f"{size}, {precision}, batch {problem.batch}"
    print(f"the teachers' outputs differ by at most {difference:.1e}; a product reaches {peak / 1e9:.0f} GFLOP/s")
    yield f"a cycle of distillation, {setting}", cycles
    yield f"the sampler, {setting}", rows("sample")


def tables(options: argparse.Namespace) -> Tables:
    for size in options.size:
        yield from measure(size, options.precision, options.compiled, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=sorted(SIZES), default=["digits"], help="networks")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the networks")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile")
    parser.add_argument("--rounds", type=int, default=9, help="turns that the contestants take")
    run_suite("fdistill", parser, tables, peers=("torch",))


if __name__ == "__main__":
    main()
