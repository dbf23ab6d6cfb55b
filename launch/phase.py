"""A phase of a run, and the compiled program of one of its steps."""

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree

from poise.core import Algorithm, State
from poise.launch.agreement import alike
from poise.launch.data import Data, for_host
from poise.launch.devices import DeviceError, Placement
from poise.launch.leaves import Layout, from_data, to_data
from poise.launch.sharding import DATA

RESERVED = ("phase", "step")
# What runs once need not run fast: a U-Net's parameters are drawn after 2 seconds of compilation instead of 9.
_COMPILED_FAST: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}


class Phase(NamedTuple):
    """One training procedure of a run, with its data and its length.

    Attributes:
      name: in files, folders and messages; unlike those of the other phases.
      make_algorithm: from the finished state of the phase before (None for the first) to this phase's algorithm. It is
        called several times, also with abstract and traced states; only ``init`` may depend on their values, ``step``
        finds everything in its own state. To run under pmap it takes ``axis_name`` besides, and passes it on.
      data: gives the batch of each step; see :class:`poise.launch.data.Data`.
      num_steps: steps of the finished phase; 0 only makes the state.
      evaluate: ``(state, key) -> figures by name``, run on the host between steps; jit what is in it. It must not keep
        the state, whose buffers the next step takes over. A figure that doesn't apply is None.
      evaluate_every: evaluates after steps that are multiples of it; 0: once, at the phase's end.
      render: ``(state, key) -> pictures by name``, at the same steps; for writers that take pictures.
      num_seeds: of a state of several seeds, see :func:`poise.rl.over_seeds`: how many the first axis of all its leaves
        and of all metrics counts. They are split over the devices, where these can share them evenly; a batch
        is then whole on all of them, and under pmap ``axis_name`` is for :func:`poise.rl.over_seeds` alone.
    """

    name: str
    make_algorithm: Callable[..., Algorithm]
    data: Data
    num_steps: int
    evaluate: Callable[[State, PRNGKeyArray], Mapping[str, Any]] | None = None
    evaluate_every: int = 0
    render: Callable[[State, PRNGKeyArray], Mapping[str, np.ndarray]] | None = None
    num_seeds: int = 0


