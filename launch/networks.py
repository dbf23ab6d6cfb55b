"""The denoiser of a run, from plain settings that travel with its weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from poise.nets import edm_network

PRECISIONS = ("float32", "bfloat16")


class NetworkConfig(NamedTuple):
    """Settings of a denoiser.

    Attributes:
      architecture: the arguments of :func:`poise.nets.edm_network`, as JSON holds them: ``img_resolution``,
        ``img_channels``, ``label_dim`` (0 for no classes), ``model_type``, ``sigma_data`` and the network's own.
      precision: what it computes in, ``"float32"`` or ``"bfloat16"``; parameters are float32.
    """

    architecture: Mapping[str, Any]
    precision: str = "float32"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        size = int(self.architecture["img_resolution"])
        return size, size, int(self.architecture["img_channels"])

    @property
    def num_classes(self) -> int:
        """Classes, labelled ``0 .. num_classes - 1``; 0 for an unconditional network."""
        return int(self.architecture.get("label_dim", 0))

    @property
    def sigma_data(self) -> float:
        """The data's standard deviation that the network is preconditioned for."""
        return float(self.architecture.get("sigma_data", 0.5))

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"architecture": dict(self.architecture), "precision": self.precision}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "NetworkConfig":
        """From a JSON object; lists become tuples.

        Raises:
          ValueError: if a field is missing, unknown or has a value that there is not.
        """
        if not isinstance(values, Mapping) or set(values) != set(cls._fields):
            found = sorted(values) if isinstance(values, Mapping) else values
            raise ValueError(f"network settings must be {sorted(cls._fields)}, got {found}")
        if values["precision"] not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {values['precision']!r}")
        entries = {n: tuple(value) if isinstance(value, list) else value for n, value in values["architecture"].items()}
        return cls(entries, values["precision"])


def build_network(config: NetworkConfig, remat: bool = False) -> nn.Module:
    """The network of these settings; ``remat`` recomputes its activations in the backward pass, to save memory."""
    return edm_network(config.architecture, jnp.bfloat16 if config.precision == "bfloat16" else None, remat)


def abstract_variables(config: NetworkConfig) -> PyTree:
    """Shapes and types of the network's variables, without computing any."""
    images = jnp.zeros((1, *config.image_shape))
    labels = jnp.zeros((1,), jnp.int32) if config.num_classes else None
    return jax.eval_shape(build_network(config).init, jax.random.key(0), images, jnp.ones((1,)), labels)


def check_variables(config: NetworkConfig, variables: PyTree) -> None:
    """Makes sure that variables are those of the network.

    Raises:
      ValueError: naming the first variable that is missing, unknown or of another shape, and how many there are.
    """
    expected, found = (
        {"/".join(path): tuple(leaf.shape) for path, leaf in flax.traverse_util.flatten_dict(tree).items()}
        for tree in (abstract_variables(config), variables)
    )
    wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if wrong:
        first = wrong[0]
        has, needs = (
            f"shape {list(shapes[first])}" if first in shapes else "nothing of that name"
            for shapes in (found, expected)
        )
        raise ValueError(f"{len(wrong)} variables differ; the first is {first}: it has {has}, the network {needs}")
