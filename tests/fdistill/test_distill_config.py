"""The settings of f-distill: every bad one names itself."""

import pytest

from poise.fdistill import FDistillConfig


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"divergence": "jensen"}, "jensen"),
        ({"fake_updates": 0}, "fake_updates"),
        ({"num_bins": 0}, "num_bins"),
        ({"bins_decay": 1.0}, "bins_decay"),
        ({"bins": "log"}, "karras, linear, none"),
        ({"sigma_min": 90.0}, "sigma_min"),
        ({"sigma_max": float("inf")}, "sigma_max"),
        ({"ratio_clip": 0.0}, "ratio_clip"),
        ({"ratio_range": (2.0, 1.0)}, "ratio_range"),
        ({"gan_weight": -1.0}, "gan_weight"),
        ({"discriminator_weight": 0.0}, "discriminator_weight"),
        ({"min_level": 5, "max_level": 4}, "min_level"),
        ({"ema_decays": ()}, "ema_decays"),
        ({"fake_weighting": "snr"}, "fake_weighting"),
        ({"head_features": "student"}, "teacher, fake, own"),
        ({"train_features": True}, "train_features must be False unless head_features is 'fake', got"),
        ({"fake_min_level": 900, "fake_max_level": 100}, "fake_min_level"),
        ({"fake_max_level": 1000}, "fake_max_level <= 999"),
        ({"max_level": 3, "levels": (0.1, 0.2, 0.3)}, "max_level <= 2"),
        ({"levels": (0.2, 0.1)}, "levels must be positive, finite and ascending"),
        ({"matching_weighting": "sigma"}, "dmd, score"),
        ({"matching_eps": -1e-6}, "matching_eps"),
        ({"weight_eps": float("nan")}, "weight_eps"),
        ({"regression_weight": -1.0}, "regression_weight"),
        ({"r1_image": "both"}, "noised, clean"),
    ],
)
def test_bad_settings_name_themselves(changes, words):
    with pytest.raises(ValueError, match=words):
        FDistillConfig(**changes)


@pytest.mark.parametrize("name", ["train_features", "gan_own_noise", "gan_same_noise", "critics_on_student_step"])
def test_switches_are_switches(name):
    with pytest.raises(TypeError, match=name):
        FDistillConfig(**{name: 1})


def test_a_gan_weight_of_zero_is_allowed():
    assert FDistillConfig(gan_weight=0.0).gan_weight == 0
