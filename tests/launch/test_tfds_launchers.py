"""Launchers of quantization on a data set of TFDS with encoded pictures, as most of its sets are."""

import io
import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from poise.launch import ptq, qat
from poise.launch.classifier import accuracy_of, open_classes
from poise.launch.image_sets import open_images
from poise.launch.integer_classifier import load_classifier
from poise.launch.qat import QATConfig

FLAGS = ("--data=tfds:poise_pictures", "--recipe=smoke", "--float_steps=60", "--save_every=0", "--seed=1")


class PoisePictures(tfds.core.GeneratorBasedBuilder):
    """Noise that is bright in one half; PNG files, which are written and read without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 8, 3)),
            "label": tfds.features.ClassLabel(names=["above", "below"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 256), "test": self._generate_examples(1, 64)}

    def _generate_examples(self, seed, number):
        rng = np.random.default_rng(seed)
        for i in range(number):
            pixels = rng.integers(0, 64, (8, 8, 3), np.uint8)
            pixels[4 * (i % 2) : 4 * (i % 2) + 4] += 128
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 2}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    tfds.builder("poise_pictures", data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_pictures_are_read_without_tensorflow(data_dir):
    train, held_out = open_images("tfds:poise_pictures", data_dir)
    rows = train.read(np.arange(256))
    halves = rows["image"].reshape(256, 2, -1).mean(-1)
    np.testing.assert_array_equal(halves.argmax(1), rows["label"])
    assert (len(held_out), train.image_shape, train.class_names) == (64, (8, 8, 3), ("above", "below"))
    assert "tensorflow" not in sys.modules


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "flags", "file"),
    [
        (qat, ("--steps=40", "--eval_every=0"), ""),
        (ptq, ("--methods=flexround", "--bits=4"), "flexround_4bit.safetensors"),
    ],
    ids=["qat", "ptq"],
)
def test_a_launcher_learns_them_and_leaves_a_classifier_of_integers(launcher, flags, file, data_dir, tmp_path):
    assert launcher.main([*FLAGS, *flags, f"--data_dir={data_dir}", f"--workdir={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert all(row["accuracy"] > 0.9 for row in rows)
    images = open_classes(QATConfig(data="tfds:poise_pictures", patch_size=4), data_dir)
    assert len(images.images) == 64
    assert accuracy_of(np.asarray(load_classifier(tmp_path, file)(images.images)), images.labels) > 0.9