def _own(leaf: Array) -> Array:
    """A copy that shares no buffer with anything (else donating one would take the other) and has no weak type."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return from_data(jnp.array(to_data(leaf), copy=True), leaf.dtype)
    return jnp.array(leaf, dtype=leaf.dtype, copy=True)


def _check_seeds(phase: Phase, layout: Layout) -> None:
    names = (*layout.live_names, *layout.frozen_names)
    for name, leaf in zip(names, (*layout.abstract_live, *layout.abstract_frozen), strict=True):
        if phase.num_seeds and leaf.shape[:1] != (phase.num_seeds,):
            raise ValueError(
                f"phase {phase.name!r}: every leaf of a state of {phase.num_seeds} seeds must have them along its "
                f"first axis, but {name} has shape {leaf.shape}"
            )


def _is_inexact(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, np.inexact)


class Program:
    """A phase made concrete: its state's layout, how it begins, and its step.

    Args:
      phase: the phase.
      previous: the layout of the state of the phase before; None for the first.
      placement: where arrays lie.

    Attributes:
      layout: of its state.
      shardings: of its live and of its frozen leaves.
      notice: what is to be said before it starts, or nothing.
      inexact_names: of its live leaves those that may hold NaN or infinity.

    Raises:
      DeviceError: if the devices can't share its batches.
      ConfigError: if the rules for the layout of its state don't fit.
      TypeError: if a step changes the structure, a shape or a type of the state.
      ValueError: if metrics are not named scalars (or one number a seed), or a leaf has no axis of the phase's seeds.
    """

    def __init__(self, phase: Phase, previous: Layout | None, placement: Placement):
        self.phase, self._placement = phase, placement
        abstract = None if previous is None else previous.abstract
        whole = for_host(phase.data, 0, 1) if placement.several else phase.data
        first = whole.batch(0)
        alike(lambda: _fingerprint(first), f"the first batch of phase {phase.name!r}", "it reads other data")
        batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, first))
        self.batch = batch
        placement.check_batch(batch, phase.data.batch_axis, phase.name, phase.data.batch_size)
        self._data = for_host(phase.data, *placement.block) if placement.several else phase.data

        def init(previous_state: State | None, key: PRNGKeyArray, batch: PyTree) -> State:
            state = phase.make_algorithm(previous_state).init(key, batch)
            return jax.tree.map(_own, jax.tree.map(jnp.asarray, state))

        key = jax.eval_shape(lambda: jax.random.key(0))
        self.layout = Layout(jax.eval_shape(init, abstract, key, batch))
        _check_seeds(phase, self.layout)
        self._seeds_apart = placement.splits_seeds(phase.num_seeds)
        self.shardings = placement.leaf_shardings(self.layout, phase.num_seeds)
        self._init = jax.jit(init, out_shardings=self.layout.merge(*self.shardings))
        self.notice = placement.notice_of_seeds(phase.num_seeds)
        self._previous = abstract
        self.inexact_names = tuple(
            name
            for name, leaf in zip(self.layout.live_names, self.layout.abstract_live, strict=True)
            if _is_inexact(leaf)
        )
        self._step: Any = None
        self._look: Any = None

    def begin(self, previous_state: State | None, key: PRNGKeyArray) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The live and frozen leaves that the phase starts with."""
        batch = self.place(0)
        lowered = self._init.lower(previous_state, key, batch)
        options = _COMPILED_FAST if self._placement.platform == "cpu" else None
        return self.layout.split(lowered.compile(compiler_options=options)(previous_state, key, batch))

    def whole_state(self, live: tuple[Any, ...], frozen: tuple[Any, ...]) -> State:
        """The state for those who use it outside of a step: its weights are put together."""
        placement, layout = self._placement, self.layout
        live = placement.laid(live, placement.together(layout.live_names, self.shardings[0]))
        frozen = placement.laid(frozen, placement.together(layout.frozen_names, self.shardings[1]))
        return layout.merge(live, frozen)

    def own_state(self, live: tuple[Any, ...], frozen: tuple[Any, ...]) -> State:
        """The same on this process's devices alone."""
        return self._placement.own_copy(self.whole_state(live, frozen))

    def place(self, step: int) -> PyTree:
        """The batch of a step, from 0, on the devices."""
        return self._placement.place_batch(self._data.batch(step), self._data.batch_axis)

    def compile(self) -> None:
        """Compiles the step and the look at its state once; no other programs are called later."""
        phase, layout, placement = self.phase, self.layout, self._placement
        advance = self._advance()
        used_live = placement.together(layout.live_names, self.shardings[0])
        used_frozen = placement.together(layout.frozen_names, self.shardings[1])

        def step(
            live: tuple[Any, ...], frozen: tuple[Any, ...], batch: PyTree, key: PRNGKeyArray, index: Array
        ) -> tuple[tuple[Any, ...], dict[str, Array]]:
            live = _moved(live, self.shardings[0], used_live)
            frozen = _moved(frozen, self.shardings[1], used_frozen)
            # The fold-in completes poise.core.step_key(seed, phase, step).
            state, metrics = advance(layout.merge(live, frozen), batch, jax.random.fold_in(key, index))
            new_live, _ = layout.split(state)
            _check_metrics(metrics, phase, self._seeds_apart)
            return new_live, metrics

        key = jax.eval_shape(lambda: jax.random.key(0))
        index = jax.ShapeDtypeStruct((), jnp.uint32)
        abstract = (layout.abstract_live, layout.abstract_frozen, self.batch, key, index)
        whole, split = placement.replicated, placement.batch_sharding(phase.data.batch_axis)
        live, frozen = self.shardings
        # Of seeds every device tells its own, so that none waits for another.
        told = placement.batch_sharding(0) if self._seeds_apart and not placement.several else whole
        jitted = jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(live, frozen, split, whole, whole),
            out_shardings=(live, told),
        )
        self._step = jitted.lower(*abstract).compile()
        look = functools.partial(_finite, seeds_apart=self._seeds_apart)
        jitted = jax.jit(look, in_shardings=(live,), out_shardings=told)
        self._look = jitted.lower(layout.abstract_live).compile()

    def _advance(self) -> Callable[..., Any]:
        """The algorithm's step; under pmap the same program on every device, with its share of batch or seeds.

        What is the same on all devices before is the same afterwards by the algorithm's own means.
        """
        make, placement = self.phase.make_algorithm, self._placement
        if placement.parallel != "pmap":
            return make(self._previous).step
        if "axis_name" not in inspect.signature(make).parameters:
            raise DeviceError(f"phase {self.phase.name!r} can't run with parallel=pmap: it knows of no axis_name")
        whole, split = PartitionSpec(), PartitionSpec(*[None] * self.phase.data.batch_axis, DATA)
        state, batch, named = whole, split, {"axis_name": DATA}
        if self._seeds_apart:
            state, batch = PartitionSpec(DATA), whole
        elif self.phase.num_seeds:  # every device trains all of them
            batch, named = whole, {}
        return jax.shard_map(
            make(self._previous, **named).step,
            mesh=placement.mesh,
            in_specs=(state, batch, whole),
            out_specs=(state, state),
            check_vma=False,
        )

    def step(
        self, live: tuple[Any, ...], frozen: tuple[Any, ...], batch: PyTree, key: PRNGKeyArray, index: int
    ) -> tuple[tuple[Any, ...], dict[str, Array]]:
        """One step, from 0: new live leaves (the old ones are gone) and metrics."""
        return self._step(live, frozen, batch, key, np.uint32(index))

    def look(self, live: tuple[Any, ...]) -> Array:
        """Which of the leaves ``inexact_names`` are finite: ``[leaves]``, where seeds are split ``[seeds, leaves]``."""
        return self._look(live)


