"""What a finished run left is drawn from and compared with real images, from the command line."""

import json
import re

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from PIL import Image

from poise.launch import evaluate, sample
from poise.launch.export import Student, save_student
from poise.launch.networks import NetworkConfig, abstract_variables
from poise.launch.pixels import PixelScale
from poise.launch.teachers import Teacher, save_teacher
from poise.metrics import frechet

NETWORK = NetworkConfig(
    {
        "model_type": "SongUNet",
        "img_resolution": 8,
        "img_channels": 3,
        "label_dim": 3,
        "model_channels": 4,
        "channel_mult": (1,),
        "num_blocks": 1,
        "attn_resolutions": (),
    }
)
NUM = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as a finished run leaves it, with an untrained student and teacher."""
    root = tmp_path_factory.mktemp("runs") / "run"
    root.mkdir()
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), abstract_variables(NETWORK)
    )
    save_student(root / "student.safetensors", Student(NETWORK, variables, 80.0, PixelScale.edm()))
    save_teacher(root, Teacher(NETWORK, variables, PixelScale.edm(), ("a", "b", "c")))
    images = root.parent / "images"
    for i in range(NUM):
        (images / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(images / f"{i % 3}" / f"{i}.png")
    (root / "config.json").write_text(json.dumps({"data": f"folder:{images}"}))
    return root


@pytest.mark.slow
def test_images_are_drawn_with_the_labels_asked_for(folder, tmp_path):
    flags = (f"--workdir={folder}", "--num=7", "--batch_size=3")
    assert sample.main([*flags, f"--output={tmp_path}/a", "--labels=2,0"]) == 0
    drawn = np.load(tmp_path / "a.npz")
    assert drawn["image"].shape == (7, 8, 8, 3)
    np.testing.assert_array_equal(drawn["label"], [2, 0, 2, 0, 2, 0, 2])
    assert matplotlib.image.imread(tmp_path / "a.png").shape[:2] == (3 * 9 * 6 - 6, 3 * 9 * 6 - 6)
    assert sample.main([*flags, "--nfe=3", "--seed=1"]) == 0
    teacher = np.load(folder / "samples_nfe3.npz")
    np.testing.assert_array_equal(teacher["label"], [0, 1, 2, 0, 1, 2, 0])
    assert (teacher["image"] != drawn["image"]).any()


@pytest.mark.slow
def test_a_run_is_compared_with_its_data(folder, tmp_path):
    flags = (f"--workdir={folder}", "--num=30", "--batch_size=16", "--num_neighbours=3")
    assert evaluate.main([*flags, f"--output={tmp_path}/a.json", f"--write_reference={tmp_path}/real.npz",
                          f"--write_generated={tmp_path}/drawn.npz"]) == 0  # fmt: skip
    report = json.loads((tmp_path / "a.json").read_text())
    assert (report["num_real"], report["num_drawn"]) == (30, 30)
    assert all(0 <= report[name] <= 1 for name in ("precision", "recall", "coverage"))
    assert report["density"] >= 0
    real = np.stack([np.asarray(Image.open(path), np.float64).ravel() / 255 for path in real_files(folder)])
    written = np.load(tmp_path / "real.npz")
    np.testing.assert_allclose(written["mu"], real.mean(0), rtol=1e-12)
    np.testing.assert_allclose(written["sigma"], np.cov(real.T), rtol=1e-9, atol=1e-12)
    drawn = np.load(tmp_path / "drawn.npz")
    with jax.enable_x64(True):
        expected = frechet(written["mu"], written["sigma"], drawn["mu"], drawn["sigma"])
    assert report["frechet"] == pytest.approx(float(expected), rel=1e-9)

    assert evaluate.main([*flags, f"--output={tmp_path}/b.json", f"--reference={tmp_path}/real.npz"]) == 0
    again = json.loads((tmp_path / "b.json").read_text())
    assert again["frechet"] == pytest.approx(report["frechet"], rel=1e-9)
    assert again["precision"] is None


@pytest.mark.slow
def test_what_is_judged_is_what_is_drawn(folder, tmp_path, monkeypatch):
    (tmp_path / "keeper.py").write_text(
        "kept = []\ndef keep(images):\n    kept.append(images)\n    return images.mean((1, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import keeper

    shared = (f"--workdir={folder}", "--num=10", "--batch_size=4", "--seed=5")
    assert evaluate.main([*shared, "--features=keeper:keep", f"--output={tmp_path}/a.json"]) == 0
    assert sample.main([*shared, f"--output={tmp_path}/a"]) == 0
    drawn = np.concatenate(keeper.kept[-3:])  # after the real images come three batches of drawn ones
    np.testing.assert_array_equal(drawn, np.load(tmp_path / "a.npz")["image"])


def real_files(folder):
    """The training part of the folder's images."""
    from poise.launch.image_sets import open_images

    data = json.loads((folder / "config.json").read_text())["data"]
    train = open_images(data, "").train
    return [train._images._files[i] for i in train._indices]


@pytest.mark.slow
def test_any_feature_function_will_do(folder, tmp_path, monkeypatch):
    (tmp_path / "my_features.py").write_text("def means(images):\n    return images.mean((1, 2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    flags = (f"--workdir={folder}", "--num=24", "--split=held_out", f"--output={tmp_path}/a.json")
    assert evaluate.main([*flags, "--features=my_features:means", f"--write_generated={tmp_path}/drawn.npz"]) == 0
    assert np.load(tmp_path / "drawn.npz")["mu"].shape == (3,)


@pytest.mark.parametrize(
    ("launcher", "flags", "message"),
    [
        (sample, ["--labels=3"], "labels must be below 3, got 3"),
        (sample, ["--nfe=4"], "nfe must be odd"),
        (sample, ["--workdir={folder}/none"], "no student at"),
        (sample, ["--workdir={folder}/none", "--nfe=3"], "there is no teacher in"),
        (evaluate, ["--features=json:no_such"], "features: 'json:no_such' cannot be imported"),
        (evaluate, ["--features=json"], "features must be pixels or package.module:function, got 'json'"),
        (evaluate, ["--reference={folder}/student.safetensors"], "holds no arrays mu and sigma"),
        (evaluate, ["--data=digits"], r"data must hold images of shape \(8, 8, 3\), got \(8, 8, 1\)"),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(folder, capsys, launcher, flags, message):
    given = [f"--workdir={folder}", *(flag.format(folder=folder) for flag in flags)]
    before = sorted(folder.iterdir())
    try:
        code = launcher.main(given)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err.strip()
    assert code == 2, said
    assert re.search(message, said)
    assert len(said.splitlines()) == 1
    assert sorted(path for path in folder.iterdir() if path.name != "data") == before
