"""Where the constrained runs of optim_gallery.py should end: each one's set and penalty, and the minimum by scipy."""

from collections.abc import Callable

import numpy as np
import scipy.optimize

EPS = 0.2  # of the kappas that have one; slopes are its inverse
FREE_MINIMUM = np.array([1.4, 1.0])
CURVATURE = np.array([[2.0, -0.6], [-0.6, 1.0]])


def entropy(x):
    """Sum of x log x, zero at zero; negative, as a penalty is."""
    return np.sum(x * np.log(np.maximum(x, 1e-300)))


def each(x):
    """The gauge of a box, coordinate by coordinate, since a maximum has a kink."""
    return x


def none(x):
    """No constraint, or no penalty."""
    return 0.0


def square(x):
    """Half the squared length."""
    return np.sum(x**2) / 2


# Where the run should end, without poise: the gauge whose unit ball is the set, and the penalty, both for x >= 0.
CONSTRAINED: dict[str, tuple[str, Callable, Callable]] = {
    "sign": ("box", each, none),
    "lp(1.5)": ("ball of the 3-norm", lambda x: np.sum(x**3), none),
    "lp(2)": ("disc", lambda x: np.sum(x**2), none),
    "linf": ("diamond", np.sum, none),
    "nuclear": ("diamond", np.sum, none),
    "spectral": ("half box", lambda x: 2 * x, none),
    "dead_zone": ("box", each, lambda x: EPS * np.sum(x)),
    "huber": ("box", each, lambda x: EPS * square(x)),
    "relativistic": ("box", each, lambda x: EPS * np.sum(1 - np.sqrt(1 - x**2))),
    "tanh": ("box", each, lambda x: EPS / 2 * (entropy(1 + x) + entropy(1 - x))),
    "softsign": ("box", each, lambda x: -EPS * np.sum(np.abs(x) + np.log1p(-np.abs(x)))),
    "arctan": ("box", each, lambda x: -2 * EPS / np.pi * np.sum(np.log(np.cos(np.pi / 2 * x)))),
    "squared_l2": ("none", none, square),
    "log_sum_exp": ("simplex", np.sum, lambda x: entropy(x)),
    "apply_prox, ball": ("disc", lambda x: np.sum(x**2), none),
    "apply_prox, wgsef": ("none", none, lambda x: np.sum(x) ** 2 / 2),
    "compander": ("box", each, none),
}
CONSTRAINED |= {
    "sgdp": CONSTRAINED["squared_l2"],
    "optax.sgd": CONSTRAINED["squared_l2"],
    "optax.sgd, nesterov": CONSTRAINED["squared_l2"],
    "optax.lion": CONSTRAINED["sign"],
    "optax.contrib.muon": CONSTRAINED["nuclear"],
}
BARRIERS = ("relativistic", "tanh", "softsign", "arctan")
PENALTIES = {
    "dead_zone": "$\\epsilon\\lVert x\\rVert_1$",
    "huber": "$\\frac\\epsilon2\\lVert x\\rVert^2$",
    "relativistic": "smooth",
    "tanh": "entropy",
    "softsign": "barrier",
    "arctan": "barrier",
    "squared_l2": "$\\frac12\\lVert x\\rVert^2$",
    "log_sum_exp": "entropy",
    "apply_prox, wgsef": "$\\frac12\\lVert x\\rVert_1^2$",
}
PENALTIES |= {name: PENALTIES["squared_l2"] for name in ("sgdp", "optax.sgd", "optax.sgd, nesterov")}


def constrained_minimum(name: str) -> np.ndarray:
    """By scipy: in the quadrant where all of these minima lie, or inside of the box where the penalty is a barrier."""
    _, gauge, penalty = CONSTRAINED[name]
    total = lambda x: float((x - FREE_MINIMUM) @ CURVATURE @ (x - FREE_MINIMUM) / 2 + penalty(x))  # noqa: E731
    start = np.array([0.3, 0.3])
    if name in BARRIERS:
        options = {"xatol": 1e-12, "fatol": 1e-16, "maxiter": 2000}
        return np.tanh(
            scipy.optimize.minimize(lambda z: total(np.tanh(z)), start, method="Nelder-Mead", options=options).x
        )
    constraint = {"type": "eq" if name == "log_sum_exp" else "ineq", "fun": lambda x: 1 - gauge(x)}
    options = {"ftol": 1e-15, "maxiter": 500}
    bounds = [(0, 2), (0, 2)]
    solution = scipy.optimize.minimize(
        total, start, method="SLSQP", bounds=bounds, constraints=constraint, options=options
    )
    return np.clip(solution.x, 0, None)
