"""Which divergences collapse on two modes and which cover them: exactly, and with everything learned.

    python docs/effects/fdistill_mixture.py [number of seeds]

Three experiments: the exact gradient of each divergence moves a Gaussian towards a mixture of two; the whole algorithm
(learned fake score, learned density ratio) moves an affine generator towards one in the plane, for several seeds; and
the weights of the divergences as they are before any training. It writes fdistill_mixture.json and fdistill_mixture.png
beside itself, and prints tables.
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

from poise.fdistill import (
    FDistillConfig,
    GaussianMixture,
    Optimizers,
    Oracles,
    divergence,
    exact_gradient,
    f_distill,
    f_weight,
    weight_moments,
)
from poise.nets import MLP, AffineGenerator, EDMPrecond, MLPHead

NAMES = (
    "reverse_kl", "softened_reverse_kl", "jensen_shannon", "squared_hellinger", "forward_kl", "jeffreys",
)  # fmt: skip
LINE = GaussianMixture(jnp.array([0.5, 0.5]), jnp.array([[-2.0], [2.0]]), jnp.array([0.5, 0.5]))
PLANE = GaussianMixture(jnp.array([0.5, 0.5]), jnp.array([[-1.5, 0.0], [1.5, 0.0]]), jnp.array([0.4, 0.4]))


def step_key(seed, phase: int, step):
    """A key for each step of each phase; unlike ``poise.core.step_key`` for seeds under ``vmap``, too."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), phase), step)


def exact_run(name: str, levels: tuple[float, ...] = (0.3,), steps: int = 1500) -> np.ndarray:
    """Mean and deviation of a Gaussian under the exact gradient, averaged over noise levels by their variance."""
    div, weights = divergence(name), np.square(levels) / np.sum(np.square(levels))
    adam = optax.adam(0.02)

    def step(carry, _):
        params, state = carry
        student = GaussianMixture(jnp.ones(1), params[:1, None], jnp.abs(params[1:]))
        grads = [exact_gradient(div, LINE, student, level, num_nodes=401) for level in levels]
        grad = sum(w * jnp.concatenate([g.means, g.stds]) for w, g in zip(weights, grads, strict=True))
        updates, state = adam.update(grad, state)
        params = params + updates
        return (params, state), params

    start = jnp.array([0.6, 0.7])
    run = jax.jit(lambda start: jax.lax.scan(step, (start, adam.init(start)), length=steps)[1])
    return np.abs(np.asarray(run(start)))


def plane_algorithm(name: str, **kwargs):
    """The algorithm on the plane: an exact teacher; fake score and ratio are learned by perceptrons."""
    config = FDistillConfig(
        divergence=name, sigma_min=0.05, sigma_max=0.5, min_level=0, max_level=999, fake_updates=5, head_features="own",
        gan_weight=0.0, sigma_data=1.55, ema_decays=(0.0,), **kwargs.pop("changes", {}),
    )  # fmt: skip
    optimizers = Optimizers(optax.adam(1e-2), optax.adam(1e-3), optax.adam(1e-3, b1=0.5))
    net = EDMPrecond(MLP((64, 64)), sigma_data=1.55)
    if "start" not in kwargs:
        kwargs["teacher"] = net.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.ones(1))
    return f_distill(
        net, MLPHead((64, 64), sigma_data=1.55), config, optimizers,
        student_net=AffineGenerator(0.5, (0.5, 0.0)),
        oracles=Oracles(teacher=lambda x, sigma, labels: PLANE.denoise(x, sigma)), **kwargs,
    )  # fmt: skip


def plane_run(
    name: str, seeds: int, warmup: int = 100, steps: int = 400, batch_size: int = 256
) -> dict[str, np.ndarray]:
    """A warm-up of the critics (500 updates) and a distillation for each seed, all at once.

    Returns:
      The student's kernel and bias and the weights' effective sample size after every update, ``[seeds, steps, ...]``.
    """

    def batch(key):
        return {"image": PLANE.sample(key, 5 * batch_size).reshape(5, batch_size, 2)}

    def cycle(algorithm, phase, seed, state, i):
        data, draws = jax.random.split(step_key(seed, phase, i))
        state, metrics = algorithm.step(state, batch(data), draws)
        student = {"kernel": state.student["kernel"], "bias": state.student["bias"]}
        return state, {**student, "effective_sample_size": metrics.get("effective_sample_size", 0.0)}

    warm = plane_algorithm(name, update_student=False)

    @jax.jit
    @jax.vmap
    def start(seed):
        state = warm.init(jax.random.key(seed), batch(jax.random.key(0)))
        return jax.lax.scan(functools.partial(cycle, warm, 0, seed), state, jnp.arange(warmup))[0]

    @jax.jit
    @jax.vmap
    def distill(seed, state):
        algorithm = plane_algorithm(name, start=state)
        return jax.lax.scan(functools.partial(cycle, algorithm, 1, seed), state, jnp.arange(steps))[1]

    numbers = jnp.arange(seeds)
    return jax.device_get(distill(numbers, start(numbers)))


