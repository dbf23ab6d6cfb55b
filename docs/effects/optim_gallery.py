"""Every optimizer of poise.optim in the plane, beside optax's: a curved valley, a constraint, a cone, a norm.

    python docs/effects/optim_gallery.py

writes optim_gallery.json and optim_gallery_*.png beside itself, and prints the tables of docs/methods/gallery.md.
"""

import json
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optim_gallery_constraints import CONSTRAINED, CURVATURE, EPS, FREE_MINIMUM, constrained_minimum

from poise.optim import (
    Armijo,
    Kappa,
    adamp,
    apply_prox,
    armijo_gradient_descent,
    average_gradients,
    batch_perceptron_rule,
    compander,
    iterations_to_separate,
    kappas,
    lion_kappa,
    lion_kappa_constraint_violation,
    lion_kappa_stationarity_gap,
    logistic_rule,
    normalized_logistic_loss,
    path_of_rule,
    perceptron_rule,
    prox_wgsef,
    sgdp,
    sso,
)

RATES = np.logspace(-4, 1, 21)  # of which each optimizer gets its best in the valley
RATE, DECAY = 0.1, 1.0  # of everything under the constraint
VALLEY_START, BALL_START = np.array([-1.2, 1.0]), np.array([-1.6, 1.5])
# Shapes in which an optimizer gets the two numbers: a vector, the kernel of one neuron, a symmetric matrix.
LAYOUTS = {
    "vector": (lambda x: x, lambda leaf: leaf),
    "kernel": (lambda x: x[:, None], lambda leaf: leaf[:, 0]),
    "matrix": (
        lambda x: jnp.array([[x[0], x[1]], [x[1], x[0]]]),
        lambda leaf: jnp.stack([leaf[0, 0] + leaf[1, 1], leaf[0, 1] + leaf[1, 0]]) / 2,
    ),
}


class Entry(NamedTuple):
    """An optimizer of the gallery.

    Attributes:
      make: ``(learning_rate, weight_decay)`` to the optimizer.
      layout: the shape in which it gets its leaf.
      kappa: that of Lion-kappa.
      transform: to what is trained, and back.
      share: of the common learning rate, for a momentum that adds up gradients.
    """

    make: Callable[[Any, Any], optax.GradientTransformation]
    layout: str = "vector"
    kappa: Kappa | None = None
    transform: tuple[Callable, Callable] = (lambda x: x, lambda x: x)
    share: float = 1.0


def of_kappa(kappa: Kappa, layout: str = "vector") -> Entry:
    """Lion-kappa with its usual rates."""
    return Entry(lambda rate, decay: lion_kappa(rate, kappa, weight_decay=decay), layout, kappa)


def companded(bound: float) -> Entry:
    """Adam on raw weights whose companded values stay below a bound."""
    wc = compander(a=2 * bound / np.pi, b=2 * bound / np.pi, mask=True, clip=0.9)
    return Entry(lambda rate, decay: optax.adam(rate), transform=(wc.init, wc.apply))


