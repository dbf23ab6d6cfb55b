"""Channel axes of linen and nnx trees, by path."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from poise.optim import ChannelAxes, adamp, adamp_view, flax_channel_axes
from poise.optim.channel_axes import check_channel_axes, row_geometry

LAST, HEADS, TABLE = ChannelAxes((-1,)), ChannelAxes((-2, -1)), ChannelAxes((0,))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(4)(x), None


class EveryLayer(nn.Module):
    """One of each kind of layer, in shapes whose sizes are all different where that matters."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 4)(tokens)
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, name="plain")(x, x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, use_bias=False, name="unbiased")(x, x)
        x = nn.DenseGeneral((2, 3), name="split")(x)
        x = nn.DenseGeneral(4, axis=(-2, -1), name="merge")(x)
        x = nn.Conv(6, (3,), name="conv")(x)
        x = nn.Conv(6, (3,), feature_group_count=6, name="depthwise")(x)
        x = nn.ConvTranspose(5, (3,), name="up")(x)
        x = nn.ConvTranspose(4, (3,), transpose_kernel=True, name="up_transposed")(x)
        x, _ = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)
        x, _ = nn.scan(Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)(name="layers")(
            x, None
        )
        many = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=7)
        x = many(9)(x).mean(0)
        kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        x = nn.Dense(4, kernel_init=kernel_init, name="boxed")(x)
        x = nn.LSTMCell(5)(nn.LSTMCell(5).initialize_carry(jax.random.key(0), x.shape), x)[1]
        return nn.LayerNorm()(x) * self.param("gain_table", nn.initializers.ones, (7, 5))


@pytest.fixture(scope="module")
def linen_params():
    return jax.eval_shape(EveryLayer().init, jax.random.key(0), jnp.zeros((2, 7), jnp.int32))["params"]


def specs_by_path(params, **options):
    specs = flax_channel_axes(params, **options)
    flat, _ = jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda x: x is None or isinstance(x, ChannelAxes))
    return {jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): spec for path, spec in flat}


def test_linen_layers(linen_params):
    specs = specs_by_path(linen_params, stacked={"^layers/": 1})
    expected = {
        "Embed_0/embedding": TABLE,
        "plain/query/kernel": HEADS,
        "plain/key/kernel": HEADS,
        "plain/value/kernel": HEADS,
        "plain/out/kernel": LAST,
        "unbiased/query/kernel": HEADS,
        "unbiased/out/kernel": LAST,
        "split/kernel": HEADS,
        "merge/kernel": LAST,
        "conv/kernel": LAST,
        "depthwise/kernel": LAST,
        "up/kernel": LAST,
        "up_transposed/kernel": ChannelAxes((-2,)),
        "ScanBlock_0/Dense_0/kernel": ChannelAxes((-1,), (0,)),
        "VmapDense_0/kernel": ChannelAxes((-1,), (0,)),
        "layers/Dense_0/kernel": ChannelAxes((-1,), (1,)),
        "boxed/kernel": LAST,
        "gain_table": LAST,
    }
    assert {path: specs[path] for path in expected} == expected
    vectors = {path: spec for path, spec in specs.items() if path.endswith(("bias", "scale"))}
    assert len(vectors) > 10
    assert set(vectors.values()) == {None}
    assert all(spec == LAST for path, spec in specs.items() if "LSTMCell" in path and path.endswith("kernel"))


def test_stack_is_seen_by_its_bias():
    """A stack without a telling name: the bias has the stack's axis too."""
    params = {"kernel": jnp.zeros((5, 3, 4)), "bias": jnp.zeros((5, 4))}
    assert flax_channel_axes(params)["kernel"] == ChannelAxes((-1,), (0,))
    heads = {"query": {"kernel": jnp.zeros((5, 8, 2, 3)), "bias": jnp.zeros((5, 2, 3))}}
    assert flax_channel_axes(heads)["query"]["kernel"] == ChannelAxes((-2, -1), (0,))


def test_stacked_and_overrides_win():
    params = {"table": {"kernel": jnp.zeros((5, 3, 4))}, "rest": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}
    specs = flax_channel_axes(params, stacked={"table": (0,)}, overrides={"^rest/kernel$": ChannelAxes((0,))})
    assert specs["table"]["kernel"] == ChannelAxes((-1,), (0,))
    assert specs["rest"]["kernel"] == ChannelAxes((0,))
    assert flax_channel_axes(params, overrides={"kernel": None})["table"]["kernel"] is None
    named = {"ScanBlock_0": {"kernel": jnp.zeros((3, 4))}}
    assert flax_channel_axes(named)["ScanBlock_0"]["kernel"] is None
    assert flax_channel_axes(named, stacked={"Scan": ()})["ScanBlock_0"]["kernel"] == LAST


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, 6, decode=False, rngs=rngs)
        self.conv = nnx.Conv(4, 6, (3,), rngs=rngs)
        self.up = nnx.ConvTranspose(6, 5, (3,), transpose_kernel=True, rngs=rngs)
        self.dense = nnx.Linear(5, 3, rngs=rngs)
        self.norm = nnx.LayerNorm(3, rngs=rngs)


