"""A batch in parts gives the outputs and gradients of the whole, whatever the loss, and takes less memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from poise.core import Microbatched, in_microbatches


class Net(nn.Module):
    """A network with an optional condition and dropout."""

    @nn.compact
    def __call__(self, x, label=None, train=False):
        hidden = nn.Dense(32)(x)
        if label is not None:
            hidden = hidden + nn.Embed(3, 32)(label)
        hidden = nn.Dropout(0.5, deterministic=not train)(nn.gelu(hidden))
        return {"out": nn.Dense(2)(hidden), "hidden": hidden}


NET = Net()
X = jax.random.normal(jax.random.key(1), (12, 5))
LABEL = jnp.arange(12) % 3
VARIABLES = NET.init(jax.random.key(0), X[:1], LABEL[:1])


def spread(variables, apply, *examples, **options):
    """No mean over parts of the batch gives this loss."""
    out = apply(variables, *examples, **options)
    return jnp.std(out["out"]) + jnp.max(out["hidden"])


@pytest.mark.parametrize("label", [LABEL, None])
@pytest.mark.parametrize("parts", [1, 2, 3, 12])
def test_outputs_and_gradients_are_those_of_the_whole_batch(parts, label):
    variables = VARIABLES if label is not None else NET.init(jax.random.key(0), X[:1])
    net = Microbatched(NET, parts)
    for one, other in zip(
        jax.tree.leaves(net.apply(variables, X, label)), jax.tree.leaves(NET.apply(variables, X, label)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    ours, theirs = (jax.grad(spread)(variables, apply, X, label) for apply in (net.apply, NET.apply))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_one_part_is_the_function_itself():
    assert in_microbatches(NET.apply, 1) == NET.apply
    assert Microbatched(NET, 4).name is NET.name


def test_parts_draw_different_dropout_and_the_same_again():
    same = jnp.ones((4, 5))
    apply = in_microbatches(NET.apply, 2)
    out = apply(VARIABLES, same, train=True, rngs={"dropout": jax.random.key(3)})["hidden"] == 0
    assert (out[0] != out[1]).any()
    again = apply(VARIABLES, same, train=True, rngs={"dropout": jax.random.key(3)})["hidden"] == 0
    np.testing.assert_array_equal(out, again)


def test_split_batches_stay_where_they_are():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    split = NamedSharding(mesh, PartitionSpec("data"))
    x, label = jnp.tile(X, (2, 1))[:16], jnp.tile(LABEL, 2)[:16]
    apply = in_microbatches(NET.apply, 2)
    lowered = jax.jit(apply, in_shardings=(None, split, split), out_shardings=split).lower(VARIABLES, x, label)
    text = lowered.compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    mapped = jax.shard_map(
        lambda v, x, label: jax.lax.pmean(jnp.mean(apply(v, x, label)["out"]), "data"),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    np.testing.assert_allclose(mapped(VARIABLES, x, label), NET.apply(VARIABLES, x, label)["out"].mean(), rtol=1e-5)


def test_activations_of_one_part_are_in_memory():
    wide = nn.Sequential([nn.Dense(256), nn.gelu, nn.Dense(256), nn.gelu, nn.Dense(256), nn.gelu, nn.Dense(1)])
    x = jnp.ones((512, 8))
    variables = wide.init(jax.random.key(0), x[:1])

    def extra(parts):
        apply = in_microbatches(wide.apply, parts)
        grad = jax.jit(jax.grad(lambda v: jnp.std(apply(v, x)))).lower(variables)
        return grad.compile().memory_analysis().temp_size_in_bytes

    assert extra(8) < 0.6 * extra(1)


def test_bad_input():
    with pytest.raises(ValueError, match="num_microbatches must be at least 1, got 0"):
        in_microbatches(NET.apply, 0)
    with pytest.raises(ValueError, match="num_microbatches must divide the 12 examples of a batch, got 5"):
        in_microbatches(NET.apply, 5)(VARIABLES, X)
    with pytest.raises(ValueError, match=r"first axis of all arrays, got lengths \[\(2,\), \(12,\)\]"):
        in_microbatches(NET.apply, 2)(VARIABLES, X, LABEL[:2])
    with pytest.raises(ValueError, match=r"outputs that count examples by their first axis, 6 in each part, got shape"):
        in_microbatches(lambda v, x: (x, x.mean(0)), 2)(VARIABLES, X)
    with pytest.raises(ValueError, match=r"first axis of all arrays, got lengths \[\(\), \(12,\)\]"):
        in_microbatches(lambda v, x, y: x, 2)(VARIABLES, X, 1.0)
