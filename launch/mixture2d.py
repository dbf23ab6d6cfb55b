"""Distillation of a Gaussian mixture in the plane, where teacher, ratio and best student are known exactly.

The teacher is the exact denoiser of two modes, the student an affine map of Gaussian noise, so it cannot fit both: a
mode-seeking divergence takes one of them, a mass-covering one lies across. Fake score and ratio head are learned.
"""

import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from poise.core import Microbatched
from poise.fdistill import (
    FDistillConfig,
    GaussianMixture,
    Optimizers,
    Oracles,
    f_distill,
    log_ratio,
    one_step,
    student_variables,
)
from poise.launch.agreement import is_main
from poise.launch.data import InMemory
from poise.launch.distill_phases import settings_of
from poise.launch.files import atomic_path
from poise.launch.loop import fit
from poise.launch.phase import Phase
from poise.launch.results import write_report
from poise.metrics import energy_distance, mode_coverage
from poise.nets import MLP, AffineGenerator, EDMPrecond, MLPHead

if TYPE_CHECKING:
    from poise.launch.distill import DistillConfig

CENTRE, STD = 1.5, 0.4
_EXAMPLES, _DRAWN = 65_536, 8_192
_LEVEL = 0.3  # the noise level at which the fields are drawn
_SPAN = 3.2
_STUDENT = AffineGenerator(scale=0.5, shift=(0.5, 0.0))
_HEAD = MLPHead((64, 64))


def teacher_mixture() -> GaussianMixture:
    """Two round modes of equal weight on the first axis."""
    centres = jnp.array([[-CENTRE, 0.0], [CENTRE, 0.0]])
    return GaussianMixture(jnp.array([0.5, 0.5]), centres, jnp.array([STD, STD]))


def run_mixture2d(config: "DistillConfig", workdir: pathlib.Path) -> None:
    """The whole run: warm-up of the critics, distillation, report and picture.

    Args:
      config: the run's settings; what belongs to images or a learned teacher is ignored.
      workdir: where ``report.json``, ``mixture2d.png`` and the rest go.
    """
    mixture = teacher_mixture()
    points = np.asarray(mixture.sample(jax.random.key(config.seed), _EXAMPLES, 0.0), np.float32)
    net = Microbatched(EDMPrecond(MLP((64, 64))), config.microbatches)
    start = net.init(jax.random.fold_in(jax.random.key(config.seed), 1), jnp.zeros((1, 2)), jnp.ones((1,)))
    result = fit(
        _phases(config, net, mixture, points),
        workdir=workdir,
        seed=config.seed,
        start=start,
        **config.for_fit(),
    )
    if is_main():
        _write_results(config, result, mixture, points, workdir)


def _phases(config: "DistillConfig", net: Any, mixture: GaussianMixture, points: np.ndarray) -> tuple[Phase, Phase]:
    settings = _settings(config)
    rate: Any = config.learning_rate
    if config.decay_steps:
        rate = optax.cosine_decay_schedule(rate, config.decay_steps, alpha=0.1)
    distillation = functools.partial(
        f_distill,
        net,
        _HEAD,
        optimizers=Optimizers(
            student=optax.adam(rate),
            fake=optax.adam(config.fake_learning_rate),
            head=optax.adam(config.head_learning_rate, b1=0.5),
        ),
        student_net=Microbatched(_STUDENT, config.microbatches),
        oracles=Oracles(teacher=lambda x, sigma, labels: mixture.denoise(x, sigma)),
    )
    warmup = Phase(
        name="warmup",
        make_algorithm=lambda variables, axis_name=None: distillation(
            config=dataclasses.replace(settings, fake_updates=1),
            teacher=variables,
            update_student=False,
            axis_name=axis_name,
        ),
        data=InMemory({"image": points}, config.batch_size, config.seed, cycle=1),
        num_steps=config.warmup_steps,
    )
    distill = Phase(
        name="distill",
        make_algorithm=lambda warm, axis_name=None: distillation(config=settings, start=warm, axis_name=axis_name),
        data=InMemory({"image": points}, config.batch_size, config.seed, cycle=config.fake_updates),
        num_steps=config.steps,
        evaluate=lambda state, key: figures(_draw(state, key, settings.sigma_init), mixture),
        evaluate_every=config.eval_every,
    )
    return warmup, distill


def _settings(config: "DistillConfig") -> FDistillConfig:
    return dataclasses.replace(settings_of(config, 0.5), head_features="own", train_features=False)


def _draw(state: Any, key: jax.Array, sigma_init: float) -> jax.Array:
    latents = jax.random.normal(key, (_DRAWN, 2))
    return one_step(_STUDENT, student_variables(state), latents, None, sigma_init=sigma_init)


