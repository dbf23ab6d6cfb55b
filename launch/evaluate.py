"""Compares what a finished run draws with real images: ``python -m poise.launch.evaluate --workdir=runs/digits``.

Images are drawn, and real ones read, in batches; of their features only the moments are kept, in float64, and as many
features as precision, recall, density and coverage are computed from. ``--features=package.module:function`` takes any
feature function, from uint8 images ``[B, H, W, C]`` to ``[B, D]``; with the features of an Inception network and
``--num=50000`` the Fréchet distance is the FID-50k. ``--reference=FILE.npz`` takes precomputed statistics (arrays
``mu`` and ``sigma``) in place of real images, ``--write_reference`` and ``--write_generated`` write such files.
"""

import dataclasses
import importlib
import json
import pathlib
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from poise.launch.config import ConfigError, field, validate
from poise.launch.main import run_tool
from poise.launch.object_store import checked_address, delivered, is_address, settled

PIXELS = "pixels"


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """The settings of a comparison; every field is a flag of the same name."""

    workdir: str = field("", "folder of a finished run, or of a converted teacher")
    nfe: int = field(1, "network evaluations per image: 1 for the student, odd numbers for the teacher", minimum=1)
    num: int = field(50_000, "images that are drawn", minimum=2)
    seed: int = field(0, "seed of the latents", minimum=0, maximum=2**32 - 1)
    batch_size: int = field(256, "images at a time", minimum=1)
    data: str = field("", "real images: digits, tfds:NAME or folder:PATH; empty: the run's")
    data_dir: str = field("", "folder of prepared data sets; empty: the run's")
    image_size: int = field(0, "a folder's images are cropped and resized to it; 0: as the run had it", minimum=0)
    split: str = field("train", "which of them", choices=("train", "held_out"))
    features: str = field(PIXELS, "what is compared: pixels, or package.module:function")
    num_neighbours: int = field(5, "k of precision, recall, density and coverage", minimum=1)
    num_compared: int = field(10_000, "images of each side that these four are computed from; 0: leave out", minimum=0)
    reference: str = field("", "an .npz file with mu and sigma of the real images' features, in their place")
    write_reference: str = field("", "an .npz file to write mu and sigma of the real images' features to")
    write_generated: str = field("", "an .npz file to write mu and sigma of the drawn images' features to")
    output: str = field("", "the JSON file that is written; empty: <workdir>/evaluation_nfe<nfe>.json")
    jax_cache_dir: str = field("", "folder of JAX's compilation cache; empty: none")

    def __post_init__(self):
        """Checks each field, and those that belong together."""
        validate(self)
        if not self.workdir:
            raise ConfigError("workdir must name the folder of a finished run, got an empty text")
        object.__setattr__(self, "workdir", settled(self.workdir))
        if self.nfe % 2 == 0:
            raise ConfigError(f"nfe must be odd: n Heun steps take 2n - 1 evaluations, got {self.nfe}")
        if self.features != PIXELS and not all(self.features.partition(":")):
            raise ConfigError(f"features must be {PIXELS} or package.module:function, got {self.features!r}")
        for name in ("data_dir", "reference"):
            if is_address(getattr(self, name)):
                raise ConfigError(f"{name} must be on this machine, got the address {getattr(self, name)!r}")
        for name in ("write_reference", "write_generated", "output"):
            if is_address(getattr(self, name)):
                checked_address(getattr(self, name), name)
        if self.reference and self.write_reference:
            raise ConfigError("reference and write_reference exclude each other: the statistics are there already")


class Summary(NamedTuple):
    """What is kept of a set of images.

    Attributes:
      mean: of the features, float64 ``[D]``.
      cov: their unbiased covariance, float64 ``[D, D]``.
      features: the first ones, ``[n, D]``.
      count: how many images there were.
    """

    mean: Any
    cov: Any
    features: Any
    count: int


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the launcher and returns its exit code, see :func:`poise.launch.main.launch`."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_tool(EvaluateConfig, {}, arguments, run, prog="poise.launch.evaluate", description=__doc__ or "")


