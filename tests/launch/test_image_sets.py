"""Image sets: arrays, folders and TFDS data sets give the same kind of batches; what is wrong with one is named."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from poise.launch.data import DataError
from poise.launch.image_sets import (
    ArrayImages,
    FolderImages,
    Subset,
    TfdsImages,
    Unlabelled,
    first_images,
    open_images,
)

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 6, 6, 3)).astype(np.uint8)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def by_class(tmp_path):
    """Three classes of eight images; the classes' natural order isn't the alphabet's."""
    for i, pixels in enumerate(PIXELS):
        write(tmp_path / f"class{(2, 10, 1)[i % 3]}" / f"{i:02d}.png", pixels)
    return tmp_path


def test_subfolders_are_classes_in_their_natural_order(by_class):
    images = FolderImages(by_class)
    assert (len(images), images.image_shape, images.maximum) == (24, (6, 6, 3), 255)
    assert images.class_names == ("class1", "class2", "class10")
    found = images.read(np.array([0, 23, 8]))
    assert found["image"].dtype == np.uint8
    assert found["label"].dtype == np.int32
    paths = sorted(path for path in by_class.rglob("*.png"))
    for image, label, index in zip(found["image"], found["label"], (0, 23, 8), strict=True):
        np.testing.assert_array_equal(image, PIXELS[int(paths[index].stem)])
        assert images.class_names[label] == paths[index].parent.name


def test_a_list_of_labels_counts_more_than_folders(by_class):
    names = sorted(path.relative_to(by_class).as_posix() for path in by_class.rglob("*.png"))
    (by_class / "dataset.json").write_text(json.dumps({"labels": [[name, i % 4] for i, name in enumerate(names)]}))
    images = FolderImages(by_class)
    assert images.class_names == ("0", "1", "2", "3")
    np.testing.assert_array_equal(images.read(np.arange(24))["label"], np.arange(24) % 4)
    (by_class / "dataset.json").write_text(json.dumps({"labels": [[name, 0] for name in names[1:]]}))
    with pytest.raises(DataError, match=f"no label for 1 images, the first is {names[0]}"):
        FolderImages(by_class)
    (by_class / "dataset.json").write_text('{"labels": null}')
    assert FolderImages(by_class).class_names == ()
    (by_class / "dataset.json").write_text("[1")
    with pytest.raises(DataError, match="is no list of labels"):
        FolderImages(by_class)