def describe(kernel: np.ndarray, bias: np.ndarray, num: int = 20_000) -> dict[str, float]:
    """The smaller mode's share of a generator's points, and its shape."""
    points = np.random.default_rng(0).standard_normal((num, 2)) @ kernel + bias
    share = float((points[:, 0] > 0).mean())
    sizes = np.linalg.svd(kernel, compute_uv=False)
    return {
        "smaller_share": min(share, 1 - share), "bias": float(abs(bias[0])), "largest_scale": float(sizes[0]),
        "smallest_scale": float(sizes[1]),
    }  # fmt: skip


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The rank correlation."""
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def variances(gaps: np.ndarray) -> dict[str, np.ndarray]:
    """The variance of the normalised weight between two unit Gaussians over the distance of their means."""
    with jax.enable_x64():

        def unit(mean):
            return GaussianMixture(jnp.ones(1), jnp.reshape(mean, (1, 1)), jnp.ones(1))

        found = {}
        for name in NAMES:
            div = divergence(name)
            moments = jax.vmap(lambda gap, div=div: weight_moments(div, unit(gap), unit(0.0 * gap)))
            mean, variance = jax.jit(moments)(jnp.asarray(gaps, jnp.float64))
            found[name] = np.asarray(variance / mean**2)
    return found


def weights_and_scores(sigma: float, num: int = 6400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Density ratio, JS weight and distance of the scores at points of a wide student."""
    with jax.enable_x64():
        teacher = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), PLANE)
        student = GaussianMixture(jnp.ones(1), jnp.array([[0.3, 0.1]]), jnp.array([1.2]))
        x = student.sample(jax.random.key(0), num, sigma)
        ell = teacher.log_prob(x, sigma) - student.log_prob(x, sigma)
        distance = jnp.linalg.norm(teacher.score(x, sigma) - student.score(x, sigma), axis=1)
        return np.asarray(ell), np.asarray(f_weight(divergence("jensen_shannon"), ell)), np.asarray(distance)


