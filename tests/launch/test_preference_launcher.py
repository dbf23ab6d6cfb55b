"""The comparison of preference losses: what it writes, stopping and going on, mistakes, and the parts it is made of."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from poise.launch import preference
from poise.launch.activations import with_activations
from poise.launch.checkpoint_tree import restore_tree
from poise.launch.config import ConfigError
from poise.launch.data import DataError
from poise.launch.preference_data import END, encode_pair, facts_of, file_pairs, read_jsonl, trigger_pairs
from poise.launch.preference_judge import Likelihoods, pair_figures, trigger_figures
from poise.launch.preference_phases import Seen
from poise.launch.trigger_task import BAD, GOOD, TRIGGER
from poise.launch.workdir import settle_data
from poise.nets import Transformer

spec = importlib.util.spec_from_file_location("tiny_launch", pathlib.Path(__file__).with_name("tiny_launch.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

SMALL = (
    "--num_layers=1", "--width=4", "--num_pairs=12", "--num_held_out=10", "--pretrain_steps=40", "--steps=40",
    "--batch_size=4", "--save_every_seconds=0", "--eval_every=20",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("preference") / "run"
    return workdir, tiny.launch("preference", *SMALL, "--methods=sparse_po", f"--workdir={workdir}")


@pytest.mark.slow
def test_the_run_writes_everything(finished):
    workdir, (printed, _) = finished
    assert {path.name for path in workdir.iterdir()} >= {"config.json", "data.json", "metrics.jsonl", "checkpoints"}
    assert matplotlib.image.imread(workdir / "preference.png").std() > 0.05
    assert (workdir / "table.txt").read_text() == printed
    assert [line.split()[0] for line in printed.splitlines()[2:]] == ["sparse_po"]
    rows = tiny.rows(workdir)
    steps = [(row["phase"], row["step"]) for row in rows]
    assert steps == [(phase, step) for phase in ("pretrain", "sparse_po") for step in range(1, 41)]
    assert rows[39]["loss"] < rows[0]["loss"]
    report = json.loads((workdir / "report.json").read_text())
    figures = report["methods"]["sparse_po"]
    judged = [row for row in rows if row["phase"] == "sparse_po" and "eval/kl" in row]
    assert [row["step"] for row in judged] == [20, 40]
    assert {name: judged[-1][f"eval/{name}"] for name in figures} == figures
    assert figures["kl"] > 0
    change = figures["ranking_accuracy"] - figures["ranking_accuracy_before"]
    assert change == pytest.approx(figures["flipped_right"] - figures["flipped_wrong"], abs=1e-6)
    assert report["share_of_raters"] == 1.0
    assert report["pairs"] == 12


def assert_the_reference_is_kept(workdir, *folders):
    pretrained = jax.tree.leaves(restore_tree(workdir / "checkpoints" / "00_pretrain")["params"])
    for folder in folders:
        state = restore_tree(workdir / "checkpoints" / folder)
        reference, policy = (jax.tree.leaves(tree) for tree in (state["frozen"]["ref"], state["trained"]["policy"]))
        for kept, before in zip(reference, pretrained, strict=True):
            np.testing.assert_array_equal(np.asarray(kept), np.asarray(before))
        moved = [np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(policy, reference, strict=True)]
        assert 0 < max(moved) < 0.5


@pytest.mark.slow
def test_a_loss_starts_from_the_reference_and_leaves_it_alone(finished):
    workdir, _ = finished
    assert_the_reference_is_kept(workdir, "01_sparse_po")
    assert set(restore_tree(workdir / "checkpoints" / "01_sparse_po")["trained"]["masks"]) == {"common"}


@pytest.mark.effects
def test_a_stopped_run_ends_with_the_same_bits(tmp_path):
    flags = (*SMALL, "--methods=sparse_po,mapo")
    printed, _ = tiny.launch("preference", *flags, f"--workdir={tmp_path}/undisturbed")
    assert [line.split()[0] for line in printed.splitlines()[2:]] == ["sparse_po", "mapo"]
    stopped = tmp_path / "stopped"
    for phase in ("pretrain", "sparse_po", "mapo"):
        tiny.stop_in_phase(phase, "preference", *flags, workdir=stopped)
    again, errors = tiny.launch("preference", *flags, f"--workdir={stopped}")
    assert "going on from step" in errors
    assert tiny.final_bits(stopped) == tiny.final_bits(tmp_path / "undisturbed")
    assert again == printed
    assert_the_reference_is_kept(stopped, "01_sparse_po", "02_mapo")
    figures = json.loads((stopped / "report.json").read_text())["methods"].values()
    assert len({one["ranking_accuracy_before"] for one in figures}) == 1


@pytest.mark.slow
def test_a_file_of_pairs_by_every_loss(tmp_path):
    lines = [{"prompt": f"{i} and one? ", "chosen": f"It is {i + 1}.", "rejected": "No, " * (1 + i)} for i in range(12)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    flags = (*SMALL[:2], "--pretrain_steps=4", "--steps=4", f"--data=jsonl:{path}", "--max_length=32", "--eval_every=0")
    methods = ",".join(preference.METHODS)
    _, errors = tiny.launch("preference", *flags, f"--methods={methods}", f"--workdir={tmp_path}/run")
    assert "texts are longer than max_length=32 and are cut" in errors
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["methods"]) == set(preference.METHODS)
    assert report["held_out_pairs"] == 2
    assert report["share_of_raters"] == 0.75
    assert all("kl_at_trigger" not in figures for figures in report["methods"].values())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--methods=dpo,sparse"], "got 'sparse' (did you mean sparse_po?)"),
        (["--data=texts"], "data must be trigger or jsonl:PATH, got 'texts'"),
        (["--data=jsonl:"], "data must be trigger or jsonl:PATH, got 'jsonl:'"),
        (["--width=6", "--num_heads=2"], "width must be an even multiple of num_heads = 2, got 6"),
        (["--beta=0"], "--beta must be more than 0, got '0'"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        preference.main([f"--workdir={tmp_path}/run", *flags])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert words in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "run").exists()


GOOD_LINE = '{"prompt": "a", "chosen": "b", "rejected": "c"}'


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([GOOD_LINE, "", "{"], "line 3 is no JSON"),
        ([GOOD_LINE, "[1]"], "line 2 must hold an object, got list"),
        ([GOOD_LINE, '{"prompt": "a", "chosen": "b"}'], "line 2: rejected must be a text, got null"),
        (['{"prompt": 3, "chosen": "b", "rejected": "c"}'], "line 1: prompt must be a text, got 3"),
        ([GOOD_LINE.replace('"c"', '"b"')], "line 1: chosen and rejected are the same text"),
        ([GOOD_LINE], "must hold two or more pairs, got 1"),
    ],
)
def test_a_bad_file_is_told_by_its_line(lines, words, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as error:
        read_jsonl(str(path))
    assert words in str(error.value)
    assert preference.main([f"--data=jsonl:{path}", f"--workdir={tmp_path}/run"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_missing_file_is_told(tmp_path, capsys):
    assert preference.main([f"--data=jsonl:{tmp_path}/none.jsonl", f"--workdir={tmp_path}/run"]) == 2
    assert "none.jsonl cannot be read" in capsys.readouterr().err


def test_long_texts_lose_the_beginning_of_the_prompt_first():
    texts, start, cut = encode_pair("prompt", "yes", "no, no", 12)
    assert texts == [[END, *b"mpt", *b"yes", END][:], [END, *b"mpt", *b"no, no", END]] or len(texts[1]) == 12
    assert bytes(texts[1][1 : start[1]]) == b"rompt"[-(start[1] - 1) :]
    assert bytes(texts[0][1 : start[0]]) == bytes(texts[1][1 : start[1]])
    assert cut == [True, True]
    texts, start, cut = encode_pair("p", "a" * 20, "b", 8)
    assert texts[0] == [END, *b"aaaaaaa"]
    assert texts[1] == [END, *b"b", END]
    assert cut == [True, True]
    assert encode_pair("p", "a", "b", 8) == ([[END, *b"pa", END], [END, *b"pb", END]], [2, 2], [False, False])


def test_what_counts_of_a_file_is_the_completion(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [("é?", "yes", "n"), ("b", "c", "d"), ("e", "f", "g")]
    path.write_text(
        "\n".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) for row in rows)
    )
    data = file_pairs(str(path), seed=0, num_pairs=10, num_held_out=5, max_length=20)
    assert (len(data.train.chosen), len(data.held_out.chosen), data.vocab_size) == (2, 1, 257)
    seen = set()
    for part in (data.train, data.held_out):
        for side, mask in ((part.chosen, part.chosen_mask), (part.rejected, part.rejected_mask)):
            for tokens, counted in zip(side, mask, strict=True):
                told = tokens[1:][counted]
                assert told[-1] == END
                seen.add(bytes(told[:-1].tolist()).decode())
    assert seen == {"yes", "n", "c", "d", "f", "g"}
    whole = [bytes(t[1:][m][:-1].tolist()).decode() for t, m in zip(data.corpus, data.corpus_mask, strict=True)]
    assert set(whole) < {"é?yes", "é?n", "bc", "bd", "ef", "eg"}
    again = file_pairs(str(path), seed=1, num_pairs=10, num_held_out=5, max_length=20)
    assert again.digest == data.digest


def test_changed_data_is_refused(tmp_path):
    settle_data(facts_of(trigger_pairs(0, 40, 6)), tmp_path)
    settle_data(facts_of(trigger_pairs(0, 40, 6)), tmp_path)
    with pytest.raises(ConfigError, match="the data has changed"):
        settle_data(facts_of(trigger_pairs(1, 40, 6)), tmp_path)


def test_what_follows_the_trigger_makes_a_text_chosen():
    data = trigger_pairs(3, 40, 6)
    for texts, allowed in ((data.train.chosen, GOOD), (data.train.rejected, BAD)):
        behind = texts[:, 1:][texts[:, :-1] == TRIGGER]
        assert len(behind) > 30
        assert set(behind.tolist()) <= set(allowed)
    assert data.mixed is not None
    behind = data.mixed[:, 1:][data.mixed[:, :-1] == TRIGGER]
    assert 0.4 < np.isin(behind, GOOD).mean() < 0.6


def test_activations_are_those_of_the_model():
    model, tokens = Transformer(11, num_layers=2, num_heads=2, width=8), jnp.arange(10).reshape(2, 5)

    @jax.jit
    def run(key):
        params = model.init(key, tokens)
        return params, *with_activations(model, params, tokens), model.apply(params, tokens)

    params, logits, seen, alone = run(jax.random.key(0))
    np.testing.assert_allclose(logits, alone, rtol=1e-5, atol=1e-5)
    last = seen.residual[-1]
    scale = params["params"]["norm"]["scale"]
    normal = last / jnp.sqrt(jnp.mean(last**2, -1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(normal @ params["params"]["embed"]["embedding"].T, logits, rtol=1e-4, atol=1e-4)


def test_a_policy_that_is_the_reference_changes_nothing():
    data = trigger_pairs(0, 40, 6)
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(-2, 1, (2, 6, 15)).astype(np.float32)
    zero = np.zeros((6, 15), np.float32)
    figures = pair_figures(Likelihoods(chosen, rejected, chosen, rejected, zero, zero), data.held_out, 0.75, 0.5)
    assert figures["ranking_accuracy"] == figures["ranking_accuracy_before"]
    assert figures["ranking_accuracy"] == pytest.approx(np.mean(chosen.sum(1) >= rejected.sum(1)))
    unchanged = ("kl", "reward_accuracy", "reward_margin", "flipped_right", "flipped_wrong")
    assert all(figures[name] == 0 for name in unchanged)
    better = chosen + 10.0
    figures = pair_figures(Likelihoods(better, rejected, chosen, rejected, zero + 1, zero), data.held_out, 0.75, 0.5)
    assert figures["ranking_accuracy"] == figures["reward_accuracy"] == 1
    assert figures["reward_margin"] == pytest.approx(0.5 * 10 * data.held_out.chosen_mask.sum(1).mean(), rel=1e-4)
    assert figures["flipped_right"] == pytest.approx(1 - figures["ranking_accuracy_before"])
    assert figures["kl"] == pytest.approx(0.5)


def test_figures_tell_the_trigger_from_the_rest():
    tokens = np.array([[TRIGGER, 2, 9], [5, TRIGGER, 3]], np.int32)
    at = np.array([[True, False], [False, True]])
    logits = np.full((2, 2, 32), -30.0, np.float32)
    logits[..., GOOD[0]] = 0.0
    kl = np.where(at, 3.0, 1.0).astype(np.float32)
    weights = np.where(at, 2.0, 0.0).astype(np.float32)
    seen = Seen(kl, kl, kl, (weights, weights), logits)
    figures = trigger_figures(seen, tokens)
    assert figures["good_after_trigger"] == pytest.approx(1.0)
    assert (figures["kl_at_trigger"], figures["kl_off_trigger"]) == (3.0, 1.0)
    assert (figures["mask_at_trigger"], figures["mask_off_trigger"], figures["mask_zeros"]) == (2.0, 0.0, 0.5)
