"""The comparison of losses for values: what it writes, stopping and going on, mistakes, and the parts it is made of."""

import importlib.util
import json
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from poise.launch import value
from poise.launch.config import ConfigError
from poise.launch.episodes import play_episodes
from poise.launch.intervals import interquartile_mean
from poise.launch.value import LOSSES, ValueConfig
from poise.launch.value_phases import make_environment, make_transform
from poise.nets import ValueMLP
from poise.rl import scalar

spec = importlib.util.spec_from_file_location("tiny_launch", pathlib.Path(__file__).with_name("tiny_launch.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

SMALL = (
    "--num_seeds=2", "--updates=100", "--updates_per_step=2", "--num_envs=2", "--batch_size=4", "--buffer_size=20",
    "--min_history=4", "--hidden=4", "--eval_episodes=3", "--save_every_seconds=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("value") / "run"
    return workdir, tiny.launch("value", *SMALL, "--losses=hl_gauss", f"--workdir={workdir}")


@pytest.mark.slow
def test_the_run_writes_everything(finished):
    workdir, (printed, errors) = finished
    assert {path.name for path in workdir.iterdir()} >= {"config.json", "metrics.jsonl", "checkpoints", "report.json"}
    for name in ("curves.png", "values.png"):
        assert matplotlib.image.imread(workdir / name).std() > 0.05
    rows = tiny.rows(workdir)
    assert [(row["phase"], row["step"]) for row in rows] == [("hl_gauss", step) for step in range(1, 51)]
    assert all(len(row["return_mean"]) == 2 for row in rows)
    assert rows[-1]["env_steps"] == [200.0, 200.0]
    report = json.loads((workdir / "report.json").read_text())
    figures = report["losses"]["hl_gauss"]
    last = np.array([row["return_mean"] for row in rows])[-6:].mean(0)
    np.testing.assert_allclose(figures["return_last_eighth"]["by_seed"], last, rtol=1e-6)
    low, high = figures["return_last_eighth"]["interval_95"]
    assert low <= figures["return_last_eighth"]["interquartile_mean"] <= high
    assert figures["greedy_return"]["by_seed"] == rows[-1]["eval/return"]
    assert all(-1 <= score <= 1 for score in rows[-1]["eval/return"])  # without the noise
    assert figures["excess_loss"] > 0
    assert report["settings"]["hidden"] == [4]
    assert "hl_gauss: finished 50 steps" in errors
    table = printed.splitlines()
    assert table[0].split()[:2] == ["return", "95%"]
    assert [line.split()[0] for line in table[2:]] == ["hl_gauss"]


@pytest.mark.effects
def test_a_stopped_run_ends_with_the_same_bits(tmp_path):
    printed, _ = tiny.launch("value", *SMALL, f"--workdir={tmp_path}/undisturbed")
    assert [line.split()[0] for line in printed.splitlines()[2:]] == ["mse", "hl_gauss"]
    stopped = tmp_path / "stopped"
    tiny.stop_in_phase("mse", "value", *SMALL, workdir=stopped)
    tiny.stop_in_phase("hl_gauss", "value", *SMALL, workdir=stopped)
    again, errors = tiny.launch("value", *SMALL, f"--workdir={stopped}")
    assert "going on from step" in errors
    assert tiny.final_bits(stopped) == tiny.final_bits(tmp_path / "undisturbed")
    assert again == printed
    report = json.loads((stopped / "report.json").read_text())
    assert report["losses"]["mse"]["excess_loss"] is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--losses=mse,hl_gaus"], "losses must be among mse, hl_gauss, two_hot, c51, mse_softmax, got 'hl_gaus' (did"),
        (["--losses=mse,mse"], "losses must hold one or more different names, got 'mse,mse'"),
        (["--losses="], "losses must hold one or more different names, got ''"),
        (["--eval_every=30"], "eval_every must divide the run's 80 steps, got 30"),
        (["--updates=130"], "updates must be a multiple of updates_per_step = 50, got 130"),
        (["--num_bins=1"], "num_bins must be at least 2"),
        (["--buffer_size=10"], "num_envs must be at most buffer_size = 10, got 32"),
        (["--v_min=1"], "v_min must be below v_max, got 1.0 and 0.0"),
        (["--env=CartPole-v1"], "v_min and v_max must be given for env=CartPole-v1"),
        (["--reward_noise=-1"], "--reward_noise must be at least 0, got '-1'"),
        (["--num_seeds=0"], "--num_seeds must be at least 1, got '0'"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        value.main([f"--workdir={tmp_path}/run", *flags])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert words in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_without_gymnax_its_environments_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gymnax", None)
    assert value.main([f"--workdir={tmp_path}/run", "--env=Breakout-MinAtar"]) == 2
    assert 'env=Breakout-MinAtar needs gymnax: pip install ".[rl]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_mesh_of_other_devices_is_refused(tmp_path, capsys):
    assert value.main([f"--workdir={tmp_path}/run", "--mesh=data:3"]) == 2
    assert "mesh must take all 8 devices, got 'data:3', which takes 3" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_environment_is_refused_with_the_nearest_name(monkeypatch):
    fake = types.SimpleNamespace(registered_envs=["Breakout-MinAtar", "CartPole-v1"])
    monkeypatch.setitem(sys.modules, "gymnax", fake)
    config = ValueConfig(env="Breakout", v_min=0.0, v_max=1.0)
    with pytest.raises(
        ConfigError, match=r"one of Breakout-MinAtar, CartPole-v1, catch, got 'Breakout' \(did you mean"
    ):
        make_environment(config)


def test_noise_widens_the_grid_as_far_as_there_is_no_room():
    assert ValueConfig(env="Breakout-MinAtar").support == (-3.0, 9.0)
    assert ValueConfig(env="Breakout-MinAtar", reward_noise=0.0).support == (-1.0, 9.0)
    assert ValueConfig(env="Breakout-MinAtar", reward_noise=2.0).support == (-5.0, 11.0)
    assert ValueConfig().support == (-4.0, 4.0)
    assert ValueConfig(v_min=-7.0, v_max=2.0).support == (-7.0, 2.0)


def test_flags_come_before_what_suits_the_environment():
    suits = ValueConfig().preset
    assert (suits.updates, suits.target_period, suits.num_bins, suits.hidden) == (4000, 100, 21, (64, 64))
    set_ = ValueConfig(updates=50, target_period=7, num_bins=5, hidden=(3,), learning_rate=0.1).preset
    assert (set_.updates, set_.target_period, set_.num_bins, set_.hidden, set_.learning_rate) == (50, 7, 5, (3,), 0.1)
    assert set_.epsilon_steps == suits.epsilon_steps


@pytest.mark.parametrize("loss", LOSSES)
def test_targets_are_distributions_with_an_entropy(loss):
    """float32's erf falls here and there; a share below zero would make the entropy NaN and end the run."""
    transform = make_transform(loss, -3.5, 3.5, 51)
    targets = transform.encode(jnp.linspace(-5, 5, 20_001))
    if loss in ("mse", "mse_softmax"):
        assert targets.shape == (20_001, 1)
        return
    assert float(targets.min()) >= 0
    np.testing.assert_allclose(np.asarray(targets.sum(-1)), 1, atol=2e-6)


def test_the_interquartile_mean_and_its_interval():
    values = np.stack([np.arange(8.0), np.full(8, 3.0)])
    found = interquartile_mean(values)
    np.testing.assert_allclose(found.mean, [3.5, 3.0])
    assert found.low[0] < 3.5 < found.high[0]
    assert found.low[1] == found.high[1] == 3.0
    single = interquartile_mean(np.array([2.0]))
    assert single.low == single.mean == single.high == 2.0
    wide, narrow = (interquartile_mean(np.tile(np.arange(4.0), n)) for n in (1, 8))
    assert narrow.high - narrow.low < wide.high - wide.low
    with pytest.raises(ValueError, match="one or more runs"):
        interquartile_mean(np.zeros((3, 0)))


def test_episodes_are_counted_to_their_end_and_not_beyond():
    env, net = make_environment(ValueConfig(reward_noise=0.0)), ValueMLP(3, 1, (4,))

    @jax.jit
    def play(key):
        params = net.init(key, jnp.zeros((1, 10, 5)))
        return play_episodes(env, net, scalar(), params, key, num_episodes=4, max_steps=12, epsilon=1.0)

    played = play(jax.random.key(0))
    assert played.lengths().tolist() == [9] * 4
    assert set(np.asarray(played.returns()).tolist()) <= {-1.0, 1.0}
    togo = np.asarray(played.returns_to_go(0.5))
    last = np.asarray(played.returns())
    for step in range(9):
        np.testing.assert_allclose(togo[step], last * 0.5 ** (8 - step), rtol=1e-6)
    assert not togo[9:].any()
    assert bool(played.terminated[8].all())