def _moved(leaves: tuple[Any, ...], lie: tuple[Any, ...], used: tuple[Any, ...]) -> tuple[Any, ...]:
    """The leaves as they are used; those that lie so already are left alone."""
    constrain = jax.lax.with_sharding_constraint
    return tuple(
        leaf if before == after else constrain(leaf, after)
        for leaf, before, after in zip(leaves, lie, used, strict=True)
    )


def _check_metrics(metrics: Any, phase: Phase, seeds_apart: bool) -> None:
    if not isinstance(metrics, dict):
        raise ValueError(f"phase {phase.name!r}: metrics must be a dictionary of scalars, got {type(metrics).__name__}")
    for name, value in metrics.items():
        if not isinstance(name, str) or name in RESERVED or name.startswith("eval/"):
            raise ValueError(f"phase {phase.name!r}: a metric can't be called {name!r}")
        if jnp.ndim(value) > 1 or (seeds_apart and jnp.shape(value) != (phase.num_seeds,)):
            wanted = (
                f"one number for each of {phase.num_seeds} seeds" if seeds_apart else "a scalar or one number a seed"
            )
            raise ValueError(f"phase {phase.name!r}: metric {name!r} must be {wanted}, got shape {jnp.shape(value)}")


def _fingerprint(batch: PyTree) -> str:
    """A text that is another for another batch."""
    parts = [(np.shape(leaf), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(batch)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _finite(live: tuple[Any, ...], seeds_apart: bool) -> Bool[Array, "..."]:
    """Which leaves hold only finite numbers, of those that may hold others; seeds first."""
    first = int(seeds_apart)
    flags = [jnp.isfinite(leaf).all(axis=tuple(range(first, leaf.ndim))) for leaf in live if _is_inexact(leaf)]
    none = jnp.ones((live[0].shape[0], 0) if seeds_apart else (0,), bool)
    return jnp.stack(flags, axis=-1) if flags else none
