"""The f-distill algorithm: the contract, its special cases, and the same numbers on any number of devices."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from poise.core import Microbatched, step_key
from poise.fdistill import (
    FDistillConfig,
    Optimizers,
    Oracles,
    edm_coefficients,
    edm_teacher,
    f_distill,
    one_step,
    student_variables,
    teacher_variables,
)
from poise.nets import EDMPrecond, RatioHead, SongUNet


class TinyDenoiser(nn.Module):
    """A preconditioned perceptron that honours what f-distill asks of a denoiser; it compiles in a moment."""

    label_dim: int = 3
    dtype: Any = None

    @nn.compact
    def __call__(self, x, sigma, class_labels=None, *, train=False, feature_levels=(), features_only=False):
        c_skip, c_out, c_in, c_noise = (c.reshape(-1, 1) for c in edm_coefficients(sigma))
        flat, labels = x.reshape(len(x), -1), class_labels
        if labels is None or labels.ndim == 1:
            labels = jax.nn.one_hot(jnp.full(len(x), -1) if labels is None else labels, self.label_dim)
        hidden = nn.Dense(16, dtype=self.dtype)(jnp.concatenate([c_in * flat, c_noise, labels], axis=1))
        features = [nn.silu(hidden)]
        if features_only:
            return features
        out = nn.Dense(flat.shape[1], dtype=self.dtype)(features[0]).astype(x.dtype)
        denoised = (c_skip * flat + c_out * out).reshape(x.shape)
        return (denoised, features) if feature_levels else denoised


NET = TinyDenoiser()
SHAPE = (4, 4, 1)
HEAD = RatioHead(hidden=(8,), label_dim=3, noise_channels=4)
BASE = FDistillConfig(sigma_min=0.02, sigma_max=5.0, fake_updates=1, num_bins=3, gan_weight=1e-2, ema_decays=(0.9, 0.5))
OPTIMIZERS = Optimizers(optax.adam(1e-3), optax.adam(1e-3), optax.adam(1e-3))
MESH = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def make_batch(size=8, cycles=1, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(size=(cycles, size, *SHAPE)) * 0.5, jnp.float32),
        "label": jnp.asarray(rng.integers(0, 3, size=(cycles, size)), jnp.int32),
    }


def make_pairs(size=8, seed=20):
    rng = np.random.default_rng(seed)
    return {
        "latents": jnp.asarray(rng.normal(size=(1, size, *SHAPE)), jnp.float32),
        "target": jnp.asarray(rng.normal(size=(1, size, *SHAPE)) * 0.5, jnp.float32),
        "target_label": jnp.asarray(rng.integers(0, 3, size=(1, size)), jnp.int32),
    }


@functools.cache
def teacher():
    variables = NET.init(jax.random.key(5), jnp.zeros((1, *SHAPE)), jnp.ones(1), jnp.zeros(1, jnp.int32))
    leaves, treedef = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(6), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


def make(config=BASE, optimizers=OPTIMIZERS, net=NET, **kwargs):
    return f_distill(net, HEAD, config, optimizers, teacher=teacher(), **kwargs)


@pytest.fixture(scope="module")
def base_step(quick_jit):
    return quick_jit(make().step)


@pytest.fixture(scope="module")
def started(base_step):
    """A state whose student, fake score and head all differ from where they began, and one step after it."""
    algorithm, step = make(), base_step
    state = algorithm.init(jax.random.key(0), make_batch())
    for i in range(3):
        state, _ = step(state, make_batch(seed=i), step_key(0, 1, i))
    after, metrics = step(state, make_batch(seed=9), step_key(0, 1, 3))
    again, same = step(state, make_batch(seed=9), step_key(0, 1, 3))
    assert largest_difference((after, metrics), (again, same)) == 0
    return state, after, metrics


@pytest.fixture(scope="module")
def stepped(quick_jit, started):
    """One step with changed settings from the common start; each is compiled once."""
    state = started[0]

    @functools.cache
    def step(**changes):
        return quick_jit(make(dataclasses.replace(BASE, **changes)).step)(state, make_batch(), jax.random.key(2))

    return step


def largest_difference(a, b):
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_step_moves_everything_but_the_teacher(started):
    before, after, metrics = started
    assert largest_difference(before.frozen, after.frozen) == 0
    for name in ("student", "fake", "head", "bins", "ema"):
        assert largest_difference(getattr(before, name), getattr(after, name)) > 0, name
    assert int(after.step) == int(before.step) + 1 == 4
    assert all(np.isfinite(value) and value.shape == () for value in metrics.values())
    assert {
        "matching_norm",
        "effective_sample_size",
        "ratio_bin_0",
        "fake_loss",
        "discriminator_loss",
    } <= metrics.keys()
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)


def test_first_average_follows_the_student(started):
    before, after, _ = started
    for average, old, decay in zip(after.ema, before.ema, BASE.ema_decays, strict=True):
        expected = jax.tree.map(lambda p, e, d=decay: d * e + (1 - d) * p, after.student, old)
        assert largest_difference(expected, average) < 1e-6
    assert largest_difference(student_variables(after)["params"], after.ema[0]) == 0
    assert largest_difference(student_variables(after, None)["params"], after.student) == 0


def test_warm_up_leaves_the_student_alone_and_hands_its_state_over(quick_jit):
    warm = make(update_student=False)
    state = warm.init(jax.random.key(0), make_batch())
    trained, metrics = quick_jit(warm.step)(state, make_batch(), jax.random.key(1))
    assert largest_difference(trained.student, state.student) == 0
    assert int(trained.step) == 0
    assert largest_difference(trained.fake, state.fake) > 0
    assert "matching_norm" not in metrics
    algorithm = f_distill(NET, HEAD, BASE, OPTIMIZERS, start=trained)
    assert largest_difference(algorithm.init(jax.random.key(3), make_batch()), trained) == 0


def test_reverse_kl_has_weight_one_and_needs_no_head(stepped, started):
    with_head, metrics = stepped(divergence="reverse_kl", gan_weight=0.0)
    without, fewer = stepped(divergence="reverse_kl", gan_weight=0.0, discriminator_weight=0.0)
    assert metrics["weight_min"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["weight_max"] == pytest.approx(1.0, abs=1e-6)
    assert largest_difference(with_head.student, without.student) < 1e-6  # whatever the head says
    assert largest_difference(with_head.fake, without.fake) < 1e-6
    assert largest_difference(without.head, started[0].head) == 0
    assert "discriminator_loss" in metrics
    assert "discriminator_loss" not in fewer


@pytest.mark.slow
def test_divergences_differ_only_in_the_weight(stepped):
    """At the first step the heads' logits are equal for all divergences, but the students' gradients are not."""
    results = [stepped(divergence="reverse_kl"), stepped(), stepped(divergence="forward_kl")]
    assert largest_difference(results[0][0].bins, results[2][0].bins) < 1e-5
    assert largest_difference(results[0][0].student, results[2][0].student) > 1e-5
    sizes = [float(metrics["effective_sample_size"]) for _, metrics in results]
    assert sizes[0] == pytest.approx(8.0, abs=1e-5)
    assert sizes[0] > sizes[1] > sizes[2] >= 1


@pytest.mark.parametrize("size", [0.0, 1e4, 1e6])
def test_no_head_makes_a_step_that_is_not_finite(size, started, base_step):
    """Ratios that are all equal, and logits beyond what can be exponentiated."""
    state = started[0]._replace(head=jax.tree.map(lambda p: size * p, started[0].head))
    after, metrics = base_step(state, make_batch(), jax.random.key(2))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after.student, after.fake, after.bins)))
    assert 1 - 1e-5 <= metrics["effective_sample_size"] <= 8 + 1e-5
    if size == 0:
        assert metrics["weight_min"] > 0.9  # the bins remember other ratios
        assert metrics["weight_max"] < 1.1


def test_where_fake_score_and_teacher_agree_nothing_matches(base_step):
    """At the start, with a copy for a fake score, the student is moved by the adversarial loss alone."""
    state = make().init(jax.random.key(0), make_batch())
    _, metrics = base_step(state, make_batch(), jax.random.key(2))
    assert float(metrics["matching_norm"]) < 1e-5
    assert float(metrics["student_grad_norm"]) > 0


JOINT = {"head_features": "fake", "train_features": True}


def with_sgd(state, joint=False):
    """SGD, so that rounding isn't amplified; all optimizers begin anew."""
    sgd = optax.sgd(0.1)
    critics = {"fake": state.fake, "head": state.head}
    return Optimizers(sgd, sgd, sgd), state._replace(
        student_opt=sgd.init(state.student),
        fake_opt=sgd.init(critics if joint else state.fake),
        head_opt=() if joint else sgd.init(state.head),
    )


