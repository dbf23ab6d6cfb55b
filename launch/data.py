"""Where batches come from: a batch is a pure function of (seed, step), so a resumed run needs only its step."""

import concurrent.futures
import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from poise.launch.errors import LaunchError


class DataError(LaunchError, ValueError):
    """Data that cannot be trained on; the message names it."""


@runtime_checkable
class Data(Protocol):
    """What a phase reads.

    With several processes, a source with a method ``for_host(index, count)`` is asked for one that reads a block of
    each batch alone, as the sources of this module are. Of any other the whole batch is read in every process, where it
    must be the same, and its block is cut out.

    Attributes:
      batch_axis: the axis of every leaf that counts examples; the others are never split over devices.
      batch_size: examples per global batch; 0 where there are none.
    """

    batch_axis: int
    batch_size: int

    def batch(self, step: int) -> Any:
        """The batch of a step, from 0; the same whenever it is asked for."""
        ...


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """One epoch's order, by sorting raw bits: numpy promises the stream of its bit generators alone."""
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_examples)
    order = np.argsort(bits, kind="stable")
    order.setflags(write=False)
    return order


def _at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def batch_indices(
    seed: int, step: int, batch_size: int, num_examples: int, process_index: int = 0, process_count: int = 1
) -> np.ndarray:
    r"""The examples of one batch: place $i$ of the stream is entry $i \bmod N$ of epoch $\lfloor i/N \rfloor$'s order.

    Every epoch is a fresh permutation, drawn by the counter-based generator Philox from (seed, epoch) alone; batches
    run across the borders of epochs, so no example is left out. The global batch doesn't depend on the number of hosts:
    host $p$ of $P$ reads its block $[pB/P, (p+1)B/P)$.

    Args:
      seed: the run's seed, at least 0.
      step: the batch's number, from 0.
      batch_size: examples in the global batch; may exceed ``num_examples``.
      num_examples: examples there are.
      process_index: this host.
      process_count: all hosts.

    Returns:
      This host's indices, ``[batch_size / process_count]``, int64.

    Raises:
      ValueError: if a number is out of range or the hosts can't share the batch evenly.

    Example:
      >>> import numpy as np
      >>> from poise.launch.data import batch_indices
      >>> epoch = np.concatenate([batch_indices(seed=0, step=s, batch_size=2, num_examples=6) for s in range(3)])
      >>> sorted(epoch.tolist())
      [0, 1, 2, 3, 4, 5]
    """
    for name, value, minimum in (
        ("seed", seed, 0),
        ("step", step, 0),
        ("batch_size", batch_size, 1),
        ("num_examples", num_examples, 1),
        ("process_count", process_count, 1),
    ):
        _at_least(name, value, minimum)
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in [0, {process_count}), got {process_index}")
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} cannot be shared evenly by {process_count} hosts")
    share = batch_size // process_count
    first = step * batch_size + process_index * share
    epochs, places = np.divmod(np.arange(first, first + share, dtype=np.int64), num_examples)
    indices = np.empty(share, np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        chosen = epochs == epoch
        indices[chosen] = epoch_order(seed, epoch, num_examples)[places[chosen]]
    return indices


def _checked(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not arrays:
        raise DataError("arrays must hold at least one array, got none")
    checked = {name: np.asarray(array) for name, array in arrays.items()}
    lengths = {}
    for name, array in checked.items():
        if array.ndim == 0 or array.dtype == object:
            raise DataError(f"array {name!r} must hold numbers with examples along its first axis, got {array.dtype} "
                            f"of shape {array.shape}")  # fmt: skip
        lengths[name] = len(array)
    if len(set(lengths.values())) > 1:
        raise DataError(f"all arrays must hold the same number of examples, got {lengths}")
    if 0 in lengths.values():
        raise DataError(f"the data is empty: {', '.join(f'{name!r} has no examples' for name in lengths)}")
    for name, array in checked.items():
        if not np.issubdtype(array.dtype, np.inexact):
            continue
        bad = ~np.isfinite(array)
        if bad.any():
            place = tuple(int(axis[0]) for axis in np.nonzero(bad))
            raise DataError(
                f"array {name!r} is not finite in {int(bad.reshape(len(array), -1).any(1).sum())} of {len(array)} "
                f"examples; the first is example {place[0]} (index {list(place)} is {array[place]})"
            )
    return checked


class Shuffled:
    """Examples read by their indices, shuffled anew every epoch; see :func:`batch_indices`.

    Args:
      read: from indices ``[n]`` to arrays by name, examples along the first axis; a pure function.
      num_examples: examples there are.
      batch_size: examples in the global batch; may exceed the number of examples.
      seed: of the order.
      cycle: None for leaves ``[B, ...]``; ``k`` for ``[k, B, ...]``, of ``k`` consecutive batches, for a step that
        updates ``k`` times.
      process_index: this host.
      process_count: all hosts.

    Raises:
      ValueError: if ``batch_size`` or ``cycle`` is below 1 or the hosts can't share the batch evenly.

    Example:
      >>> from poise.launch.data import Shuffled
      >>> squares = Shuffled(lambda indices: {"square": indices**2}, num_examples=10, batch_size=5, seed=0, cycle=2)
      >>> sorted(squares.batch(0)["square"].ravel().tolist())
      [0, 1, 4, 9, 16, 25, 36, 49, 64, 81]
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], Mapping[str, np.ndarray]],
        num_examples: int,
        batch_size: int,
        seed: int,
        cycle: int | None = None,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._read, self._num_examples = read, num_examples
        if cycle is not None:
            _at_least("cycle", cycle, 1)
        self.batch_size, self.seed, self.cycle = batch_size, seed, cycle
        self.batch_axis = 0 if cycle is None else 1
        self._hosts = (process_index, process_count)
        self._indices(0)

    def for_host(self, index: int, count: int) -> "Shuffled":
        """The same examples, of which one of ``count`` hosts reads its block."""
        part = copy.copy(self)
        part._hosts = (index, count)
        part._indices(0)
        return part

    def _indices(self, step: int) -> np.ndarray:
        return batch_indices(self.seed, step, self.batch_size, self._num_examples, *self._hosts)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This host's part of the batch of a step, from 0."""
        if self.cycle is None:
            return dict(self._read(self._indices(step)))
        indices = np.stack([self._indices(step * self.cycle + i) for i in range(self.cycle)])
        found = self._read(indices.ravel())
        return {name: array.reshape(*indices.shape, *array.shape[1:]) for name, array in found.items()}


class InMemory(Shuffled):
    """Arrays in memory, shuffled anew every epoch.

    Args:
      arrays: by name, examples along the first axis. They are not copied.
      batch_size: examples in the global batch; may exceed the number of examples.
      seed: of the order.
      cycle: see :class:`Shuffled`.
      process_index: this host.
      process_count: all hosts.

    Raises:
      DataError: if there are no examples, the arrays differ in length, or a value is not finite.
      ValueError: as :class:`Shuffled`.

    Example:
      >>> import numpy as np
      >>> from poise.launch.data import InMemory
      >>> data = InMemory({"image": np.zeros((10, 8, 8, 1)), "label": np.arange(10)}, batch_size=4, seed=0, cycle=3)
      >>> {name: leaf.shape for name, leaf in data.batch(0).items()}
      {'image': (3, 4, 8, 8, 1), 'label': (3, 4)}
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        batch_size: int,
        seed: int,
        cycle: int | None = None,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ):
        checked = _checked(arrays)
        super().__init__(
            lambda indices: {name: array[indices] for name, array in checked.items()},
            len(next(iter(checked.values()))),
            batch_size,
            seed,
            cycle,
            process_index=process_index,
            process_count=process_count,
        )


class Prefetched:
    """Batches that are made in the background while the devices compute.

    Args:
      data: where they come from; its ``batch`` is called from other threads.
      num_steps: how many batches will be asked for; none beyond them is made.
      ahead: how many batches to make in advance, each in its own thread; at least 1.

    Example:
      >>> import numpy as np
      >>> from poise.launch.data import InMemory, Prefetched
      >>> data = InMemory({"x": np.arange(6)}, batch_size=2, seed=0)
      >>> ahead = Prefetched(data, num_steps=8)
      >>> all((ahead.batch(step)["x"] == data.batch(step)["x"]).all() for step in (0, 1, 7))
      True
    """

    def __init__(self, data: Data, num_steps: int, ahead: int = 2):
        _at_least("ahead", ahead, 1)
        self.batch_axis, self.batch_size = data.batch_axis, data.batch_size
        self._data, self._num_steps, self._ahead = data, num_steps, ahead
        self._pool = concurrent.futures.ThreadPoolExecutor(ahead, thread_name_prefix="batches")
        self._coming: dict[int, concurrent.futures.Future] = {}
        self._last = -2

    def for_host(self, index: int, count: int) -> "Prefetched":
        """The same, of which one of ``count`` hosts reads its block."""
        return Prefetched(for_host(self._data, index, count), self._num_steps, self._ahead)

    def batch(self, step: int) -> Any:
        """This host's part of the batch of a step, from 0."""
        ahead = self._ahead if step - 1 == self._last else 0  # not for a look at the first batch's shapes
        self._last = step
        wanted = range(step, max(step + 1, min(step + ahead + 1, self._num_steps)))
        for other in [number for number in self._coming if number not in wanted]:
            self._coming.pop(other).cancel()
        for number in wanted:
            if number not in self._coming:
                self._coming[number] = self._pool.submit(self._data.batch, number)
        return self._coming.pop(step).result()


def for_host(data: Data, index: int, count: int) -> Data:
    """What one of several hosts reads of a source.

    Args:
      data: the source.
      index: the block's place in each batch.
      count: blocks a batch has.

    Returns:
      A source of the batches ``[index * B / count, (index + 1) * B / count)`` of each batch.

    Example:
      >>> import numpy as np
      >>> from poise.launch.data import InMemory, for_host
      >>> data = InMemory({"x": np.arange(8)}, batch_size=4, seed=0)
      >>> (for_host(data, 1, 2).batch(0)["x"] == data.batch(0)["x"][2:]).all().item()
      True
    """
    own = getattr(data, "for_host", None)
    if own is not None:
        return own(index, count)
    return data if count == 1 else _Block(data, index, count)


class _Block:
    """A block of every batch of a source that knows nothing of hosts."""

    def __init__(self, data: Data, index: int, count: int):
        self.batch_axis, self.batch_size = data.batch_axis, data.batch_size
        self._data, self._index, self._count = data, index, count

    def _cut(self, leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        share = leaf.shape[self.batch_axis] // self._count
        return leaf.take(range(self._index * share, (self._index + 1) * share), self.batch_axis)

    def batch(self, step: int) -> Any:
        """This host's part of the batch of a step, from 0."""
        return jax.tree.map(self._cut, self._data.batch(step))


class NoData:
    """For algorithms that need none, or make their own: every batch is ``()``.

    Example:
      >>> from poise.launch.data import NoData
      >>> NoData().batch(7)
      ()
    """

    batch_axis = 0
    batch_size = 0

    def batch(self, step: int) -> tuple[()]:
        """The empty batch."""
        return ()