def test_nnx_layers():
    specs = specs_by_path(nnx.state(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))), nnx.Param))
    assert specs["embed/embedding"] == TABLE
    assert specs["attention/query/kernel"] == specs["attention/value/kernel"] == HEADS
    assert specs["attention/out/kernel"] == specs["conv/kernel"] == specs["dense/kernel"] == LAST
    assert specs["up/kernel"] == ChannelAxes((-2,))
    assert specs["norm/scale"] is None
    assert specs["dense/bias"] is None


def test_nnx_optimizer_takes_specs_as_tree_and_as_function():
    """A real nnx optimizer hands over bare arrays, while the tree of specs was made from boxed ones."""
    x = jnp.linspace(-1, 1, 12).reshape(3, 4)

    def trained(make_specs):
        model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        specs = make_specs(nnx.state(model, nnx.Param))
        optimizer = nnx.Optimizer(model, adamp(1e-1, weight_decay=1e-2, channel_axes=specs), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(lambda m: jnp.mean((m(x) - 1) ** 2))(model))

        for _ in range(3):
            step(model, optimizer)
        return np.asarray(model.kernel[...])

    start = np.asarray(nnx.Linear(4, 2, rngs=nnx.Rngs(0)).kernel[...])
    by_tree, by_function = trained(flax_channel_axes), trained(lambda params: flax_channel_axes)
    assert (by_tree == by_function).all()
    assert np.abs(by_tree - start).min() > 1e-2


def test_batch_axes_are_separate_leaves():
    """A stack is projected slice by slice, as the slices would be on their own."""
    p, g = np.random.default_rng(1).standard_normal((2, 3, 6, 4)).astype(np.float32)
    g[0] -= p[0] * (p * g)[0].sum(0) / (p * p)[0].sum(0)  # orthogonal to every row
    g[1] = p[1]  # along the weight
    sign = np.array([1, -1, 1, -1], np.float32)
    g[2] = p[2] * sign * np.array([1, 1, 1, (p[2] ** 2 @ (sign * [1, 1, 1, 0])).sum() / (p[2, :, 3] ** 2).sum()])
    view = jax.jit(adamp_view, static_argnames="channel_axes")
    stacked = view(p, g, channel_axes=ChannelAxes((-1,), (0,)))
    assert stacked.tolist() == [int(view(p[i], g[i])) for i in range(3)] == [1, 0, 2]


def test_geometry_counts():
    geometry = row_geometry((5, 3, 2, 7), ChannelAxes((-1, 1), (0,)))
    assert (geometry.channel, geometry.within, geometry.batch) == ((1, 3), (2,), (0,))
    assert (geometry.row_size, geometry.slice_size) == (2, 42)
    assert row_geometry((5,), ChannelAxes()) is None
    assert row_geometry((), ChannelAxes()) is None
    assert row_geometry((5, 3), ChannelAxes((-1,), (0,))) is None  # a stack of vectors
    assert row_geometry((5, 0), ChannelAxes()) is None


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (ChannelAxes(()), ValueError, "at least one channel axis"),
        (ChannelAxes((0, 0)), ValueError, "at most once"),
        (ChannelAxes((0,), (0,)), ValueError, "at most once"),
        (ChannelAxes((0.5,)), TypeError, "tuples of integers"),
        ({"a": (0,)}, TypeError, "ChannelAxes and None"),
    ],
)
def test_bad_specs(spec, error, message):
    with pytest.raises(error, match=message):
        check_channel_axes(spec)
    with pytest.raises(error, match=message):
        adamp(1e-3, channel_axes=spec)


def test_bad_axes_for_a_shape():
    with pytest.raises(ValueError, match=r"lie in \[-2, 1\]"):
        row_geometry((3, 4), ChannelAxes((2,)))
    with pytest.raises(ValueError, match="at most once"):
        row_geometry((3, 4, 5), ChannelAxes((-1, 2)))
    with pytest.raises(ValueError, match="stacked must name axes"):
        flax_channel_axes({"kernel": jnp.zeros((3, 4))}, stacked={"kernel": 2})
    with pytest.raises(ValueError, match="a/kernel"):
        flax_channel_axes({"a": {"kernel": jnp.zeros((3, 4))}}, overrides={"kernel": ChannelAxes((5,))})
    tx, params = adamp(1e-3, channel_axes=ChannelAxes((3,))), {"w": jnp.zeros((3, 4))}
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"\['w'\]"):
        tx.update(params, state, params)
