"""Teacher, student, fake score and head, as the updates of a distillation call them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from poise.core import fold_in_examples
from poise.fdistill.distill_config import FDistillConfig
from poise.fdistill.distill_state import FDistillState, Optimizers
from poise.fdistill.edm import sample_karras_sigma
from poise.fdistill.generator import one_step


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
      net: the denoiser of teacher, student and fake score.
      head: estimates the log density ratio from the teacher's features.
      config: the settings.
      optimizers: of student, fake score and head.
      feature_levels: the teacher's features that the head sees.
      axis_name: the mapped device axis, or None.
    """

    net: Any  # Flax modules; Any, since `apply` is annotated to return a union that no caller can use
    head: Any
    config: FDistillConfig
    optimizers: Optimizers
    feature_levels: tuple[int, ...]
    axis_name: str | None

    @property
    def label_dim(self) -> int:
        """The number of classes, 0 for none."""
        label_dim = getattr(self.net, "label_dim", None)
        if label_dim is None:  # a preconditioner takes its network's
            label_dim = getattr(getattr(self.net, "model", None), "label_dim", 0)
        return int(label_dim or 0)

    @property
    def learns_ratio(self) -> bool:
        """Whether there is a trained head."""
        return self.config.discriminator_weight > 0

    def matching_level(self, key: PRNGKeyArray, dtype: Any) -> Array:
        """A noise level of the student's loss."""
        return self._level(key, dtype, self.config.min_level, self.config.max_level)

    def critic_level(self, key: PRNGKeyArray, dtype: Any) -> Array:
        """A noise level of the critics' losses."""
        return self._level(key, dtype, 0, None)

    def _level(self, key, dtype, lowest, highest):
        config = self.config
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

    def variables(self, state: FDistillState, params: PyTree) -> dict[str, Any]:
        """A copy of the teacher's variables with other parameters."""
        return {**state.frozen["teacher"], "params": params}

    def generate(self, state: FDistillState, params: PyTree, latents: Array, labels: Array | None) -> Array:
        """The student's images."""
        return one_step(self.net, self.variables(state, params), latents, labels, sigma_init=self.config.sigma_init)

    def denoise(self, state: FDistillState, params: PyTree, x: Array, sigma: Array, labels: Array | None) -> Array:
        """The estimate of the clean images by a network with these parameters."""
        return self.net.apply(self.variables(state, params), x, sigma, labels)

    def features(self, teacher: PyTree, x: Array, sigma: Array, labels: Array | None) -> Any:
        """What the head sees of noisy images."""
        return self.net.apply(teacher, x, sigma, labels, feature_levels=self.feature_levels, features_only=True)