def assert_close(expected, other):
    (state, metrics), (other_state, other_metrics) = jax.device_get((expected, other))
    assert largest_difference(state, other_state) < 1e-5
    assert metrics.keys() == other_metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(
            {"bins": "linear", "gan_same_noise": True, "weight_eps": 1e-6, "r1_weight": 1.0, "r1_image": "clean"},
            marks=pytest.mark.slow,
        ),
        pytest.param({"bins": "none", "head_features": "fake", "regression_weight": 0.5}, marks=pytest.mark.slow),
        {**JOINT, "gan_own_noise": True, "critics_on_student_step": True, "matching_eps": 0.0, "fake_updates": 2},
    ],
    ids=["default", "fastgen", "regression", "dmd2"],
)
@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one(changes, started, quick_jit):
    """Jit with a sharded batch, and shard_map."""
    config = dataclasses.replace(BASE, **changes)
    optimizers, state = with_sgd(started[0], config.train_features)
    key = jax.random.key(8)
    batch = {**make_batch(16, config.fake_updates, 4), **(make_pairs(16) if config.regression_weight else {})}
    plain, mapped = make(config, optimizers), make(config, optimizers, axis_name="data")
    step = quick_jit(plain.step)
    expected = step(state, batch, key)
    everywhere = NamedSharding(MESH, P())
    replicated, sharded = jax.device_put(state, everywhere), jax.device_put(batch, NamedSharding(MESH, P(None, "data")))
    assert_close(expected, step(replicated, sharded, jax.device_put(key, everywhere)))
    shard = jax.shard_map(mapped.step, mesh=MESH, in_specs=(P(), P(None, "data"), P()), out_specs=(P(), P()))
    assert_close(expected, quick_jit(shard)(replicated, sharded, key))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"r1_weight": 1.0}, {**JOINT, "gan_own_noise": True}], ids=["default", "dmd2"])
