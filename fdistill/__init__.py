"""One-step diffusion distillation: f-divergences, density ratios, diffusion teachers, samplers and averages."""

from poise.fdistill.divergences import (
    DIVERGENCES,
    FDivergence,
    alpha,
    divergence,
    f_divergence,
    f_weight,
    from_function,
    scale,
    skew_js,
)

__all__ = [
    "DIVERGENCES",
    "FDivergence",
    "alpha",
    "divergence",
    "f_divergence",
    "f_weight",
    "from_function",
    "scale",
    "skew_js",
]
