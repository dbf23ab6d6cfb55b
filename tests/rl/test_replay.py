"""The ring buffer against a plain model in NumPy: order, wrap-around, refused writes, no sample that wasn't written."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poise.rl import replay_add, replay_init, replay_sample

CAPACITY = 7
add = jax.jit(replay_add)
sample = jax.jit(functools.partial(replay_sample, batch_size=64))


class Model:
    """What a ring buffer is: the last items, each at its number modulo the capacity."""

    def __init__(self):
        self.written = []

    def add(self, items):
        self.written.extend(items)

    def places(self):
        kept = np.zeros(CAPACITY)
        for number, item in enumerate(self.written):
            kept[number % CAPACITY] = item
        return kept


# Batches of the sizes 1, 3 and 7, each with whether it is written; a size is compiled once.
batches = st.lists(st.tuples(st.sampled_from([1, 3, 7]), st.booleans()), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batches, st.integers(0, 1000))
def test_against_a_model(batches, seed):
    replay, model, number = replay_init({"x": np.float32(0), "y": np.zeros(2, np.int32)}, CAPACITY), Model(), 0
    for size, valid in batches:
        items = np.arange(number + 1, number + 1 + size)  # 0 is what was never written
        replay = add(replay, {"x": items.astype(np.float32), "y": np.stack([items, -items], 1).astype(np.int32)}, valid)
        if valid:
            model.add(items)
            number += size
    count = len(model.written)
    np.testing.assert_array_equal(replay.data["x"], model.places())
    np.testing.assert_array_equal(replay.data["y"], np.stack([model.places(), -model.places()], 1))
    assert (int(replay.insert), int(replay.size)) == (count % CAPACITY, min(count, CAPACITY))
    drawn = sample(replay, jax.random.key(seed))
    np.testing.assert_array_equal(drawn["y"][:, 0], drawn["x"])
    newest = model.written[-CAPACITY:] or [0]
    assert set(np.asarray(drawn["x"]).tolist()) <= {float(x) for x in newest}


def test_samples_are_uniform():
    replay = add(replay_init(np.float32(0), CAPACITY), np.arange(3, dtype=np.float32), True)
    draws = np.concatenate([sample(replay, jax.random.key(i)) for i in range(40)])
    counts = np.bincount(draws.astype(int), minlength=3)
    assert counts.sum() == 2560
    assert np.all(np.abs(counts - 2560 / 3) < 5 * np.sqrt(2560 * 2 / 9))


def test_in_a_scan_and_under_vmap():
    def fill(offset):
        start = replay_init(jnp.zeros(()), 4)
        return jax.lax.scan(lambda r, x: (replay_add(r, x[None] + offset), None), start, jnp.arange(6.0))[0]

    replay = jax.jit(jax.vmap(fill))(jnp.array([0.0, 10.0]))
    assert replay.data.tolist() == [[4, 5, 2, 3], [14, 15, 12, 13]]
    assert replay.size.tolist() == [4, 4]


def test_dtypes_are_the_buffers():
    replay = replay_add(replay_init(jnp.zeros(2, bool), 4), jnp.array([[1.0, 0.0]]))
    assert replay.data.dtype == bool
    assert replay.data[0].tolist() == [True, False]


def test_bad_arguments():
    replay = replay_init(jnp.zeros(2), 3)
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        replay_init(jnp.zeros(2), 0)
    with pytest.raises(ValueError, match="items must be at most 3"):
        replay_add(replay, jnp.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"items must have shape \(2, 2\), got \(2, 3\)"):
        replay_add(replay, jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        replay_sample(replay, jax.random.key(0), 0)