def test_microbatches_give_the_numbers_of_the_whole(changes, started, quick_jit):
    """Also of what is normalized over the batch: weights, bins and the matching gradient."""
    config = dataclasses.replace(BASE, **changes)
    optimizers, state = with_sgd(started[0], config.train_features)
    batch, key = make_batch(12, config.fake_updates, 4), jax.random.key(8)
    expected = quick_jit(make(config, optimizers).step)(state, batch, key)
    parts = quick_jit(make(config, optimizers, net=Microbatched(NET, 3)).step)
    assert_close(expected, parts(state, batch, key))


@pytest.mark.slow
def test_pmap_gives_the_numbers_of_one_device(started, quick_jit):
    optimizers, state = with_sgd(started[0])
    batch, key = make_batch(16, seed=4), jax.random.key(8)
    expected = quick_jit(make(BASE, optimizers).step)(state, batch, key)
    split = jax.tree.map(lambda x: x.reshape(1, 8, 2, *x.shape[2:]).swapaxes(0, 1), batch)
    mapped = make(BASE, optimizers, axis_name="data")
    got = jax.pmap(mapped.step, axis_name="data", in_axes=(None, 0, None))(state, split, key)
    assert_close(expected, jax.tree.map(lambda x: x[0], got))


def test_bfloat16_network_with_float32_weights(quick_jit):
    algorithm = f_distill(TinyDenoiser(dtype=jnp.bfloat16), HEAD, BASE, OPTIMIZERS, teacher=teacher())
    state = algorithm.init(jax.random.key(0), make_batch())
    after, metrics = quick_jit(algorithm.step)(state, make_batch(), jax.random.key(1))
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(after))
    assert all(np.isfinite(value) for value in metrics.values())


class Block(nn.Module):
    """A head without parameters to speak of, on images."""

    @nn.compact
    def __call__(self, features, sigma, labels=None):
        return nn.Dense(2)(features.reshape(len(features), -1))


