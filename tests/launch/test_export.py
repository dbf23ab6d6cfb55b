"""A student as a file: saved, loaded and used in somebody else's project; damaged files say so."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from poise.fdistill import one_step
from poise.launch import load_student
from poise.launch.export import Student, save_student
from poise.launch.networks import NetworkConfig, build_network
from poise.launch.pixels import PixelScale

UNET = {
    "model_type": "SongUNet",
    "model_channels": 4,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
}
NETWORK = NetworkConfig({"img_resolution": 8, "img_channels": 1, "label_dim": 3, **UNET})
SCALE = PixelScale(4.9, 6.0, 16)


def make_student():
    net = build_network(NETWORK)
    variables = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.ones(1), jnp.zeros(1, jnp.int32))
    return Student(NETWORK, variables, 80.0, SCALE)


@pytest.fixture
def file(tmp_path) -> pathlib.Path:
    save_student(tmp_path / "student.safetensors", make_student())
    return tmp_path / "student.safetensors"


@pytest.mark.slow
def test_round_trip_is_exact_from_file_and_from_folder(file):
    student = make_student()
    for path in (file, file.parent, str(file)):
        loaded = load_student(path)
        assert loaded.network == NETWORK
        assert loaded.scale == SCALE
        assert jax.tree.structure(loaded.variables) == jax.tree.structure(student.variables)
        jax.tree.map(np.testing.assert_array_equal, loaded.variables, student.variables)


@pytest.mark.slow
def test_a_loaded_student_draws_images(file):
    student = load_student(file)
    images = student(jax.random.key(0), jnp.arange(3))
    assert images.shape == (3, 8, 8, 1)
    assert ((images >= 0) & (images <= 1)).all()
    z = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    raw = one_step(build_network(NETWORK), student.variables, z, jnp.arange(3))
    np.testing.assert_allclose(images, np.clip((raw * 12.0 + 4.9) / 16, 0, 1), atol=1e-6)
    jitted = jax.jit(lambda key, labels: student(key, labels))(jax.random.key(0), jnp.arange(3))
    np.testing.assert_allclose(images, jitted, atol=1e-5)


@pytest.mark.parametrize("labels", [jnp.array([0, 3]), jnp.array([-1]), jnp.array([0.5]), jnp.zeros((2, 2), jnp.int32)])
def test_bad_labels_name_themselves(file, labels):
    with pytest.raises(ValueError, match="labels"):
        load_student(file)(jax.random.key(0), labels)


def test_missing_damaged_and_foreign_files(file, tmp_path):
    with pytest.raises(FileNotFoundError, match="is the run finished"):
        load_student(tmp_path / "nowhere")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_student(file)
    save_file({"w": np.zeros(2, np.float32)}, file)
    with pytest.raises(ValueError, match="holds no student"):
        load_student(file)


def rewrite(file, change):
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as reader:
        metadata = reader.metadata()
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    header = json.loads(metadata["student"])
    change(header, tensors)
    save_file(tensors, file, metadata={**metadata, "student": json.dumps(header)})


def test_contradictions_are_named(file):
    rewrite(file, lambda header, tensors: header.update(version=99))
    with pytest.raises(ValueError, match="version 99"):
        load_student(file)
    save_student(file, make_student())
    rewrite(file, lambda header, tensors: tensors.pop(sorted(tensors)[0]))
    with pytest.raises(
        ValueError, match=r"1 variables differ; the first is params/.*: it has nothing of that name, the network shape"
    ):
        load_student(file)
    save_student(file, make_student())
    rewrite(file, lambda header, tensors: header["network"].pop("precision"))
    with pytest.raises(ValueError, match="network settings"):
        load_student(file)


@pytest.mark.slow
def test_a_student_without_classes_is_told_how_many_images(tmp_path):
    network = NetworkConfig({**NETWORK.architecture, "label_dim": 0})
    variables = build_network(network).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.ones(1))
    save_student(tmp_path / "student.safetensors", Student(network, variables, 80.0, SCALE))
    student = load_student(tmp_path)
    assert student(jax.random.key(0), num_images=2).shape == (2, 8, 8, 1)
    with pytest.raises(ValueError, match="takes num_images and no labels"):
        student(jax.random.key(0), jnp.arange(2))


def test_a_student_with_classes_needs_labels(file):
    with pytest.raises(ValueError, match=r"takes labels in \[0, 3\) and no num_images"):
        load_student(file)(jax.random.key(0), num_images=2)
