"""The handwritten digits that scikit-learn ships: 1,797 real images of 8x8 pixels, as a TFDS data set."""

import contextlib
import fcntl
import io
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from poise.launch.data import DataError, epoch_order

CLASS_NAMES = tuple("0123456789")
MAXIMUM = 16
NUM_EXAMPLES = {"train": 1297, "test": 500}
IMAGE_SHAPE = (8, 8, 1)
_SPLIT_SEED = 20240  # of the one fixed shuffle before the cut into train and test


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Images ``[8, 8, 1]`` of uint8 in 0..16 and labels 0..9; nothing is downloaded, scikit-learn holds the data.

    The order is one fixed shuffle (raw bits of Philox, key (20240, 0), sorted); the first 1,297 are ``train``, the
    last 500 ``test``. Classes are as frequent in each as the shuffle makes them.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "scikit-learn's digits, cut by one fixed shuffle."}  # noqa: RUF012

    code_path = (
        None  # TFDS would look for download checksums beside this file, and can't find files in namespace packages
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="scikit-learn's handwritten digits.",
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            # A plain tensor: TFDS can't encode its Image feature without TensorFlow.
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=IMAGE_SHAPE, dtype=np.uint8),
                    "label": tfds.features.ClassLabel(names=list(CLASS_NAMES)),
                }
            ),
            disable_shuffling=True,  # the order below is the order on disk
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in NUM_EXAMPLES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits as sklearn_digits

        digits = sklearn_digits()
        order = epoch_order(_SPLIT_SEED, 0, len(digits.target))
        first = NUM_EXAMPLES["train"]
        chosen = order[:first] if split == "train" else order[first:]
        for position, index in enumerate(chosen):
            image = digits.images[index].astype(np.uint8)[..., None]
            yield position, {"image": image, "label": int(digits.target[index])}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS prints notices and progress bars, which say nothing about a set that is made in a second."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _builder(data_dir: pathlib.Path) -> Any:  # TFDS's own annotations lose its methods' arguments
    return Digits(data_dir=str(data_dir), file_format="array_record")


def _read(data_dir: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """Both splits as arrays, checked; any exception means damage. The record format checks its own hashes."""
    with _quiet():
        builder = _builder(data_dir)
        arrays = {}
        for split, count in NUM_EXAMPLES.items():
            source = builder.as_data_source(split)
            if len(source) != count:
                raise ValueError(f"split {split!r} holds {len(source)} examples, not {count}")
            rows = source.__getitems__(range(count))
            image = np.stack([row["image"] for row in rows])
            label = np.array([row["label"] for row in rows], np.int32)
            if image.shape != (count, *IMAGE_SHAPE) or image.dtype != np.uint8 or image.max() > MAXIMUM:
                raise ValueError(f"split {split!r} holds images that are none of 8x8 pixels in 0..{MAXIMUM}")
            if not ((label >= 0) & (label < len(CLASS_NAMES))).all():
                raise ValueError(f"split {split!r} holds labels outside of 0..9")
            arrays[split] = {"image": image, "label": label}
    return arrays


def _prepare(data_dir: pathlib.Path) -> None:
    """Writes the set. TFDS renames a finished folder into place; what a killed process left is removed first."""
    folder = data_dir / Digits.name
    for leftover in folder.glob("incomplete.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with _quiet(), tempfile.TemporaryDirectory() as downloads:
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        _builder(data_dir).download_and_prepare(download_dir=downloads, download_config=config)


@contextlib.contextmanager
def _alone(data_dir: pathlib.Path) -> Iterator[None]:
    """Waits until no other process prepares the set."""
    with (data_dir / f".{Digits.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load_digits(data_dir: str | os.PathLike[str]) -> dict[str, dict[str, np.ndarray]]:
    """The digits as arrays, prepared in ``data_dir`` at first use.

    A folder that is damaged is put aside as ``1.0.0.damaged`` with a note on stderr and prepared again, which always
    gives the same data: it comes from the installed scikit-learn. Several processes may call this at once, a process
    that was killed while preparing leaves nothing that hurts, and a prepared folder may be read-only.

    Args:
      data_dir: the folder of TFDS data sets; the set goes to ``<data_dir>/digits/1.0.0``.

    Returns:
      ``{"train": ..., "test": ...}`` with 1,297 and 500 examples, each ``{"image": uint8 [N, 8, 8, 1] in 0..16,
      "label": int32 [N] in 0..9}``.

    Raises:
      DataError: if the set can't be prepared, naming the folder and the reason.

    Example:
      >>> import tempfile
      >>> from poise.launch.digits import load_digits
      >>> with tempfile.TemporaryDirectory() as data_dir:
      ...     digits = load_digits(data_dir)
      >>> digits["train"]["image"].shape, digits["test"]["label"].shape
      ((1297, 8, 8, 1), (500,))
    """
    root = pathlib.Path(data_dir).expanduser().absolute()
    folder = root / Digits.name / str(Digits.VERSION)
    if folder.exists():
        with contextlib.suppress(Exception):
            return _read(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root):
            if folder.exists():
                try:
                    return _read(root)  # another process was quicker
                except Exception as error:
                    aside = folder.with_name(f"{folder.name}.damaged")
                    shutil.rmtree(aside, ignore_errors=True)
                    folder.rename(aside)
                    reason = " ".join(str(error).split()) or type(error).__name__
                    print(
                        f"the data set in {folder} is damaged ({reason}): put aside as {aside.name}, prepared again",
                        file=sys.stderr,
                    )
            _prepare(root)
            return _read(root)
    except OSError as error:
        raise DataError(f"the digits cannot be prepared in {folder}: {error.strerror or error}") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the digits in {folder} cannot be read: {reason}; delete that folder to mend it") from error