KAPPAS = {
    "sign": of_kappa(kappas.sign()),
    "lp(1.5)": of_kappa(kappas.lp(1.5)),
    "lp(2)": of_kappa(kappas.lp(2.0)),
    "linf": of_kappa(kappas.linf()),
    "nuclear": of_kappa(kappas.nuclear(), "matrix"),
    "spectral": of_kappa(kappas.spectral(), "matrix"),
    "dead_zone": of_kappa(kappas.dead_zone(EPS)),
    "huber": of_kappa(kappas.huber(EPS)),
    "relativistic": of_kappa(kappas.relativistic(EPS)),
    "tanh": of_kappa(kappas.tanh(1 / EPS)),
    "softsign": of_kappa(kappas.softsign(EPS)),
    "arctan": of_kappa(kappas.arctan(1 / EPS)),
    "squared_l2": of_kappa(kappas.squared_l2()),
}
OTHERS = {
    "adamp": Entry(lambda rate, decay: adamp(rate, weight_decay=decay), "kernel"),
    "sgdp": Entry(lambda rate, decay: sgdp(rate, 0.9, weight_decay=decay, nesterov=True), "kernel", share=0.1),
}
OPTAX = {
    "optax.sgd": Entry(lambda rate, decay: optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))),
    "optax.sgd, nesterov": Entry(
        lambda rate, decay: optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, 0.9, nesterov=True)),
        share=0.1,
    ),
    "optax.adamw": Entry(lambda rate, decay: optax.adamw(rate, weight_decay=decay)),
    "optax.lion": Entry(lambda rate, decay: optax.lion(rate, weight_decay=decay)),
    "optax.contrib.muon": Entry(lambda rate, decay: optax.contrib.muon(rate, weight_decay=decay), "matrix"),
}
VALLEY = KAPPAS | OTHERS
VALLEY |= {
    "average_gradients": Entry(lambda rate, decay: optax.chain(average_gradients(0.1), optax.sgd(rate))),
    "compander": companded(np.pi),
}
PROJECTED = Entry(
    lambda rate, decay: optax.chain(
        optax.sgd(rate), apply_prox(lambda x, step: optax.projections.projection_l2_ball(x, 1 / DECAY), rate)
    )
)
SPARSE = Entry(
    lambda rate, decay: optax.chain(
        optax.sgd(rate), apply_prox(lambda x, step: prox_wgsef(x, step * DECAY, "weights", k=1), rate)
    )
)
BALL = (
    KAPPAS
    | {
        "log_sum_exp": of_kappa(kappas.log_sum_exp()),
        "apply_prox, ball": PROJECTED,
        "apply_prox, wgsef": SPARSE,
        "compander": companded(1 / DECAY),
    }
    | OTHERS
)


def valley(x):
    """Rosenbrock's function."""
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def bowl(x):
    """A quadratic with its minimum outside of every constraint."""
    return (x - FREE_MINIMUM) @ CURVATURE @ (x - FREE_MINIMUM) / 2


def walks(entry: Entry, steps: int) -> Callable:
    """``(rates, decay, on_valley) -> paths [rate, step + 1, 2]``, compiled once for both objectives."""
    to_leaf, from_leaf = LAYOUTS[entry.layout]
    to_raw, from_raw = entry.transform

    def one(rate, decay, on_valley):
        schedule = optax.cosine_decay_schedule(rate * entry.share, steps)
        optimizer = entry.make(schedule, decay)
        point = lambda raw: from_leaf(from_raw(raw))  # noqa: E731
        loss = lambda raw: jnp.where(on_valley, valley(point(raw)), bowl(point(raw)))  # noqa: E731

        def step(carry, _):
            raw, state = carry
            updates, state = optimizer.update(jax.grad(loss)(raw), state, raw)
            raw = optax.apply_updates(raw, updates)
            return (raw, state), point(raw)

        raw = to_raw(to_leaf(jnp.where(on_valley, VALLEY_START, BALL_START)))
        path = jax.lax.scan(step, (raw, optimizer.init(raw)), length=steps)[1]
        return jnp.concatenate([point(raw)[None], path])

    return jax.jit(jax.vmap(one, (0, None, None)))


