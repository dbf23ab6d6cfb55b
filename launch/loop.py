"""The one training loop: phases of jitted steps, with metrics, evaluations and checkpoints in a fixed order.

Each step goes: batch -> step -> evaluation, if due -> its row, with the evaluation's figures as ``eval/...`` ->
pictures, if due -> checkpoint, if due; a metric or a state that isn't finite ends the run before the evaluation. The
state is looked at every few steps, and always before it is evaluated or saved. A checkpoint of step
``s`` therefore stands for everything up to ``s``, its evaluation included, and every row up to ``s`` is on disk before
the checkpoint is. A run that goes on from it drops later rows and does the same again. Rows are fetched one step late,
so that the devices are never waited for.

With several processes each reads its block of every batch, all take part in steps, evaluations and checkpoints, and
process 0 alone writes. An evaluation gets a copy of the state on the process's own devices, so that nothing in it
waits for the others; every process evaluates, all get the same. What depends on clocks and signals is decided
together, see :class:`poise.launch.agreement.Decisions`.
"""

import contextlib
import io
import math
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from poise.core import State, step_key
from poise.launch.agreement import Decisions, alike, is_main, only_main
from poise.launch.checkpoint import CheckpointStore, Restored
from poise.launch.claim import claimed_by_all
from poise.launch.devices import Placement
from poise.launch.digest import digests
from poise.launch.errors import LaunchError
from poise.launch.hosts import lost
from poise.launch.leaves import Layout, host_scalar
from poise.launch.phase import Phase, Program
from poise.launch.profiling import StepProfile
from poise.launch.progress import Console, duration
from poise.launch.sharding import Rules
from poise.launch.signals import Interrupted, StopRequest, stop_on_signals
from poise.launch.timing import TimingLog
from poise.launch.workdir import prepare_workdir, workdir_path
from poise.launch.writers import JsonLinesWriter, TensorBoardWriter, Writer, tensorboard_available

# Keys of anything but steps come from phases that no run reaches, so that they meet no step's key.
_INIT, _EVALUATE, _RENDER = 1 << 16, 2 << 16, 3 << 16


class NonFiniteError(LaunchError, FloatingPointError):
    """A step gave NaN or infinity; the message names the leaf, the phase and the step."""


class FitResult(NamedTuple):
    """What a run ended with.

    Attributes:
      state: the last phase's finished state.
      seconds: seconds spent in each phase, over all restarts, by name.
      steps_trained: steps done by this call; 0 if the run was finished before.
      restored: the (phase, step) this call went on from, or None where it started afresh.
    """

    state: State
    seconds: dict[str, float]
    steps_trained: int
    restored: tuple[str, int] | None


