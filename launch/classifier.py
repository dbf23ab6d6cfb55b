"""A vision transformer that classifies images: its data, its training in float, its accuracy and its speed."""

import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from poise.core import Algorithm, in_microbatches, mean_over
from poise.launch.classifier_config import ClassifierConfig
from poise.launch.data import DataError, Shuffled
from poise.launch.files import atomic_path
from poise.launch.image_sets import first_images, open_images
from poise.launch.phase import Phase
from poise.nets import VisionTransformer

_IMAGES_AT_ONCE = 256  # of an evaluation
_REPEATS = 20  # of a timing


class Images(NamedTuple):
    """What a classifier learns and is judged by; pixels are in [-1, 1].

    Attributes:
      train: batches ``{"image": [B, H, W, C], "label": [B]}``.
      calibration: reads training images by their number.
      images: held-out ones.
      labels: theirs.
      num_classes: the labels' number.
    """

    train: Shuffled
    calibration: Callable[[int], np.ndarray]
    images: np.ndarray
    labels: np.ndarray
    num_classes: int


class ClassifierState(NamedTuple):
    """What the training of a float classifier keeps.

    Attributes:
      variables: the network's, ``{"params": ...}``.
      optimizer: the optimizer's state.
    """

    variables: PyTree
    optimizer: optax.OptState


def open_classes(config: ClassifierConfig, data_dir: str | pathlib.Path) -> Images:
    """Opens the labelled images that the flags name.

    Args:
      config: the run's settings.
      data_dir: where data sets are prepared and looked for.

    Returns:
      Training batches and held-out images.

    Raises:
      DataError: if they cannot be read, have no classes, or the patches don't tile them.
    """
    splits = open_images(config.data, data_dir, config.image_size)
    shape, names = splits.train.image_shape, splits.train.class_names
    if not names:
        raise DataError(f"data={config.data} has no classes to learn")
    if shape[0] % config.patch_size or shape[1] % config.patch_size:
        raise DataError(f"patch_size must divide the sides of images of {list(shape)}, got {config.patch_size}")
    half = splits.train.maximum / 2

    def scaled(pixels: np.ndarray) -> np.ndarray:
        return (pixels / half - 1).astype(np.float32)

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        found = splits.train.read(indices)
        return {"image": scaled(found["image"]), "label": found["label"]}

    held_out = first_images(splits.held_out, config.eval_images)
    held_out = {name: array[: config.eval_images] for name, array in held_out.items()}
    return Images(
        Shuffled(read, len(splits.train), config.batch_size, config.seed),
        lambda number: scaled(first_images(splits.train, number)["image"][:number]),
        scaled(held_out["image"]),
        held_out["label"],
        len(names),
    )


def model_of(config: ClassifierConfig, num_classes: int, **options: Any) -> VisionTransformer:
    """The network in float; ``options`` are other attributes."""
    return VisionTransformer(
        num_classes,
        patch_size=config.patch_size,
        width=config.width,
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        mlp_ratio=config.mlp_ratio,
        **options,
    )


def adamw(rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """AdamW with clipping, whose decay is that of kernels alone."""

    def kernels(tree: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path[-1:]) == "['kernel']", tree)

    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=weight_decay, mask=kernels))


def cross_entropy(logits: Array, labels: Array) -> Array:
    """The mean cross-entropy, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def classifier(
    model: VisionTransformer,
    optimizer: optax.GradientTransformation,
    axis_name: str | None = None,
    num_microbatches: int = 1,
) -> Algorithm:
    """Training of both heads by the labels of ``{"image", "label"}``.

    Args:
      model: the network.
      optimizer: of its variables.
      axis_name: of the devices that share a batch under pmap.
      num_microbatches: parts of a batch that are computed one after the other.

    Returns:
      The algorithm; its metrics are ``loss``, in nats, ``accuracy`` and ``grad_norm``.
    """
    forward = in_microbatches(model.apply, num_microbatches)

    def init(key: Array, batch: dict[str, Array]) -> ClassifierState:
        variables = model.init(key, batch["image"][:1])
        return ClassifierState(variables, optimizer.init(variables))

    def step(state: ClassifierState, batch: dict[str, Array], key: Array) -> tuple[ClassifierState, dict[str, Array]]:
        del key  # nothing is drawn

        def loss_fn(variables: PyTree) -> tuple[Array, Array]:
            head, distilled = cast(tuple[Array, Array], forward(variables, batch["image"], train=True))
            right = (head + distilled).argmax(-1) == batch["label"]
            return (cross_entropy(head, batch["label"]) + cross_entropy(distilled, batch["label"])) / 2, right.mean()

        (loss, accuracy), grads = mean_over(axis_name, jax.value_and_grad(loss_fn, has_aux=True)(state.variables))
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.variables)
        new = ClassifierState(optax.apply_updates(state.variables, updates), optimizer_state)
        return new, {"loss": loss, "accuracy": accuracy, "grad_norm": optax.tree.norm(grads)}

    return Algorithm(init, step)


def float_phase(config: ClassifierConfig, images: Images) -> Phase:
    """The phase ``float``: the network without any quantization."""
    model = model_of(config, images.num_classes)
    rate = optax.cosine_decay_schedule(config.float_learning_rate, config.float_steps)
    optimizer = adamw(rate, config.weight_decay)
    forward = jax.jit(model.apply)

    def make_algorithm(previous: Any, axis_name: str | None = None) -> Algorithm:
        del previous
        return classifier(model, optimizer, axis_name, config.microbatches)

    def evaluate(state: ClassifierState, key: Array) -> dict[str, float]:
        del key
        logits = logits_of(lambda x: forward(state.variables, x), images.images)
        return {"accuracy": accuracy_of(logits, images.labels)}

    return Phase("float", make_algorithm, images.train, config.float_steps, evaluate=evaluate)


def logits_of(forward: Callable[[np.ndarray], Array], images: np.ndarray) -> np.ndarray:
    """The logits of any number of images, in batches of one size."""
    rows = min(len(images), _IMAGES_AT_ONCE)
    padded = np.concatenate([images, np.repeat(images[:1], -len(images) % rows, 0)])
    parts = [np.asarray(forward(part)) for part in np.split(padded, len(padded) // rows)]
    return np.concatenate(parts)[: len(images)]


def accuracy_of(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of labels that have the largest logit."""
    return float((logits.argmax(-1) == labels).mean())


def squared_error(logits: np.ndarray, target: np.ndarray) -> float:
    """The mean squared difference of logits."""
    return float(np.mean(np.square(logits.astype(np.float64) - target.astype(np.float64))))


def milliseconds(forward: Callable[[np.ndarray], Array], images: np.ndarray, number: int) -> float:
    """The median time of a compiled function on a batch of ``number`` images, after one call that isn't counted."""
    batch = np.resize(images, (number, *images.shape[1:]))
    batch = jax.block_until_ready(jnp.asarray(batch))
    jax.block_until_ready(forward(batch))
    taken = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(forward(batch))
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken)


def save_floats(path: pathlib.Path, params: PyTree) -> None:
    """Writes float parameters as safetensors, arrays by path, whole or not at all."""
    from flax import traverse_util
    from safetensors.numpy import save_file

    flat = traverse_util.flatten_dict(params, sep="/")
    with atomic_path(path) as temporary:
        save_file({name: np.ascontiguousarray(jax.device_get(leaf)) for name, leaf in flat.items()}, temporary)
