"""Official weights, as docs/guides/pretrained_teachers.md exports them: converted without loss, or refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from poise.launch.convert_edm import CHECKPOINTS, main
from poise.launch.networks import build_network
from poise.launch.teachers import load_teacher
from poise.nets import EDM_CHECKPOINTS, state_dict_shapes, to_state_dict

CONFIG = {
    "model_type": "SongUNet",
    "img_resolution": 8,
    "img_channels": 1,
    "model_channels": 4,
    "channel_mult": (1,),
    "num_blocks": 1,
    "attn_resolutions": (),
}


@pytest.fixture
def weights(tmp_path):
    """A file with weights of a small network."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in state_dict_shapes(CONFIG).items()}
    save_file(arrays, tmp_path / "edm.safetensors")
    return tmp_path / "edm.safetensors"


def test_recipes_are_the_published_networks():
    assert tuple(EDM_CHECKPOINTS) == CHECKPOINTS


@pytest.mark.slow
@pytest.mark.golden
@pytest.mark.golden_pattern("nets", "*.safetensors")
def test_a_converted_network_gives_the_official_outputs(golden_file, tmp_path, capsys):
    assert main([f"--input={golden_file}", f"--output={tmp_path / 'teacher'}"]) == 0
    assert "poise.launch.distill --teacher=" in capsys.readouterr().out
    teacher = load_teacher(tmp_path / "teacher")
    expected = np.load(golden_file.with_suffix(".npz"))
    nhwc = (0, 2, 3, 1)
    x, labels = jnp.asarray(expected["x"].transpose(nhwc)), jnp.asarray(expected["class_labels"])
    found = build_network(teacher.network).apply(teacher.variables, x, jnp.asarray(expected["sigma"]), labels)
    np.testing.assert_allclose(found, expected["D_no_augment"].transpose(nhwc), atol=2e-5)
    back, official = to_state_dict(teacher.variables, teacher.network.architecture), load_file(golden_file)
    assert back.keys() == official.keys()
    for name, value in official.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_npz_files_serve_as_well(weights, tmp_path):
    np.savez(tmp_path / "edm.npz", **load_file(weights))
    for name in ("edm.safetensors", "edm.npz"):
        assert main([f"--input={tmp_path / name}", f"--output={tmp_path / name}_teacher"]) == 0
    one, other = (load_teacher(tmp_path / f"edm.{kind}_teacher") for kind in ("safetensors", "npz"))
    assert one.network == other.network
    np.testing.assert_array_equal(
        one.variables["params"]["model"]["enc"]["8x8_conv"]["kernel"],
        other.variables["params"]["model"]["enc"]["8x8_conv"]["kernel"],
    )


def refused(capsys, *flags):
    try:
        code = main(flags)
    except SystemExit as end:
        code = end.code
    assert code == 2
    return capsys.readouterr().err


def test_files_that_do_not_fit_are_refused_and_nothing_is_written(weights, tmp_path, capsys):
    output = f"--output={tmp_path / 'teacher'}"
    said = refused(capsys, f"--input={weights}", output, "--recipe=cifar10-32x32-cond-vp")
    assert "missing: " in said
    assert "model.enc.32x32_conv.weight" in said
    assert "unexpected: " in said
    assert "label_dim must be the weights' 0 classes, got 10" in refused(
        capsys, f"--input={weights}", output, "--label_dim=10"
    )
    assert "unknown recipe 'cifar10' (did you mean" in refused(capsys, f"--input={weights}", output, "--recipe=cifar10")
    assert "there is no file" in refused(capsys, f"--input={tmp_path}/none.npz", output)
    assert "input must be a .safetensors or .npz file" in refused(capsys, f"--input={tmp_path}/edm.pkl", output)
    (tmp_path / "damaged.safetensors").write_bytes(weights.read_bytes()[:100])
    assert "cannot be read" in refused(capsys, f"--input={tmp_path}/damaged.safetensors", output)
    np.savez(tmp_path / "objects.npz", x=np.array([{"a": 1}], dtype=object))  # a pickle in disguise
    assert "cannot be read" in refused(capsys, f"--input={tmp_path}/objects.npz", output)
    assert not (tmp_path / "teacher").exists()


def test_metadata_says_what_network_it_is_and_a_recipe_must_agree(weights, tmp_path, capsys):
    arguments = {**CONFIG, "channel_mult": [1], "attn_resolutions": [], "dropout": 0.3}
    metadata = {"class_name": "VPPrecond", "init_kwargs": json.dumps(arguments)}
    save_file(load_file(weights), tmp_path / "vp.safetensors", metadata=metadata)
    assert main([f"--input={tmp_path / 'vp.safetensors'}", f"--output={tmp_path / 'teacher'}"]) == 0
    architecture = load_teacher(tmp_path / "teacher").network.architecture
    assert (architecture["class_name"], architecture["dropout"]) == ("VPPrecond", 0.3)
    flags = (f"--input={tmp_path / 'vp.safetensors'}", f"--output={tmp_path / 'other'}")
    said = refused(capsys, *flags, "--recipe=cifar10-32x32-uncond-vp")
    assert "contradicts the metadata" in said
    assert "the preconditioning is 'vp' there" in said
    assert "img_resolution is 8 there" in said


def test_a_folder_that_holds_a_teacher_is_left_alone(weights, tmp_path, capsys):
    flags = (f"--input={weights}", f"--output={tmp_path / 'teacher'}")
    assert main(flags) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "teacher").rglob("*") if path.is_file()}
    assert "holds one" in refused(capsys, *flags)
    assert before == {path: path.read_bytes() for path in (tmp_path / "teacher").rglob("*") if path.is_file()}
