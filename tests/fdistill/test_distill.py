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

from poise.core import step_key
from poise.fdistill import (
    FDistillConfig,
    Optimizers,
    edm_coefficients,
    edm_teacher,
    f_distill,
    one_step,
    student_variables,
    teacher_variables,
)
from poise.nets import RatioHead


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
HEAD = RatioHead(hidden=(16,), label_dim=3)
BASE = FDistillConfig(sigma_min=0.02, sigma_max=5.0, fake_updates=2, gan_weight=1e-2, ema_decays=(0.9, 0.5))
OPTIMIZERS = Optimizers(optax.adam(1e-3), optax.adam(1e-3), optax.adam(1e-3))


def make_batch(size=8, cycles=2, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(size=(cycles, size, *SHAPE)) * 0.5, jnp.float32),
        "label": jnp.asarray(rng.integers(0, 3, size=(cycles, size)), jnp.int32),
    }


@functools.cache
def teacher():
    variables = NET.init(jax.random.key(5), jnp.zeros((1, *SHAPE)), jnp.ones(1), jnp.zeros(1, jnp.int32))
    leaves, treedef = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(6), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


def make(config=BASE, optimizers=OPTIMIZERS, **kwargs):
    return f_distill(NET, HEAD, config, optimizers, teacher=teacher(), **kwargs)


@functools.cache
def started(config=BASE):
    """A state whose student, fake score and head all differ from where they began, and one step after it."""
    algorithm = make(config)
    step = jax.jit(algorithm.step)
    state = algorithm.init(jax.random.key(0), make_batch())
    for i in range(3):
        state, _ = step(state, make_batch(seed=i), step_key(0, 1, i))
    after, metrics = step(state, make_batch(seed=9), step_key(0, 1, 3))
    return state, after, metrics


def largest_difference(a, b):
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_step_moves_everything_but_the_teacher():
    before, after, metrics = started()
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


def test_first_average_follows_the_student():
    before, after, _ = started()
    for average, old, decay in zip(after.ema, before.ema, BASE.ema_decays, strict=True):
        expected = jax.tree.map(lambda p, e, d=decay: d * e + (1 - d) * p, after.student, old)
        assert largest_difference(expected, average) < 1e-6
    assert largest_difference(student_variables(after)["params"], after.ema[0]) == 0
    assert largest_difference(student_variables(after, None)["params"], after.student) == 0


def test_warm_up_leaves_the_student_alone_and_hands_its_state_over():
    warm = make(update_student=False)
    state = warm.init(jax.random.key(0), make_batch())
    trained, metrics = jax.jit(warm.step)(state, make_batch(), jax.random.key(1))
    assert largest_difference(trained.student, state.student) == 0
    assert int(trained.step) == 0
    assert largest_difference(trained.fake, state.fake) > 0
    assert "matching_norm" not in metrics
    algorithm = f_distill(NET, HEAD, BASE, OPTIMIZERS, start=trained)
    assert largest_difference(algorithm.init(jax.random.key(3), make_batch()), trained) == 0


