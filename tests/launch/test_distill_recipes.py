"""The recipes are what they are called after, and each of them runs at tiny size."""

import dataclasses

import jax
import numpy as np
import pytest

from poise.fdistill import PRESETS, preset
from poise.launch import distill
from poise.launch.data import InMemory
from poise.launch.distill import DistillConfig
from poise.launch.distill_phases import network_of, settings_of
from poise.launch.distill_recipes import RECIPES
from poise.launch.image_sets import ArrayImages
from poise.launch.networks import build_network
from poise.nets import EDM_CHECKPOINTS, edm_network

PAPER = {"cifar10": "cifar10-32x32-cond-vp", "imagenet64": "imagenet-64x64-cond-adm"}


def test_presets_are_those_of_the_library():
    assert ("none", *PRESETS) == distill.PRESETS


@pytest.mark.parametrize("recipe", PAPER)
def test_paper_recipes_are_the_published_settings(recipe):
    config = DistillConfig(**RECIPES[recipe])
    published = PRESETS[config.preset]
    found = dataclasses.replace(settings_of(config, 0.5), ema_decays=published.config.ema_decays)
    assert found == preset(config.preset)
    assert config.learning_rate == config.fake_learning_rate == config.head_learning_rate == published.learning_rate
    assert (config.batch_size, config.steps) == (published.batch_size, published.student_updates)
    assert (config.feature_levels, config.weight_decay) == (published.feature_levels, published.weight_decay)


@pytest.mark.parametrize("recipe", PAPER)
def test_networks_of_the_paper_recipes_are_the_published_ones(recipe):
    published = EDM_CHECKPOINTS[PAPER[recipe]]
    size, classes = published["img_resolution"], published["label_dim"]
    images = ArrayImages(np.zeros((1, size, size, 3), np.uint8), np.zeros(1), [str(c) for c in range(classes)])
    config = DistillConfig(**{**RECIPES[recipe], "precision": "float32"})
    ours = build_network(network_of(config, images))
    assert ours == edm_network({**published, "augment_dim": 0})


def test_the_digits_recipe_is_the_default():
    assert DistillConfig(**RECIPES["digits"]) == DistillConfig()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe=mixture2d", "--guidance_scale=2"], "guidance_scale must be 1 for data=mixture2d, got 2"),
        (["--preset=dmd2_no_gan"], "discriminator_weight must be above 0"),
        (["--feature_levels=2"], "feature_levels must be levels of the network, from -2 to 1, got 2"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_before_anything_is_written(flags, message, tmp_path, capsys):
    assert distill.main([f"--workdir={tmp_path}/run", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["dmd2", "fastgen"])
def test_presets_combine_with_flags(name):
    settings = settings_of(DistillConfig(preset=name, divergence="reverse_kl", gan_weight=0.5), 0.5)
    assert (settings.gan_weight, settings.divergence) == (0.5, "reverse_kl")
    assert settings.matching_eps == preset(name).matching_eps
    assert settings.head_features == preset(name).head_features


TINY = {
    "model_channels": 4, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (), "batch_size": 4,
    "fake_updates": 1, "feature_levels": (0,), "teacher_steps": 1, "teacher_batch_size": 4, "teacher_warmup_steps": 0,
    "warmup_steps": 1, "steps": 1,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PAPER)
def test_a_paper_recipe_traces_through_all_phases_at_tiny_size(recipe):
    """One step of each phase is traced, in bfloat16 as the recipe says; computing them is the slow tier's."""
    from poise.launch.distill_phases import distill_phases
    from poise.launch.pixels import PixelScale
    from poise.launch.quality import Judge

    config = DistillConfig(**{**RECIPES[recipe], **TINY})
    rng = np.random.default_rng(0)
    arrays = {"image": rng.integers(0, 256, (24, 8, 8, 3)).astype(np.uint8), "label": np.arange(24) % 3}
    images = ArrayImages(arrays["image"], arrays["label"], ("a", "b", "c"))
    network = network_of(config, images)
    judge = Judge(arrays, arrays, PixelScale.edm())
    state = None
    for phase in distill_phases(config, network, images, judge):
        assert isinstance(phase.data, InMemory)
        batch, key = phase.data.batch(0), jax.random.key(0)

        def begin(previous, key, batch, phase=phase):
            return phase.make_algorithm(previous).init(key, batch)

        previous, state = state, jax.eval_shape(begin, state, key, batch)
        new, metrics = jax.eval_shape(phase.make_algorithm(previous).step, state, batch, key)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert all(value.dtype == np.float32 for value in metrics.values())
    assert "ratio_bin_0" in metrics
