import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from poise.nets import (
    EDM_CHECKPOINTS,
    edm_network,
    from_state_dict,
    iddpm_levels,
    infer_config,
    state_dict_shapes,
    to_state_dict,
)

pytestmark = pytest.mark.filterwarnings("ignore:no attention in a block")
CONFIG = {
    "model_type": "SongUNet",
    "img_resolution": 8,
    "img_channels": 1,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "label_dim": 3,
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": (1, 3, 3, 1),
}


def weights_of(config, seed=0):
    rng = np.random.default_rng(seed)
    weights = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in state_dict_shapes(config).items()}
    taps = np.asarray(config.get("resample_filter", (1, 1)), np.float32)
    for key, value in weights.items():
        if key.endswith("resample_filter"):
            weights[key] = (np.outer(taps, taps) / taps.sum() ** 2).reshape(value.shape)
    return weights


@pytest.fixture(scope="module")
def weights():
    return weights_of(CONFIG)


def read(path):
    z = np.load(path)
    prefix = "state_dict/"
    state_dict = {key.removeprefix(prefix): z[key] for key in z.files if key.startswith(prefix)}
    return json.loads(str(z["config"])), state_dict


def assert_same(one, other):
    assert sorted(one) == sorted(other)
    for key, value in one.items():
        assert value.dtype == other[key].dtype, key
        np.testing.assert_array_equal(value, other[key], err_msg=key)


class OfficialWeights:
    """What holds for the weights of every official network."""

    def test_there_and_back(self, golden_file):
        config, state_dict = read(golden_file)
        _, variables = from_state_dict(state_dict, config)
        assert_same(to_state_dict(variables, config), state_dict)
        assert all(value.flags.c_contiguous for value in to_state_dict(variables, config).values())

    def test_configuration_is_read_off_the_weights(self, golden_file):
        config, state_dict = read(golden_file)
        if config.get("channels_per_head", 64) != 64:
            with pytest.raises(ValueError, match="channels_per_head isn't 64"):
                infer_config(state_dict)
            return
        inferred, told = edm_network(infer_config(state_dict)), edm_network(config)
        attention = {"attn_resolutions": told.model.attn_resolutions}
        if type(told.model).__name__ == "DhariwalUNet":  # where no block is wide enough, attention leaves no trace
            widths = [told.model.model_channels * mult for mult in told.model.channel_mult]
            wide = [told.model.img_resolution >> i for i, width in enumerate(widths) if width >= 64]
            attention["attn_resolutions"] = tuple(r for r in told.model.attn_resolutions if r in wide)
        assert inferred == told.clone(model=told.model.clone(**attention))


@pytest.mark.golden
@pytest.mark.golden_pattern("nets", "ddpmpp_*.npz")
class TestOfficialDDPMPP(OfficialWeights):
    """DDPM++."""


@pytest.mark.golden
@pytest.mark.golden_pattern("nets", "ncsnpp_*.npz")
class TestOfficialNCSNPP(OfficialWeights):
    """NCSN++."""


@pytest.mark.golden
@pytest.mark.golden_pattern("nets", "skip_*.npz")
class TestOfficialSkip(OfficialWeights):
    """SongUNet with the skip encoder and decoder."""


@pytest.mark.golden
@pytest.mark.golden_pattern("nets", "adm_*.npz")
class TestOfficialADM(OfficialWeights):
    """ADM."""


@pytest.mark.golden
@pytest.mark.golden_pattern("nets", "*.safetensors")
def test_a_users_export(golden_file):
    with safe_open(golden_file, "numpy") as file:
        metadata = file.metadata()
        state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    config = {**json.loads(metadata["init_kwargs"]), "class_name": metadata["class_name"]}
    _, variables = from_state_dict(state_dict, config)
    assert_same(to_state_dict(variables, config), state_dict)
    told, same = read(golden_file.with_suffix(".npz"))
    assert_same(state_dict, same)
    assert edm_network(told) == edm_network(config)


@pytest.mark.parametrize("name", ["cifar10-32x32-cond-ve", "imagenet-64x64-cond-adm"])
def test_published_configurations_are_read_off_their_shapes(name):
    config = dict(EDM_CHECKPOINTS[name])
    shapes = state_dict_shapes(config)
    structs = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in shapes.items()}
    del config["dropout"]
    assert infer_config(structs) == config


def test_layout(weights):
    module, variables = from_state_dict(weights)
    params = variables["params"]["model"]
    np.testing.assert_array_equal(params["map_layer0"]["kernel"], weights["model.map_layer0.weight"].T)
    kernel = params["enc"]["4x4_down"]["conv0"]["kernel"]
    np.testing.assert_array_equal(kernel[2, 0, 5, 3], weights["model.enc.4x4_down.conv0.weight"][3, 5, 2, 0])
    np.testing.assert_array_equal(params["dec"]["8x8_aux_norm"]["scale"], weights["model.dec.8x8_aux_norm.weight"])
    np.testing.assert_array_equal(
        variables["constants"]["model"]["map_noise"]["freqs"], weights["model.map_noise.freqs"]
    )
    x = jnp.ones((1, 8, 8, 1))
    fresh = jax.eval_shape(module.init, jax.random.key(0), x, jnp.ones(1))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), fresh) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), variables
    )


@pytest.mark.parametrize(
    "prefix", ["", "model.", "module.", "_orig_mod.", "module._orig_mod.model.", "model._orig_mod."]
)
def test_prefixes(weights, prefix):
    renamed = {prefix + key.removeprefix("model."): value for key, value in weights.items()}
    _, variables = from_state_dict(renamed, CONFIG)
    assert_same(to_state_dict(variables, CONFIG), weights)


