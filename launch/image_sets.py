"""Labelled images to train on and to compare with: in memory, in a folder, or in a TFDS data set."""

import concurrent.futures
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from poise.launch.data import DataError, epoch_order
from poise.launch.synthetic_images import NUM_HELD_OUT, NUM_TRAIN, SIZE, SyntheticImages

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# A tenth is held out, within these bounds; precision and recall take the 5 nearest neighbours.
_HELD_OUT_SHARE, _HELD_OUT_LEAST, _HELD_OUT_MOST = 10, 10, 5_000
_SPLIT_SEED = 20240  # of the one fixed shuffle before a folder's images are cut into training and held-out ones
_READERS = 16


@runtime_checkable
class ImageSet(Protocol):
    """Images of one size, with labels unless there are no classes.

    Attributes:
      image_shape: height, width and channels.
      class_names: in the order of the labels; empty without labels.
      maximum: the largest pixel value; the smallest is 0.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    maximum: int

    def __len__(self) -> int:
        """The number of images."""
        ...

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """``image`` uint8 ``[n, H, W, C]`` and, where there are classes, ``label`` int32 ``[n]``."""
        ...


class ImageSplits(NamedTuple):
    """A data set in two parts.

    Attributes:
      train: what is trained on.
      held_out: what generated images are compared with.
    """

    train: ImageSet
    held_out: ImageSet


def shape_of(image: np.ndarray) -> tuple[int, int, int]:
    """Height, width and channels of an image."""
    height, width, channels = image.shape
    return height, width, channels


class ArrayImages:
    """Images in memory.

    Args:
      images: uint8 ``[N, H, W, C]``.
      labels: integers ``[N]``; None without classes.
      class_names: in the order of the labels.
      maximum: the largest pixel value.

    Example:
      >>> import numpy as np
      >>> from poise.launch.image_sets import ArrayImages
      >>> images = ArrayImages(np.zeros((3, 8, 8, 1), np.uint8), np.array([0, 1, 1]), ("cat", "dog"))
      >>> images.read(np.array([2]))["label"]
      array([1], dtype=int32)
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray | None = None, class_names: Sequence[str] = (), maximum: int = 255
    ):
        self._images, self._labels = images, labels
        self.image_shape = shape_of(images[0])
        self.class_names, self.maximum = tuple(class_names), maximum

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The images and labels of these indices."""
        found = {"image": self._images[indices]}
        return found if self._labels is None else {**found, "label": self._labels[indices].astype(np.int32)}


class Subset:
    """Some images of a set, in a given order.

    Args:
      images: the set.
      indices: of the images that are kept.
    """

    def __init__(self, images: ImageSet, indices: np.ndarray):
        self._images, self._indices = images, indices
        self.image_shape, self.class_names, self.maximum = images.image_shape, images.class_names, images.maximum

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The images and labels of these indices."""
        return self._images.read(self._indices[indices])


class Unlabelled:
    """A set without its labels, for networks without classes.

    Args:
      images: the set.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, images: ImageSet):
        self._images = images
        self.image_shape, self.maximum = images.image_shape, images.maximum

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The images of these indices."""
        return {"image": self._images.read(indices)["image"]}