def test_reverse_kl_has_weight_one_whatever_the_head_says():
    config = dataclasses.replace(BASE, divergence="reverse_kl")
    state, *_ = started()
    other = state._replace(head=jax.tree.map(lambda p: p + 0.3, state.head))
    step = jax.jit(make(dataclasses.replace(config, gan_weight=0.0)).step)
    (one, metrics), (two, _) = (step(s, make_batch(), jax.random.key(2)) for s in (state, other))
    assert metrics["weight_min"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["weight_max"] == pytest.approx(1.0, abs=1e-6)
    assert largest_difference(one.student, two.student) < 1e-6


def test_reverse_kl_needs_no_head_and_equals_the_one_with_it():
    with_head = dataclasses.replace(BASE, divergence="reverse_kl", gan_weight=0.0)
    without = dataclasses.replace(with_head, discriminator_weight=0.0)
    state, *_ = started()
    one, metrics = jax.jit(make(with_head).step)(state, make_batch(), jax.random.key(2))
    two, fewer = jax.jit(make(without).step)(state, make_batch(), jax.random.key(2))
    assert largest_difference(one.student, two.student) < 1e-6
    assert largest_difference(one.fake, two.fake) < 1e-6
    assert largest_difference(two.head, state.head) == 0
    assert "discriminator_loss" in metrics
    assert "discriminator_loss" not in fewer


def test_divergences_differ_only_in_the_weight():
    """At the first step the heads' logits are equal for all divergences, but the students' gradients are not."""
    state, *_ = started()
    students = {}
    for name in ("reverse_kl", "jensen_shannon", "forward_kl"):
        after, metrics = jax.jit(make(dataclasses.replace(BASE, divergence=name)).step)(
            state, make_batch(), jax.random.key(2)
        )
        students[name] = (after, metrics)
    fakes = [after.bins.log_mean for after, _ in students.values()]
    assert largest_difference(fakes[0], fakes[2]) < 1e-5
    sizes = [float(metrics["effective_sample_size"]) for _, metrics in students.values()]
    assert sizes[0] == pytest.approx(8.0, abs=1e-5)
    assert sizes[0] > sizes[1] > sizes[2] >= 1


def test_steps_are_pure_functions_of_state_batch_and_key():
    state, after, metrics = started()
    again, metrics_again = jax.jit(make().step)(state, make_batch(seed=9), step_key(0, 1, 3))
    assert largest_difference(after, again) == 0
    assert all(metrics[name] == metrics_again[name] for name in metrics)


@pytest.mark.parametrize("bins", ["karras", "linear", "none"])
def test_eight_devices_give_the_numbers_of_one(bins):
    """Jit with a sharded batch, and pmap, on 8 simulated devices, with SGD so that rounding isn't amplified."""
    config = dataclasses.replace(BASE, bins=bins, fake_updates=1)
    optimizers = Optimizers(optax.sgd(0.1), optax.sgd(0.1), optax.sgd(0.1))
    state, *_ = started()
    batch, key = make_batch(size=16, cycles=1, seed=4), jax.random.key(8)
    plain = make(config, optimizers)
    state = state._replace(
        student_opt=optimizers.student.init(state.student),
        fake_opt=optimizers.fake.init(state.fake),
        head_opt=optimizers.head.init(state.head),
    )
    expected, metrics = jax.jit(plain.step)(state, batch, key)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(batch, NamedSharding(mesh, P(None, "data")))
    replicated = jax.device_put(state, NamedSharding(mesh, P()))
    got, got_metrics = jax.jit(plain.step)(replicated, sharded, jax.device_put(key, NamedSharding(mesh, P())))

    mapped = make(config, optimizers, axis_name="data")
    split = jax.tree.map(lambda x: x.reshape(1, 8, 2, *x.shape[2:]).swapaxes(0, 1), batch)
    pmapped, pmapped_metrics = jax.pmap(mapped.step, axis_name="data", in_axes=(None, 0, None))(state, split, key)
    pmapped, pmapped_metrics = jax.tree.map(lambda x: x[0], (pmapped, pmapped_metrics))

    shard = jax.shard_map(mapped.step, mesh=mesh, in_specs=(P(), P(None, "data"), P()), out_specs=(P(), P()))
    shard_mapped, shard_metrics = jax.jit(shard)(replicated, sharded, key)
    results = ((got, got_metrics), (pmapped, pmapped_metrics), (shard_mapped, shard_metrics))
    for other, other_metrics in results:
        assert largest_difference(jax.device_get(expected), jax.device_get(other)) < 1e-5
        assert metrics.keys() == other_metrics.keys()
        for name in metrics:
            np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_bfloat16_network_with_float32_weights():
    algorithm = f_distill(TinyDenoiser(dtype=jnp.bfloat16), HEAD, BASE, OPTIMIZERS, teacher=teacher())
    state = algorithm.init(jax.random.key(0), make_batch())
    after, metrics = jax.jit(algorithm.step)(state, make_batch(), jax.random.key(1))
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(after))
    assert all(np.isfinite(value) for value in metrics.values())


