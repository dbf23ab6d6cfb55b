"""The contract that every part of poise shares: algorithms as values, keys per example, means over a device axis."""

from poise.core.algorithm import Algorithm, Batch, Metrics, State
from poise.core.collectives import axis_index, mean_over, sum_over
from poise.core.keys import fold_in_examples, step_key
from poise.core.microbatches import Microbatched, in_microbatches

__all__ = [
    "Algorithm",
    "Batch",
    "Metrics",
    "Microbatched",
    "State",
    "axis_index",
    "fold_in_examples",
    "in_microbatches",
    "mean_over",
    "step_key",
    "sum_over",
]
