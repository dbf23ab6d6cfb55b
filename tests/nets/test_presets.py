import math

import jax.numpy as jnp
import pytest

from poise.nets import EDM_CHECKPOINTS, adm, ddpmpp, edm_network, ncsnpp, preconditioning_of, state_dict_shapes

# (parameters, tensors of parameters, buffers) of the official networks
COUNTS = {
    "cifar10-32x32-cond-vp": (55_735_299, 419, 8),
    "cifar10-32x32-uncond-vp": (55_733_891, 417, 8),
    "cifar10-32x32-cond-ve": (56_400_643, 423, 11),
    "cifar10-32x32-uncond-ve": (56_397_827, 421, 11),
    "ffhq-64x64-uncond-vp": (61_805_571, 541, 12),
    "ffhq-64x64-uncond-ve": (62_761_091, 547, 16),
    "imagenet-64x64-cond-adm": (295_899_267, 541, 12),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_networks_have_the_official_tensors(name):
    shapes = state_dict_shapes(EDM_CHECKPOINTS[name])
    buffers = [key for key in shapes if key.endswith((".resample_filter", ".freqs"))]
    parameters = [math.prod(shape) for key, shape in shapes.items() if key not in buffers]
    assert (sum(parameters), len(parameters), len(buffers)) == COUNTS[name]


def test_all_published_networks_are_there():
    assert set(EDM_CHECKPOINTS) - set(COUNTS) == {"afhqv2-64x64-uncond-vp", "afhqv2-64x64-uncond-ve"}
    for kind in ("vp", "ve"):
        ffhq, afhq = EDM_CHECKPOINTS[f"ffhq-64x64-uncond-{kind}"], EDM_CHECKPOINTS[f"afhqv2-64x64-uncond-{kind}"]
        assert {**ffhq, "dropout": 0.25} == dict(afhq)


def test_presets_are_the_published_architectures():
    cifar = {"channel_mult": (2, 2, 2), "label_dim": 10, "augment_dim": 9, "dropout": 0.13, "in_channels": 3}
    assert ddpmpp(32, **cifar) == edm_network(EDM_CHECKPOINTS["cifar10-32x32-cond-vp"]).model
    assert ncsnpp(32, **cifar) == edm_network(EDM_CHECKPOINTS["cifar10-32x32-cond-ve"]).model
    assert adm(64, label_dim=1000, in_channels=3) == edm_network(EDM_CHECKPOINTS["imagenet-64x64-cond-adm"]).model


BASE = {"model_type": "SongUNet", "img_resolution": 8, "img_channels": 1}


def test_what_a_users_export_holds():
    config = {**BASE, "class_name": "training.networks.VPPrecond", "use_fp16": False, "sigma_min": 0, "beta_d": 19.9}
    module = edm_network({**config, "channel_mult": [1, 2]}, dtype=jnp.bfloat16, remat=True)
    assert (module.preconditioning, module.model.channel_mult, module.model.dtype) == ("vp", (1, 2), jnp.bfloat16)
    assert module.model.remat
    twice = edm_network({"precond": "iDDPMPrecond", "img_resolution": 8, "img_channels": 3})
    assert (twice.model.out_channels, twice.model.in_channels, type(twice.model).__name__) == (6, 3, "DhariwalUNet")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "UViT"}, "model_type must be 'SongUNet' or 'DhariwalUNet', got 'UViT'"),
        ({"chanel_mult": (1,)}, r"entries that SongUNet doesn't know: \['chanel_mult'\]"),
        ({"channels_per_head": 32}, r"entries that SongUNet doesn't know: \['channels_per_head'\]"),
        ({"beta_d": 20.0}, "beta_d must be 19.9, got 20.0"),
        ({"class_name": "RFPrecond"}, "class_name must be one of .*, got 'RFPrecond'"),
        ({"class_name": "VPPrecond", "preconditioning": "edm"}, "contradict each other"),
        ({"preconditioning": "ddim"}, "preconditioning must be one of .*, got 'ddim'"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        edm_network({**BASE, **changes})


def test_missing_entries():
    with pytest.raises(ValueError, match=r"config lacks \['img_channels', 'img_resolution'\]"):
        edm_network({"model_type": "SongUNet"})
    assert preconditioning_of({}) == "edm"
