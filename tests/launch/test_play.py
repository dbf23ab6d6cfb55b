"""An agent at play: frames of the whole episode, both files, and sentences for what can't be played."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from poise.launch import play
from poise.launch.frames import draw_frames, paint
from poise.launch.loop import fit
from poise.launch.value import ValueConfig
from poise.launch.value_phases import value_phases
from poise.launch.workdir import settle_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose agents are as they begin; the second loss has none yet."""
    workdir = tmp_path_factory.mktemp("play")
    config = ValueConfig(losses="hl_gauss,mse", num_seeds=2, num_envs=1, buffer_size=2, min_history=1, hidden=(4,))
    settle_config(config, workdir)
    fit([value_phases(config)[0]._replace(num_steps=0)], workdir=workdir, seed=0, devices=jax.devices()[:1])
    return workdir


def test_an_episode_becomes_an_animation_and_a_sheet(run, capsys):
    assert play.main([f"--workdir={run}", "--loss=hl_gauss", "--agent=1", "--frames_per_second=4"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(("9 steps, return 1: ", "9 steps, return -1: "))
    with Image.open(run / "play_hl_gauss.gif") as gif:
        durations = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            durations.append(gif.info["duration"])
        assert sum(durations) == 10 * 250 + 1000  # equal frames may be stored as one that is shown longer
        assert gif.info["loop"] == 0
    with Image.open(run / "play_hl_gauss.png") as picture:
        assert np.asarray(picture).std() > 10


def test_an_episode_can_be_cut_and_go_elsewhere(run, tmp_path, capsys):
    flags = [f"--workdir={run}", "--loss=hl_gauss", "--max_steps=2", f"--output={tmp_path}/new/cut"]
    assert play.main(flags) == 0
    assert capsys.readouterr().out.startswith("2 steps, return 0: ")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"cut.gif", "cut.png"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--loss=hl_gaus"], "loss must be among the run's, hl_gauss, mse, got 'hl_gaus' (did you mean hl_gauss?)"),
        (["--agent=2"], "agent must be below the run's num_seeds = 2, got 2"),
        (["--loss=mse"], "has the run come to mse?"),
        (["--workdir=nowhere"], "there is no run of poise.launch.value in nowhere: it has no config.json"),
    ],
)
def test_what_cannot_be_played_is_told(run, flags, words, capsys):
    assert play.main([f"--workdir={run}", *flags]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert len(told.splitlines()) == 1


def test_a_run_of_another_launcher_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"data": "digits"}))
    assert play.main([f"--workdir={tmp_path}"]) == 2
    assert "is of no run of poise.launch.value: it sets data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"losses": "mse"}, "has the run come to mse?"),
        ({"losses": "mse", "hiden": [4]}, "hiden (did you mean hidden?)"),
    ],
)
def test_settings_that_lack_or_are_unknown_are_told(tmp_path, content, told, capsys):
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert play.main([f"--workdir={tmp_path}"]) == 2
    errors = capsys.readouterr().err
    assert told in errors
    assert len(errors.splitlines()) == 1


def test_channels_have_their_colours_and_later_ones_lie_on_top():
    observation = np.zeros((2, 2, 3), bool)
    observation[0, 0, 0] = observation[0, 0, 2] = observation[1, 1, 1] = True
    picture = paint(observation)
    assert len({tuple(colour) for colour in picture.reshape(-1, 3)}) == 3
    alone = np.zeros((1, 1, 3), bool)
    alone[..., 2] = True
    assert tuple(picture[0, 0]) == tuple(paint(alone)[0, 0])
    assert tuple(picture[0, 1]) == tuple(paint(np.zeros((1, 1)))[0, 0])


def test_bars_stand_for_the_distribution():
    observations = np.zeros((2, 10, 10), bool)
    probs, support = np.array([[0.0, 0.0, 0.25, 0.75]]), np.array([0.0, 1.0, 2.0, 3.0])
    frame = draw_frames(observations, np.array([2.75]), np.array([1.0]), probs, support)[0]
    bars = (frame[28:, -160:] == (31, 119, 180)).all(-1).sum(0)  # blue pixels in each column
    assert not bars[:80].any()
    assert abs(3 * int(bars[85]) - int(bars[150])) <= 3
    assert frame.shape == draw_frames(observations, np.array([2.75]), np.array([1.0]))[0].shape
