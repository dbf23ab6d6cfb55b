"""The main job from its command line: to the end at smoke size, a kill on the way, and its mistakes."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

import matplotlib.image
import numpy as np
import pytest
from safetensors.numpy import load_file

from poise.fdistill import DIVERGENCES
from poise.launch.distill import RECIPES, DistillConfig

COMMAND = [sys.executable, "-m", "poise.launch.distill", "--recipe=smoke"]
FIGURES = {
    "frechet",
    "frechet_train",
    "precision",
    "recall",
    "coverage",
    "class_consistency",
    "nfe",
    "images_per_second",
}


CACHE = tempfile.TemporaryDirectory()  # of compiled programs, which all runs here share


def environment():
    """One device, as a user's laptop has, and programs that are compiled quickly for the few steps that they run."""
    return {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}


def start(*flags):
    command = [*COMMAND, f"--jax_cache_dir={CACHE.name}", *flags]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def launch(*flags, check=True):
    process = start(*flags)
    output, errors = process.communicate()
    assert not check or process.returncode == 0, errors[-4000:]
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def rows(workdir: pathlib.Path):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def whole_rows(workdir: pathlib.Path):
    """The rows that are there while a run writes them."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the smoke recipe, undisturbed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, launch(f"--workdir={workdir}")


@pytest.mark.slow
def test_the_run_writes_everything(finished):
    workdir, done = finished
    names = {path.name for path in workdir.iterdir()}
    assert {"config.json", "metrics.jsonl", "timing.jsonl", "report.json", "samples.png", "distill.png"} <= names
    assert "student.safetensors" in names
    report = json.loads((workdir / "report.json").read_text())
    for name in ("teacher", "teacher_1step", "student", "real"):
        assert report[name].keys() >= FIGURES
    assert report["teacher"]["nfe"] == 5
    assert report["student"]["nfe"] == 1
    assert report["seconds"].keys() == {"teacher", "warmup", "distill"}
    assert report["seed"] == report["config"]["seed"] == 0
    assert report["versions"]["poise"]
    assert matplotlib.image.imread(workdir / "samples.png").std() > 0.05
    assert matplotlib.image.imread(workdir / "distill.png").std() > 0.05
    for name in ("real", "teacher", "student"):
        assert name in done.stdout


@pytest.mark.slow
def test_metrics_have_one_object_a_step_and_no_clock(finished):
    workdir, _ = finished
    for phase, steps in (("teacher", 6), ("warmup", 2), ("distill", 4)):
        steps_written = [row["step"] for row in rows(workdir) if row["phase"] == phase]
        assert steps_written == list(range(1, steps + 1))
    evaluated = [row["step"] for row in rows(workdir) if "eval/frechet" in row]
    assert evaluated == [2, 4]
    assert not any("second" in name or "time" in name for row in rows(workdir) for name in row)


def results(workdir: pathlib.Path):
    """Everything that must not depend on interruptions: parameters, metrics, and the report without its clock."""
    report = json.loads((workdir / "report.json").read_text())
    report.pop("seconds")
    report.pop("config")
    for name in ("teacher", "teacher_1step", "student", "real"):
        report[name].pop("images_per_second")
    return (workdir / "metrics.jsonl").read_bytes(), load_file(workdir / "student.safetensors"), report


@pytest.mark.slow
def test_killed_while_it_distils_it_ends_bit_identical(finished, tmp_path):
    """SIGKILL at some moment of a step, an evaluation or a save; test_faults.py has every phase."""
    expected = results(finished[0])
    workdir = tmp_path / "run"
    process = start(f"--workdir={workdir}", "--save_every=1")
    while process.poll() is None and not any(row["phase"] == "distill" for row in whole_rows(workdir)):
        time.sleep(0.01)
    time.sleep(random.Random(int.from_bytes(os.urandom(4))).uniform(0.0, 1.0))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    launch(f"--workdir={workdir}", "--save_every=1")
    metrics, student, report = results(workdir)
    assert metrics == expected[0]
    assert report == expected[2]
    assert student.keys() == expected[1].keys()
    for name, value in student.items():
        np.testing.assert_array_equal(value, expected[1][name], err_msg=name)


@pytest.mark.slow
def test_a_finished_run_is_left_alone_and_more_steps_extend_it(finished):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    launch(f"--workdir={workdir}")
    assert (workdir / "metrics.jsonl").read_bytes() == before
    launch(f"--workdir={workdir}", "--steps=6")
    assert (workdir / "metrics.jsonl").read_bytes().startswith(before)
    assert [row["step"] for row in rows(workdir) if row["phase"] == "distill" and "fake_loss" in row] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stepz=3"], ["--stepz", "did you mean", "steps"]),
        (["--recipe=digit"], ["recipe", "digit", "digits"]),
        (["--steps=0"], ["steps", "at least 1", "0"]),
        (["--batch_size=1"], ["batch_size", "at least 2"]),
        (["--divergence=jensen_shanon"], ["divergence", "jensen_shannon"]),
        (["--learning_rate=fast"], ["learning_rate", "fast"]),
        (["--sigma_min=9"], ["sigma_min", "sigma_max"]),
        (["--model_channels=6"], ["model_channels", "multiple of 4"]),
        (["--channel_mult="], ["channel_mult", "at least one entry"]),
        (["--channel_mult=1,2,2,2,2"], ["channel_mult", "fewer entries"]),
        (["--attn_resolutions=5"], ["attn_resolutions", "8"]),
        (["--seed=4294967296"], ["seed", "at most"]),
        (["runs/digits"], ["runs/digits"]),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(flags, words, tmp_path):
    workdir = tmp_path / "run"
    done = launch(f"--workdir={workdir}", *flags, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr
    assert not workdir.exists()
    assert not done.stdout


def test_no_workdir_and_one_that_cannot_be_written(tmp_path):
    done = launch(check=False)
    assert done.returncode == 2
    assert "--workdir" in done.stderr
    file = tmp_path / "file"
    file.write_text("")
    done = launch(f"--workdir={file}/run", check=False)
    assert done.returncode == 2
    assert str(file) in done.stderr


@pytest.mark.slow
def test_another_configuration_in_the_same_folder_is_refused(finished):
    workdir, _ = finished
    done = launch(f"--workdir={workdir}", "--seed=1", "--teacher_steps=7", check=False)
    assert done.returncode == 2
    assert "seed was 0 and is now 1" in done.stderr
    assert "teacher_steps was 6 and is now 7" in done.stderr


def test_help_lists_every_flag_without_loading_jax():
    code = (
        "import sys; from poise.launch.distill import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "assert not {'jax', 'orbax', 'tensorflow_datasets', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    for name in DistillConfig.__dataclass_fields__:
        assert f"--{name}" in done.stdout
    for name in RECIPES:
        assert name in done.stdout


def test_the_flag_allows_exactly_the_library_divergences():
    choices = DistillConfig.__dataclass_fields__["divergence"].metadata["poise"]["choices"]
    assert sorted(choices) == sorted(DIVERGENCES)


def readme_blocks():
    text = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run_python(code, cwd):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=cwd)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_a_student_loads_in_the_three_lines_of_the_readme(finished, tmp_path):
    workdir, _ = finished
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(workdir)
    run_python(readme_blocks()[0] + "\nassert images.shape == (10, 8, 8, 1), images.shape", tmp_path)


@pytest.mark.slow
def test_the_parts_of_the_readme_run(tmp_path):
    run_python(readme_blocks()[1] + "\nassert int(state.step) == 1", tmp_path)
