"""Leaves of parameter trees: names by path, rules, masks, absent ones."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from poise.optim.leaves import find_rule, is_absent, path_names, resolve_mask, sum_dtype


def test_paths_are_the_same_for_linen_and_nnx():
    linen = {"layers": [{"kernel": jnp.ones(2)}], "value": {"bias": jnp.ones(1)}}
    boxed = jax.tree.map(nnx.Param, linen)
    for tree in (linen, boxed):
        paths = [path_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        assert paths == [("layers", "0", "kernel"), ("value", "bias")]
    # a leaf that is itself called value keeps its name: only the attribute of a box is left out
    assert path_names(jax.tree_util.tree_leaves_with_path({"value": jnp.ones(1)})[0][0]) == ("value",)


def test_rules_are_searched_in_order():
    rules = {"^a/": 1, "kernel$": 2}
    assert find_rule(rules, ("a", "kernel"), 0) == 1
    assert find_rule(rules, ("b", "kernel"), 0) == 2
    assert find_rule(rules, ("b", "bias"), 0) == 0
    assert find_rule(None, ("a",), 0) == 0


def test_masks_are_broadcast_from_prefixes():
    params = {"a": {"x": 1.0, "y": 2.0}, "b": 3.0, "c": None}
    mask = resolve_mask({"a": False, "b": True, "c": True}, params)
    assert mask == {"a": {"x": False, "y": False}, "b": True, "c": None}
    assert resolve_mask(None, params)["b"] is True
    assert resolve_mask(lambda p: {"a": True, "b": False, "c": True}, params)["b"] is False


def test_absent_leaves():
    assert is_absent(None)
    assert is_absent(optax.MaskedNode())
    assert not is_absent(0.0)


@pytest.mark.parametrize(
    ("dtype", "wide"), [(jnp.float16, "float32"), (jnp.bfloat16, "float32"), (jnp.float32, "float32")]
)
def test_sums_are_taken_in_float32_at_least(dtype, wide):
    assert sum_dtype(jnp.ones(1, dtype)) == wide
    with jax.enable_x64():
        assert sum_dtype(jnp.ones(1, dtype), jnp.ones(1, jnp.float64)) == "float64"
