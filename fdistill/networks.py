"""Teacher, student, fake score and head, as the updates of a distillation call them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from poise.core import fold_in_examples
from poise.fdistill.distill_config import FDistillConfig
from poise.fdistill.distill_state import FDistillState, Optimizers
from poise.fdistill.edm import sample_karras_sigma
from poise.fdistill.generator import one_step
from poise.fdistill.losses import guided
from poise.fdistill.oracles import Oracles

Distance = Callable[[Array, Array], Array]

OWN_NOISE = 2**30
"""Folded into an update's key it gives the noise of the adversarial losses; no example has this number."""


class Draws(NamedTuple):
    """What every example of a batch draws.

    Attributes:
      latents: what the student starts from.
      labels: uniform over the classes; None without classes.
      sigma: the noise level.
      noise: the noise.
    """

    latents: Array
    labels: Array | None
    sigma: Array
    noise: Array

    def noised(self, x: Array) -> Array:
        """The images at their noise levels."""
        return x + self.sigma.reshape(-1, *(1,) * (x.ndim - 1)) * self.noise


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of one distillation and what they are trained with.

    Attributes:
      net: the denoiser of teacher and fake score, and of the student unless that has its own.
      head: estimates the log density ratio.
      config: the settings.
      optimizers: of student, fake score and head.
      feature_levels: the features that the head sees.
      axis_name: the mapped device axis, or None.
      student_net: the student's own network, or None.
      oracles: what is known exactly.
      distance: of the regression loss, one number per example.
    """

    net: Any  # Flax modules; Any, since `apply` is annotated to return a union that no caller can use
    head: Any
    config: FDistillConfig
    optimizers: Optimizers
    feature_levels: tuple[int, ...]
    axis_name: str | None
    student_net: Any = None
    oracles: Oracles = dataclasses.field(default_factory=Oracles)
    distance: Distance | None = None

    @property
    def label_dim(self) -> int:
        """The number of classes, 0 for none."""
        label_dim = getattr(self.net, "label_dim", None)
        if label_dim is None:  # a preconditioner takes its network's
            label_dim = getattr(getattr(self.net, "model", None), "label_dim", 0)
        return int(label_dim or 0)

    @property
    def learns_fake(self) -> bool:
        """Whether there is a trained fake score."""
        return self.oracles.fake is None

    @property
    def learns_ratio(self) -> bool:
        """Whether there is a trained head."""
        return self.config.discriminator_weight > 0 and (self.oracles.log_ratio is None or self.config.gan_weight > 0)

    @property
    def joint(self) -> bool:
        """Whether fake score and head are trained as one."""
        return self.config.train_features and self.learns_ratio

    def matching_level(self, key: PRNGKeyArray, dtype: Any) -> Array:
        """A noise level of the student's loss."""
        return self._level(key, dtype, self.config.min_level, self.config.max_level)

    def critic_level(self, key: PRNGKeyArray, dtype: Any) -> Array:
        """A noise level of the critics' losses."""
        return self._level(key, dtype, self.config.fake_min_level, self.config.fake_max_level)

    def _level(self, key, dtype, lowest, highest):
        config = self.config
        if config.levels is not None:
            return jnp.asarray(config.levels, dtype)[jax.random.randint(key, (), lowest, highest + 1)]
        return sample_karras_sigma(
            key, (), config.sigma_min, config.sigma_max, config.rho, min_level=lowest, max_level=highest, dtype=dtype
        )

    def draw(self, key: PRNGKeyArray, image: Array, level: Callable[[PRNGKeyArray, Any], Array]) -> Draws:
        """Draws for a batch like ``image``; those of an example depend on the key and its place in the batch alone."""

        def one(example_key):
            z, c, s, e = jax.random.split(example_key, 4)
            return Draws(
                jax.random.normal(z, image.shape[1:], image.dtype),
                jax.random.randint(c, (), 0, self.label_dim) if self.label_dim else None,
                level(s, image.dtype),
                jax.random.normal(e, image.shape[1:], image.dtype),
            )

        return jax.vmap(one)(fold_in_examples(key, image.shape[0], self.axis_name))

    def generate(self, state: FDistillState, params: PyTree, latents: Array, labels: Array | None) -> Array:
        """The student's images."""
        constants = state.frozen.get("student", state.frozen["teacher"])
        net = self.net if self.student_net is None else self.student_net
        return one_step(net, {**constants, "params": params}, latents, labels, sigma_init=self.config.sigma_init)

    def denoise(self, state: FDistillState, fake: PyTree, x: Array, sigma: Array, labels: Array | None) -> Array:
        """The fake score's estimate of clean images."""
        return self.net.apply(self._fake(state, fake), x, sigma, labels)

    def features(self, state: FDistillState, fake: PyTree, x: Array, sigma: Array, labels: Array | None) -> Any:
        """What the head sees of noisy images."""
        if self.config.head_features == "own":
            return x
        of_teacher = self.config.head_features == "teacher"
        variables = state.frozen["teacher"] if of_teacher else self._fake(state, fake)
        return self.net.apply(variables, x, sigma, labels, feature_levels=self.feature_levels, features_only=True)

    def judge(self, head: PyTree, features: Any, sigma: Array, labels: Array | None) -> Array:
        """The head's logits."""
        return self.head.apply({"params": head}, features, sigma, labels)

    def predictions(
        self, state: FDistillState, student: PyTree, xt: Array, sigma: Array, labels: Array | None
    ) -> tuple[Array, Array, Any]:
        """Teacher's and fake score's estimates, which are constants, and what the head sees, which is not.

        A network that gives both an estimate and the features is called once.
        """
        teacher, oracles, fixed = state.frozen["teacher"], self.oracles, jax.lax.stop_gradient(xt)
        seen = self.config.head_features if self.learns_ratio else ""
        features = xt if seen == "own" else None

        def both(variables):
            return self.net.apply(variables, xt, sigma, labels, feature_levels=self.feature_levels)

        if oracles.teacher is not None:
            x0_real = oracles.teacher(fixed, sigma, labels)
            if seen == "teacher":
                features = self.features(state, state.fake, xt, sigma, labels)
        elif seen == "teacher":
            x0_real, features = both(teacher)
        else:
            x0_real = self.net.apply(teacher, fixed, sigma, labels)
        if self.config.guidance_scale != 1.0:
            nothing = jnp.zeros((xt.shape[0], self.label_dim), xt.dtype)
            ask = oracles.teacher or (lambda *inputs: self.net.apply(teacher, *inputs))
            x0_real = guided(jax.lax.stop_gradient(x0_real), ask(fixed, sigma, nothing), self.config.guidance_scale)
        if oracles.fake is not None:
            x0_fake = oracles.fake(jax.lax.stop_gradient(student), fixed, sigma, labels)
        elif seen == "fake":
            x0_fake, features = both(self._fake(state, state.fake))
        else:
            x0_fake = self.denoise(state, state.fake, fixed, sigma, labels)
        return *jax.lax.stop_gradient((x0_real, x0_fake)), features

    def _fake(self, state: FDistillState, params: PyTree) -> dict[str, Any]:
        return {**state.frozen["teacher"], "params": params}
