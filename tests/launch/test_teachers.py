"""A teacher in a folder: saved, loaded, and refused where it is unfinished, damaged or of another network."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.launch.networks import NetworkConfig, abstract_variables
from poise.launch.pixels import PixelScale
from poise.launch.teachers import Teacher, TeacherError, load_teacher, save_teacher

UNET = {
    "model_type": "SongUNet",
    "embedding_type": "fourier",  # which has constants
    "model_channels": 4,
    "channel_mult": (1,),
    "num_blocks": 1,
    "attn_resolutions": (),
}
NETWORK = NetworkConfig({"img_resolution": 8, "img_channels": 1, "label_dim": 3, **UNET})


def make_teacher():
    rng = np.random.default_rng(0)
    shapes = abstract_variables(NETWORK)
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)
    return Teacher(NETWORK, variables, PixelScale.edm(), ("a", "b", "c"))


def test_round_trip_is_exact(tmp_path):
    teacher = make_teacher()
    assert set(teacher.variables) == {"params", "constants"}
    save_teacher(tmp_path, teacher)
    loaded = load_teacher(str(tmp_path))
    assert loaded._replace(variables=None) == teacher._replace(variables=None)
    assert jax.tree.structure(loaded.variables) == jax.tree.structure(teacher.variables)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, teacher.variables)


def test_variables_of_another_network_are_not_saved(tmp_path):
    teacher = make_teacher()
    wider = NetworkConfig({**NETWORK.architecture, "model_channels": 8})
    with pytest.raises(ValueError, match=r"the first is .*it has shape \[.*\], the network shape \["):
        save_teacher(tmp_path, teacher._replace(network=wider))
    assert list(tmp_path.iterdir()) == []


def change(folder, **entries):
    path = folder / "teacher.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_what_cannot_be_used_says_why(tmp_path):
    with pytest.raises(TeacherError, match=r"there is no teacher in .*: it needs teacher\.json"):
        load_teacher(tmp_path)
    save_teacher(tmp_path, make_teacher())
    change(tmp_path, num_steps=7)
    with pytest.raises(TeacherError, match="isn't finished"):
        load_teacher(tmp_path)
    network = NETWORK.to_json()
    network["architecture"]["num_blocks"] = 2
    change(tmp_path, num_steps=0, network=network)
    with pytest.raises(TeacherError, match=r"variables differ; the first is constants?.*|the first is params/"):
        load_teacher(tmp_path)
    change(tmp_path, version=9)
    with pytest.raises(TeacherError, match="version 9"):
        load_teacher(tmp_path)
    (tmp_path / "teacher.json").write_text("{")
    with pytest.raises(TeacherError, match="cannot be read"):
        load_teacher(tmp_path)
