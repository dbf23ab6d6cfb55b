"""The preset of DMD2 against DMD2 written out plainly: two iterations of it, optimizers included."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.fdistill import (
    FDistillState,
    GaussianMixture,
    Oracles,
    f_distill,
    karras_levels,
    matching_gradient,
    preset,
    preset_optimizers,
    surrogate_loss,
)
from poise.fdistill.networks import OWN_NOISE, Networks
from poise.nets import MLP, EDMPrecond, RatioHead

CLASSES, SHAPE, BATCH, RATE = 3, (2, 3, 1), 6, 2e-3
NET = EDMPrecond(MLP((10,), CLASSES, noise_channels=4))
HEAD = RatioHead((8,), CLASSES, noise_channels=4)
CONFIG = preset("dmd2", fake_updates=2)


def shaken(tree, seed, size=0.2):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(size * rng.normal(size=leaf.shape), leaf.dtype), tree)


def make_batch():
    rng = np.random.default_rng(3)
    image = jnp.asarray(0.5 * rng.normal(size=(2, BATCH, *SHAPE)))
    return {"image": image, "label": jnp.asarray(rng.integers(0, CLASSES, image.shape[:2]), jnp.int32)}


def first_adamw_step(params, grads):
    """Clipping to the norm 10 over all of the parameters, then AdamW from rest."""
    norm = math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * min(1.0, 10.0 / norm), grads)
    return jax.tree.map(lambda p, g: p - RATE * (g / (jnp.abs(g) + 1e-8) + 0.01 * p), params, grads), norm


def plain_gradients(state, batch, key):
    """The three gradients of an iteration that trains the generator and of the next one, with SGD in between."""
    networks = Networks(NET, HEAD, CONFIG, preset_optimizers("dmd2"), (-1,), None)

    def net(params, x, sigma, labels, **kwargs):
        return NET.apply({"params": params}, x, sigma, labels, **kwargs)

    def noised(x, draws):
        return x + draws.sigma[:, None, None, None] * draws.noise

    def classify(guidance, x, draws, labels):
        seen = net(guidance["fake"], noised(x, draws), draws.sigma, labels, feature_levels=(-1,), features_only=True)
        return HEAD.apply({"params": guidance["head"]}, seen, draws.sigma, labels)

    def generate(params, draws):
        return net(params, 80.0 * draws.latents, jnp.full(BATCH, 80.0), draws.labels)

    def draw(key, level):
        return networks.draw(key, batch["image"][0], level)

    guidance = {"fake": state.fake, "head": state.head}
    first = jax.random.fold_in(key, 0)
    dm = draw(first, networks.matching_level)
    cls = draw(jax.random.fold_in(first, OWN_NOISE), networks.critic_level)

    def generator_loss(params):
        x = generate(params, dm)
        real, fake = (
            net(p, noised(x, dm), dm.sigma, dm.labels) for p in (state.frozen["teacher"]["params"], state.fake)
        )
        p_real, p_fake = x - real, x - fake
        grad = jnp.nan_to_num((p_real - p_fake) / jnp.abs(p_real).mean(axis=(1, 2, 3), keepdims=True))
        target = jax.lax.stop_gradient(x - grad)
        realism = classify(guidance, x, cls, dm.labels)
        return 0.5 * ((x - target) ** 2).mean() + 3e-3 * jax.nn.softplus(-realism).mean()

    generator_grads = jax.grad(generator_loss)(state.student)
    x, labels = generate(state.student, dm), dm.labels  # of the generator as it was

    def guidance_grads(guidance, i, x, labels):
        fake_key, real_key = jax.random.split(jax.random.fold_in(key, i + 1))
        a, b = draw(fake_key, networks.critic_level), draw(real_key, networks.critic_level)
        c = draw(jax.random.fold_in(jax.random.fold_in(key, i + 1), OWN_NOISE), networks.critic_level)

        def loss(guidance):
            error = (net(guidance["fake"], noised(x, a), a.sigma, labels) - x) ** 2
            loss_fake = ((a.sigma**-2 + 1 / 0.5**2)[:, None, None, None] * error).mean()
            on_fake = classify(guidance, x, c, labels)
            on_real = classify(guidance, batch["image"][i], b, batch["label"][i])
            loss_cls = (jax.nn.softplus(on_fake) + jax.nn.softplus(-on_real)).mean()
            return loss_fake + 1e-2 * loss_cls, {"fake_loss": loss_fake, "discriminator_loss": 1e-2 * loss_cls}

        return jax.grad(loss, has_aux=True)(guidance)

    def fresh(student):
        draws = draw(jax.random.split(jax.random.fold_in(key, 2))[0], networks.critic_level)
        return generate(student, draws), draws.labels

    return generator_grads, guidance_grads, (x, labels), fresh


def plain_step(state, batch, key, descend):
    """A DMD2 iteration that trains generator and guidance, and one that trains the guidance alone."""
    generator_grads, guidance_grads, generated, fresh = plain_gradients(state, batch, key)
    student = descend(state.student, generator_grads)
    guidance = {"fake": state.fake, "head": state.head}
    for i in range(2):
        grads, metrics = guidance_grads(guidance, i, *(generated if i == 0 else fresh(student)))
        guidance = descend(guidance, grads)
    return {"student": student, **guidance}, metrics


@pytest.mark.slow
def test_a_cycle_is_two_iterations_of_dmd2(quick_jit):
    """In float64, and with SGD, which shows the gradients themselves."""
    with jax.enable_x64():
        sgd = optax.sgd(1e-2)
        example = (jnp.zeros((1, *SHAPE)), jnp.ones(1), jnp.zeros(1, jnp.int32))
        variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), NET.init(jax.random.key(0), *example))
        optimizers = preset_optimizers("dmd2")._replace(student=sgd, fake=sgd)
        algorithm = f_distill(NET, HEAD, CONFIG, optimizers, teacher=shaken(variables, 1))
        batch, key = make_batch(), jax.random.key(12)
        state = algorithm.init(jax.random.key(2), batch)
        head = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state.head)
        state = state._replace(student=shaken(state.student, 3), fake=shaken(state.fake, 4), head=shaken(head, 5, 0.25))

        def descend(params, grads):
            return jax.tree.map(lambda p, g: p - 1e-2 * g, params, grads)

        expected, metrics = quick_jit(functools.partial(plain_step, descend=descend))(state, batch, key)
        after, got = quick_jit(algorithm.step)(state, batch, key)
        for name, value in metrics.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-9, err_msg=name)
        assert float(got["weight_min"]) == float(got["weight_max"]) == 1.0
        for name, part in expected.items():
            leaves = map(jax.tree.leaves, (getattr(state, name), getattr(after, name), part))
            for old, leaf, wanted in zip(*leaves, strict=True):
                size = float(jnp.abs(wanted - old).max())
                assert size > 1e-7, name  # far more than rounding
                np.testing.assert_allclose(leaf - old, wanted - old, atol=1e-7 * size, err_msg=name)
        assert all(map(np.array_equal, jax.tree.leaves(after.ema[0]), jax.tree.leaves(after.student)))


def test_the_first_step_of_its_optimizers_is_adamw_with_joint_clipping():
    params = {"fake": shaken({"w": jnp.zeros((3, 2))}, 0), "head": shaken({"w": jnp.zeros(4)}, 1)}
    for size in (0.3, 30.0):  # below and above the norm 10
        grads = shaken(jax.tree.map(jnp.zeros_like, params), 2, size)
        optimizer = preset_optimizers("dmd2", learning_rate=RATE, warmup_steps=0).fake
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        expected, norm = first_adamw_step(params, grads)
        assert (norm > 10) == (size == 30.0)
        for got, wanted in zip(*map(jax.tree.leaves, (optax.apply_updates(params, updates), expected)), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "dmd2_dm_loss*.npz")
def test_official_matching_loss_through_oracles(golden_file):
    """The official code's exact denoisers in the place of the networks, at its noise."""
    data = np.load(golden_file)
    with jax.enable_x64():
        mixtures = [
            GaussianMixture(*(jnp.asarray(data[f"{kind}_{part}"]) for part in ("w", "mu", "std")))
            for kind in ("real", "fake")
        ]
        x, noise = jnp.asarray(data["latents"]), jnp.asarray(data["noise"])
        sigma = jnp.asarray(data["karras_sigmas"][data["timesteps"]])

        def denoise(mixture, xt, sigma):
            return mixture.denoise(xt.reshape(len(xt), -1), sigma).reshape(xt.shape)

        oracles = Oracles(
            teacher=lambda xt, sigma, labels: denoise(mixtures[0], xt, sigma),
            fake=lambda params, xt, sigma, labels: denoise(mixtures[1], xt, sigma),
        )
        settings = dataclasses.replace(CONFIG, head_features="own", train_features=False)
        networks = Networks(NET, HEAD, settings, preset_optimizers("dmd2"), (-1,), None, None, oracles)
        state = FDistillState({"teacher": {}}, *[()] * 9)
        xt = x + sigma[:, None, None, None] * noise
        x0_real, x0_fake, _ = networks.predictions(state, {}, xt, sigma, None)
        np.testing.assert_allclose(x0_real, data["x0_real"], rtol=1e-9)
        np.testing.assert_allclose(x0_fake, data["x0_fake"], rtol=1e-9)
        grad = matching_gradient(x, x0_real, x0_fake, eps=CONFIG.matching_eps)
        loss, gradient = jax.value_and_grad(surrogate_loss)(x, grad)
        np.testing.assert_allclose(grad, data["grad"], rtol=1e-9)
        np.testing.assert_allclose(loss, data["loss"], rtol=1e-9)
        np.testing.assert_allclose(gradient, data["dloss_dlatents"], rtol=1e-9)
        levels = np.array(karras_levels(dtype=jnp.float64))
        np.testing.assert_allclose(levels, data["karras_sigmas"], rtol=1e-6)  # which were made in float32
        assert (CONFIG.min_level, CONFIG.max_level) == (int(data["min_step"]), int(data["max_step"]))
