"""Updates of the critics: the fake score, and the head that estimates density ratios."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from poise.core import Batch, Metrics, mean_over
from poise.fdistill.distill_state import FDistillState
from poise.fdistill.losses import approx_r1, fake_score_loss, gan_losses
from poise.fdistill.networks import OWN_NOISE, Draws, Networks
from poise.fdistill.student import Generated


def critic_updates(
    networks: Networks, state: FDistillState, batch: Batch, keys: Array, generated: Generated | None = None
) -> tuple[FDistillState, Metrics]:
    """Updates fake score and head once for each of ``k`` batches, with images of the student.

    Neither the student nor the teacher changes in between, so the student's images and the teacher's features of all
    ``k`` batches come from one call each: it compiles once and fills the device. Only what is trained goes
    batch by batch.

    Args:
      networks: the networks.
      state: the state.
      batch: ``image`` ``[k, B, ...]`` and, with classes, ``label`` ``[k, B]``.
      keys: ``k`` keys.
      generated: images ``[B, ...]`` for the first of the updates; by default all are fresh.

    Returns:
      The new state and the metrics of the last update.
    """
    config = networks.config
    image, label = batch["image"], batch.get("label")
    num_updates = image.shape[0]
    both = jax.vmap(jax.random.split)(keys)
    draw = jax.vmap(lambda key, x: networks.draw(key, x, networks.critic_level))
    fake, x = _generate(networks, state, draw(both[:, 0], image), generated)
    xt = fake.noised(x)
    steps = {"x": x, "xt": xt, "sigma": fake.sigma, "labels": fake.labels}
    if networks.learns_ratio:
        real = _merge(draw(both[:, 1], image))
        real_labels = None if label is None else _label_vectors(networks, label)
        vectors = fake.labels if label is None else jax.nn.one_hot(fake.labels, networks.label_dim, dtype=x.dtype)
        judged, shown = fake, xt
        if config.gan_own_noise:
            own_keys = jax.vmap(lambda key: jax.random.fold_in(key, OWN_NOISE))(keys)
            judged = _merge(draw(own_keys, image))
            shown = judged.noised(x)
        if config.gan_same_noise:
            real = real._replace(sigma=judged.sigma, noise=judged.noise)
        noised = real.noised(_merge(image))
        seen = {"fake": (shown, judged.sigma, vectors), "real": (noised, real.sigma, real_labels)}
        if config.r1_weight > 0:
            beside = noised if config.r1_image == "noised" else _merge(image)
            seen["perturbed"] = (beside + config.r1_noise * real.latents, real.sigma, real_labels)
        # One kind of labels for the call that all share, but the head sees the student's as they were drawn.
        steps["conditions"] = {name: inputs[1:] for name, inputs in seen.items()}
        steps["conditions"]["fake"] = (judged.sigma, fake.labels)
        if config.head_features == "fake":
            steps["seen"] = seen
        else:
            features = lambda *inputs: networks.features(state, state.fake, *inputs)  # noqa: E731
            steps["features"] = _in_one_call(features, seen)
    steps = _split(steps, num_updates)
    metrics: Metrics = {}
    for i in range(num_updates):
        state, metrics = _update(networks, state, jax.tree.map(lambda leaf, i=i: leaf[i], steps))
    return state, metrics


def _generate(
    networks: Networks, state: FDistillState, draws: Draws, generated: Generated | None
) -> tuple[Draws, Array]:
    """The student's images for draws ``[k, B, ...]``, the first batch of which may be given; both merged."""

    def images(draws):
        return jax.lax.stop_gradient(networks.generate(state, state.student, draws.latents, draws.labels))

    if generated is None:
        draws = _merge(draws)
        return draws, images(draws)
    x = generated.x[None]
    if draws.sigma.shape[0] > 1:
        fresh = jax.tree.map(lambda leaf: leaf[1:], draws)
        x = jnp.concatenate([x, _split(images(_merge(fresh)), fresh.sigma.shape[0])])
    if draws.labels is not None:
        draws = draws._replace(labels=draws.labels.at[0].set(generated.labels))
    return _merge(draws), _merge(x)


def _update(networks: Networks, state: FDistillState, step: PyTree) -> tuple[FDistillState, Metrics]:
    config, optimizers, axis_name = networks.config, networks.optimizers, networks.axis_name

    def fake_objective(params):
        x0 = networks.denoise(state, params, step["xt"], step["sigma"], step["labels"])
        loss = fake_score_loss(x0, step["x"], step["sigma"], config.sigma_data, config.fake_weighting)
        return mean_over(axis_name, loss)

    def head_objective(params, fake):
        seen = step["features"] if "features" in step else _in_one_call(
            lambda *inputs: networks.features(state, fake, *inputs), step["seen"]
        )  # fmt: skip
        logits = {name: networks.judge(params, seen[name], *step["conditions"][name]) for name in seen}
        loss = config.discriminator_weight * gan_losses(logits["real"], logits["fake"]).discriminator
        if config.r1_weight > 0:
            loss = loss + config.r1_weight * approx_r1(logits["real"], logits["perturbed"])
        means = {"logit_real": logits["real"].mean(), "logit_fake": logits["fake"].mean()}
        return mean_over(axis_name, (loss, means))

    if networks.joint:

        def objective(params):
            fake_loss = fake_objective(params["fake"])
            loss, logits = head_objective(params["head"], params["fake"])
            return fake_loss + loss, {"fake_loss": fake_loss, "discriminator_loss": loss, **logits}

        params = {"fake": state.fake, "head": state.head}
        (_, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params)
        grads = mean_over(axis_name, grads)
        updates, fake_opt = optimizers.fake.update(grads, state.fake_opt, params)
        metrics |= {f"{name}_grad_norm": optax.tree.norm(grads[name]) for name in params}
        moved: PyTree = optax.apply_updates(params, updates)
        return state._replace(fake=moved["fake"], head=moved["head"], fake_opt=fake_opt), metrics

    new, metrics = state, {}
    if networks.learns_fake:
        fake_loss, fake_grads = jax.value_and_grad(fake_objective)(state.fake)
        fake_grads = mean_over(axis_name, fake_grads)
        updates, fake_opt = optimizers.fake.update(fake_grads, state.fake_opt, state.fake)
        metrics = {"fake_loss": fake_loss, "fake_grad_norm": optax.tree.norm(fake_grads)}
        new = new._replace(fake=optax.apply_updates(state.fake, updates), fake_opt=fake_opt)
    if networks.learns_ratio:
        assert optimizers.head is not None
        (loss, logits), grads = jax.value_and_grad(head_objective, has_aux=True)(state.head, state.fake)
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
