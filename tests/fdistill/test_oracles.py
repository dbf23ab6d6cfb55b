"""The whole pipeline against the exact gradient of the divergence, with exact and with learned parts.

Teacher and student are known in closed form, so what ``f_distill`` does to the student can be compared with the exact
gradient: with both oracles, and with either alone, the other part being what the critics' updates have learned.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.fdistill import (
    FDistillConfig,
    GaussianMixture,
    Optimizers,
    Oracles,
    divergence,
    exact_gradient,
    f_distill,
    weight_moments,
)
from poise.nets import AffineGenerator

TEACHER = GaussianMixture(jnp.array([0.4, 0.6]), jnp.array([[-1.0], [1.0]]), jnp.array([0.6, 0.5]))
NARROW = GaussianMixture(jnp.ones(1), jnp.array([[0.8]]), jnp.array([0.6]))
NAMES = ("reverse_kl", "softened_reverse_kl", "jensen_shannon", "squared_hellinger", "forward_kl", "jeffreys")
STUDENT = AffineGenerator(0.75, (0.5,))
SIGMA = 0.5


class LinearDenoiser(nn.Module):
    """What the ideal denoiser of a Gaussian is."""

    label_dim: int = 0

    @nn.compact
    def __call__(self, x, sigma, class_labels=None, *, train=False):
        return nn.Dense(1)(x)


class QuadraticHead(nn.Module):
    """What the log density ratio of two Gaussians is."""

    @nn.compact
    def __call__(self, x, sigma, labels=None):
        return nn.Dense(1)(jnp.concatenate([x, x**2], axis=1))


def settings(name, **changes):
    """One noise level, and the gradient of the divergence itself, but for the mean of the weights."""
    return FDistillConfig(
        **{
            "divergence": name,
            "levels": (SIGMA,),
            "min_level": 0,
            "max_level": 0,
            "fake_max_level": 0,
            "fake_updates": 1,
            "bins": "none",
            "ratio_range": None,
            "ratio_clip": 80.0,
            "matching_weighting": "score",
            "gan_weight": 0.0,
            "head_features": "own",
            "ema_decays": (0.0,),
            **changes,
        }
    )


def law(params):
    """The student's distribution."""
    return GaussianMixture(jnp.ones(1), params["bias"][:, None], jnp.abs(params["kernel"][0]))


def oracles(teacher, *parts):
    exact = {
        "teacher": lambda x, sigma, labels: teacher.denoise(x, sigma),
        "fake": lambda params, x, sigma, labels: law(params).denoise(x, sigma),
        "log_ratio": lambda params, x, sigma, labels: teacher.log_prob(x, sigma) - law(params).log_prob(x, sigma),
    }
    return Oracles(**{name: exact[name] for name in ("teacher", *parts)})


def make(teacher, config, parts, rate=1.0, **kwargs):
    sgd, adam = optax.sgd(rate), optax.adam(optax.cosine_decay_schedule(0.05, 700, 0.01))
    if "start" not in kwargs:
        kwargs["teacher"] = LinearDenoiser().init(jax.random.key(0), jnp.zeros((1, 1)), jnp.ones(1))
    return f_distill(
        LinearDenoiser(), QuadraticHead(), config, Optimizers(sgd, adam, adam),
        student_net=STUDENT, oracles=oracles(teacher, *parts), **kwargs,
    )  # fmt: skip


def truth(name, teacher, params):
    """The gradient with respect to bias and kernel that normalised weights give."""
    div, student = divergence(name), law(params)
    exact = exact_gradient(div, teacher, student, SIGMA)
    mean = weight_moments(div, teacher, student, SIGMA).mean
    return np.array([exact.means[0] / mean, exact.stds[0] / mean])


def gradients(algorithm, state, batch, num, quick_jit):
    """What ``num`` updates from the same state do to the student, by SGD with rate 1."""

    def one(key):
        after, _ = algorithm.step(state, batch, key)
        moved = jax.tree.map(lambda old, new: old - new, state.student, after.student)
        return jnp.stack([moved["bias"][0], moved["kernel"][0, 0]])

    return np.asarray(quick_jit(functools.partial(jax.lax.map, one))(jax.random.split(jax.random.key(7), num)))


@pytest.mark.parametrize("name", NAMES)
def test_with_both_oracles_the_update_is_the_exact_gradient(name, quick_jit):
    """In expectation: 100 updates with batches of 1000 against the quadrature, within 4 standard errors."""
    batch = {"image": jnp.zeros((1, 1000, 1))}
    algorithm = make(TEACHER, settings(name), ("fake", "log_ratio"))
    state = algorithm.init(jax.random.key(1), batch)
    got = gradients(algorithm, state, batch, 100, quick_jit)
    wanted, error = truth(name, TEACHER, state.student), got.std(axis=0, ddof=1) / np.sqrt(len(got))
    assert np.all(np.abs(got.mean(axis=0) - wanted) < 4 * error + 2e-3 * np.abs(wanted)), (got.mean(0), wanted, error)
    assert np.all(error < 0.04 * np.abs(wanted).max())
    assert np.abs(wanted).max() > 10 * error.max()  # the test can tell the gradient from none