def fit(
    phases: Sequence[Phase],
    *,
    workdir: str | os.PathLike[str],
    seed: int,
    start: State | None = None,
    save_every: int = 0,
    save_every_seconds: float | int = 60.0,
    keep: int = 2,
    parallel: str = "jit",
    mesh: str = "",
    sharding: str | Rules = "",
    devices: Sequence[jax.Device] | None = None,
    check_every: int = 10,
    profile_steps: Sequence[int] = (),
    writers: Sequence[Writer] = (),
    tensorboard: bool = True,
    console: Console | None = None,
) -> FitResult:
    """Trains phase after phase, or goes on where an earlier call in the same folder stopped.

    Batches, keys and checkpoints are such that a run which was killed at any moment and started again ends with the
    very bits of one that was not: parameters, metrics and evaluations. The key of a step is
    ``poise.core.step_key(seed, phase, step)``. Every phase is saved at its end. SIGINT or SIGTERM stop the run after
    the step under way; after the last step they are answered once everything is saved.

    With several processes (joined by ``jax.distributed.initialize``) all call this with the same arguments.

    The folder gets ``metrics.jsonl`` (exactly one row a step, with an evaluation's figures in the row of its step),
    ``timing.jsonl`` (wall-clock), ``checkpoints/`` and, where tensorboardX is installed, ``tensorboard/``.

    Args:
      phases: in order; only the last one may be made longer for a run that has come past the others.
      workdir: the run's folder, or an address such as ``gs://bucket/run``; one run, one folder. All processes see the
        folder, or have the same address.
      seed: of parameters and noise, at least 0. (Data sources have seeds of their own.)
      start: what the first phase's ``make_algorithm`` receives, such as a network trained elsewhere; the same whenever
        the run goes on.
      save_every: steps between checkpoints; 0: by time alone.
      save_every_seconds: seconds between checkpoints; 0: by steps alone.
      keep: checkpoints kept of each phase.
      parallel: how a batch is spread over devices; ``"jit"``: one program over all of them; ``"pmap"``: the same
        program on each, for phases whose ``make_algorithm`` takes ``axis_name``.
      mesh: the devices' axes, such as ``"data:4,fsdp:2"``; empty for all on ``data``. See
        :func:`poise.launch.sharding.parse_mesh`.
      sharding: rules for the layout of the state's leaves, such as ``"kernel$=-,fsdp;.*="``; without, only an axis
        ``fsdp`` splits leaves. See :class:`poise.launch.sharding.LeafSpecs`. Both may change when a run goes on.
      devices: the devices; None for all.
      check_every: steps between looks at the whole state for NaN and infinity, which read all of it; metrics are looked
        at after every step, and a state before it is evaluated or saved. 1 tells exactly where something went wrong.
      profile_steps: the first and the last of this call's steps that go into a profile in ``<workdir>/profile``, see
        :class:`poise.launch.profiling.StepProfile`; of several processes that of process 0.
      writers: take metrics and pictures besides the files above; of several processes those of process 0.
      tensorboard: whether to write TensorBoard files, where tensorboardX is installed.
      console: shows progress on stderr; made here if None.

    Returns:
      The finished state, of several processes a copy on each one's own devices, and what it took.

    Raises:
      Interrupted: after SIGINT or SIGTERM (to any of the processes), with everything saved.
      HostError: if another process is gone.
      NonFiniteError: if a metric or a leaf of the state is not finite; nothing of it is saved.
      CheckpointError: if a checkpoint can't be written, or one there is of another run.
      ConfigError: if the folder can't be written to, or another process works in it; or if mesh and rules don't fit
        the devices or the state.
      DeviceError: if the devices can't share a batch evenly.
      ValueError: if an argument is out of range.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from poise.core import Algorithm
      >>> from poise.launch import NoData, Phase, fit
      >>> def step(state, batch, key):
      ...     return state - 0.5 * (state - 3.0), {"loss": (state - 3.0) ** 2}
      >>> algorithm = Algorithm(init=lambda key, batch: jnp.zeros(()), step=step)
      >>> phase = Phase("newton", lambda previous: algorithm, NoData(), num_steps=20)
      >>> with tempfile.TemporaryDirectory() as workdir:
      ...     result = fit([phase], workdir=workdir, seed=0)
      >>> round(float(result.state), 3), result.steps_trained
      (3.0, 20)
    """
    _check(phases, seed, save_every, save_every_seconds, check_every)
    profile = StepProfile(profile_steps if is_main() else (), workdir_path(workdir) / "profile")
    path = workdir_path(workdir)
    only_main(lambda: prepare_workdir(workdir))
    placement = Placement(devices, parallel, mesh, sharding)
    sinks: list[Writer] = []
    timing = TimingLog(path / "timing.jsonl" if is_main() else None)
    if is_main():
        console = Console() if console is None else console
        sinks += [JsonLinesWriter(path / "metrics.jsonl"), *writers]
        if tensorboard and tensorboard_available():
            sinks.append(TensorBoardWriter(path / "tensorboard"))
    else:
        console = Console(io.StringIO(), every_seconds=math.inf)
    order = [(phase.name, phase.num_steps) for phase in phases]
    with claimed_by_all(workdir, console.line) as apart, stop_on_signals() as stop:
        store = CheckpointStore(path / "checkpoints", order, seed, keep, console.line, apart)
        run = _Run(phases, seed, placement, store, sinks, console, stop, timing)
        run.save_every, run.save_every_seconds, run.start = save_every, save_every_seconds, start
        run.check_every, run.profile = check_every, profile
        try:
            result = run.all_phases()
            run.close()
            stopping = run.decisions.stopping()
        except BaseException as error:
            gone = lost(error)
            with contextlib.suppress(Exception):  # the first failure is the one to tell
                run.close(wait=gone is None or apart)
            if gone is None or gone is error:
                raise
            raise gone from error
        if stopping:  # it came after the last step, where nothing is left but saving
            assert stop.signum is not None
            raise Interrupted(stop.signum, "stopped after the last phase, with everything saved")
        return result


