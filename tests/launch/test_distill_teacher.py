"""From official weights and a folder of images to a student, its drawings and its figures, by four commands."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from poise.launch import distill


def command(launcher, *flags):
    """Runs a launcher on one device, with programs that are compiled quickly for the few steps that they run."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-m", f"poise.launch.{launcher}", *flags], env=environment, check=True)


@pytest.mark.slow
@pytest.mark.golden
@pytest.mark.golden_pattern("nets", "*.safetensors")
def test_a_converted_teacher_is_distilled_on_a_folder_of_images(golden_file, tmp_path, capsys):
    config = json.loads(str(np.load(golden_file.with_suffix(".npz"))["config"]))
    size, classes = config["img_resolution"], config["label_dim"]
    rng = np.random.default_rng(0)
    for i in range(60):
        path = tmp_path / "images" / f"class{i % classes}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3)).astype(np.uint8)).save(path)
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    command("convert_edm", f"--input={golden_file}", f"--output={teacher}")
    cache = f"--jax_cache_dir={tmp_path}/cache"
    flags = ["--recipe=smoke", f"--data=folder:{tmp_path}/images", f"--teacher={teacher}", f"--workdir={run}"]
    command("distill", *flags, cache)
    report = json.loads((run / "report.json").read_text())
    assert report["seconds"].keys() == {"warmup", "distill"}
    assert report["student_updates"] == 4
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 1, 2, 3, 4]
    command("distill", *flags, cache, "--steps=5")  # goes on, with the teacher read again
    assert json.loads((run / "report.json").read_text())["student_updates"] == 5

    command("sample", f"--workdir={run}", "--num=6", "--nfe=3")
    assert np.load(run / "samples_nfe3.npz")["image"].shape == (6, size, size, 3)
    command("evaluate", f"--workdir={run}", "--num=20")
    assert json.loads((run / "evaluation_nfe1.json").read_text())["num_real"] == 50
    assert distill.main([*flags[:-1], f"--workdir={tmp_path}/other", "--data=digits"]) == 2
    assert "the teacher must be one of the data's images" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
