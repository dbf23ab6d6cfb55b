"""The radial projection: views of the official code, closed forms, invariances."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.optim import ChannelAxes, adamp, adamp_view, project_radial

quick = settings(max_examples=15, deadline=None)
project = jax.jit(project_radial, static_argnames="channel_axes")
view = jax.jit(adamp_view, static_argnames="channel_axes")
FIRST, LAST = ChannelAxes((0,)), ChannelAxes((-1,))


def to_flax(x, lead=0):
    """(out, in, *window) to (*window, in, out), behind some leading axes; vectors and scalars stay."""
    rank = x.ndim - lead
    if rank < 2:
        return x
    return np.transpose(x, (*range(lead), *(lead + axis for axis in (*range(2, rank), 1, 0))))


@jax.jit
def views_in_both_layouts(weights, grads, delta, wd_ratio, eps):
    """View and decay ratio at every step, from PyTorch's layout and from Flax's."""

    def at_step(p, g, axes):
        return adamp_view(p, g, delta, eps, axes), project_radial(p, g, g, delta, wd_ratio, eps, axes)[1]

    torch = jax.vmap(lambda p, g: at_step(p, g, FIRST))(weights, grads)
    order = (*range(2, weights.ndim - 1), 1, 0) if weights.ndim > 2 else range(weights.ndim - 1)
    flax = jax.vmap(lambda p, g: at_step(p.transpose(order), g.transpose(order), LAST))(weights, grads)
    return torch, flax


@pytest.mark.golden
@pytest.mark.golden_pattern("optim", "*[md]p_*.npz")
def test_views_and_ratios_of_the_official_code(golden_file):
    """At every recorded weight and gradient, the same view fires and the same decay ratio comes back."""
    data = np.load(golden_file)
    hparams = json.loads(str(data["hparams"]))
    assert hparams["optimizer"] in ("AdamP", "SGDP")
    options = [hparams.get(name, value) for name, value in (("delta", 0.1), ("wd_ratio", 0.1), ("eps", 1e-8))]
    with jax.enable_x64():
        for i in range(hparams["num_params"]):
            weights = np.concatenate([data[f"p{i}_init"][None], data[f"p{i}_params"][:-1]])
            for views, ratio in views_in_both_layouts(weights, data[f"p{i}_grads"], *options):
                assert views.tolist() == data[f"p{i}_view"].tolist()
                np.testing.assert_array_equal(ratio, data[f"p{i}_wd_ratio"].astype(ratio.dtype))


def random_leaf(seed, shape, count=3):
    return np.random.default_rng(seed).standard_normal((count, *shape))


def orthogonal(p, g, axis=None):
    """The gradient of a loss that ignores the length of p, over the given axes."""
    return g - p * (p * g).sum(axis, keepdims=True) / (p * p).sum(axis, keepdims=True)


seeds = st.integers(0, 10**6)
shapes = st.sampled_from([(3, 4), (6, 1), (3, 3, 2, 5)])


@quick
@given(seeds, shapes)
def test_channel_view_leaves_no_radial_part_in_any_row(seed, shape):
    with jax.enable_x64():
        p, g, u = random_leaf(seed, shape)
        within = tuple(range(len(shape) - 1))
        new, ratio = project(p, orthogonal(p, g, within), u, 0.1, 0.3, 0.0)
        new = np.asarray(new)
        assert np.abs((p * new).sum(within) / np.sqrt((p * p).sum(within))).max() < 1e-13
        assert ratio == 0.3
        # Pythagoras: a step of any length, here 0.7, only adds its own square
        np.testing.assert_allclose(
            ((p - 0.7 * new) ** 2).sum(within), (p**2).sum(within) + 0.49 * (new**2).sum(within), rtol=1e-13
        )


@quick
@given(seeds, st.sampled_from([(3, 4), (3, 3, 2, 5)]))
def test_layer_view_leaves_no_radial_part_in_total(seed, shape):
    with jax.enable_x64():
        p, g, u = random_leaf(seed, shape)
        # rows that pull in and out: large cosines row by row, none in total
        g = orthogonal(p, orthogonal(p, g) + p * np.where(np.arange(shape[-1]) % 2 == 0, 1.0, -1.0))
        new, _ = project(p, g, u, 1e-6, 0.1, 0.0)
        assert int(view(p, g, delta=1e-6)) == 2
        assert abs((p * new).sum()) < 1e-12
        np.testing.assert_allclose(new, orthogonal(p, u), rtol=1e-12, atol=1e-14)


@quick
@given(seeds, st.floats(0.0, 0.5))
def test_is_a_linear_projection_of_the_update(seed, delta):
    """For given weight and gradient, u -> u' is linear, idempotent and never lengthens."""
    with jax.enable_x64():
        p, g, u, v = random_leaf(seed, (3, 4), 4)
        g = g - 0.95 * p * (p * g).sum() / (p * p).sum()

        def at(update):
            return np.asarray(project(p, g, update, delta, 0.1, 0.0)[0])

        np.testing.assert_allclose(at(2 * u - 3 * v), 2 * at(u) - 3 * at(v), rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(at(at(u)), at(u), rtol=1e-11, atol=1e-12)
        assert (at(u) ** 2).sum() <= (u**2).sum() * (1 + 1e-12)


@quick
@given(seeds, st.integers(-6, 6))
def test_permutation_transposition_and_scale(seed, exponent):
    """Permuting channels commutes, so does moving the channel axis; the decision ignores lengths."""
    with jax.enable_x64():
        p, g, u = random_leaf(seed, (2, 3, 4))
        g = g - 0.9 * p * (p * g).sum() / (p * p).sum()
        new, ratio = project(p, g, u, 0.1, 0.1, 0.0)
        order = np.random.default_rng(seed).permutation(4)
        permuted, _ = project(p[..., order], g[..., order], u[..., order], 0.1, 0.1, 0.0)
        np.testing.assert_allclose(permuted, new[..., order], rtol=1e-12, atol=1e-15)
        moved, _ = project(*(np.moveaxis(x, -1, 0) for x in (p, g, u)), 0.1, 0.1, 0.0, channel_axes=FIRST)
        np.testing.assert_allclose(np.moveaxis(moved, 0, -1), new, rtol=1e-12, atol=1e-15)
        scaled, same = project(p * 10.0**exponent, g * 10.0**-exponent, u, 0.1, 0.1, 0.0)
        assert same == ratio
        np.testing.assert_allclose(scaled, new, rtol=1e-12, atol=1e-14)


def test_attention_kernel_equals_its_matrix():
    """Two channel axes are the same as the matrix with both of them flattened."""
    with jax.enable_x64():
        p, g, u = random_leaf(3, (6, 2, 5))
        g = orthogonal(p, g, 0)
        new, _ = project(p, g, u, channel_axes=ChannelAxes((-2, -1)))
        flat, _ = project(*(x.reshape(6, 10) for x in (p, g, u)))
        np.testing.assert_allclose(new.reshape(6, 10), flat, rtol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_zero_gradients_and_zero_weights(dtype):
    """A zero gradient fires the channel view; zero weights change nothing; neither makes a NaN, whatever eps."""
    p = jnp.arange(1, 13, dtype=dtype).reshape(3, 4)
    u, zero = jnp.ones_like(p), jnp.zeros_like(p)
    slope_at = jax.jit(jax.grad(lambda p, eps: project(p, u, u, eps=eps)[0].astype(jnp.float32).sum()))
    for eps in (1e-8, 0.0):
        new, ratio = project(p, zero, u, eps=eps)
        assert new.dtype == dtype
        assert ratio == jnp.float32(0.1)
        radial = np.asarray(p, np.float64) * np.asarray(new, np.float64)
        assert np.abs(radial.sum(0)).max() < 20 * float(jnp.finfo(dtype).eps)
        assert (project(zero, u, u, eps=eps)[0] == u).all()
        assert bool(jnp.isfinite(slope_at(zero, eps)).all())


def test_low_precision_sums_are_float32():
    """4096 products of ones summed in bfloat16 would stop at 256, far below the threshold that they exceed."""
    p = jnp.ones((4096, 1), jnp.bfloat16)
    g = p.at[0].set(-1)  # cosine 4094/4096, threshold delta/64
    assert project(p, g, p, 63.9)[1] == 1
    assert project(p, g, p, 64.0)[1] < 1


def test_vectors_scalars_and_exempt_leaves_pass():
    params = {"bias": jnp.ones(4), "scalar": jnp.ones(()), "kernel": jnp.ones((3, 4)), "none": None}
    grads = jax.tree.map(jnp.zeros_like, params)
    spec = {"bias": ChannelAxes(), "scalar": ChannelAxes(), "kernel": None, "none": None}
    new, ratio = jax.jit(lambda p, g: project_radial(p, g, p, channel_axes=spec))(params, grads)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(params), strict=True))
    assert jax.tree.map(float, ratio) == {"bias": 1.0, "scalar": 1.0, "kernel": 1.0, "none": None}


