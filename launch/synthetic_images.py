"""Labelled images made of noise, to measure how fast a run is where no data set is at hand."""

import numpy as np

CLASSES, MAXIMUM, SIZE = 10, 255, 32
NUM_TRAIN, NUM_HELD_OUT = 50_000, 10_000
_DIFFERENT = 256


class SyntheticImages:
    """As many images as a real set has, of which a few hundred differ: they are drawn once, so that reading is fast.

    Image ``i`` is a pure function of ``i`` and the seed.

    Args:
      num_images: how many.
      image_size: height and width; there are three channels.
      seed: of the noise.

    Example:
      >>> import numpy as np
      >>> from poise.launch.synthetic_images import SyntheticImages
      >>> images = SyntheticImages(1000, image_size=32, seed=0)
      >>> {name: (array.shape, str(array.dtype)) for name, array in images.read(np.array([3, 999])).items()}
      {'image': ((2, 32, 32, 3), 'uint8'), 'label': ((2,), 'int32')}
    """

    class_names = tuple(str(label) for label in range(CLASSES))
    maximum = MAXIMUM

    def __init__(self, num_images: int, image_size: int = SIZE, seed: int = 0):
        self.image_shape: tuple[int, int, int] = (image_size, image_size, 3)
        self._num_images = num_images
        size = _DIFFERENT * image_size * image_size * 3
        words = np.random.Philox(key=np.array([seed, 0], np.uint64)).random_raw(-(-size // 8))
        self._images = words.view(np.uint8)[:size].reshape(_DIFFERENT, *self.image_shape)

    def __len__(self) -> int:
        """The number of images."""
        return self._num_images

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Images and their labels."""
        return {"image": self._images[indices % _DIFFERENT], "label": (indices % CLASSES).astype(np.int32)}