class FolderImages:
    """A folder of image files, read when they are needed.

    Labels come from ``dataset.json`` (``{"labels": [["sub/img.png", 3], ...]}``, as EDM's tools write it) if it is
    there, else from the names of the subfolders that hold the images; without either there are no classes.

    Args:
      folder: searched with its subfolders for PNG, JPEG, WebP and BMP files, in the order of their paths.
      image_size: images are cropped to their centred square and resized to this height and width; 0: they must be
        square and of one size already.

    Raises:
      DataError: naming the folder or file that can't be used; a damaged file is named when it is read.
    """

    maximum: int = 255

    def __init__(self, folder: str | os.PathLike[str], image_size: int = 0):
        root = pathlib.Path(folder).expanduser()
        if not root.is_dir():
            raise DataError(f"there is no folder {root}")
        self._files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self._files:
            raise DataError(f"the folder {root} holds no images ({', '.join(SUFFIXES)})")
        self._labels, self.class_names = _labels(root, self._files)
        self._size = image_size
        self.image_shape: tuple[int, int, int] = (0, 0, 0)  # until the first image is read
        self.image_shape = shape_of(self._load(self._files[0]))

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The images and labels of these indices."""
        files = [self._files[i] for i in indices]
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            images = np.stack(list(pool.map(self._load, files)))
        return {"image": images} if self._labels is None else {"image": images, "label": self._labels[indices]}

    def _load(self, path: pathlib.Path) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise DataError(f"the image {path} has more than 8 bits a pixel (mode {image.mode}): convert it")
                grey = image.mode in ("1", "L", "LA") and self.image_shape[2] != 3
                image = image.convert("L" if grey else "RGB")
                if self._size:
                    side = min(image.size)
                    left, top = (image.width - side) // 2, (image.height - side) // 2
                    image = image.crop((left, top, left + side, top + side))
                    image = image.resize((self._size, self._size), Image.Resampling.LANCZOS)
                pixels = np.asarray(image, np.uint8)
        except DataError:
            raise
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"the image {path} cannot be read: {' '.join(str(error).split())}") from error
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if pixels.shape[0] != pixels.shape[1]:
            raise DataError(f"the image {path} is not square (it has {pixels.shape[1]}x{pixels.shape[0]} pixels); "
                            "--image_size=N crops and resizes all images")  # fmt: skip
        if self.image_shape[0] and pixels.shape[2] != self.image_shape[2]:
            raise DataError(
                f"the image {path} is in colour, the first of its folder is grey: make all of them one kind"
            )
        if self.image_shape[0] and pixels.shape != self.image_shape:
            raise DataError(
                f"the image {path} has shape {list(pixels.shape)}, the first of its folder has "
                f"{list(self.image_shape)}; --image_size=N crops and resizes all images"
            )
        return pixels


def _labels(root: pathlib.Path, files: Sequence[pathlib.Path]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    names = [path.relative_to(root).as_posix() for path in files]
    listed = root / "dataset.json"
    if listed.is_file():
        try:
            entries = json.loads(listed.read_text(encoding="utf-8")).get("labels")
            table = None if entries is None else {str(name): int(label) for name, label in entries}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{listed} is no list of labels: {error}") from error
        if table is None:
            return None, ()  # no classes, whatever the subfolders are called
        if missing := [name for name in names if name not in table]:
            raise DataError(f"{listed} has no label for {len(missing)} images, the first is {missing[0]}")
        labels = np.array([table[name] for name in names], np.int32)
        if labels.min() < 0:
            raise DataError(f"{listed} has the label {labels.min()}; labels count from 0")
        return labels, tuple(str(i) for i in range(int(labels.max()) + 1))
    parents = [name.rpartition("/")[0] for name in names]
    classes = sorted(set(parents), key=lambda name: (_natural(name), name))
    if len(classes) < 2 or "" in classes:
        return None, ()
    numbers = {name: i for i, name in enumerate(classes)}
    return np.array([numbers[name] for name in parents], np.int32), tuple(classes)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts ``class2`` before ``class10``."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


class TfdsImages:
    """One split of a TFDS data set that is prepared in a format with random access (array_record).

    Args:
      name: the data set, such as ``"cifar10"``.
      split: such as ``"train"``.
      data_dir: TFDS's folder; empty for its default.

    Raises:
      DataError: if it is not there, and how to prepare it.
    """

    maximum: int = 255

    def __init__(self, name: str, split: str, data_dir: str | os.PathLike[str] = ""):
        import tensorflow_datasets as tfds

        try:
            builder: Any = tfds.builder(name, data_dir=str(data_dir) or None, file_format="array_record")
            self._source: Any = builder.as_data_source(split)
            features: Any = builder.info.features
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"the TFDS data set {name!r}, split {split!r}, cannot be opened ({reason[:200]}); prepare it with "
                f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
            ) from error
        if "image" not in features:
            raise DataError(f"the TFDS data set {name!r} has no feature 'image'; it has {', '.join(features)}")
        self.class_names = tuple(features["label"].names) if "label" in features else ()
        self.image_shape = shape_of(self._image(self._source[0]))

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The images and labels of these indices."""
        rows = self._source.__getitems__([int(i) for i in indices])
        images = {"image": np.stack([self._image(row) for row in rows])}
        if not self.class_names:
            return images
        return {**images, "label": np.array([row["label"] for row in rows], np.int32)}

    def _image(self, row: Any) -> np.ndarray:
        image = np.asarray(row["image"])
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != image.shape[1]:
            raise DataError(f"images must be square and uint8, got {image.dtype} of shape {list(image.shape)}")
        return image


