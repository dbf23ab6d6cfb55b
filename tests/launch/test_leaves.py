"""A state as named leaves, live and frozen."""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.launch.leaves import Layout, dtype_named, from_data, host_scalar, nest, to_data


class Tuple(NamedTuple):
    params: Any
    frozen: Any
    optimizer: Any


@flax.struct.dataclass
class Dataclass:
    params: Any
    frozen: Any
    optimizer: Any


def make(cls):
    params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    return cls(params=params, frozen={"teacher": (jnp.ones(4),)}, optimizer=optax.adam(1e-3).init(params))


@pytest.mark.parametrize("cls", [Tuple, Dataclass, dict])
def test_split_and_merge_are_inverse(cls):
    state = make(cls)
    layout = Layout(jax.eval_shape(lambda: state))
    assert layout.frozen_names == ("frozen/teacher/0",)
    assert "params/w" in layout.live_names
    assert "optimizer/0/mu/b" in layout.live_names
    live, frozen = layout.split(state)
    assert len(live) == len(layout.live_names) == len(layout.abstract_live)
    merged = layout.merge(live, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(state)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(state), strict=True))


def test_only_the_field_itself_is_frozen():
    layout = Layout({"params": {"frozen": jnp.ones(1)}, "frozen": jnp.ones(2), "frozen_": jnp.ones(3)})
    assert layout.frozen_names == ("frozen",)
    assert layout.live_names == ("frozen_", "params/frozen")


def test_states_without_frozen_parts():
    for state in (jnp.ones(3), (), make(Tuple)._replace(frozen=None), make(Tuple)._replace(frozen=())):
        layout = Layout(state)
        assert layout.frozen_names == ()
        assert jax.tree.structure(layout.merge(*layout.split(state))) == jax.tree.structure(state)


def test_changes_are_named():
    state = make(Tuple)
    layout = Layout(state)
    with pytest.raises(TypeError, match=r"params/b changed from float32\[3\] to float32\[4\]"):
        layout.split(state._replace(params={"w": jnp.ones((2, 3)), "b": jnp.zeros(4)}))
    with pytest.raises(TypeError, match=r"params/w changed from float32\[2, 3\] to bfloat16\[2, 3\]"):
        layout.split(state._replace(params={"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.zeros(3)}))
    with pytest.raises(TypeError, match="structure changed"):
        layout.split(state._replace(params={"w": jnp.ones((2, 3))}))
    with pytest.raises(ValueError, match="both called 'a/b'"):
        Layout({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_and_their_types_survive(impl):
    keys = jax.random.split(jax.random.key(1, impl=impl), 3)
    again = from_data(to_data(keys), dtype_named(str(keys.dtype)))
    assert again.dtype == keys.dtype
    np.testing.assert_array_equal(jax.random.key_data(again), jax.random.key_data(keys))
    assert dtype_named("bfloat16") == jnp.bfloat16


def test_nest_undoes_paths():
    state = make(Tuple)
    layout = Layout(state)
    tree = nest(layout.live_paths + layout.frozen_paths, layout.live_names + layout.frozen_names)
    assert tree["params"] == {"b": "params/b", "w": "params/w"}
    assert tree["frozen"]["teacher"]["0"] == "frozen/teacher/0"
    assert nest([()], [1]) == 1
    assert nest([], []) == {}


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(0.1, "bfloat16"), (0.1, "float16"), (6e-8, "float16"), (0.1, "float32"), (1e-45, "float32"), (3.4e38, "float32")],
)
def test_host_scalars_are_exact(value, dtype):
    array = jnp.asarray(value, dtype)
    plain = host_scalar(array)
    assert type(plain) is float
    np.testing.assert_array_equal(np.asarray(plain).astype(array.dtype), array)


def test_host_scalars_keep_their_kind():
    assert host_scalar(jnp.int32(3)) == 3
    assert type(host_scalar(jnp.int32(3))) is int
    assert host_scalar(jnp.array(True)) is True
    assert host_scalar(jnp.arange(2, dtype=jnp.float32)) == [0.0, 1.0]
