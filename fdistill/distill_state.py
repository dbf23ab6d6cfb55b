"""What a distillation holds: three optimizers, three networks, and everything that changes."""

from typing import Any, NamedTuple

import optax
from jaxtyping import Array, Int, PyTree

from poise.fdistill.ratio import RatioBins


class Optimizers(NamedTuple):
    """One optax transformation for each trained network.

    Attributes:
      student: moves the one-step generator.
      fake: moves the fake score, the denoiser of the student's distribution.
      head: moves the head that estimates the density ratio; None where ``fake`` moves it, too
        (``FDistillConfig.train_features``), or where there is nothing to learn.
    """

    student: optax.GradientTransformation
    fake: optax.GradientTransformation
    head: optax.GradientTransformation | None = None


class FDistillState(NamedTuple):
    """Everything that a distillation holds.

    Attributes:
      frozen: ``{"teacher": variables}``, and for a student with a network of its own ``"student"`` with that network's
        constants; never changes.
      student: parameters of the one-step generator.
      student_opt: its optimizer's state.
      fake: parameters of the fake score.
      fake_opt: its optimizer's state; with ``train_features`` that of fake score and head.
      head: parameters of the ratio head.
      head_opt: its optimizer's state; empty with ``train_features``.
      bins: running means of the density ratio over noise levels.
      ema: averages of ``student``, one for each of ``FDistillConfig.ema_decays``.
      step: finished student updates.
    """

    frozen: PyTree
    student: PyTree
    student_opt: PyTree
    fake: PyTree
    fake_opt: PyTree
    head: PyTree
    head_opt: PyTree
    bins: RatioBins
    ema: tuple[PyTree, ...]
    step: Int[Array, ""]


def student_variables(state: FDistillState, average: int | None = 0) -> dict[str, Any]:
    """The variables of the one-step generator that a distillation has reached.

    Args:
      state: a state of :func:`f_distill`.
      average: which of the averages to take, or None for the raw parameters.

    Returns:
      Variables for :func:`poise.fdistill.one_step`.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import FDistillState, init_ratio_bins, student_variables
      >>> bins, step = init_ratio_bins(2), jnp.array(0)
      >>> state = FDistillState({"teacher": {"params": 0.0}}, 1.0, (), 2.0, (), 3.0, (), bins, (4.0,), step)
      >>> student_variables(state), student_variables(state, None)
      ({'params': 4.0}, {'params': 1.0})
    """
    params = state.student if average is None else state.ema[average]
    return {**state.frozen.get("student", state.frozen["teacher"]), "params": params}