def test_guidance_and_r1_change_the_losses_that_they_belong_to():
    state, *_ = started()
    plain, metrics = jax.jit(make().step)(state, make_batch(), jax.random.key(2))
    _, guided = jax.jit(make(dataclasses.replace(BASE, guidance_scale=2.0)).step)(
        state, make_batch(), jax.random.key(2)
    )
    _, penal = jax.jit(make(dataclasses.replace(BASE, r1_weight=100.0)).step)(state, make_batch(), jax.random.key(2))
    assert guided["matching_norm"] != metrics["matching_norm"]
    assert guided["generator_loss"] == pytest.approx(float(metrics["generator_loss"]), rel=1e-5)
    assert penal["discriminator_loss"] > metrics["discriminator_loss"]
    assert int(plain.step) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"divergence": "jensen"}, "jensen"),
        ({"fake_updates": 0}, "fake_updates"),
        ({"num_bins": 0}, "num_bins"),
        ({"bins_decay": 1.0}, "bins_decay"),
        ({"bins": "log"}, "karras, linear, none"),
        ({"sigma_min": 9.0}, "sigma_min"),
        ({"sigma_max": float("inf")}, "sigma_max"),
        ({"ratio_clip": 0.0}, "ratio_clip"),
        ({"ratio_range": (2.0, 1.0)}, "ratio_range"),
        ({"gan_weight": -1.0}, "gan_weight"),
        ({"discriminator_weight": 0.0}, "discriminator_weight"),
        ({"min_level": 5, "max_level": 4}, "min_level"),
        ({"ema_decays": ()}, "ema_decays"),
        ({"fake_weighting": "snr"}, "fake_weighting"),
    ],
)
def test_bad_settings_name_themselves(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(BASE, **changes)


def test_a_gan_weight_of_zero_is_allowed():
    assert dataclasses.replace(BASE, gan_weight=0.0).gan_weight == 0


def test_bad_batches_and_arguments():
    algorithm = make()
    state, *_ = started()
    with pytest.raises(ValueError, match="fake_updates = 2"):
        algorithm.step(state, make_batch(cycles=3), jax.random.key(0))
    with pytest.raises(ValueError, match="at least 2, got 1"):
        algorithm.step(state, make_batch(size=1), jax.random.key(0))
    with pytest.raises(ValueError, match="exactly one of teacher and start"):
        f_distill(NET, HEAD, BASE, OPTIMIZERS)
    with pytest.raises(ValueError, match="both"):
        f_distill(NET, HEAD, BASE, OPTIMIZERS, teacher=teacher(), start=state)


def test_labels_and_guidance_must_fit_the_network():
    algorithm = make()
    state, *_ = started()
    with pytest.raises(ValueError, match="if and only if the network has classes"):
        algorithm.step(state, {"image": make_batch()["image"]}, jax.random.key(0))
    unconditional = TinyDenoiser(label_dim=0)
    with pytest.raises(ValueError, match="guidance_scale"):
        f_distill(unconditional, HEAD, dataclasses.replace(BASE, guidance_scale=2.0), OPTIMIZERS, teacher=teacher())


def test_label_vectors_serve_as_well_as_numbers():
    state, *_ = started()
    batch = make_batch()
    vectors = {**batch, "label": jax.nn.one_hot(batch["label"], 3)}
    one, two = (jax.jit(make().step)(state, b, jax.random.key(2))[0] for b in (batch, vectors))
    assert largest_difference(one, two) < 1e-6


def test_the_teacher_counts_more_images_than_an_int32_holds():
    algorithm = edm_teacher(NET, optax.sgd(0.0), ema_halflife=5e7)
    batch = jax.tree.map(lambda x: x[0], make_batch(size=8, cycles=1))
    state = algorithm.init(jax.random.key(0), batch)._replace(step=jnp.array(600_000_000, jnp.int32))
    _, metrics = jax.jit(algorithm.step)(state, batch, jax.random.key(1))
    assert float(metrics["ema_decay"]) == pytest.approx(0.5 ** (8 / 5e7), rel=1e-6)


def test_student_starts_as_the_teacher_cut_to_one_step():
    state = make().init(jax.random.key(0), make_batch())
    z, labels = jax.random.normal(jax.random.key(1), (4, *SHAPE)), jnp.arange(4) % 3
    np.testing.assert_array_equal(
        one_step(NET, student_variables(state), z, labels), one_step(NET, teacher(), z, labels)
    )


def test_teacher_learns_and_its_average_is_used():
    algorithm = edm_teacher(NET, optax.adam(1e-2), ema_halflife=64.0, ema_rampup=None)
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, size=64)
    image = np.zeros((64, *SHAPE), np.float32) + (label - 1.0)[:, None, None, None] * 0.5
    batch = {"image": jnp.asarray(image, jnp.float32), "label": jnp.asarray(label, jnp.int32)}
    state = algorithm.init(jax.random.key(0), batch)
    step = jax.jit(algorithm.step)
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


def test_teacher_on_eight_devices_gives_the_numbers_of_one():
    batch = jax.tree.map(lambda x: x[0], make_batch(size=16, cycles=1))
    plain = edm_teacher(NET, optax.sgd(0.1))
    state = plain.init(jax.random.key(0), batch)
    expected, metrics = jax.jit(plain.step)(state, batch, jax.random.key(1))
    mapped = edm_teacher(NET, optax.sgd(0.1), axis_name="data")
    split = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    got, got_metrics = jax.pmap(mapped.step, axis_name="data", in_axes=(None, 0, None))(state, split, jax.random.key(1))
    got, got_metrics = jax.tree.map(lambda x: x[0], (got, got_metrics))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shard = jax.shard_map(mapped.step, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=(P(), P()))
    for other, other_metrics in ((got, got_metrics), jax.jit(shard)(state, batch, jax.random.key(1))):
        assert largest_difference(jax.device_get(expected), jax.device_get(other)) < 1e-5
        for name in metrics:
            np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["sigma_data", "p_std", "ema_halflife"])
def test_bad_teacher_settings(name):
    with pytest.raises(ValueError, match=name):
        edm_teacher(NET, optax.sgd(0.1), **{name: 0.0})