def test_images_without_classes_and_in_grey(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.png", PIXELS[i, ..., 0])
    images = FolderImages(tmp_path)
    assert (images.image_shape, images.class_names) == ((6, 6, 1), ())
    found = images.read(np.arange(3))
    assert list(found) == ["image"]
    np.testing.assert_array_equal(found["image"], PIXELS[:3, ..., :1])


def test_images_are_cropped_to_a_square_and_resized(tmp_path):
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200  # the centred square
    write(tmp_path / "a.png", wide)
    with pytest.raises(DataError, match=r"a\.png is not square \(it has 16x8 pixels\)"):
        FolderImages(tmp_path)
    images = FolderImages(tmp_path, image_size=4)
    assert images.image_shape == (4, 4, 3)
    np.testing.assert_array_equal(images.read(np.array([0]))["image"], np.full((1, 4, 4, 3), 200))


def test_damaged_and_odd_files_are_named(by_class, tmp_path):
    images = FolderImages(by_class)
    victim = sorted(by_class.rglob("*.png"))[5]
    victim.write_bytes(victim.read_bytes()[:40])
    with pytest.raises(DataError, match=f"{victim} cannot be read"):
        images.read(np.arange(24))
    write(victim, PIXELS[0, :4, :4])
    with pytest.raises(DataError, match=rf"{victim} has shape \[4, 4, 3\], the first of its folder has \[6, 6, 3\]"):
        images.read(np.arange(24))


def test_pictures_of_more_than_8_bits_or_of_two_kinds_are_named(tmp_path):
    write(tmp_path / "a.png", PIXELS[0, ..., 0])
    write(tmp_path / "b.png", PIXELS[1])
    with pytest.raises(DataError, match=r"b\.png is in colour, the first of its folder is grey"):
        FolderImages(tmp_path).read(np.arange(2))
    write(tmp_path / "0.png", PIXELS[0, ..., 0].astype(np.uint16) * 200)
    with pytest.raises(DataError, match=r"0\.png has more than 8 bits a pixel \(mode I;16\)"):
        FolderImages(tmp_path)


def test_labels_can_be_left_out():
    images = Unlabelled(ArrayImages(PIXELS, np.arange(24), tuple("abcdefghijklmnopqrstuvwx")))
    assert (len(images), images.class_names, images.image_shape, images.maximum) == (24, (), (6, 6, 3), 255)
    assert list(images.read(np.arange(3))) == ["image"]


def test_the_first_images_of_a_folder_are_of_all_classes(by_class):
    assert set(first_images(FolderImages(by_class), 12)["label"]) == {0, 1, 2}
    assert set(first_images(FolderImages(by_class), 100)["label"][:10]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("folder:{tmp}/none", "there is no folder"),
        ("folder:{tmp}/empty", "holds no images"),
        ("tfds:no_such_set", "the TFDS data set 'no_such_set', split 'train', cannot be opened"),
        ("mnist", "data must be digits, synthetic, tfds:NAME or folder:PATH, got 'mnist'"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, data, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        open_images(data.format(tmp=tmp_path), tmp_path)


def test_a_folder_is_split_once_and_for_all(by_class):
    train, held_out = open_images(f"folder:{by_class}", "")
    assert (len(train), len(held_out)) == (14, 10)
    both = np.concatenate([part.read(np.arange(len(part)))["image"] for part in (train, held_out)])
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in PIXELS)
    again = open_images(f"folder:{by_class}", "").held_out
    np.testing.assert_array_equal(held_out.read(np.arange(9))["image"], again.read(np.arange(9))["image"])
    with pytest.raises(DataError, match="must hold at least 20 images, got 8"):
        open_images(f"folder:{by_class / 'class1'}", "")


def test_a_folder_may_come_in_two_parts(tmp_path):
    for i, pixels in enumerate(PIXELS):
        write(tmp_path / ("test" if i % 4 == 0 else "train") / f"c{i % 2}" / f"{i}.png", pixels)
    with pytest.raises(DataError, match="differ in their class names"):
        open_images(f"folder:{tmp_path}", "")  # multiples of four are even: the test part lacks a class
    write(tmp_path / "test" / "c1" / "x.png", PIXELS[0])
    with pytest.raises(DataError, match="/test must hold at least 10 images, got 7"):
        open_images(f"folder:{tmp_path}", "")
    for i in range(3):
        write(tmp_path / "test" / "c1" / f"x{i}.png", PIXELS[i])
    train, held_out = open_images(f"folder:{tmp_path}", "")
    assert (len(train), len(held_out), train.class_names) == (18, 10, ("c0", "c1"))


def test_digits_are_a_set_like_the_others(tmp_path):
    train, held_out = open_images("digits", tmp_path)
    assert (len(train), len(held_out), train.image_shape, train.maximum) == (1297, 500, (8, 8, 1), 16)
    assert train.read(np.arange(3))["image"].shape == (3, 8, 8, 1)


def test_first_images_are_all_or_a_fixed_choice():
    images = ArrayImages(PIXELS, np.arange(24), tuple("abcdefghijklmnopqrstuvwx"))
    np.testing.assert_array_equal(first_images(images, 24)["label"], np.arange(24))
    some = first_images(images, 5)["label"]
    assert len(set(some.tolist())) == 5
    np.testing.assert_array_equal(some, first_images(images, 5)["label"])
    subset = Subset(images, np.array([7, 3]))
    np.testing.assert_array_equal(subset.read(np.array([1, 0]))["label"], [3, 7])


class PoiseColours(tfds.core.GeneratorBasedBuilder):
    """A registered data set, as those on a user's disk are."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(6, 6, 3), dtype=np.uint8),
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(18)), "validation": self._generate_examples(range(18, 24))}

    def _generate_examples(self, indices):
        for i in indices:
            yield i, {"image": PIXELS[i], "label": i % 2}


def test_a_tfds_data_set_is_read_by_name(tmp_path):
    tfds.builder("poise_colours", data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    train, held_out = open_images("tfds:poise_colours", tmp_path)
    assert (len(train), len(held_out), train.class_names, train.image_shape) == (18, 6, ("even", "odd"), (6, 6, 3))
    found = held_out.read(np.array([5, 0]))
    np.testing.assert_array_equal(found["image"], PIXELS[[23, 18]])
    np.testing.assert_array_equal(found["label"], [1, 0])
    with pytest.raises(DataError, match="split 'nothing', cannot be opened"):
        TfdsImages("poise_colours", "nothing", tmp_path)


def test_synthetic_images_are_functions_of_their_number():
    train, held_out = open_images("synthetic", "", image_size=8)
    indices = np.array([0, 7, 49_999])
    first, again = train.read(indices), open_images("synthetic", "", image_size=8).train.read(indices)
    for name in ("image", "label"):
        np.testing.assert_array_equal(first[name], again[name])
    assert first["image"].shape == (3, 8, 8, 3)
    assert first["label"].tolist() == [0, 7, 9]
    assert (first["image"][0] != first["image"][1]).mean() > 0.9
    assert (held_out.read(indices[:1])["image"] != first["image"][:1]).mean() > 0.9
    assert (len(train), len(held_out), train.image_shape) == (50_000, 10_000, (8, 8, 3))
    assert open_images("synthetic", "").train.image_shape == (32, 32, 3)