@pytest.mark.slow
def test_a_unet_with_features_of_two_resolutions(quick_jit):
    """The networks that this is for: a U-Net, and heads on two levels of the fake score's encoder, trained with it."""
    net = EDMPrecond(
        SongUNet(4, 1, label_dim=3, model_channels=4, channel_mult=(1, 1), num_blocks=1, attn_resolutions=())
    )
    sgd = Optimizers(optax.sgd(0.1), optax.sgd(0.1))
    config = dataclasses.replace(BASE, **JOINT)
    x, sigma, labels = jnp.zeros((2, *SHAPE)), jnp.ones(2), jnp.zeros(2, jnp.int32)
    variables = quick_jit(net.init)(jax.random.key(0), x, sigma, labels)
    algorithm = f_distill(net, HEAD, config, sgd, teacher=variables, feature_levels=(0, 1))
    state = quick_jit(algorithm.init)(jax.random.key(1), make_batch())
    assert {name[:5] for name in state.head if name.startswith("head")} == {"head0", "head1"}
    after, metrics = quick_jit(algorithm.step)(state, make_batch(), jax.random.key(2))
    for name in ("student", "fake", "head"):
        assert largest_difference(getattr(after, name), getattr(state, name)) > 0, name
    assert all(np.isfinite(value) for value in metrics.values())


def test_a_head_may_look_at_the_image_and_the_teacher_needs_no_features(quick_jit):
    class Plain(TinyDenoiser):
        @nn.compact
        def __call__(self, x, sigma, class_labels=None, *, train=False):
            return nn.Dense(16)(x.reshape(len(x), -1)).reshape(x.shape)

    net = Plain()
    variables = net.init(jax.random.key(0), make_batch()["image"][0], jnp.ones(8))
    config = dataclasses.replace(BASE, head_features="own")
    algorithm = f_distill(net, Block(), config, OPTIMIZERS, teacher=variables)
    state = algorithm.init(jax.random.key(1), make_batch())
    assert jax.tree.map(jnp.shape, state.head) == {"Dense_0": {"kernel": (16, 2), "bias": (2,)}}
    after, metrics = quick_jit(algorithm.step)(state, make_batch(), jax.random.key(2))
    assert largest_difference(after.head, state.head) > 0
    assert np.isfinite(metrics["effective_sample_size"])


