"""How good generated images are: Fréchet distance, precision, recall, and a classifier's opinion."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from poise.launch.drawing import Draw
from poise.launch.pixels import PixelScale
from poise.metrics import frechet, moments, prdc

_NUM_FEATURES = 32
_NEAREST_K = 5
_MANY_IMAGES, _MANY_PIXELS = 5_000, 1_024  # beyond these, no exact decomposition and no classifier


class Judge:
    """Compares images with training and held-out images of the same classes.

    The features are the first 32 principal components of the pixels, fitted on the training images; distances and
    moments are in float64. Everything generated is first rounded to pixel values, as real images are. Precision, recall
    and coverage use the 5th nearest neighbour among as many images as are held out. Class consistency is the share of
    images to which a support vector classifier, trained on the training images, gives the label that was asked for; it
    is None without classes, and where there are too many images or pixels for such a classifier.

    Attributes:
      scale: the scale of the network's images.
      num_train: the number of training images, which is how many are drawn for a comparison.
      classifier_accuracy: the classifier's own accuracy on held-out images; None without a classifier.
    """

    def __init__(self, train: Mapping[str, np.ndarray], held_out: Mapping[str, np.ndarray], scale: PixelScale):
        """Fits features and classifier.

        Args:
          train: ``image`` ``[N, H, W, C]`` in pixel values and, with classes, ``label`` ``[N]``.
          held_out: likewise.
          scale: the scale of the network's images.
        """
        from sklearn.decomposition import PCA
        from sklearn.svm import SVC

        self.scale = scale
        self.num_train, self.num_held_out = len(train["image"]), len(held_out["image"])
        flat = self._flat(train["image"])
        solver = "full" if flat.shape[1] <= _MANY_PIXELS else "randomized"
        self._pca = PCA(min(_NUM_FEATURES, *flat.shape), svd_solver=solver, random_state=0).fit(flat)
        classes = np.unique(train["label"]) if "label" in train else ()
        few = len(flat) <= _MANY_IMAGES and flat.shape[1] <= _MANY_PIXELS
        self._classifier = SVC(C=10.0, gamma="scale").fit(flat, train["label"]) if few and len(classes) > 1 else None
        self._train, self._held_out = self.features(train["image"]), self.features(held_out["image"])
        self.classifier_accuracy = self.class_consistency(held_out["image"], held_out.get("label"))

    def _flat(self, images: np.ndarray) -> np.ndarray:
        return self.scale.to_network(images).astype(np.float64).reshape(len(images), -1)

    def features(self, images: np.ndarray) -> np.ndarray:
        """Principal components ``[N, 32]`` of images in pixel values."""
        return self._pca.transform(self._flat(images))

    def class_consistency(self, images: np.ndarray, labels: np.ndarray | None) -> float | None:
        """The share of images that the classifier assigns to their label; None without a classifier."""
        if self._classifier is None or labels is None:
            return None
        return float((self._classifier.predict(self._flat(images)) == labels).mean())

    def frechet(self, images: np.ndarray, against: str = "held_out") -> float:
        """The Fréchet distance of images from the ``"held_out"`` or the ``"train"`` images."""
        reference = self._held_out if against == "held_out" else self._train
        with jax.enable_x64(True):
            return float(frechet(*moments(self.features(images)), *moments(reference)))

    def neighbours(self, images: np.ndarray) -> dict[str, float]:
        """Precision, recall and coverage of images, as many of them as are held out."""
        with jax.enable_x64(True):
            result = prdc(self._held_out, self.features(images[: self.num_held_out]), k=_NEAREST_K)
        return {name: float(getattr(result, name)) for name in ("precision", "recall", "coverage")}

    def judge(self, draws: Sequence[Draw], nfe: int) -> dict[str, float | int | None]:
        """All figures of a generator, each the mean over its draws."""
        rows = [
            {
                "frechet": self.frechet(draw.images),
                "frechet_train": self.frechet(draw.images, "train"),
                **self.neighbours(draw.images),
                "class_consistency": self.class_consistency(draw.images, draw.labels),
                "images_per_second": len(draw.images) / draw.seconds,
            }
            for draw in draws
        ]
        mean: dict[str, float | int | None] = {
            name: None if value is None else float(np.mean([row[name] for row in rows]))
            for name, value in rows[0].items()
        }
        mean["frechet_std"] = float(np.std([row["frechet"] for row in rows]))
        mean["nfe"] = nfe
        return mean

    def judge_real(self, train: Mapping[str, np.ndarray]) -> dict[str, float | int | None]:
        """The floor: the training images themselves, against the held-out ones."""
        return {
            "frechet": self.frechet(train["image"]),
            "frechet_train": None,
            **self.neighbours(train["image"]),
            "class_consistency": self.classifier_accuracy,
            "images_per_second": None,
            "frechet_std": None,
            "nfe": None,
        }