def run(config: EvaluateConfig) -> None:
    """The whole comparison, top to bottom."""
    import jax

    from poise.launch.files import atomic_path
    from poise.launch.runs import open_generator
    from poise.metrics import frechet, prdc

    found = open_generator(config.workdir, config.nfe)
    function = feature_function(config.features, found.scale.maximum)
    real = read_statistics(config.reference) if config.reference else None
    if real is None:
        real = summarize(_real_images(config, found.network), function, config.num_compared, "real images")
    drawn = summarize(_drawn_images(config, found), function, config.num_compared, "drawn images")
    if real.mean.shape != drawn.mean.shape:
        raise ConfigError(
            f"reference must have the features' dimension {len(drawn.mean)}, got {len(real.mean)} in {config.reference}"
        )
    with jax.enable_x64(True):
        report: dict[str, Any] = {"frechet": float(frechet(real.mean, real.cov, drawn.mean, drawn.cov))}
        names = ("precision", "recall", "density", "coverage")
        enough = len(real.features) > config.num_neighbours < len(drawn.features)
        if enough:
            figures = prdc(real.features, drawn.features, k=config.num_neighbours)
        report |= {name: float(getattr(figures, name)) if enough else None for name in names}
    report |= {"num_real": real.count, "num_drawn": drawn.count, "config": dataclasses.asdict(config)}
    for path, summary in ((config.write_reference, real), (config.write_generated, drawn)):
        if path:
            write_statistics(path, summary)
    place = settled(config.output or f"{config.workdir}/evaluation_nfe{config.nfe}.json")
    with delivered(place) as output, atomic_path(output) as temporary:
        temporary.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shown = {name: report[name] for name in ("frechet", *names) if report[name] is not None}
    against = config.reference or f"{real.count} real images, {config.split}"
    print("  ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    print(f"{drawn.count} drawn images against {against}, on {config.features} ({place})")


def feature_function(name: str, maximum: int) -> Callable[[Any], Any]:
    """The function that a name on the command line stands for.

    Args:
      name: ``"pixels"``, or ``"package.module:function"``.
      maximum: the largest pixel value, which ``"pixels"`` divides by.

    Returns:
      From uint8 images ``[B, H, W, C]`` to features ``[B, D]``.

    Raises:
      ConfigError: if there is no such function.
    """
    if name == PIXELS:
        return lambda images: images.reshape(len(images), -1) / maximum
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"features: {name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ConfigError(f"features: {name!r} is not a function")
    return function


def summarize(batches: Iterable[Any], function: Callable[[Any], Any], keep: int, what: str) -> Summary:
    """Moments and the first features of images that come in batches.

    Args:
      batches: uint8 images ``[B, H, W, C]``.
      function: the feature function.
      keep: how many features to keep.
      what: for the progress bar.

    Returns:
      The summary.

    Raises:
      ConfigError: if the feature function doesn't return one finite row an image.
    """
    import jax
    import numpy as np
    import tqdm

    from poise.metrics import finalize_moments, init_moments, update_moments

    running, kept, count = None, [], 0
    with tqdm.tqdm(desc=what, unit=" images", disable=None) as bar:
        for images in batches:  # drawn and judged in the precision that they always have; only the sums are in float64
            features = np.asarray(function(images), np.float64)
            if features.ndim != 2 or len(features) != len(images) or not np.isfinite(features).all():
                raise ConfigError(
                    f"features must be finite and of shape [{len(images)}, D] for {len(images)} images, "
                    f"got shape {list(features.shape)}"
                )
            with jax.enable_x64(True):
                running = init_moments(features.shape[1], np.float64) if running is None else running
                running = update_moments(running, features)
            if count < keep:
                kept.append(features[: keep - count])
            count += len(images)
            bar.update(len(images))
        if count < 2 or running is None:
            raise ConfigError(f"there must be at least 2 {what}, got {count}")
    with jax.enable_x64(True):
        mean, cov = finalize_moments(running)
    dim = len(mean)
    return Summary(np.asarray(mean), np.asarray(cov), np.concatenate([np.empty((0, dim)), *kept]), count)


def read_statistics(path: str) -> Summary:
    """Mean and covariance from an ``.npz`` file with the arrays ``mu`` and ``sigma``.

    Raises:
      ConfigError: naming the file and what is wrong with it.
    """
    import numpy as np

    try:
        with np.load(pathlib.Path(path).expanduser(), allow_pickle=False) as archive:
            mean, cov = (np.asarray(archive[name], np.float64) for name in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"reference: {path} holds no arrays mu and sigma: {' '.join(str(error).split())}") from error
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise ConfigError(
            f"reference: {path} must hold mu of shape [D] and sigma of shape [D, D], "
            f"got {list(mean.shape)} and {list(cov.shape)}"
        )
    return Summary(mean, cov, np.empty((0, len(mean))), 0)


def write_statistics(path: str, summary: Summary) -> None:
    """Writes ``mu`` and ``sigma`` as an ``.npz`` file, to a path or an address."""
    import numpy as np

    from poise.launch.files import atomic_path

    with delivered(path) as target, atomic_path(target) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=summary.mean, sigma=summary.cov)


def _real_images(config: EvaluateConfig, network: Any) -> Iterator[Any]:
    from poise.launch.image_sets import fixed_order, open_images
    from poise.launch.local_copy import local_copy
    from poise.launch.runs import read_config

    of_run = read_config(config.workdir)
    data = config.data or of_run.get("data", "")
    if not data:
        raise ConfigError(f"data must name the real images, since {config.workdir} is no run that was trained on some")
    data_dir = (
        config.data_dir
        or of_run.get("data_dir", "")
        or (local_copy(config.workdir) / "data" if data == "digits" else "")
    )
    splits = open_images(data, data_dir, config.image_size or int(of_run.get("image_size", 0)))
    images = splits.train if config.split == "train" else splits.held_out
    if images.image_shape != network.image_shape:
        raise ConfigError(f"data must hold images of shape {network.image_shape}, got {images.image_shape}")
    order = fixed_order(len(images))  # a folder's own order is by class
    for first in range(0, len(images), config.batch_size):
        yield images.read(order[first : first + config.batch_size])["image"]


def _drawn_images(config: EvaluateConfig, found: Any) -> Iterator[Any]:
    import jax

    from poise.launch.drawing import Drawer, labels_in_turn

    labels = labels_in_turn(config.num, found.network.num_classes)
    draw = Drawer(found.generate, found.network.image_shape, config.num, labels, config.batch_size)
    key = jax.random.key(config.seed)
    for first in range(0, config.num, config.batch_size):
        yield found.scale.to_pixels(draw.chunk(found.variables, key, first))


if __name__ == "__main__":
    sys.exit(main())
