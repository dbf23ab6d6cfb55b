"""The language-model launcher at its smallest: what it writes, how it resumes, what it refuses."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.launch import lm, lm_phases, texts
from poise.launch.checkpoint_tree import restore_tree
from poise.launch.data import DataError
from poise.nets import Transformer

TINY = (
    "--recipe=smoke", "--steps=3", "--width=8", "--eval_tokens=128", "--sample_tokens=6", "--batch_size=16", "--seed=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lm") / "run"
    assert lm.main([f"--workdir={workdir}", *TINY]) == 0
    return workdir


def bits(workdir: pathlib.Path):
    leaves = [jax.tree.leaves(restore_tree(folder)) for folder in sorted((workdir / "checkpoints").glob("0*"))]
    return (workdir / "metrics.jsonl").read_bytes(), [np.asarray(leaf).tobytes() for row in leaves for leaf in row]


@pytest.mark.slow
def test_what_a_run_leaves(finished):
    report = json.loads((finished / "report.json").read_text())
    assert set(report["losses"]) == {"softmax", "lssar_p15"}
    for losses in report["losses"].values():
        assert losses["loss_4x"] == pytest.approx(np.mean(losses["loss_4x_quarters"]))
        assert 3 < losses["loss_1x"] < 7  # near log(256) after three updates
    assert (finished / "extrapolation.png").read_bytes().startswith(b"\x89PNG")
    assert "=== softmax ===\nThe " in (finished / "samples.txt").read_text()


@pytest.mark.slow
def test_a_changed_text_is_another_run(finished, monkeypatch, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    splits = texts.open_text("topics")
    monkeypatch.setattr(texts, "open_text", lambda *arguments: splits._replace(train=splits.train[1:]))
    assert lm.main([f"--workdir={finished}", *TINY]) == 2
    assert "the data has changed since the run in" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_all_kinds_of_attention_see_the_same_batches(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["step"]) for row in rows] == [
        (name, step) for name in ("softmax", "lssar_p15") for step in (1, 2, 3)
    ]
    assert all("loss" in row for row in rows)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch):
    writes = []

    def interrupted(*arguments):
        writes.append(arguments)
        raise KeyboardInterrupt

    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:  # when the second model is about to be judged
        patch.setattr(lm_phases, "evaluator", lambda model, cut, unit: interrupted if writes else _count(writes))
        assert lm.main([f"--workdir={workdir}", *TINY]) == 130
    assert lm.main([f"--workdir={workdir}", *TINY]) == 0
    before, after = bits(finished), bits(workdir)
    assert before[1] == after[1]


def _count(writes):
    def evaluate(params):
        writes.append(None)
        raise KeyboardInterrupt

    return evaluate


def test_windows_of_every_length_predict_the_same_tokens():
    tokens = np.arange(1000)
    cut = lm_phases.evaluation_windows(tokens, [8, 16, 64], at_most=500)
    for length, rows in cut.items():
        assert rows.shape == (448 // length, length + 1)
        np.testing.assert_array_equal(rows[:, 1:].ravel(), np.arange(1, 449))
    with pytest.raises(DataError, match="must hold a window of 1025; lower eval_factors or length"):
        lm_phases.evaluation_windows(tokens, [64, 1024], at_most=5000)


def test_the_mean_loss_does_not_depend_on_how_windows_are_grouped(monkeypatch):
    model = Transformer(16, 1, 1, 8)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    cut = lm_phases.evaluation_windows(np.random.default_rng(0).integers(0, 16, 300), [8, 16], 280)
    whole = lm_phases.evaluator(model, cut, 8)(params)
    monkeypatch.setattr(lm_phases, "_TOKENS_AT_ONCE", 48)  # of 34 windows, the last group is filled up
    assert lm_phases.evaluator(model, cut, 8)(params) == pytest.approx(whole, rel=1e-6)
    direct = jax.jit(functools.partial(lm_phases.token_losses, model))(params, jnp.asarray(cut[8]))
    assert whole["loss_1x"] == pytest.approx(float(direct.mean()), rel=1e-6)
    assert whole["loss_1x_q2"] == pytest.approx(float(direct[:, 2:4].mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--variants=softmax,lsar_p15", "variants must be among .* got 'lsar_p15' (did you mean lssar_p15?)"),
        ("--variants=softmax,softmax", "variants must hold one or more different names"),
        ("--width=10", "width must be an even multiple of num_heads=2, got 10"),
        ("--eval_factors=2,4", "eval_factors must begin with 1"),
        ("--eval_factors=1,3,8", "eval_factors must begin with 1 and divide their last, got 1,3,8"),
        ("--vocab_size=100", "vocab_size must be 0 or at least 257, got 100"),
        ("--data=wiki", "data must be topics, file:PATH or tfds:NAME"),
        ("--batch_size=4", "batch_size must be a multiple of 8, the devices that share a batch, got 4"),
        ("--mesh=fsdp:3", "mesh must take all 8 devices, got 'fsdp:3', which takes 3"),
        ("--eval_every=300", "eval_every must divide steps=1000, got 300"),
        ("--prompt=", "prompt must have at least one character"),
        ("--data=file:/no/such/text", "can't be read"),
        ("--eval_factors=1,4096", "must hold a window of 262145"),
    ],
)
def test_bad_flags(tmp_path, capsys, flag, message):
    import re

    workdir = tmp_path / "run"
    try:
        code = lm.main([f"--workdir={workdir}", flag])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    pattern = re.escape(message).replace(r"\.\*", ".*") if "(did" in message else re.escape(message)
    assert re.search(pattern, " ".join(capsys.readouterr().err.split()))
    assert not workdir.exists()
