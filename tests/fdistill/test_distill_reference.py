"""One step of f-distill against the same step written out plainly: every tensor goes where it belongs."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.fdistill import FDistillConfig, Optimizers, f_distill
from poise.fdistill.networks import Networks
from poise.nets import MLPHead, RatioHead

CLASSES, SHAPE, BATCH, RATES = 3, (2, 3, 1), 6, (0.3, 0.02, 0.5)


class Perceptron(nn.Module):
    """A preconditioned denoiser with one hidden layer, which is also its feature."""

    label_dim: int = CLASSES

    @nn.compact
    def __call__(self, x, sigma, class_labels=None, *, train=False, feature_levels=(), features_only=False):
        flat, s = x.reshape(len(x), -1), sigma.reshape(-1, 1)
        labels = class_labels if class_labels.ndim == 2 else jax.nn.one_hot(class_labels, self.label_dim)
        seen = jnp.concatenate([flat / jnp.sqrt(s**2 + 0.25), jnp.log(s) / 4, labels], axis=1)
        features = [nn.silu(nn.Dense(12)(seen))]
        if features_only:
            return features
        out = nn.Dense(flat.shape[1])(features[0])
        denoised = (0.25 * flat + 0.5 * s * jnp.sqrt(s**2 + 0.25) * out) / (s**2 + 0.25)
        denoised = denoised.reshape(x.shape)
        return (denoised, features) if feature_levels else denoised


NET, HEAD = Perceptron(), RatioHead(hidden=(8,), label_dim=CLASSES, noise_channels=8)
OWN = MLPHead((8,), CLASSES, noise_channels=8)
BASE = FDistillConfig(
    sigma_min=0.05,
    sigma_max=4.0,
    sigma_init=3.0,
    fake_updates=2,
    num_bins=3,
    bins_decay=0.7,
    gan_weight=0.2,
    discriminator_weight=0.8,
    ema_decays=(0.9, 0.5),
)
WEIGHTS = {"forward_kl": lambda r: r, "jensen_shannon": lambda r: r / (r + 1)}


def head_of(config):
    return OWN if config.head_features == "own" else HEAD


def shaken(tree, seed, size=0.2):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf + size * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, moved)


def make_batch():
    rng = np.random.default_rng(3)
    image = jnp.asarray(0.5 * rng.normal(size=(BASE.fake_updates, BATCH, *SHAPE)), jnp.float32)
    return {"image": image, "label": jnp.asarray(rng.integers(0, CLASSES, image.shape[:2]), jnp.int32)}


@functools.cache
def started():
    """A state in which no two networks are the same, and whose bins and averages have moved."""
    x, sigma, labels = jnp.zeros((1, *SHAPE)), jnp.ones(1), jnp.zeros(1, jnp.int32)
    teacher = shaken(NET.init(jax.random.key(0), x, sigma, labels), 1)
    algorithm = f_distill(NET, HEAD, BASE, Optimizers(*map(optax.sgd, RATES)), teacher=teacher)
    state = algorithm.init(jax.random.key(2), make_batch())
    student = shaken(state.student, 3)
    return state._replace(
        student=student,
        fake=shaken(state.fake, 4),
        head=shaken(state.head, 5, 0.25),
        bins=state.bins._replace(log_mean=jnp.array([0.2, -0.3, 0.1])),
        ema=tuple(shaken(student, 6 + i) for i in range(2)),
    )


def plain_step(config, state, batch, key):
    """The algorithm, network by network and loss by loss; the random draws alone are the library's."""
    networks = Networks(NET, head_of(config), config, Optimizers(*map(optax.sgd, RATES)), (-1,), None)
    teacher, h_of, metrics = state.frozen["teacher"], WEIGHTS[config.divergence], {}
    tiny = config.weight_eps

    def denoise(params, x, sigma, labels):
        return NET.apply({"params": params}, x, sigma, labels)

    def generate(params, draws):
        return denoise(params, config.sigma_init * draws.latents, jnp.full(BATCH, config.sigma_init), draws.labels)

    def noised(x, draws):
        return x + draws.sigma[:, None, None, None] * draws.noise

    def judge(head, xt, sigma, labels, fake=state.fake):
        variables = {"teacher": teacher, "fake": {"params": fake}}
        features = xt
        if config.head_features != "own":
            features = NET.apply(
                variables[config.head_features], xt, sigma, labels, feature_levels=(-1,), features_only=True
            )
        return head_of(config).apply({"params": head}, features, sigma, labels).mean(axis=1)

    def descend(params, grads, rate):
        return jax.tree.map(lambda p, g: p - rate * g, params, grads)

    # The student: weights from the head's ratios, then one vector field pulled back through the generator.
    draws = networks.draw(jax.random.fold_in(key, 0), batch["image"][0], networks.matching_level)
    sigma, labels = draws.sigma, draws.labels
    x, pull_back = jax.vjp(lambda params: generate(params, draws), state.student)
    xt = noised(x, draws)
    d_real, d_fake = denoise(teacher["params"], xt, sigma, labels), denoise(state.fake, xt, sigma, labels)
    d_real = d_real + (config.guidance_scale - 1) * (
        d_real - denoise(teacher["params"], xt, sigma, jnp.zeros((BATCH, CLASSES)))
    )
    ratio, means = jnp.exp(judge(state.head, xt, sigma, labels)), jnp.exp(state.bins.log_mean)
    metrics["clipped"] = ((ratio < config.ratio_range[0]) | (ratio > config.ratio_range[1])).mean()
    ratio = jnp.clip(ratio, *config.ratio_range)
    power = 1 / config.rho if config.bins == "karras" else 1.0
    ends = config.sigma_min**power, config.sigma_max**power
    place = jnp.digitize(sigma**power, np.linspace(*ends, config.num_bins + 1)[1:-1])
    for b in range(config.num_bins):
        count = (place == b).sum()
        mean = jnp.where(place == b, ratio, 0).sum() / jnp.maximum(count + tiny, 1)
        metrics[f"ratio_bin_{b}"] = jnp.where(count > 0, mean, 1)
        moved = config.bins_decay * means[b] + (1 - config.bins_decay) * mean
        means = means.at[b].set(jnp.where(count > 0, moved, means[b]))
    h = h_of(ratio / (means[place] + tiny))
    h = h / (h.mean() + tiny)
    distance = jnp.abs(x - d_real).mean(axis=(1, 2, 3), keepdims=True) + 1e-6
    if config.matching_weighting == "score":
        distance = sigma[:, None, None, None] ** 2
    field = h[:, None, None, None] * (d_fake - d_real) / distance

    def generator_loss(x):
        return jax.nn.softplus(-judge(state.head, noised(x, draws), sigma, labels)).mean()

    metrics["generator_loss"], adversarial = jax.value_and_grad(generator_loss)(x)
    (student_grads,) = pull_back(field / x.size + config.gan_weight * adversarial)
    if config.regression_weight > 0:

        def regression(params):
            latents, labels = batch["latents"][0], batch["target_label"][0]
            x = denoise(params, config.sigma_init * latents, jnp.full(BATCH, config.sigma_init), labels)
            return ((x - batch["target"][0]) ** 2).mean()

        metrics["regression_loss"], grads = jax.value_and_grad(regression)(state.student)
        student_grads = jax.tree.map(lambda a, b: a + config.regression_weight * b, student_grads, grads)
    metrics["matching_norm"] = jnp.abs(field).mean()
    metrics |= {"weight_min": h.min(), "weight_max": h.max(), "effective_sample_size": h.sum() ** 2 / (h**2).sum()}
    student = descend(state.student, student_grads, RATES[0])
    ema = [
        jax.tree.map(lambda a, p, d=d: d * a + (1 - d) * p, average, student)
        for d, average in zip(config.ema_decays, state.ema, strict=True)
    ]

    # The critics, on images of the student that has just moved.
    fake, head = state.fake, state.head
    for i, (image, label) in enumerate(zip(batch["image"], batch["label"], strict=True)):
        fake_key, real_key = jax.random.split(jax.random.fold_in(key, i + 1))
        a, b = (networks.draw(k, image, networks.critic_level) for k in (fake_key, real_key))
        x = generate(student, a)
        xt, real = noised(x, a), noised(image, b)
        if config.gan_same_noise:
            b = b._replace(sigma=a.sigma, noise=a.noise)
            real = noised(image, b)
        near = (real if config.r1_image == "noised" else image) + config.r1_noise * b.latents

        def fake_loss(params, x=x, xt=xt, a=a):
            weights = {"edm": 1 / a.sigma**2 + 1 / config.sigma_data**2, "none": jnp.ones_like(a.sigma)}
            error = (denoise(params, xt, a.sigma, a.labels) - x) ** 2
            return (weights[config.fake_weighting][:, None, None, None] * error).mean()

        def head_loss(params, fake=fake, xt=xt, real=real, near=near, a=a, b=b, label=label):
            l_fake, l_real = judge(params, xt, a.sigma, a.labels, fake), judge(params, real, b.sigma, label, fake)
            penalty = ((l_real - judge(params, near, b.sigma, label, fake)) ** 2).mean()
            logistic = jnp.log1p(jnp.exp(l_fake)).mean() + jnp.log1p(jnp.exp(-l_real)).mean()
            loss = config.discriminator_weight * logistic + config.r1_weight * penalty
            return loss, {"logit_fake": l_fake.mean(), "logit_real": l_real.mean()}

        metrics["fake_loss"], fake_grads = jax.value_and_grad(fake_loss)(fake)
        (metrics["discriminator_loss"], logits), head_grads = jax.value_and_grad(head_loss, has_aux=True)(head)
        metrics |= logits
        fake, head = descend(fake, fake_grads, RATES[1]), descend(head, head_grads, RATES[2])
    for name, grads in (("student", student_grads), ("fake", fake_grads), ("head", head_grads)):
        metrics[f"{name}_grad_norm"] = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    parts = {"student": student, "fake": fake, "head": head, "bins": (jnp.log(means),), "ema": tuple(ema)}
    return parts, metrics


