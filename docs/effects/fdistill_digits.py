"""All divergences on real data with an exact teacher: handwritten digits, five seeds.

    python docs/effects/fdistill_digits.py [number of seeds]

The data are 1200 of scikit-learn's 8x8 digits in 16 principal components, of standard deviation 0.5. The teacher is the
exact denoiser of a kernel density on them; a perceptron that has learned it is where student and fake score start. The
divergences differ in the weights alone: there is no adversarial loss. Generated points are judged against the other 597
digits. It writes fdistill_digits.json and fdistill_digits.png beside itself, and prints a table.
"""

import functools
import json
import pathlib
import platform
import sys
import time

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

from poise.fdistill import (
    FDistillConfig,
    GaussianMixture,
    Optimizers,
    Oracles,
    f_distill,
    many_steps,
    one_step,
    sample_karras_sigma,
)
from poise.metrics import frechet_distance, prdc
from poise.nets import MLP, EDMPrecond, MLPHead

NAMES = (
    "reverse_kl", "softened_reverse_kl", "jensen_shannon", "squared_hellinger", "triangular", "forward_kl", "jeffreys",
    "pearson_chi2", "neyman_chi2",
)  # fmt: skip
DIM, BANDWIDTH, BATCH, STEPS, WARMUP, CRITICS = 16, 0.08, 256, 300, 100, 5
NET, HEAD = EDMPrecond(MLP((128, 128))), MLPHead((128, 128))


def step_key(seed, phase: int, step):
    """A key for each step of each phase; unlike ``poise.core.step_key`` for seeds under ``vmap``, too."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), phase), step)


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Principal components of 1200 digits and of the 597 others, in an order that is mixed once."""
    images = sklearn.datasets.load_digits().data[np.random.default_rng(0).permutation(1797)]
    train = images[:1200]
    center = train.mean(axis=0)
    axes = np.linalg.svd(train - center, full_matrices=False)[2][:DIM]
    points = (images - center) @ axes.T
    points *= 0.5 / points[:1200].std()
    return points[:1200], points[1200:]


def teacher() -> GaussianMixture:
    """The kernel density."""
    points = digits()[0]
    count = len(points)
    return GaussianMixture(jnp.full(count, 1 / count), jnp.asarray(points, jnp.float32), jnp.full(count, BANDWIDTH))


def sample(key, num: int):
    """Points of the kernel density: images that are drawn evenly, and noise."""
    pick, noise = jax.random.split(key)
    points = jnp.asarray(digits()[0], jnp.float32)
    return points[jax.random.randint(pick, (num,), 0, len(points))] + BANDWIDTH * jax.random.normal(noise, (num, DIM))


def pretrain(seed, steps: int = 1000):
    """A network that imitates the teacher at all noise levels."""
    density, adam = teacher(), optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    variables = NET.init(jax.random.key(seed), jnp.zeros((1, DIM)), jnp.ones(1))

    def step(carry, i):
        params, state = carry
        data, level, noise = jax.random.split(step_key(seed, 0, i), 3)
        sigma = sample_karras_sigma(level, (BATCH,), 0.02, 80.0)
        x = sample(data, BATCH) + sigma[:, None] * jax.random.normal(noise, (BATCH, DIM))
        weight = 1 / sigma**2 + 1 / 0.25

        def loss(params):
            return jnp.mean(
                weight[:, None] * (NET.apply({"params": params}, x, sigma) - density.denoise(x, sigma)) ** 2
            )

        updates, state = adam.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    params = variables["params"]
    return jax.lax.scan(step, (params, adam.init(params)), jnp.arange(steps))[0][0]


def algorithm(name: str, **kwargs):
    """f-distill with the exact teacher."""
    config = FDistillConfig(
        divergence=name, sigma_min=0.02, sigma_max=5.0, fake_updates=CRITICS, head_features="own", gan_weight=0.0,
        ema_decays=(0.98,),
    )  # fmt: skip
    density, rate = teacher(), optax.cosine_decay_schedule(1e-3, STEPS, alpha=0.1)
    clipped = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))
    optimizers = Optimizers(clipped, optax.adam(1e-3), optax.adam(1e-3, b1=0.5))
    oracles = Oracles(teacher=lambda x, sigma, labels: density.denoise(x, sigma))
    return f_distill(NET, HEAD, config, optimizers, oracles=oracles, **kwargs)