def test_one_error_names_every_key(weights):
    broken = dict(weights)
    del broken["model.map_layer1.bias"], broken["model.enc.8x8_conv.weight"]
    broken["model.dec.8x8_block0.conv1.weight"] = np.zeros((8, 8, 1, 1), np.float32)
    broken["model.extra.weight"] = np.zeros(1, np.float32)
    broken["model.enc.4x4_down.skip.resample_filter"] = np.full((1, 1, 4, 4), 1 / 16, np.float32)
    with pytest.raises(ValueError, match="state_dict doesn't fit the network") as error:
        from_state_dict(broken, CONFIG)
    message = str(error.value)
    assert "2 missing: model.enc.8x8_conv.weight; model.map_layer1.bias" in message
    assert "1 unexpected: model.extra.weight" in message
    assert "1 wrongly shaped: model.dec.8x8_block0.conv1.weight has shape (8, 8, 1, 1), not (8, 8, 3, 3)" in message
    assert "1 different from the configuration: model.enc.4x4_down.skip.resample_filter is" in message


def test_configuration_and_weights_that_contradict_each_other(weights):
    with pytest.raises(ValueError, match=r"wrongly shaped: model.map_label.weight has shape \(16, 3\), not \(16, 4\)"):
        from_state_dict(weights, {**CONFIG, "label_dim": 4})
    with pytest.raises(ValueError, match=r"12 unexpected: .*model.enc.4x4_block0.norm2.bias"):
        from_state_dict(weights, {**CONFIG, "attn_resolutions": ()})


def test_fastgens_extra_layer(weights):
    extended = {**weights, "model.logvar_linear.weight": np.ones((1, 16)), "logvar_linear.bias": np.ones(1)}
    with pytest.raises(ValueError, match=r"2 unexpected: model.logvar_linear.bias; model.logvar_linear.weight"):
        from_state_dict(extended, CONFIG)
    _, variables = from_state_dict(extended, CONFIG, strict=False)
    assert_same(to_state_dict(variables, CONFIG), weights)
    with pytest.raises(ValueError, match=r"1 unexpected: model.other.bias"):
        from_state_dict({**weights, "other.bias": np.ones(1)}, CONFIG, strict=False)


def test_iddpm_grid():
    config = {**CONFIG, "preconditioning": "iddpm", "encoder_type": "standard", "resample_filter": (1, 1)}
    weights = {**weights_of(config), "u": iddpm_levels().astype(np.float32)}
    inferred = infer_config(weights)
    assert inferred["preconditioning"] == "iddpm"
    module, variables = from_state_dict(weights)
    assert (module.model.in_channels, module.model.out_channels) == (1, 2)
    assert_same(to_state_dict(variables, config), weights)
    with pytest.raises(ValueError, match=r"1 different from the configuration: u is"):
        from_state_dict({**weights, "u": 1.1 * weights["u"]}, config)


def test_dtypes(weights):
    half = {key: value.astype(np.float16) for key, value in weights.items()}
    _, variables = from_state_dict(half, CONFIG)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float16)}
    key = "model.map_layer0.bias"
    with pytest.raises(TypeError, match=r"state_dict\['model.map_layer0.bias'\] is float64"):
        from_state_dict({**weights, key: weights[key].astype(np.float64)}, CONFIG)
    with pytest.raises(TypeError, match="must be of a float type, got int64"):
        from_state_dict({**weights, key: weights[key].astype(np.int64)}, CONFIG)


def test_variables_that_do_not_fit(weights):
    _, variables = from_state_dict(weights, CONFIG)
    params = {**variables["params"]["model"], "map_layer2": {"bias": jnp.ones(3)}}
    params["map_layer1"] = {"bias": jnp.ones(5)}
    with pytest.raises(ValueError, match="variables doesn't fit the network") as error:
        to_state_dict({**variables, "params": {"model": params}}, CONFIG)
    message = str(error.value)
    assert "1 missing: model.map_layer1.weight" in message
    assert "1 unexpected: model.map_layer2.bias" in message
    assert "1 wrongly shaped: model.map_layer1.bias has shape (5,), not (32,)" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"enc.8x8_conv.weight": None},
            "state_dict must hold 'model.enc.8x8_conv.weight' with 4 axes, got no such key",
        ),
        ({"map_layer0.weight": (32, 20)}, "noise width of 20, no multiple of model_channels=8"),
        ({"map_label.weight": (16,)}, "state_dict must hold 'model.map_label.weight' with 2 axes"),
        ({"enc.3x3_conv.weight": (1, 1, 1, 1)}, r"resolution halves level by level, got \[8, 4, 3\]"),
        ({"enc.8x8_block0.conv0.weight": (12, 8, 3, 3)}, "block width of 12, no multiple"),
    ],
)
def test_weights_of_no_such_network(weights, changes, message):
    broken = dict(weights)
    for key, shape in changes.items():
        broken.pop(f"model.{key}", None)
        if shape:
            broken[f"model.{key}"] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=message):
        infer_config(broken)


def test_weights_of_something_else():
    with pytest.raises(ValueError, match=r"state_dict must hold keys like 'model.enc.32x32_conv.weight', got none"):
        infer_config({"layer.weight": np.ones(3)})
    with pytest.raises(ValueError, match="state_dict must hold each key once"):
        infer_config({"model.a": np.ones(3), "a": np.ones(3)})


def test_conversion_warns_of_nothing(weights):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_state_dict(weights, CONFIG)
