"""The mixture recipe: in seconds, a mode-seeking divergence takes one mode where a mass-covering one takes both."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import matplotlib.image
import pytest

from poise.launch import distill

spec = importlib.util.spec_from_file_location("tiny_launch", pathlib.Path(__file__).with_name("tiny_launch.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

SMALL = ("--recipe=mixture2d", "--warmup_steps=2", "--batch_size=16", "--fake_updates=1", "--eval_every=1")


def run(workdir, *flags):
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "poise.launch.distill", "--recipe=mixture2d", f"--workdir={workdir}", *flags]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout
    return json.loads((workdir / "report.json").read_text())


@pytest.mark.slow
def test_the_recipe_runs_and_goes_on(tmp_path):
    said, _ = tiny.launch("distill", *SMALL, f"--workdir={tmp_path}", "--steps=2")
    report = json.loads((tmp_path / "report.json").read_text())
    assert "share of samples nearer to the left and the right mode" in said
    assert report["student_updates"] == 2
    assert report["student"]["share_left"] + report["student"]["share_right"] == pytest.approx(1.0)
    assert matplotlib.image.imread(tmp_path / "mixture2d.png").std() > 0.05
    rows = tiny.rows(tmp_path)
    assert [row["step"] for row in rows if row["phase"] == "distill" and "eval/share_left" in row] == [1, 2]
    tiny.launch("distill", *SMALL, f"--workdir={tmp_path}", "--steps=3")
    assert json.loads((tmp_path / "report.json").read_text())["student_updates"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(sent, code, tmp_path):
    flags = [*SMALL, "--steps=400", "--eval_every=0", "--save_every=1000", f"--workdir={tmp_path}"]
    process = tiny.start("distill", *flags)
    while process.poll() is None and sum(row["phase"] == "distill" for row in tiny.rows(tmp_path)) < 3:
        time.sleep(0.01)
    process.send_signal(sent)
    _, errors = process.communicate()
    assert process.returncode == code, errors
    assert "the same command goes on" in errors
    reached = sum(row["phase"] == "distill" for row in tiny.rows(tmp_path))
    assert 3 <= reached < 400
    _, errors = tiny.launch("distill", *flags)
    assert f"going on from step {reached} of phase 'distill'" in errors
    steps = [row["step"] for row in tiny.rows(tmp_path) if row["phase"] == "distill"]
    assert steps == list(range(1, 401))


@pytest.mark.effects
def test_jensen_shannon_covers_both_modes_where_reverse_kl_takes_one(tmp_path):
    covering = run(tmp_path / "js")
    seeking = run(tmp_path / "rkl", "--divergence=reverse_kl")
    shares = [covering["student"][name] for name in ("share_left", "share_right")]
    assert min(shares) > 0.3
    assert max(seeking["student"]["share_left"], seeking["student"]["share_right"]) > 0.99
    assert covering["student"]["modes_covered"] == 1.0
    assert seeking["student"]["modes_covered"] == 0.5
    assert covering["student"]["singular_values"][0] > 1.2 > 0.6 > seeking["student"]["singular_values"][0]


def test_a_learned_teacher_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        distill.main(["--recipe=mixture2d", f"--workdir={tmp_path}/run", "--teacher=somewhere"])
    assert end.value.code == 2
    assert "teacher must be empty for data=mixture2d" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