def batch(key):
    """Real points for a cycle."""
    return {"image": sample(key, CRITICS * BATCH).reshape(CRITICS, BATCH, DIM)}


def run(name: str, start) -> tuple[np.ndarray, np.ndarray]:
    """Distils for each seed; generated points ``[seeds, 597, 16]`` and the weights' effective sample size."""

    def cycle(algorithm, phase, seed, state, i):
        data, draws = jax.random.split(step_key(seed, phase, i))
        state, metrics = algorithm.step(state, batch(data), draws)
        return state, metrics.get("effective_sample_size", 0.0)

    @jax.jit
    @jax.vmap
    def distill(seed, params):
        warm = algorithm(name, teacher={"params": params}, update_student=False)
        state = warm.init(jax.random.key(seed), batch(jax.random.key(0)))
        state, _ = jax.lax.scan(functools.partial(cycle, warm, 1, seed), state, jnp.arange(WARMUP))
        student = algorithm(name, start=state)
        state, sizes = jax.lax.scan(functools.partial(cycle, student, 2, seed), state, jnp.arange(STEPS))
        return generate(seed, state.ema[0]), sizes[-100:].mean()

    return jax.device_get(distill(jnp.arange(len(jax.tree.leaves(start)[0])), start))


def generate(seed, params):
    """As many points as there are to compare with."""
    latents = jax.random.normal(step_key(seed, 3, 0), (len(digits()[1]), DIM))
    return one_step(NET, {"params": params}, latents)


def judge(points: np.ndarray) -> dict[str, np.ndarray]:
    """Quality and variety of every seed's points."""
    rows, real = [], digits()[1]
    with jax.enable_x64():
        for fake in points.astype(np.float64):
            found = prdc(real, fake, k=5)
            rows.append([float(frechet_distance(real, fake)), *(float(getattr(found, key)) for key in KEYS[1:])])
    return dict(zip(KEYS, np.array(rows).T, strict=True))


KEYS = ("frechet", "precision", "recall", "density", "coverage")


def draw(path: pathlib.Path, scores: dict[str, dict[str, np.ndarray]]) -> None:
    """The picture."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained", sharey=True)
    names = [*NAMES, "teacher, 18 steps"]
    for panel, key in zip(panels, ("frechet", "recall", "coverage"), strict=True):
        for place, name in enumerate(names):
            values = scores[name][key]
            panel.plot(values, np.full(len(values), place), "o", ms=4, alpha=0.6, color=f"C{place}")
            panel.plot(values.mean(), place, "|", ms=16, color=f"C{place}")
        panel.set(title=key, yticks=range(len(names)), yticklabels=[name.replace("_", " ") for name in names])
        panel.invert_yaxis() if key == "frechet" else None
        panel.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Runs it all and writes the results."""
    begin, seeds = time.time(), jnp.arange(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
    here = pathlib.Path(__file__).parent
    start = jax.jit(jax.vmap(pretrain))(seeds)

    @jax.jit
    @jax.vmap
    def by_ode(seed, params):
        latents = jax.random.normal(step_key(seed, 3, 0), (len(digits()[1]), DIM))
        return many_steps(NET, {"params": params}, latents)

    points = {
        "before": jax.device_get(jax.jit(jax.vmap(generate))(seeds, start)),
        "teacher, 18 steps": jax.device_get(by_ode(seeds, start)),
        "kernel density": np.stack([sample(step_key(int(s), 4, 0), len(digits()[1])) for s in seeds]),
    }
    scores, sizes = {name: judge(values) for name, values in points.items()}, {}
    for name in NAMES:
        values, sizes[name] = run(name, start)
        scores[name] = judge(values)
        print(name, {key: float(column.mean().round(4)) for key, column in scores[name].items()}, flush=True)
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.time() - begin),
        "seeds": seeds.tolist(),
        "scores": {
            name: {key: [round(float(v), 4) for v in column] for key, column in found.items()}
            for name, found in scores.items()
        },
        "effective_sample_size": {name: [round(float(v), 1) for v in column] for name, column in sizes.items()},
    }
    (here / "fdistill_digits.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(here / "fdistill_digits.png", scores)
    for name in scores:
        print(name, {key: f"{column.mean():.3f} ± {column.std(ddof=1):.3f}" for key, column in scores[name].items()})


if __name__ == "__main__":
    main()
