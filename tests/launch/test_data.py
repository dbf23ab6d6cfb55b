"""Batches as pure functions of (seed, step): every epoch a permutation, the same for any number of hosts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.launch.data import DataError, InMemory, NoData, Prefetched, Shuffled, batch_indices

sizes = dict(seed=st.integers(0, 2**63), batch_size=st.integers(1, 40), num_examples=st.integers(1, 30))


@given(**sizes, first=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_every_epoch_is_a_permutation(seed, batch_size, num_examples, first):
    first_step = first * num_examples  # a step at whose beginning an epoch begins
    stream = np.concatenate(
        [
            batch_indices(seed, first_step + s, batch_size, num_examples)
            for s in range(-(-3 * num_examples // batch_size))
        ]
    )
    epochs = stream[: 3 * num_examples].reshape(3, num_examples)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(num_examples), (3, 1)))


@given(seed=sizes["seed"], share=st.integers(1, 8), hosts=st.integers(1, 5), step=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_hosts_hold_blocks_of_the_same_global_batch(seed, share, hosts, step):
    batch = share * hosts
    blocks = [batch_indices(seed, step, batch, 17, process, hosts) for process in range(hosts)]
    np.testing.assert_array_equal(np.concatenate(blocks), batch_indices(seed, step, batch, 17))


def test_the_order_is_fixed_for_good():
    # Runs are resumed with newer versions of everything: these numbers must never change.
    assert batch_indices(0, 0, 8, 20).tolist() == [0, 2, 11, 17, 9, 1, 8, 13]
    assert batch_indices(7, 12345, 8, 1297).tolist() == [990, 1109, 518, 883, 77, 1159, 835, 360]


def test_seeds_and_epochs_differ():
    orders = {tuple(batch_indices(seed, step, 50, 50).tolist()) for seed in range(5) for step in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(seed=-1), "seed must be at least 0, got -1"),
        (dict(step=-1), "step must be at least 0, got -1"),
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(num_examples=0), "num_examples must be at least 1, got 0"),
        (dict(process_count=0), "process_count must be at least 1, got 0"),
        (dict(process_index=2, process_count=2), r"process_index must be in \[0, 2\), got 2"),
        (dict(batch_size=9, process_count=2), "batch_size 9 cannot be shared evenly by 2 hosts"),
    ],
)
def test_bad_numbers_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        batch_indices(**dict(seed=0, step=0, batch_size=8, num_examples=10) | arguments)


def arrays(count=10):
    return {"image": np.arange(count * 4, dtype=np.float32).reshape(count, 2, 2), "label": np.arange(count)}


def test_in_memory_gives_matching_rows():
    data = InMemory(arrays(), batch_size=4, seed=3)
    for step in range(6):
        batch = data.batch(step)
        np.testing.assert_array_equal(batch["label"], batch_indices(3, step, 4, 10))
        np.testing.assert_array_equal(batch["image"], arrays()["image"][batch["label"]])
    assert (data.batch_axis, data.batch_size) == (0, 4)


@given(cycle=st.integers(1, 4), step=st.integers(0, 100), hosts=st.sampled_from([1, 2, 4]))
@settings(max_examples=15, deadline=None)
def test_a_cycle_is_consecutive_batches(cycle, step, hosts):
    flat = InMemory(arrays(), batch_size=4, seed=3)
    parts = [
        InMemory(arrays(), 4, 3, cycle=cycle, process_index=p, process_count=hosts).batch(step) for p in range(hosts)
    ]
    whole = np.concatenate([part["label"] for part in parts], axis=1)
    np.testing.assert_array_equal(whole, np.stack([flat.batch(step * cycle + i)["label"] for i in range(cycle)]))
    assert parts[0]["image"].shape == (cycle, 4 // hosts, 2, 2)
    assert InMemory(arrays(), 4, 3, cycle=cycle).batch_axis == 1


def test_a_batch_may_exceed_the_data():
    labels = InMemory(arrays(), batch_size=25, seed=0).batch(0)["label"]
    counts = np.bincount(labels, minlength=10)
    assert counts.sum() == 25
    assert counts.min() == 2
    assert counts.max() == 3


def test_a_batch_is_a_copy():
    data = InMemory(arrays(), batch_size=4, seed=0)
    data.batch(0)["image"][:] = -1
    assert data.batch(0)["image"].min() >= 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_data_that_is_not_finite_is_named(bad):
    broken = arrays()
    broken["image"][6, 1, 0] = bad
    broken["image"][7, 0, 0] = bad
    with pytest.raises(DataError, match=r"'image' is not finite in 2 of 10 examples; the first is example 6 .*6, 1, 0"):
        InMemory(broken, 4, 0)


def test_bad_arrays_are_named():
    with pytest.raises(DataError, match="at least one array"):
        InMemory({}, 4, 0)
    with pytest.raises(DataError, match="'label' has no examples"):
        InMemory(arrays(0), 4, 0)
    with pytest.raises(DataError, match="'image': 10, 'label': 9"):
        InMemory(arrays() | {"label": np.arange(9)}, 4, 0)
    with pytest.raises(DataError, match="'scale'"):
        InMemory({"scale": np.array(3.0)}, 4, 0)
    with pytest.raises(DataError, match="'name'"):
        InMemory({"name": np.array([None, "a"])}, 4, 0)
    with pytest.raises(ValueError, match="cycle must be at least 1, got 0"):
        InMemory(arrays(), 4, 0, cycle=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        InMemory(arrays(), 0, 0)
    with pytest.raises(ValueError, match="batch_size 5 cannot be shared evenly by 2 hosts"):
        InMemory(arrays(), 5, 0, process_count=2)


def test_no_data():
    assert NoData().batch(3) == ()
    assert (NoData().batch_size, NoData().batch_axis) == (0, 0)


def test_batches_made_in_advance_are_the_same_and_failures_arrive():
    calls = []

    def read(indices):
        calls.append(indices)
        return {"x": indices}

    plain = Shuffled(read, num_examples=7, batch_size=3, seed=1, cycle=2)
    ahead = Prefetched(plain, num_steps=4, ahead=2)
    assert (ahead.batch_axis, ahead.batch_size) == (1, 3)
    assert ahead.batch(0)["x"].shape == (2, 3)
    assert len(calls) == 1  # nothing in advance for a look at the first batch
    for step in (1, 2, 3, 9, 0, 1):
        np.testing.assert_array_equal(ahead.batch(step)["x"], plain.batch(step)["x"])

    counted = []
    source = Shuffled(lambda indices: counted.append(indices) or {"x": indices}, num_examples=7, batch_size=3, seed=1)
    few = Prefetched(source, num_steps=2, ahead=2)
    few.batch(0), few.batch(1)
    assert len(counted) == 2  # none beyond the last

    def broken(indices):
        raise DataError("the image a.png cannot be read")

    with pytest.raises(DataError, match=r"a\.png"):
        Prefetched(Shuffled(broken, 7, 3, 1), 5).batch(0)
    with pytest.raises(ValueError, match="ahead must be at least 1, got 0"):
        Prefetched(plain, 4, ahead=0)