def searched(steps: int) -> dict[str, np.ndarray]:
    """The valley with Armijo's line search, and with a surrogate for its two residuals, 100 inner steps a gradient."""

    def descend(carry, _):
        x, size = carry
        x, info = armijo_gradient_descent(valley, x, 1, Armijo(initial_step=size))
        return (x, info.step_size), x

    residuals = lambda x, batch: jnp.stack([1 - x[0], 10 * (x[1] - x[0] ** 2)])  # noqa: E731
    surrogate = sso(residuals, lambda z, batch: jnp.sum(z**2), eta=0.25, inner_steps=100)

    def outer(carry, _):
        x, state, _ = surrogate.step(*carry, ())
        return (x, state), x

    start = jnp.asarray(VALLEY_START)
    runs = {
        "armijo_gradient_descent": jax.lax.scan(descend, (start, jnp.asarray(1.0)), length=steps)[1],
        "sso": jax.lax.scan(outer, (start, surrogate.init(start)), length=max(steps // 10, 1))[1],
    }
    return {name: np.concatenate([VALLEY_START[None], path]) for name, path in runs.items()}


# One example of a class against 19 of the other, in the plane of the weights of a classifier without a bias.
EXAMPLES = np.array([0.5, -1.0]) + np.concatenate(
    [np.zeros((1, 2)), [-1.0, 0.0] + 0.1 * np.random.default_rng(0).standard_normal((19, 2))]
)
LABELS = np.array([1.0] + 19 * [-1.0])


def rules() -> dict[str, Callable]:
    """Rules for linear classifiers; the last three step with optimizers of optax that have no state."""

    def with_optax(optimizer: optax.GradientTransformation, loss: Callable) -> Callable:
        return lambda theta, count, signed: optax.apply_updates(
            theta, optimizer.update(jax.grad(lambda t: loss(signed @ t))(theta), optimizer.init(theta), theta)[0]
        )

    plain = lambda margins: jnp.mean(jnp.logaddexp(0, -margins))  # noqa: E731
    return {
        "perceptron_rule": perceptron_rule(),
        "batch_perceptron_rule": batch_perceptron_rule(),
        "batch_perceptron_rule, normalized": batch_perceptron_rule(normalized=True),
        "logistic_rule": logistic_rule(2.0),
        "logistic_rule, normalized": logistic_rule(2.0, normalized=True),
        "optax.sgd": with_optax(optax.sgd(2.0), plain),
        "optax.sgd, normalized loss": with_optax(optax.sgd(2.0), normalized_logistic_loss),
        "optax.sign_sgd": with_optax(optax.sign_sgd(0.3), plain),
    }


def separations(steps: int = 60) -> dict[str, tuple[np.ndarray, int]]:
    """The path of each rule and its number of steps to separation."""
    x, y = jnp.asarray(EXAMPLES), jnp.asarray(LABELS)
    out = {}
    for name, rule in rules().items():
        count = int(iterations_to_separate(rule, x, y, 10_000).num_steps)
        out[name] = np.asarray(path_of_rule(rule, x, y, steps)), count
    return out


SPINNERS = {
    "optax.sgd, nesterov": Entry(lambda rate, decay: optax.sgd(rate, 0.9, nesterov=True), "kernel"),
    "sgdp": OTHERS["sgdp"],
    "optax.adamw": Entry(lambda rate, decay: optax.adamw(rate, weight_decay=decay), "kernel"),
    "adamp": OTHERS["adamp"],
}


def spins(steps: int = 100) -> dict[str, np.ndarray]:
    """A loss of the angle alone, 1 - cos(angle - 2.6), from the angle 0 and the length 1, with one rate for all."""
    target = jnp.array([[np.cos(2.6)], [np.sin(2.6)]])
    out = {}
    for name, entry in SPINNERS.items():
        optimizer = entry.make(0.1, 0.0)

        def step(carry, _, optimizer=optimizer):
            w, state = carry
            grad = jax.grad(lambda w: 1 - jnp.vdot(w, target) / jnp.linalg.norm(w))(w)
            updates, state = optimizer.update(grad, state, w)
            w = optax.apply_updates(w, updates)
            return (w, state), w[:, 0]

        start = jnp.array([[1.0], [0.0]])
        path = jax.jit(lambda w, step=step, o=optimizer: jax.lax.scan(step, (w, o.init(w)), length=steps)[1])(start)
        out[name] = np.concatenate([[[1.0, 0.0]], path])
    return out


class Gallery(NamedTuple):
    """All paths: of the valley with their rates, under the constraint, of classifiers with their counts, of angles."""

    valley: dict[str, tuple[np.ndarray, float | None]]
    ball: dict[str, np.ndarray]
    cone: dict[str, tuple[np.ndarray, int]]
    angle: dict[str, np.ndarray]
    same: dict[str, float]


def best_of(paths: np.ndarray) -> int:
    """The path [rate, step, 2] with the least mean logarithm of the loss."""
    losses = np.asarray(jax.vmap(jax.vmap(valley))(paths))
    return int(np.argmin(np.nan_to_num(np.log(losses + 1e-12).mean(1), nan=np.inf)))


def experiment(steps: int = 500, names: tuple[str, ...] | None = None) -> Gallery:
    """Runs the gallery, or some of its optimizers."""
    on_valley, in_ball, same = {}, {}, {}
    with jax.enable_x64():
        entries = VALLEY | BALL | OPTAX
        runs = {}
        for name in entries:
            if names is not None and name not in names:
                continue
            if name in VALLEY or name in OPTAX:
                runs[name] = walks((VALLEY | OPTAX)[name], steps)
                paths = np.asarray(runs[name](RATES, 0.0, True))
                best = best_of(paths)
                on_valley[name] = paths[best], float(RATES[best] * (VALLEY | OPTAX)[name].share)
            if name in BALL or name in OPTAX:
                entry = (BALL | OPTAX)[name]
                walk = runs[name] if entry is (VALLEY | OPTAX).get(name) else walks(entry, steps)
                in_ball[name] = np.asarray(walk(np.full(len(RATES), RATE), DECAY, False))[0]
        in_ball = {name: in_ball[name] for name in BALL | OPTAX if name in in_ball}
        on_valley |= {name: (path, None) for name, path in searched(steps).items()}
        twins = {
            "top_k(1) is linf": (of_kappa(kappas.top_k(1)), "linf"),
            "top_k(2) is sign": (of_kappa(kappas.top_k(2)), "sign"),
            "group_l2 is lp(2)": (of_kappa(kappas.group_l2()), "lp(2)"),
            "optax.lion is sign": (OPTAX["optax.lion"], "sign"),
        }
        for sentence, (entry, name) in twins.items():
            if name in in_ball:
                path = np.asarray(walks(entry, steps)(np.full(len(RATES), RATE), DECAY, False))[0]
                same[sentence] = float(np.abs(path - in_ball[name]).max())
        return Gallery(on_valley, in_ball, separations(), spins(), same)


def summary(gallery: Gallery) -> dict[str, Any]:
    """The numbers of the tables."""
    with jax.enable_x64():
        rosenbrock = {
            name: {
                "rate": rate,
                "loss": float(valley(path[-1])),
                "distance": float(np.linalg.norm(path[-1] - 1)),
                "steps": len(path) - 1,
            }
            for name, (path, rate) in gallery.valley.items()
        }
        ball = {name: ball_row(name, path) for name, path in gallery.ball.items()}
    return {
        "valley": rosenbrock,
        "constraint": ball,
        "cone": {name: count for name, (_, count) in gallery.cone.items()},
        "angle": {
            name: {"length": float(np.linalg.norm(path[-1])), "angle": float(np.arctan2(path[-1, 1], path[-1, 0]))}
            for name, path in gallery.angle.items()
        },
        "same": gallery.same,
    }


def ball_row(name: str, path: np.ndarray) -> dict[str, Any]:
    """Where a run under the constraint ended, and where it should have."""
    row: dict[str, Any] = {"end": path[-1].tolist()}
    if name not in CONSTRAINED:
        return row
    best = constrained_minimum(name)
    row |= {"minimum": best.tolist(), "distance": float(np.linalg.norm(path[-1] - best))}
    entry = (BALL | OPTAX)[name]
    if entry.kappa is not None:
        to_leaf, from_leaf = LAYOUTS[entry.layout]
        leaf = to_leaf(jnp.asarray(best))
        slope = jax.grad(lambda leaf: bowl(from_leaf(leaf)))
        row["gap_of_minimum"] = float(lion_kappa_stationarity_gap(slope(leaf), leaf, entry.kappa, DECAY))
        outside = [lion_kappa_constraint_violation(to_leaf(jnp.asarray(x)), entry.kappa, DECAY) for x in path[[0, -1]]]
        row["outside"] = [float(x) for x in outside]
    return row


def main() -> None:
    """Runs it all, writes the results and prints the tables."""
    import optim_gallery_figures as figures
    from optim_gallery_tables import tables

    start = time.time()
    gallery = experiment()
    here = pathlib.Path(__file__).parent
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.time() - start),
        "rates": RATES.tolist(),
        "rate_under_the_constraint": RATE,
        "weight_decay": DECAY,
        "eps": EPS,
        **summary(gallery),
    }
    (here / "optim_gallery.json").write_text(json.dumps(results, indent=1) + "\n")
    figures.draw(gallery, results, here)
    print(*tables(results).values(), sep="\n\n")


if __name__ == "__main__":
    main()
