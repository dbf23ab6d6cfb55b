"""A profile holds the steps that were asked for and changes nothing else."""

import gzip
import json

import jax.numpy as jnp
import pytest

from poise.core import Algorithm
from poise.launch import NoData, Phase, fit, lm
from poise.launch.config import ConfigError
from poise.launch.profiling import ProfileError, StepProfile


def counted(workdir, **options):
    algorithm = Algorithm(lambda key, batch: jnp.zeros(()), lambda state, batch, key: (state + 1, {"count": state}))
    phases = [Phase(name, lambda previous: algorithm, NoData(), 3) for name in ("one", "two")]
    fit(phases, workdir=workdir, seed=0, tensorboard=False, **options)
    return (workdir / "metrics.jsonl").read_bytes()


def profiled_steps(folder):
    (file,) = folder.rglob("perfetto_trace.json.gz")
    with gzip.open(file, "rt") as text:
        events = json.load(text)["traceEvents"]
    return sorted({int(event["args"]["step_num"]) for event in events if event.get("name") == "train"})


def test_steps_are_counted_over_phases_and_the_run_is_the_same(tmp_path):
    plain = counted(tmp_path / "plain")
    assert counted(tmp_path / "profiled", profile_steps=(2, 5)) == plain
    assert profiled_steps(tmp_path / "profiled" / "profile") == [2, 3, 4, 5]
    assert list((tmp_path / "profiled" / "profile").rglob("*.xplane.pb"))
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_profile_that_the_run_ends_before_is_written(tmp_path):
    counted(tmp_path, profile_steps=(6, 100))
    assert profiled_steps(tmp_path / "profile") == [6]


def test_a_profile_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    with pytest.raises(ProfileError, match=r"profile_steps: .*profile"):
        counted(tmp_path, profile_steps=(2, 3))


@pytest.mark.parametrize("steps", [(1,), (3, 2), (0, 2), (1, 2, 3)])
def test_bad_steps(steps, tmp_path):
    with pytest.raises(ConfigError, match="profile_steps must be two steps in order, such as 10,15, got"):
        StepProfile(steps, tmp_path)


def test_a_launcher_says_so_before_anything_is_written(tmp_path, capsys):
    assert lm.main([f"--workdir={tmp_path}/run", "--recipe=smoke", "--profile_steps=5,4"]) == 2
    assert "profile_steps must be two steps in order, such as 10,15, got 5,4" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
