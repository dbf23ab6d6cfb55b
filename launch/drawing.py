"""Drawing images from a one-step student or a sampled teacher, in chunks of one compiled program."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from poise.fdistill import FDistillConfig, many_steps, one_step
from poise.launch.networks import NetworkConfig, build_network
from poise.launch.pixels import PixelScale

Generate = Callable[[Any, jax.Array, jax.Array | None], jax.Array]
CHUNK = 2048


class Draw(NamedTuple):
    """Generated images in pixel values, the labels that were asked for, and the seconds that it took."""

    images: np.ndarray
    labels: np.ndarray | None
    seconds: float


def one_step_generate(network: NetworkConfig, sigma_init: float = FDistillConfig.sigma_init) -> Generate:
    """``(variables, latents, labels) -> images``, by one evaluation of the network."""
    net = build_network(network)
    return lambda variables, latents, labels: one_step(net, variables, latents, labels, sigma_init=sigma_init)


def many_steps_generate(network: NetworkConfig, num_steps: int) -> Generate:
    """``(variables, latents, labels) -> images``, by ``num_steps`` Heun steps: ``2 num_steps - 1`` evaluations."""
    net = build_network(network)
    return lambda variables, latents, labels: many_steps(net, variables, latents, labels, num_steps=num_steps)


def labels_in_turn(number: int, num_classes: int) -> np.ndarray | None:
    """Labels ``0 .. num_classes - 1`` over and over, so that all classes are as frequent; None without classes."""
    return np.arange(number, dtype=np.int32) % num_classes if num_classes else None


class Drawer:
    """Draws sets of images of one size with one compiled program.

    The latents of image ``i`` depend on the key and ``i`` alone, not on how the images are cut into chunks.

    Args:
      generate: ``(variables, latents, labels) -> images`` in the network's scale.
      shape: of one image.
      number: images in a set.
      labels: one for each image; None without classes.
      chunk: images per call of the program, at most.
    """

    def __init__(
        self, generate: Generate, shape: tuple[int, ...], number: int, labels: np.ndarray | None, chunk: int = CHUNK
    ):
        self._number, self._labels, self._chunk = number, labels, min(chunk, number)

        def draw(variables, key, first, part):
            def one(i):
                return jax.random.normal(jax.random.fold_in(key, i), shape)

            latents = jax.vmap(one)(first + jnp.arange(self._chunk, dtype=jnp.uint32))
            return generate(variables, latents, part)

        self._draw = jax.jit(draw)

    def chunk(self, variables: Any, key: jax.Array, first: int) -> np.ndarray:
        """The images from ``first`` on, as many as fit into one call of the program."""
        part = None
        if self._labels is not None:
            part = np.resize(self._labels[first : first + self._chunk], self._chunk)  # the last is filled up
        images = jax.device_get(self._draw(variables, key, np.uint32(first), part))
        return images[: self._number - first]

    def __call__(self, variables: Any, key: jax.Array) -> np.ndarray:
        """A set ``[number, ...]`` in the network's scale, on the host."""
        return np.concatenate([self.chunk(variables, key, i) for i in range(0, self._number, self._chunk)])


def draw_sets(
    generate: Generate,
    variables: Any,
    network: NetworkConfig,
    scale: PixelScale,
    *,
    key: jax.Array,
    number: int,
    num_sets: int,
) -> list[Draw]:
    """Draws sets of images with all classes equally often.

    Args:
      generate: ``(variables, latents, labels) -> images`` in the network's scale.
      variables: the network's variables.
      network: its settings.
      scale: what turns images into pixel values.
      key: the random key; set ``i`` uses ``fold_in(key, i)``.
      number: images per set.
      num_sets: how many sets.

    Returns:
      The sets; the time of compilation is not in their ``seconds``.
    """
    labels = labels_in_turn(number, network.num_classes)
    drawer = Drawer(generate, network.image_shape, number, labels)
    drawer.chunk(variables, key, 0)  # compiles, and touches the memory for the first time
    draws = []
    for i in range(num_sets):
        start = time.perf_counter()
        images = drawer(variables, jax.random.fold_in(key, i))
        draws.append(Draw(scale.to_pixels(images), labels, time.perf_counter() - start))
    return draws