def first_images(images: ImageSet, number: int) -> dict[str, np.ndarray]:
    """Up to ``number`` images of a set, by a fixed shuffle; the digits, which are shuffled already, in their order."""
    if isinstance(images, ArrayImages) and len(images) <= number:
        return images.read(np.arange(len(images)))
    return images.read(fixed_order(len(images))[:number])


def fixed_order(number: int) -> np.ndarray:
    """One fixed shuffle of this many examples, so that the first of them are no special ones."""
    return epoch_order(_SPLIT_SEED, 0, number)


def open_images(data: str, data_dir: str | os.PathLike[str], image_size: int = 0) -> ImageSplits:
    """Opens a data set by its name on the command line.

    Args:
      data: ``"digits"`` (scikit-learn's, prepared in ``data_dir``), ``"synthetic"`` (noise, see
        :class:`poise.launch.synthetic_images.SyntheticImages`), ``"tfds:NAME"`` (splits ``train`` and ``test`` or
        ``validation``), or ``"folder:PATH"`` (``PATH/train`` and ``PATH/test`` if both are there, else a tenth of the
        images, at most 5,000, is held out by one fixed shuffle).
      data_dir: where data sets are prepared and looked for.
      image_size: see :class:`FolderImages`; 0 for the images' own size, of synthetic ones 32.

    Returns:
      The training and held-out images.

    Raises:
      DataError: if it cannot be opened.
    """
    kind, _, place = data.partition(":")
    if kind == "digits":
        from poise.launch.digits import CLASS_NAMES, MAXIMUM, load_digits

        digits = load_digits(data_dir)
        train, test = (
            ArrayImages(digits[split]["image"], digits[split]["label"], CLASS_NAMES, MAXIMUM)
            for split in ("train", "test")
        )
        return ImageSplits(train, test)
    if kind == "synthetic":
        size = image_size or SIZE
        return ImageSplits(SyntheticImages(NUM_TRAIN, size, seed=0), SyntheticImages(NUM_HELD_OUT, size, seed=1))
    if kind == "tfds":
        train = TfdsImages(place, "train", data_dir)
        try:
            return ImageSplits(train, TfdsImages(place, "test", data_dir))
        except DataError:
            return ImageSplits(train, TfdsImages(place, "validation", data_dir))
    if kind == "folder":
        root = pathlib.Path(place).expanduser()
        if (root / "train").is_dir() and (root / "test").is_dir():
            train, test = (FolderImages(root / split, image_size) for split in ("train", "test"))
            for what in ("image_shape", "class_names"):
                if getattr(train, what) != getattr(test, what):
                    raise DataError(f"{root}/train and {root}/test differ in their {what.replace('_', ' ')}: "
                                    f"{getattr(train, what)} and {getattr(test, what)}")  # fmt: skip
            for split, part in (("train", train), ("test", test)):
                if len(part) < _HELD_OUT_LEAST:
                    raise DataError(f"{root}/{split} must hold at least {_HELD_OUT_LEAST} images, got {len(part)}")
            return ImageSplits(train, test)
        images = FolderImages(root, image_size)
        if len(images) < 2 * _HELD_OUT_LEAST:
            raise DataError(f"the folder {root} must hold at least {2 * _HELD_OUT_LEAST} images, got {len(images)}")
        order = fixed_order(len(images))
        held_out = min(max(len(images) // _HELD_OUT_SHARE, _HELD_OUT_LEAST), _HELD_OUT_MOST)
        return ImageSplits(Subset(images, np.sort(order[held_out:])), Subset(images, np.sort(order[:held_out])))
    raise DataError(f"data must be digits, synthetic, tfds:NAME or folder:PATH, got {data!r}")
