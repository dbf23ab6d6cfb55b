"""Convex functions for :func:`poise.optim.lion_kappa`, with subgradients, conjugates and the sets they keep to."""

from poise.optim.kappas.kappa import Kappa
from poise.optim.kappas.matrix import MatrixAxes, nuclear, spectral
from poise.optim.kappas.norms import group_l2, linf, lp, sign, top_k
from poise.optim.kappas.separable import (
    arctan,
    dead_zone,
    huber,
    log_sum_exp,
    relativistic,
    softsign,
    squared_l2,
    tanh,
)

__all__ = [
    "Kappa",
    "MatrixAxes",
    "arctan",
    "dead_zone",
    "group_l2",
    "huber",
    "linf",
    "log_sum_exp",
    "lp",
    "nuclear",
    "relativistic",
    "sign",
    "softsign",
    "spectral",
    "squared_l2",
    "tanh",
    "top_k",
]
