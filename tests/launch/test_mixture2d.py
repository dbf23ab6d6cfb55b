"""The mixture recipe: in seconds, a mode-seeking divergence takes one mode where a mass-covering one takes both."""

import json
import os
import subprocess
import sys

import matplotlib.image
import pytest

from poise.launch import distill


def run(workdir, *flags):
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "poise.launch.distill", "--recipe=mixture2d", f"--workdir={workdir}", *flags]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads((workdir / "report.json").read_text()), done.stdout


def test_the_recipe_runs_and_goes_on(tmp_path):
    small = ("--warmup_steps=2", "--batch_size=16", "--fake_updates=1", "--eval_every=1")
    report, said = run(tmp_path, *small, "--steps=2")
    assert "share of samples nearer to the left and the right mode" in said
    assert report["student_updates"] == 2
    assert report["student"]["share_left"] + report["student"]["share_right"] == pytest.approx(1.0)
    assert matplotlib.image.imread(tmp_path / "mixture2d.png").std() > 0.05
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["phase"] == "distill" and "eval/share_left" in row] == [1, 2]
    longer, _ = run(tmp_path, *small, "--steps=3")
    assert longer["student_updates"] == 3


@pytest.mark.slow
def test_jensen_shannon_covers_both_modes_where_reverse_kl_takes_one(tmp_path):
    covering, _ = run(tmp_path / "js")
    seeking, _ = run(tmp_path / "rkl", "--divergence=reverse_kl")
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