def _check(
    phases: Sequence[Phase], seed: int, save_every: int, save_every_seconds: float | int, check_every: int
) -> None:
    names = [phase.name for phase in phases]
    if not phases:
        raise ValueError("phases must hold at least one phase, got none")
    if len(set(names)) < len(names):
        raise ValueError(f"phases must have different names, got {names}")
    for phase in phases:
        if not phase.name or not phase.name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"a phase's name must be letters, digits, - and _, got {phase.name!r}")
        for what in ("num_steps", "evaluate_every"):
            if getattr(phase, what) < 0:
                raise ValueError(f"phase {phase.name!r}: {what} must be at least 0, got {getattr(phase, what)}")
    if seed >= 2**32:
        raise ValueError(f"seed must be less than 2**32, got {seed}")
    for name, value in (("seed", seed), ("save_every", save_every), ("save_every_seconds", save_every_seconds)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if check_every < 1:
        raise ValueError(f"check_every must be at least 1, got {check_every}")


class _Pending(NamedTuple):
    """A finished step whose numbers are still on the devices; of its state which leaves are finite, if that is due."""

    step: int
    metrics: dict[str, Array]
    finite: Array | None


class _Run:
    """One call of :func:`fit`."""

    save_every = 0
    save_every_seconds: float | int = 0
    check_every = 1
    start: State | None = None
    profile = StepProfile((), "")

    def __init__(
        self,
        phases: Sequence[Phase],
        seed: int,
        placement: Placement,
        store: CheckpointStore,
        writers: Sequence[Writer],
        console: Console,
        stop: StopRequest,
        timing: TimingLog,
    ):
        self.phases, self.seed, self.placement = phases, seed, placement
        self.store, self.writers, self.console, self.stop, self.timing = store, writers, console, stop, timing
        self.seconds: dict[str, float] = {}
        self.steps_trained = 0
        self.state: State | None = None
        self.decisions = Decisions(stop)

    def all_phases(self) -> FitResult:
        programs: list[Program] = []
        before = None
        if self.start is not None:
            leaves = [jax.numpy.asarray(leaf) for leaf in jax.tree.leaves(self.start)]
            alike(lambda: "".join(digests(leaves)), "start", "it was read from another file, such as that of --teacher")
            self.start = self.placement.everywhere(self.start)
            before = Layout(self.start)
        for phase in self.phases:
            programs.append(Program(phase, programs[-1].layout if programs else before, self.placement))
        self.placement.specs.check_all_used()
        for notice in dict.fromkeys(program.notice for program in programs if program.notice):
            self.console.line(notice)
        layouts, shardings = [program.layout for program in programs], [program.shardings for program in programs]

        def make_frozen(index: int, previous: Restored | None) -> Sequence[Any]:
            state = self.start if previous is None else layouts[index - 1].merge(previous.live, previous.frozen)
            return programs[index].begin(state, self.init_key(index))[1]

        restored = self.store.restore_newest(layouts, shardings, make_frozen)
        origin = None if restored is None else (self.phases[restored.phase].name, restored.step)
        for writer in self.writers:
            writer.begin([phase.name for phase in self.phases], origin)
        first = 0
        self.state, self.start = self.start, None  # no second hold on it, once a phase has begun
        if restored is not None:
            self.seconds = dict(restored.seconds)
            self.console.line(f"going on from step {restored.step} of phase {self.phases[restored.phase].name!r}")
            first = restored.phase
            if first == len(self.phases) - 1 and restored.step >= self.phases[first].num_steps:
                more = restored.step - self.phases[first].num_steps
                longer = f" (it has come {more} steps farther than asked for, and stays there)" if more else ""
                self.console.line(f"this run is finished: there is nothing to train{longer}")
        for index in range(first, len(self.phases)):
            start = restored if restored is not None and index == first else None
            self.one_phase(index, programs[index], start)
        self.store.wait()  # so that all processes hear of a failure
        self.store.close()
        return FitResult(self.placement.own_copy(self.state), dict(self.seconds), self.steps_trained, origin)

    def init_key(self, index: int) -> PRNGKeyArray:
        return step_key(self.seed, _INIT + index, 0)

    def one_phase(self, index: int, program: Program, restored: Restored | None) -> None:
        """Takes ``state``, the finished one of the phase before, and leaves this phase's there."""
        phase, layout = program.phase, program.layout
        if self.decisions.stopping():
            self.leave(f"before the first step of phase {phase.name!r}")
        self.timing.start(phase.name, self.seconds.get(phase.name, 0.0))
        if restored is None:
            live, frozen = program.begin(self.state, self.init_key(index))
            done, saved = 0, -1
        else:
            live, frozen, done = restored.live, restored.frozen, restored.step
            saved = done
        self.state = None  # only what is trained takes memory
        if done < phase.num_steps:
            live, saved = self.train(index, program, live, frozen, done, saved)
        if saved < max(done, phase.num_steps):
            self.save(index, layout, live, frozen, phase.num_steps)
            self.store.wait()
        self.state = program.whole_state(live, frozen)

    def train(
        self, index: int, program: Program, live: tuple[Any, ...], frozen: tuple[Any, ...], done: int, saved: int
    ) -> tuple[tuple[Any, ...], int]:
        """The steps of a phase; returns the live leaves and the last step that was saved."""
        phase, layout = program.phase, program.layout
        began = time.monotonic()
        program.compile()
        self.console.line(f"{phase.name}: compiled in {duration(time.monotonic() - began)}")
        self.decisions.begin()
        if self.decisions.stopping():
            self.leave(f"after step {done} of phase {phase.name!r}")
        self.console.start(phase.name, phase.num_steps, done)
        key = jax.random.fold_in(jax.random.key(self.seed), index)
        pending: _Pending | None = None
        for step in range(done + 1, phase.num_steps + 1):
            batch = program.place(step - 1)
            self.steps_trained += 1
            with self.profile.step(self.steps_trained):
                live, metrics = program.step(live, frozen, batch, key, step - 1)
            self.profile.after(self.steps_trained, metrics)
            finite = program.look(live) if step % self.check_every == 0 else None
            pending, before = _Pending(step, metrics, finite), pending
            if before is not None:
                self.report(index, program, before)
            evaluation = self.evaluation_due(phase, step)
            # looked at once, lest a step be saved whose row isn't written
            leaving, timely = self.decisions.after_step(self.time_to_save())
            save = timely or self.save_due(step, phase.num_steps)
            if evaluation or save or leaving:
                if finite is None:
                    pending = pending._replace(finite=program.look(live))
                self.report(
                    index, program, pending, evaluation, program.own_state(live, frozen) if evaluation else None
                )
                pending, leaving = None, self.decisions.stopping()
            if save or leaving:
                self.save(index, layout, live, frozen, step)
                saved = step
            if leaving:
                self.store.wait()
                self.leave(f"and saved after step {step} of phase {phase.name!r}")
            self.store.check()
        taken = self.timing.seconds
        self.console.finish(f"{phase.name}: finished {phase.num_steps} steps, {duration(taken)} in all")
        return live, saved

    def evaluation_due(self, phase: Phase, step: int) -> bool:
        if phase.evaluate is None and phase.render is None:
            return False
        return step % phase.evaluate_every == 0 if phase.evaluate_every else step == phase.num_steps

    def save_due(self, step: int, num_steps: int) -> bool:
        return bool(self.save_every and step % self.save_every == 0) or step == num_steps

    def time_to_save(self) -> bool:
        return bool(self.save_every_seconds and self.timing.since_save >= self.save_every_seconds)

    def report(
        self, index: int, program: Program, pending: _Pending, evaluation: bool = False, state: State | None = None
    ) -> None:
        """Writes a step's row; where an evaluation is due it evaluates and draws the state after the step."""
        phase = program.phase
        values = self.fetch(program, pending)
        if evaluation and phase.evaluate is not None:
            figures = phase.evaluate(state, step_key(self.seed, _EVALUATE + index, pending.step))
            values |= {f"eval/{name}": _figure(value) for name, value in figures.items()}
        for writer in self.writers:
            writer.write(phase.name, pending.step, values)
        self.console.update(pending.step, values)
        self.timing.row(pending.step)
        if evaluation and phase.render is not None:
            images = phase.render(state, step_key(self.seed, _RENDER + index, pending.step))
            pictures = {name: np.asarray(image) for name, image in images.items()}
            for writer in self.writers:
                writer.images(phase.name, pending.step, pictures)

    def fetch(self, program: Program, pending: _Pending) -> dict[str, Any]:
        """A step's metrics, after making sure that they are finite, and the state, where it was looked at."""
        metrics, finite = jax.device_get((pending.metrics, pending.finite))
        bad = [f"metric {name}" for name, value in metrics.items() if not np.isfinite(value).all()]
        if finite is not None:
            fine = np.asarray(np.atleast_2d(finite).all(axis=0))  # over seeds
            bad += [f"state {leaf}" for leaf, whole in zip(program.inexact_names, fine, strict=True) if not whole]
        if bad:
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            closer = (
                "" if self.check_every == 1 else "; with check_every=1 it goes on from there and tells where it began"
            )
            self.console.finish()
            raise NonFiniteError(
                f"{bad[0]}{more} is not finite after step {pending.step} of phase {program.phase.name!r}; nothing of "
                f"it was saved, the last checkpoint is from before{closer}"
            )
        return {key: host_scalar(value) for key, value in metrics.items()}

    def save(self, index: int, layout: Layout, live: tuple[Any, ...], frozen: tuple[Any, ...], step: int) -> None:
        for writer in self.writers:
            writer.flush()
        self.seconds[self.phases[index].name] = self.timing.seconds
        self.store.save(index, step, layout, live, frozen, self.seconds)
        self.timing.saved(step)
        self.decisions.saved()

    def leave(self, where: str) -> None:
        self.console.finish()
        assert self.stop.signum is not None
        raise Interrupted(self.stop.signum, f"stopped {where}")

    def close(self, wait: bool = True) -> None:
        """Ends everything that is open, however the run ends; ``wait``: also a checkpoint that is being written."""
        with contextlib.ExitStack() as stack:  # each of them, whatever the others do
            stack.callback(self.console.finish)
            stack.callback(self.timing.close)
            stack.callback(self.profile.close)
            if wait:
                stack.callback(self.store.close)
            for writer in self.writers:
                stack.callback(writer.close)


def _figure(value: Any) -> Any:
    """An evaluation's figure as JSON; one that isn't a finite number doesn't apply."""
    if value is None:
        return None
    plain = host_scalar(value)
    return plain if np.isfinite(plain).all() else None