def test_regression_by_any_distance(quick_jit, started):
    """With nothing else it is plain regression towards the targets."""
    config = dataclasses.replace(BASE, divergence="reverse_kl", gan_weight=0.0, regression_weight=1e4)
    _, state = with_sgd(started[0])
    pairs = make_pairs()

    def absolute(x, y):
        return jnp.abs(x - y).mean(axis=(1, 2, 3))

    def loss(params):
        x = one_step(NET, {"params": params}, pairs["latents"][0], pairs["target_label"][0])
        return absolute(x, pairs["target"][0]).mean()

    sgd = Optimizers(optax.sgd(1e-5), optax.sgd(0.1), optax.sgd(0.1))
    step = quick_jit(make(config, sgd, distance=absolute).step)
    after, metrics = step(state, {**make_batch(), **pairs}, jax.random.key(2))
    value, grads = quick_jit(jax.value_and_grad(loss))(state.student)
    assert metrics["regression_loss"] == pytest.approx(float(value), rel=1e-4)
    moved = jax.tree.map(lambda new, old: (old - new) / (1e-5 * 1e4), after.student, state.student)
    for got, wanted in zip(jax.tree.leaves(moved), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(got, wanted, atol=0.03 * float(jnp.abs(wanted).max()) + 1e-4)


def test_bad_batches_and_arguments(started):
    algorithm = make()
    state, *_ = started
    with pytest.raises(ValueError, match="fake_updates = 1"):
        algorithm.step(state, make_batch(cycles=3), jax.random.key(0))
    with pytest.raises(ValueError, match="at least 2, got 1"):
        algorithm.step(state, make_batch(size=1), jax.random.key(0))
    with pytest.raises(ValueError, match="exactly one of teacher and start"):
        f_distill(NET, HEAD, BASE, OPTIMIZERS)
    with pytest.raises(ValueError, match="both"):
        f_distill(NET, HEAD, BASE, OPTIMIZERS, teacher=teacher(), start=state)
    with pytest.raises(ValueError, match="optimizers must have one for the head"):
        make(optimizers=Optimizers(optax.sgd(0.1), optax.sgd(0.1)))
    fake = Oracles(fake=lambda params, x, sigma, labels: x)
    with pytest.raises(ValueError, match="head_features must not be 'fake' when an oracle"):
        make(dataclasses.replace(BASE, head_features="fake"), oracles=fake)


def test_bad_pairs(started):
    state, *_ = started
    config = dataclasses.replace(BASE, regression_weight=1.0)
    batch, pairs = make_batch(), make_pairs()

    def trace(batch, **kwargs):
        jax.eval_shape(make(config, **kwargs).step, state, batch, jax.random.key(0))

    with pytest.raises(ValueError, match="'latents' and 'target'"):
        trace(batch)
    with pytest.raises(ValueError, match="'target_label' if and only if"):
        trace({**batch, **{name: pairs[name] for name in ("latents", "target")}})
    with pytest.raises(ValueError, match="latents and target must have one shape"):
        trace({**batch, **pairs, "target": pairs["target"][0]})
    with pytest.raises(ValueError, match="distance must return one number per example"):
        trace({**batch, **pairs}, distance=lambda x, y: jnp.mean((x - y) ** 2))


def test_labels_and_guidance_must_fit_the_network(started):
    algorithm = make()
    state, *_ = started
    with pytest.raises(ValueError, match="if and only if the network has classes"):
        algorithm.step(state, {"image": make_batch()["image"]}, jax.random.key(0))
    unconditional = TinyDenoiser(label_dim=0)
    with pytest.raises(ValueError, match="guidance_scale"):
        f_distill(unconditional, HEAD, dataclasses.replace(BASE, guidance_scale=2.0), OPTIMIZERS, teacher=teacher())


def test_label_vectors_serve_as_well_as_numbers(started, stepped, quick_jit):
    batch = make_batch()
    vectors = {**batch, "label": jax.nn.one_hot(batch["label"], 3)}
    two, _ = quick_jit(make().step)(started[0], vectors, jax.random.key(2))
    assert largest_difference(stepped()[0], two) < 1e-6


def test_the_teacher_counts_more_images_than_an_int32_holds(quick_jit):
    algorithm = edm_teacher(NET, optax.sgd(0.0), ema_halflife=5e7)
    batch = jax.tree.map(lambda x: x[0], make_batch())
    state = algorithm.init(jax.random.key(0), batch)._replace(step=jnp.array(600_000_000, jnp.int32))
    _, metrics = quick_jit(algorithm.step)(state, batch, jax.random.key(1))
    assert float(metrics["ema_decay"]) == pytest.approx(0.5 ** (8 / 5e7), rel=1e-6)


def test_student_starts_as_the_teacher_cut_to_one_step():
    state = make().init(jax.random.key(0), make_batch())
    z, labels = jax.random.normal(jax.random.key(1), (4, *SHAPE)), jnp.arange(4) % 3
    np.testing.assert_array_equal(
        one_step(NET, student_variables(state), z, labels), one_step(NET, teacher(), z, labels)
    )


def test_teacher_learns_and_its_average_is_used(quick_jit):
    algorithm = edm_teacher(NET, optax.adam(1e-2), ema_halflife=64.0, ema_rampup=None)
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, size=64)
    image = np.zeros((64, *SHAPE), np.float32) + (label - 1.0)[:, None, None, None] * 0.5
    batch = {"image": jnp.asarray(image, jnp.float32), "label": jnp.asarray(label, jnp.int32)}
    state = algorithm.init(jax.random.key(0), batch)
    step = quick_jit(algorithm.step)
    losses = []
    for i in range(200):
        state, metrics = step(state, batch, step_key(0, 0, i))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert float(metrics["ema_decay"]) == pytest.approx(0.5, abs=1e-6)
    z = jax.random.normal(jax.random.key(1), (3, *SHAPE))
    images = NET.apply(teacher_variables(state), z, jnp.ones(3), jnp.arange(3))
    means = images.mean(axis=(1, 2, 3))
    assert means[0] < means[1] < means[2]


def test_teacher_on_eight_devices_gives_the_numbers_of_one(quick_jit):
    batch = jax.tree.map(lambda x: x[0], make_batch(size=16))
    plain = edm_teacher(NET, optax.sgd(0.1))
    state = plain.init(jax.random.key(0), batch)
    expected, metrics = quick_jit(plain.step)(state, batch, jax.random.key(1))
    mapped = edm_teacher(NET, optax.sgd(0.1), axis_name="data")
    shard = jax.shard_map(mapped.step, mesh=MESH, in_specs=(P(), P("data"), P()), out_specs=(P(), P()))
    other, other_metrics = quick_jit(shard)(state, batch, jax.random.key(1))
    assert largest_difference(jax.device_get(expected), jax.device_get(other)) < 1e-5
    for name in metrics:
        np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["sigma_data", "p_std", "ema_halflife"])
def test_bad_teacher_settings(name):
    with pytest.raises(ValueError, match=name):
        edm_teacher(NET, optax.sgd(0.1), **{name: 0.0})