def figures(samples: jax.Array, mixture: GaussianMixture) -> dict[str, float]:
    """What is reported of samples: the share nearer to each mode, and the share of modes that get a tenth or more.

    Args:
      samples: ``[N, 2]``.
      mixture: the teacher.

    Returns:
      Figures by name.
    """
    nearest = mode_coverage(samples, mixture.means, radius=1e3, min_share=0.1)
    left, right = (float(share) for share in nearest.shares)
    return {"share_left": left, "share_right": right, "modes_covered": float(nearest.coverage)}


def _write_results(
    config: "DistillConfig", result: Any, mixture: GaussianMixture, points: np.ndarray, workdir: pathlib.Path
) -> None:
    state = result.state
    key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)
    samples = _draw(state, key, _settings(config).sigma_init)
    params = student_variables(state)["params"]
    student = GaussianMixture(
        jnp.ones((1,)), params["bias"][None], (params["kernel"].T @ params["kernel"])[None]
    )  # the affine map's law
    axis = np.linspace(-_SPAN, _SPAN, 81, dtype=np.float32)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis * 0.6), -1).reshape(-1, 2))
    level = jnp.full((len(grid),), _LEVEL)
    exact = mixture.log_prob(grid, _LEVEL) - student.log_prob(grid, _LEVEL)
    logits: Any = _HEAD.apply({"params": state.head}, grid, level, None)
    learned = log_ratio(logits)
    weight = jax.nn.softmax(student.log_prob(grid, _LEVEL))  # where the student is
    report = {
        "student": {
            **figures(samples, mixture),
            "energy_distance": float(energy_distance(samples[:2048], jnp.asarray(points[:2048]))),
            "mean": np.asarray(params["bias"]).tolist(),
            "singular_values": np.linalg.svd(np.asarray(params["kernel"]), compute_uv=False).tolist(),
        },
        "log_ratio_error": float(jnp.sqrt(jnp.sum(weight * (learned - exact) ** 2))),
        "seconds": result.seconds,
        "config": dataclasses.asdict(config),
        "seed": config.seed,
        "student_updates": int(state.step),
    }
    write_report(workdir / "report.json", report, ("poise", "jax", "flax", "optax"))
    fields = {
        "teacher's density": np.exp(np.asarray(mixture.log_prob(grid, 0.0))),
        "student's density, one Gaussian": np.exp(np.asarray(student.log_prob(grid, 0.0))),
        f"log ratio, exact (noise {_LEVEL})": np.asarray(exact),
        f"log ratio, learned (noise {_LEVEL})": np.asarray(learned),
    }
    title = f"f-distill of two modes ({config.divergence.replace('_', '-')}) after {report['student_updates']} updates"
    _picture(workdir / "mixture2d.png", axis, fields, points[:600], np.asarray(samples[:600]), title)
    shown = report["student"]
    print(
        "share of samples nearer to the left and the right mode "
        f"{shown['share_left']:.3f} and {shown['share_right']:.3f} (teacher 0.5 each), "
        f"energy distance {shown['energy_distance']:.4f}, error of the learned log ratio "
        f"{report['log_ratio_error']:.3f}",
        flush=True,
    )


def _picture(
    path: pathlib.Path,
    axis: np.ndarray,
    fields: dict[str, np.ndarray],
    real: np.ndarray,
    generated: np.ndarray,
    title: str,
) -> None:
    """Densities with samples on top, and the log ratio as it is and as it was learned, in the same colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 5.6), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    names = list(fields)
    bound = float(np.clip(np.abs(fields[names[2]]).max(), 1.0, 6.0))
    shape = (len(axis), len(axis))
    for panel, name in zip(axes.flat, names, strict=True):
        ratio = name.startswith("log ratio")
        colours = {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound} if ratio else {"cmap": "Greys", "vmin": 0.0}
        image = panel.pcolormesh(axis, axis * 0.6, fields[name].reshape(shape), shading="nearest", **colours)
        figure.colorbar(image, ax=panel, shrink=0.8)
        panel.set_title(name, fontsize=10)
        panel.set_aspect("equal")
        panel.tick_params(labelsize=8)
    inside = {"alpha": 0.35, "linewidths": 0}
    axes[0, 0].scatter(*real.T, s=5, color="tab:blue", **inside)
    axes[0, 1].scatter(*generated.T, s=5, color="tab:orange", **inside)
    for panel in axes[0]:
        panel.set_xlim(-_SPAN, _SPAN)
        panel.set_ylim(-0.6 * _SPAN, 0.6 * _SPAN)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
