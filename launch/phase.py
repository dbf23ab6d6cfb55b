"""A phase of a run, and the compiled program of one of its steps."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree

from poise.core import Algorithm, State
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
    """

    name: str
    make_algorithm: Callable[..., Algorithm]
    data: Data
    num_steps: int
    evaluate: Callable[[State, PRNGKeyArray], Mapping[str, Any]] | None = None
    evaluate_every: int = 0
    render: Callable[[State, PRNGKeyArray], Mapping[str, np.ndarray]] | None = None


def _own(leaf: Array) -> Array:
    """A copy that shares no buffer with anything (else donating one would take the other) and has no weak type."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return from_data(jnp.array(to_data(leaf), copy=True), leaf.dtype)
    return jnp.array(leaf, dtype=leaf.dtype, copy=True)


def _is_inexact(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, np.inexact)


class Program:
    """A phase made concrete: its state's layout, how it begins, and its step.

    Args:
      phase: the phase.
      previous: the layout of the state of the phase before; None for the first.
      placement: where arrays lie.

    Raises:
      DeviceError: if the devices can't share its batches.
      ConfigError: if the rules for the layout of its state don't fit.
      TypeError: if a step changes the structure, a shape or a type of the state.
      ValueError: if metrics are not named scalars (or one number a seed).
    """

    def __init__(self, phase: Phase, previous: Layout | None, placement: Placement):
        self.phase, self._placement = phase, placement
        abstract = None if previous is None else previous.abstract
        whole = for_host(phase.data, 0, 1) if placement.several else phase.data
        batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, whole.batch(0)))
        self.batch = batch
        placement.check_batch(batch, phase.data.batch_axis, phase.name, phase.data.batch_size)
        self._data = for_host(phase.data, *placement.block) if placement.several else phase.data

        def init(previous_state: State | None, key: PRNGKeyArray, batch: PyTree) -> State:
            state = phase.make_algorithm(previous_state).init(key, batch)
            return jax.tree.map(_own, jax.tree.map(jnp.asarray, state))

        key = jax.eval_shape(lambda: jax.random.key(0))
        self.layout = Layout(jax.eval_shape(init, abstract, key, batch))
        self.shardings = placement.leaf_shardings(self.layout)
        self._init = jax.jit(init, out_shardings=self.layout.merge(*self.shardings))
        self._previous = abstract
        self.finite_names: tuple[str, ...] = ()
        self._step: Any = None

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
        """Compiles the step once; what is called later is that program and never another."""
        phase, layout, placement = self.phase, self.layout, self._placement
        algorithm = self._algorithm()
        used_live = placement.together(layout.live_names, self.shardings[0])
        used_frozen = placement.together(layout.frozen_names, self.shardings[1])

        def step(
            live: tuple[Any, ...], frozen: tuple[Any, ...], batch: PyTree, key: PRNGKeyArray, index: Array
        ) -> tuple[tuple[Any, ...], dict[str, Array], Bool[Array, " leaves"]]:
            live = _moved(live, self.shardings[0], used_live)
            frozen = _moved(frozen, self.shardings[1], used_frozen)
            # The fold-in completes poise.core.step_key(seed, phase, step).
            state, metrics = algorithm.step(layout.merge(live, frozen), batch, jax.random.fold_in(key, index))
            new_live, _ = layout.split(state)
            self.finite_names, finite = _finite(layout.live_names, new_live, _checked(metrics, phase.name))
            return new_live, metrics, finite

        key = jax.eval_shape(lambda: jax.random.key(0))
        index = jax.ShapeDtypeStruct((), jnp.uint32)
        abstract = (layout.abstract_live, layout.abstract_frozen, self.batch, key, index)
        whole, split = placement.replicated, placement.batch_sharding(phase.data.batch_axis)
        live, frozen = self.shardings
        if placement.parallel == "pmap":
            step = self._mapped(step)
        jitted = jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(live, frozen, split, whole, whole),
            out_shardings=(live, whole, whole),
        )
        self._step = jitted.lower(*abstract).compile()

    def _algorithm(self) -> Algorithm:
        make = self.phase.make_algorithm
        if self._placement.parallel != "pmap":
            return make(self._previous)
        if "axis_name" not in inspect.signature(make).parameters:
            raise DeviceError(f"phase {self.phase.name!r} can't run with parallel=pmap: it knows of no axis_name")
        return make(self._previous, axis_name=DATA)

    def _mapped(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The same program on every device, on its part of the batch; what it returns is the same everywhere."""
        mesh, axis = self._placement.mesh, self.phase.data.batch_axis
        whole, split = PartitionSpec(), PartitionSpec(*[None] * axis, DATA)
        return jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(whole, whole, split, whole, whole),
            out_specs=(whole, whole, whole),
            check_vma=False,  # the algorithm's own means make them so
        )

    def step(
        self, live: tuple[Any, ...], frozen: tuple[Any, ...], batch: PyTree, key: PRNGKeyArray, index: int
    ) -> tuple[tuple[Any, ...], dict[str, Array], Array]:
        """One step, from 0: new live leaves (the old ones are gone), metrics, and which values are finite."""
        return self._step(live, frozen, batch, key, np.uint32(index))


def _moved(leaves: tuple[Any, ...], lie: tuple[Any, ...], used: tuple[Any, ...]) -> tuple[Any, ...]:
    """The leaves as they are used; those that lie so already are left alone."""
    constrain = jax.lax.with_sharding_constraint
    return tuple(
        leaf if before == after else constrain(leaf, after)
        for leaf, before, after in zip(leaves, lie, used, strict=True)
    )


def _checked(metrics: Any, phase: str) -> dict[str, Array]:
    if not isinstance(metrics, dict):
        raise ValueError(f"phase {phase!r}: metrics must be a dictionary of scalars, got {type(metrics).__name__}")
    for name, value in metrics.items():
        if not isinstance(name, str) or name in RESERVED or name.startswith("eval/"):
            raise ValueError(f"phase {phase!r}: a metric can't be called {name!r}")
        if jnp.ndim(value) > 1:
            raise ValueError(
                f"phase {phase!r}: metric {name!r} must be a scalar or one number a seed, got shape {jnp.shape(value)}"
            )
    return metrics


def _finite(
    names: tuple[str, ...], live: tuple[Any, ...], metrics: Mapping[str, Any]
) -> tuple[tuple[str, ...], Bool[Array, " leaves"]]:
    """Which metrics and which leaves of the state hold only finite numbers, with their names."""
    values = {f"metric {name}": jnp.asarray(value) for name, value in metrics.items()}
    values |= {f"state {name}": leaf for name, leaf in zip(names, live, strict=True)}
    inexact = {name: value for name, value in values.items() if _is_inexact(value)}
    flags = [jnp.isfinite(value).all() for value in inexact.values()]
    return tuple(inexact), jnp.stack(flags) if flags else jnp.ones((0,), bool)