def summary(runs: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Where the students of all seeds ended."""
    found = [describe(kernel, bias) for kernel, bias in zip(runs["kernel"][:, -1], runs["bias"][:, -1], strict=True)]
    columns = {key: np.array([row[key] for row in found]) for key in found[0]}
    columns["effective_sample_size"] = runs["effective_sample_size"][:, -100:].mean(axis=1)
    return {
        key: {"mean": float(column.mean()), "min": float(column.min()), "max": float(column.max())}
        for key, column in columns.items()
    }


def draw(path: pathlib.Path, exact, runs, gaps, spread, points) -> None:
    """The picture."""
    import matplotlib.pyplot as plt

    colors = dict(zip(NAMES, ("C3", "C1", "C0", "C9", "C2", "C4"), strict=True))
    figure, panels = plt.subplots(2, 3, figsize=(12, 6.6), layout="constrained")
    x = np.linspace(-4.5, 4.5, 600)
    with jax.enable_x64():
        truth = np.exp(np.asarray(LINE.log_prob(jnp.asarray(x)[:, None])))
    panels[0, 0].fill_between(x, truth, color="0.85", label="teacher")
    for name in NAMES:
        mean, std = exact[name][-1]
        density = np.exp(-0.5 * ((x - mean) / std) ** 2) / std / np.sqrt(2 * np.pi)
        panels[0, 0].plot(x, density, color=colors[name], label=name.replace("_", " "))
    panels[0, 0].set(title="1. exact gradient, no networks", xlabel="x", ylabel="density")
    panels[0, 0].legend(fontsize=7)
    for panel, name in zip((panels[0, 1], panels[0, 2]), ("reverse_kl", "jensen_shannon"), strict=True):
        z = np.random.default_rng(1).standard_normal((400, 2))
        teacher = np.asarray(PLANE.sample(jax.random.key(5), 400))
        panel.plot(*teacher.T, ".", color="0.75", ms=3, label="teacher")
        for seed, (kernel, bias) in enumerate(zip(runs[name]["kernel"][:, -1], runs[name]["bias"][:, -1], strict=True)):
            label = "student, one seed" if seed == 0 else None
            if seed == 0:
                panel.plot(*(z @ kernel + bias).T, ".", color=colors[name], ms=2, label=label)
            angle = np.linspace(0, 2 * np.pi, 100)
            circle = 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
            label = "two deviations, every seed" if seed == 0 else None
            panel.plot(*(circle @ kernel + bias).T, color=colors[name], lw=0.8, label=label)
        panel.set(title=f"2. all learned: {name.replace('_', ' ')}", xlim=(-5.2, 5.2), ylim=(-2.2, 2.2))
        panel.legend(fontsize=7, loc="upper right")
    for name in NAMES:
        shares = np.array(
            [[describe(k, b, 4000)["smaller_share"] for k, b in zip(ks[::10], bs[::10], strict=True)]
             for ks, bs in zip(runs[name]["kernel"], runs[name]["bias"], strict=True)]
        )  # fmt: skip
        updates = np.arange(0, runs[name]["kernel"].shape[1], 10)
        panels[1, 0].plot(updates, shares.mean(0), color=colors[name], label=name.replace("_", " "))
        panels[1, 0].fill_between(updates, shares.min(0), shares.max(0), color=colors[name], alpha=0.15, lw=0)
        panels[1, 1].plot(gaps, spread[name], color=colors[name])
    panels[1, 0].set(title="2. share of the smaller mode", xlabel="updates of the student", ylim=(0, 0.52))
    panels[1, 1].set(
        title="variance of the normalised weight", xlabel="distance of two unit Gaussians", yscale="symlog",
        ylim=(-0.05, 60),
    )  # fmt: skip
    ell, weight, distance = points
    panels[1, 2].semilogx(np.exp(ell), distance, ".", ms=2, color="C7", label="distance of the scores")
    panels[1, 2].set(title="where the scores disagree the weight is small", xlabel="density ratio", ylabel="distance")
    other = panels[1, 2].twinx()
    order = np.argsort(ell)
    other.plot(np.exp(ell)[order], weight[order], color=colors["jensen_shannon"], label="weight of Jensen-Shannon")
    other.set(ylabel="weight", ylim=(0, 1))
    other.spines["right"].set_visible(True)
    panels[1, 2].set_xlim(1e-4, 10)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Runs it all and writes the results."""
    start, seeds = time.time(), int(sys.argv[1]) if len(sys.argv) > 1 else 5
    here, exact = pathlib.Path(__file__).parent, {name: exact_run(name) for name in NAMES}
    blurred = exact_run("reverse_kl", (0.3, 1.0, 3.0))
    runs = {}
    for name in NAMES:
        runs[name] = plane_run(name, seeds)
        print(name, exact[name][-1].round(3), json.dumps(summary(runs[name])), flush=True)
    gaps = np.linspace(0.0, 2.0, 41)
    spread = variances(gaps)
    levels = (0.05, 0.2, 0.5, 1.0)
    correlation = {}
    for sigma in levels:
        ell, _, distance = weights_and_scores(sigma)
        correlation[f"{sigma:g}"] = spearman(ell, distance)
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.time() - start),
        "seeds": list(range(seeds)),
        "exact_gradient": {
            **{name: {"mean": float(run[-1, 0]), "std": float(run[-1, 1])} for name, run in exact.items()},
            "reverse_kl, sigma .3, 1, 3": {"mean": float(blurred[-1, 0]), "std": float(blurred[-1, 1])},
        },
        "all_learned": {name: summary(run) for name, run in runs.items()},
        "variance_of_normalised_weight_at_distance_2": {name: float(values[-1]) for name, values in spread.items()},
        "rank_correlation_of_ratio_and_distance_of_scores": correlation,
    }
    (here / "fdistill_mixture.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(here / "fdistill_mixture.png", exact, runs, gaps, spread, weights_and_scores(0.2))
    print(results["variance_of_normalised_weight_at_distance_2"], correlation)


if __name__ == "__main__":
    main()
