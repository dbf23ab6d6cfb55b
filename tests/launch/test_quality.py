"""Pixel scale and judge, on the real digits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits as sklearn_digits

from poise.launch.drawing import Drawer, draw_sets
from poise.launch.networks import NetworkConfig
from poise.launch.pixels import PixelScale
from poise.launch.quality import Judge


@functools.cache
def halves():
    digits = sklearn_digits()
    image = digits.images.astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(len(image))
    train, held_out = order[:1297], order[1297:]
    return (
        {"image": image[train], "label": digits.target[train]},
        {"image": image[held_out], "label": digits.target[held_out]},
    )


@functools.cache
def judge():
    train, held_out = halves()
    return Judge(train, held_out, PixelScale.fit(train["image"], 16))


def test_scale_gives_mean_zero_and_sigma_data_and_goes_back():
    train, _ = halves()
    scale = PixelScale.fit(train["image"], 16)
    x = scale.to_network(train["image"])
    assert x.dtype == np.float32
    assert abs(x.mean()) < 1e-6
    assert x.std() == pytest.approx(0.5, abs=1e-6)
    np.testing.assert_array_equal(scale.to_pixels(x), train["image"])
    np.testing.assert_array_equal(scale.to_pixels(np.array([-9.0, 9.0])), [0, 16])


def test_real_images_are_the_floor():
    train, _ = halves()
    real = judge().judge_real(train)
    assert 0.05 < real["frechet"] < 0.25
    assert real["coverage"] > 0.9
    assert real["recall"] > 0.9
    assert judge().classifier_accuracy > 0.97
    assert judge().frechet(train["image"], "train") < 1e-8
    assert real["frechet_train"] is real["nfe"] is real["images_per_second"] is None


def test_judge_sees_what_is_wrong_with_images():
    train, _ = halves()
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 17, size=train["image"].shape).astype(np.uint8)
    collapsed = np.repeat(train["image"][:1], len(train["image"]), axis=0)
    real = judge().neighbours(train["image"])
    assert judge().frechet(noise) > 10 * judge().frechet(train["image"])
    assert judge().frechet(collapsed) > 10 * judge().frechet(train["image"])
    assert judge().neighbours(noise)["precision"] < 0.1
    assert judge().neighbours(collapsed)["recall"] < 0.1 < real["recall"]
    assert judge().class_consistency(train["image"], np.roll(train["label"], 1)) < 0.2


def test_draws_are_balanced_reproducible_and_averaged():
    def generate(variables, z, labels):
        return z * variables["scale"] + labels[:, None, None, None] * 0.0

    network = NetworkConfig({"img_resolution": 8, "img_channels": 1, "label_dim": 10})
    arguments = dict(network=network, scale=judge().scale, key=jax.random.key(3), number=600, num_sets=2)
    variables = {"scale": jnp.asarray(0.5)}
    first, second = draw_sets(generate, variables, **arguments)
    again, _ = draw_sets(generate, variables, **arguments)
    assert first.images.shape == (600, 8, 8, 1)
    assert first.images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(first.labels), np.full(10, 60))
    np.testing.assert_array_equal(first.images, again.images)
    assert (first.images != second.images).any()
    row = judge().judge([first, second], nfe=1)
    singles = [judge().judge([draw], nfe=1) for draw in (first, second)]
    assert row["frechet"] == pytest.approx(np.mean([single["frechet"] for single in singles]), rel=1e-12)
    assert row["frechet_std"] == pytest.approx(np.std([single["frechet"] for single in singles]), rel=1e-9)
    assert row["nfe"] == 1
    assert row["images_per_second"] > 0


@pytest.mark.parametrize("labels", [None, np.arange(11, dtype=np.int32) % 3])
def test_drawn_images_do_not_depend_on_how_they_are_cut_into_chunks(labels):
    def generate(variables, z, labels):
        return z if labels is None else z + 100.0 * labels[:, None]

    whole = Drawer(generate, (4,), 11, labels)((), jax.random.key(1))
    parts = Drawer(generate, (4,), 11, labels, chunk=4)((), jax.random.key(1))
    assert whole.shape == (11, 4)
    np.testing.assert_array_equal(whole, parts)
    assert len(np.unique(whole)) == whole.size
    if labels is not None:
        np.testing.assert_array_equal(np.rint(whole.mean(1) / 100), labels)


def test_without_classes_or_with_too_many_images_there_is_no_class_consistency():
    train, held_out = halves()
    unlabelled = Judge({"image": train["image"]}, {"image": held_out["image"]}, judge().scale)
    assert unlabelled.classifier_accuracy is None
    assert unlabelled.class_consistency(train["image"], None) is None
    assert unlabelled.judge_real(train)["class_consistency"] is None
    assert unlabelled.frechet(train["image"]) == pytest.approx(judge().frechet(train["image"]), rel=1e-9)
