"""What is reported: sample quality and how far two distributions are apart, from arrays of samples or of features."""

from poise.metrics.energy_distance import energy_distance
from poise.metrics.frechet import frechet, frechet_distance
from poise.metrics.mmd import mmd2
from poise.metrics.mode_coverage import ModeCoverage, mode_coverage, mode_share_kl
from poise.metrics.moments import (
    Moments,
    RunningMoments,
    finalize_moments,
    init_moments,
    merge_moments,
    moments,
    update_moments,
)
from poise.metrics.prdc import PRDC, prdc
from poise.metrics.sliced_wasserstein import sliced_wasserstein

__all__ = [
    "PRDC",
    "ModeCoverage",
    "Moments",
    "RunningMoments",
    "energy_distance",
    "finalize_moments",
    "frechet",
    "frechet_distance",
    "init_moments",
    "merge_moments",
    "mmd2",
    "mode_coverage",
    "mode_share_kl",
    "moments",
    "prdc",
    "sliced_wasserstein",
    "update_moments",
]
