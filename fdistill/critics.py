"""Updates of the critics: the fake score, and the head that estimates density ratios."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from poise.core import Batch, Metrics, mean_over
from poise.fdistill.distill_state import FDistillState
from poise.fdistill.losses import approx_r1, fake_score_loss, gan_losses
from poise.fdistill.networks import Networks


def critic_updates(
    networks: Networks, state: FDistillState, batch: Batch, keys: Array
) -> tuple[FDistillState, Metrics]:
    """Updates fake score and head once for each of ``k`` batches, with fresh images of the student.

    Neither the student nor the teacher changes in between, so the student's images and the teacher's features of all
    ``k`` batches come from one call each: it compiles once and fills the device. Only what is trained goes
    batch by batch.

    Args:
      networks: the networks.
      state: the state.
      batch: ``image`` ``[k, B, ...]`` and, with classes, ``label`` ``[k, B]``.
      keys: ``k`` keys.

    Returns:
      The new state and the metrics of the last update.
    """
    config = networks.config
    image, label = batch["image"], batch.get("label")
    num_updates = image.shape[0]
    both = jax.vmap(jax.random.split)(keys)
    draw = jax.vmap(lambda key, x: networks.draw(key, x, networks.critic_level))
    fake = _merge(draw(both[:, 0], image))
    x = jax.lax.stop_gradient(networks.generate(state, state.student, fake.latents, fake.labels))
    xt = fake.noised(x)
    steps = {"x": x, "xt": xt, "sigma": fake.sigma, "labels": fake.labels}
    if networks.learns_ratio:
        real = _merge(draw(both[:, 1], image))
        steps["real_sigma"], steps["real_labels"] = (
            real.sigma,
            None if label is None else _label_vectors(networks, label),
        )
        vectors = fake.labels if label is None else jax.nn.one_hot(fake.labels, networks.label_dim, dtype=x.dtype)
        seen = {"fake": (xt, fake.sigma, vectors)}
        noised = real.noised(_merge(image))
        seen["real"] = (noised, real.sigma, steps["real_labels"])
        if config.r1_weight > 0:
            seen["perturbed"] = (noised + config.r1_noise * real.latents, real.sigma, steps["real_labels"])
        steps["features"] = _in_one_call(lambda *inputs: networks.features(state.frozen["teacher"], *inputs), seen)
    steps = _split(steps, num_updates)
    metrics: Metrics = {}
    for i in range(num_updates):
        state, metrics = _update(networks, state, jax.tree.map(lambda leaf, i=i: leaf[i], steps))
    return state, metrics


def _update(networks: Networks, state: FDistillState, step: PyTree) -> tuple[FDistillState, Metrics]:
    config, optimizers, axis_name = networks.config, networks.optimizers, networks.axis_name

    def fake_objective(params):
        x0 = networks.denoise(state, params, step["xt"], step["sigma"], step["labels"])
        loss = fake_score_loss(x0, step["x"], step["sigma"], config.sigma_data, config.fake_weighting)
        return mean_over(axis_name, loss)

    def head_objective(params):
        def logits(name):
            kind = "" if name == "fake" else "real_"
            features, sigma, labels = step["features"][name], step[f"{kind}sigma"], step[f"{kind}labels"]
            return networks.head.apply({"params": params}, features, sigma, labels)

        real, fake = logits("real"), logits("fake")
        loss = config.discriminator_weight * gan_losses(real, fake).discriminator
        if config.r1_weight > 0:
            loss = loss + config.r1_weight * approx_r1(real, logits("perturbed"))
        return mean_over(axis_name, (loss, {"logit_real": real.mean(), "logit_fake": fake.mean()}))

    fake_loss, fake_grads = jax.value_and_grad(fake_objective)(state.fake)
    fake_grads = mean_over(axis_name, fake_grads)
    updates, fake_opt = optimizers.fake.update(fake_grads, state.fake_opt, state.fake)
    metrics = {"fake_loss": fake_loss, "fake_grad_norm": optax.tree.norm(fake_grads)}
    new = state._replace(fake=optax.apply_updates(state.fake, updates), fake_opt=fake_opt)
    if networks.learns_ratio:
        (loss, logits), grads = jax.value_and_grad(head_objective, has_aux=True)(state.head)
        grads = mean_over(axis_name, grads)
        updates, head_opt = optimizers.head.update(grads, state.head_opt, state.head)
        metrics |= {"discriminator_loss": loss, "head_grad_norm": optax.tree.norm(grads), **logits}
        new = new._replace(head=optax.apply_updates(state.head, updates), head_opt=head_opt)
    return new, metrics


def _label_vectors(networks: Networks, label: Array) -> Array:
    """Real images' labels ``[k, B]`` or ``[k, B, classes]`` as merged vectors, which one call takes for both kinds."""
    vectors = jax.nn.one_hot(label, networks.label_dim) if label.ndim == 2 else label
    return _merge(vectors)


# Batches are merged with the examples' axis outermost: where it is split over devices, each keeps what it has.


def _merge(tree: PyTree) -> PyTree:
    """``[k, B, ...]`` to ``[B * k, ...]``."""
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]), tree)


def _split(tree: PyTree, k: int) -> PyTree:
    """``[B * k, ...]`` to ``[k, B, ...]``."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, k, *leaf.shape[1:]).swapaxes(0, 1), tree)


def _in_one_call(function, inputs: dict[str, tuple[Array | None, ...]]) -> dict[str, PyTree]:
    """Calls a function of batches once for several of them."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs.values())
    outputs = _split(function(*_merge(stacked)), len(inputs))
    return {name: jax.tree.map(lambda leaf, i=i: leaf[i], outputs) for i, name in enumerate(inputs)}