CASES = {
    "fastgen": {
        "divergence": "forward_kl",
        "bins": "linear",
        "bins_decay": 0.0,
        "weight_eps": 1e-3,
        "ratio_range": (0.6, 1.3),
        "fake_weighting": "none",
        "r1_weight": 5.0,
        "r1_image": "clean",
        "gan_same_noise": True,
    },
    "guidance": {"divergence": "jensen_shannon", "r1_weight": 5.0, "guidance_scale": 1.5, "head_features": "fake"},
    "own": {
        "divergence": "forward_kl",
        "head_features": "own",
        "regression_weight": 0.3,
        "matching_weighting": "score",
        "fake_min_level": 300,
        "fake_max_level": 600,
    },
}


@pytest.mark.parametrize(
    "name", ["own", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fastgen", "guidance"))]
)
def test_a_step_is_the_one_written_out_plainly(name, quick_jit):
    config = dataclasses.replace(BASE, **CASES[name])
    batch, key, head = make_batch(), jax.random.key(12), head_of(config)
    state = started()
    if config.head_features == "own":
        fresh = head.init(jax.random.key(1), batch["image"][0], jnp.ones(BATCH), batch["label"][0])
        state = state._replace(head=shaken(fresh["params"], 5), head_opt=())
        rng = np.random.default_rng(8)
        batch["latents"], batch["target"] = jnp.asarray(rng.normal(size=(2, 1, BATCH, *SHAPE)), jnp.float32)
        batch["target_label"] = batch["label"][1:]
    optimizers = Optimizers(*map(optax.sgd, RATES))
    state = state._replace(head_opt=optimizers.head.init(state.head))
    expected, metrics = quick_jit(functools.partial(plain_step, config))(state, batch, key)
    clipped = float(metrics.pop("clipped"))
    assert (0 < clipped < 1) == (name == "fastgen")  # where it matters, the bounds on the ratio bind
    step = f_distill(NET, head, config, optimizers, start=state).step
    after, got = quick_jit(step)(state, batch, key)
    compare(state, after, got, expected, metrics)


def compare(state, after, got, expected, metrics):
    assert got.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    for name, part in expected.items():
        before = jax.tree.leaves(getattr(state, name))
        ours, theirs = jax.tree.leaves(getattr(after, name)), jax.tree.leaves(part)
        for old, leaf, wanted in zip(before, ours, theirs, strict=True):
            np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-5, err_msg=name)
            assert np.abs(leaf - old).max() > 1e-4, name  # far more than the tolerance
    assert int(after.step) == 1
