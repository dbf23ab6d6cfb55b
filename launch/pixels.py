"""Between pixel values and what a diffusion network sees."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class PixelScale(NamedTuple):
    """An affine map that gives pixels mean 0 and standard deviation ``sigma_data``.

    Attributes:
      mean: the mean pixel value of the training images.
      std: their standard deviation.
      maximum: the largest pixel value that the format allows; the smallest is 0.
      sigma_data: the standard deviation that the network is preconditioned for.
    """

    mean: float
    std: float
    maximum: int
    sigma_data: float = 0.5

    @classmethod
    def fit(cls, images: np.ndarray, maximum: int, sigma_data: float = 0.5) -> "PixelScale":
        """The scale of a set of training images."""
        return cls(float(images.mean(dtype=np.float64)), float(images.std(dtype=np.float64)), int(maximum), sigma_data)

    @classmethod
    def edm(cls, sigma_data: float = 0.5) -> "PixelScale":
        """The scale of EDM's networks: pixels 0..255 to [-1, 1]."""
        return cls(127.5, 127.5 * sigma_data, 255, sigma_data)

    def to_network(self, images: np.ndarray) -> np.ndarray:
        """Pixel values to float32 network inputs."""
        scaled = (np.asarray(images, np.float64) - self.mean) * (self.sigma_data / self.std)
        return scaled.astype(np.float32)

    def to_unit(self, x: Array) -> Array:
        """Network outputs to values in [0, 1], as jax computes them."""
        pixels = x * (self.std / self.sigma_data) + self.mean
        return jnp.clip(pixels / self.maximum, 0.0, 1.0)

    def to_pixels(self, x: np.ndarray) -> np.ndarray:
        """Network outputs to the nearest pixel values, as uint8."""
        values = np.asarray(x, np.float64) * (self.std / self.sigma_data) + self.mean
        return np.clip(np.rint(values), 0, self.maximum).astype(np.uint8)