def test_vmap_is_the_loop():
    with jax.enable_x64():
        p, g, u = random_leaf(5, (4, 3, 4))
        plain = np.stack([project(*leaf, 0.6)[0] for leaf in zip(p, g, u, strict=True)])
        mapped = jax.vmap(lambda p, g, u: project(p, g, u, 0.6)[0])(p, g, u)
        np.testing.assert_allclose(mapped, plain, rtol=1e-13)


@pytest.mark.parametrize("argument", [0, 2])
def test_gradient_is_the_difference_quotient(argument):
    """Through the projected update, with respect to the weight and to the update; the decision itself has no slope."""
    with jax.enable_x64():
        p, g, u = random_leaf(5, (3, 4))
        g = orthogonal(p, g, 0)

        @jax.jit
        def total(x):
            args = [p, g, u]
            args[argument] = x
            return (project(*args)[0] ** 2).sum()

        start = (p, g, u)[argument]
        bump = np.zeros_like(p)
        bump[1, 2] = 1e-6
        quotient = (total(start + bump) - total(start - bump)) / 2e-6
        np.testing.assert_allclose(jax.jit(jax.grad(total))(start)[1, 2], quotient, rtol=1e-6)


def test_sharded_axes_stay_sharded():
    """Under an explicit mesh the projected update keeps the weight's sharding, whichever axis is split."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    p, g, u = random_leaf(7, (16, 8)).astype(np.float32)
    g = orthogonal(p, g, 0)
    expected, _ = project(p, g, u)
    with jax.set_mesh(mesh):
        for spec in (("data", None), (None, "data")):
            args = [jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec))) for x in (p, g, u)]
            new, ratio = project(*args)
            assert jax.typeof(new) == jax.typeof(args[0])
            np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-6)
            assert float(ratio) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": -0.1}, r"delta must lie in \[0, inf\], got -0.1"),
        ({"delta": float("nan")}, "delta must lie"),
        ({"wd_ratio": 1.5}, r"wd_ratio must lie in \[0, 1\], got 1.5"),
        ({"wd_ratio": -0.5}, "wd_ratio"),
        ({"eps": -1e-8}, "eps must lie"),
        ({"channel_axes": ChannelAxes((2,))}, "channel_axes must lie"),
    ],
)
def test_bad_input(options, message):
    p = jnp.ones((3, 4))
    with pytest.raises(ValueError, match=message):
        project_radial(p, p, p, **options)


def test_complex_leaves_are_refused():
    tx, params = adamp(1e-3), {"w": jnp.ones((2, 2), jnp.complex64)}
    with pytest.raises(TypeError, match=r"params must be real, got complex64 at \['w'\]"):
        tx.init(params)