def test_the_divergences_gradients_differ():
    """So that agreeing with each of them says something."""
    params = {"bias": jnp.array([0.5]), "kernel": jnp.array([[0.75]])}
    found = np.stack([truth(name, TEACHER, params) for name in NAMES])
    distances = np.abs(found[:, None] - found[None]).max(axis=-1)
    assert distances[~np.eye(len(NAMES), dtype=bool)].min() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("parts", [("log_ratio",), ("fake",), ()], ids=["exact-ratio", "exact-fake", "both-learned"])
def test_learned_parts_find_the_exact_gradient(parts, quick_jit):
    """After 700 updates of the critics, with parts that can represent the truth, both Gaussian."""
    images = NARROW.sample(jax.random.key(3), 200_000)
    config, batch_size = settings("forward_kl"), 2000
    warm = make(NARROW, config, parts, update_student=False)
    state = warm.init(jax.random.key(1), {"image": images[None, :2]})

    def train(state, key):
        pick, draw = jax.random.split(key)
        image = images[jax.random.randint(pick, (batch_size,), 0, len(images))]
        return warm.step(state, {"image": image[None]}, draw)[0], None

    state, _ = quick_jit(lambda state, keys: jax.lax.scan(train, state, keys))(
        state, jax.random.split(jax.random.key(4), 700)
    )
    x = jnp.linspace(-1.0, 2.0, 7)[:, None]
    student, sigma = law(state.student), jnp.full(7, SIGMA)
    if "fake" not in parts:
        learned = LinearDenoiser().apply({"params": state.fake}, x, sigma)
        np.testing.assert_allclose(learned, student.denoise(x, SIGMA), atol=0.03)
    if "log_ratio" not in parts:
        learned = QuadraticHead().apply({"params": state.head}, x, sigma)[:, 0]
        np.testing.assert_allclose(learned, NARROW.log_prob(x, SIGMA) - student.log_prob(x, SIGMA), atol=0.08)
    algorithm = make(NARROW, config, parts, start=state)
    batch = {"image": images[None, :1000]}
    got = gradients(algorithm, state, batch, 100, quick_jit)
    wanted, error = truth("forward_kl", NARROW, state.student), got.std(axis=0, ddof=1) / 10
    assert np.all(np.abs(got.mean(axis=0) - wanted) < 4 * error + 0.05 * np.abs(wanted).max()), (got.mean(0), wanted)


def test_exact_parts_are_not_trained(quick_jit):
    batch = {"image": jnp.ones((1, 8, 1))}
    algorithm = make(TEACHER, settings("forward_kl"), ("fake", "log_ratio"))
    state = algorithm.init(jax.random.key(1), batch)
    after, metrics = quick_jit(algorithm.step)(state, batch, jax.random.key(2))
    assert np.array_equal(after.fake["Dense_0"]["kernel"], state.fake["Dense_0"]["kernel"])
    assert np.array_equal(after.head["Dense_0"]["kernel"], state.head["Dense_0"]["kernel"])
    assert "fake_loss" not in metrics
    assert "discriminator_loss" not in metrics
    adversarial = make(TEACHER, settings("forward_kl", gan_weight=0.1), ("fake", "log_ratio"))
    after, metrics = quick_jit(adversarial.step)(state, batch, jax.random.key(2))
    assert not np.array_equal(after.head["Dense_0"]["kernel"], state.head["Dense_0"]["kernel"])
    assert metrics["generator_loss"] > 0


def test_a_student_may_keep_constants_of_its_own(quick_jit):
    class Fixed(nn.Module):
        label_dim: int = 0

        @nn.compact
        def __call__(self, x, sigma, class_labels=None, *, train=False):
            offset = self.variable("constants", "offset", lambda: jnp.array([3.0])).value
            return nn.Dense(1)(x / sigma[:, None]) + offset

    config, batch = settings("reverse_kl", discriminator_weight=0.0), {"image": jnp.ones((1, 8, 1))}
    algorithm = f_distill(
        LinearDenoiser(), QuadraticHead(), config, Optimizers(optax.sgd(0.1), optax.sgd(0.1)),
        teacher=LinearDenoiser().init(jax.random.key(0), jnp.zeros((1, 1)), jnp.ones(1)), student_net=Fixed(),
    )  # fmt: skip
    state = algorithm.init(jax.random.key(1), batch)
    assert state.frozen["student"] == {"constants": {"offset": jnp.array([3.0])}}
    after, _ = quick_jit(algorithm.step)(state, batch, jax.random.key(2))
    assert after.frozen["student"]["constants"]["offset"][0] == 3.0
    after, _ = quick_jit(algorithm.step)(after, batch, jax.random.key(3))  # in the first, fake score and teacher agree
    assert not np.array_equal(after.student["Dense_0"]["bias"], state.student["Dense_0"]["bias"])
