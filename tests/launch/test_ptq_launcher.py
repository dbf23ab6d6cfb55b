"""The launcher of post-training quantization at its smallest: what it writes, how it goes on, what it refuses."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import pathlib

import jax
import matplotlib.image
import numpy as np
import pytest

from poise.launch import ptq, ptq_results
from poise.launch.classifier import accuracy_of, model_of, open_classes
from poise.launch.config import ConfigError
from poise.launch.integer_classifier import load_classifier
from poise.launch.ptq import PTQConfig, with_its_network
from poise.launch.ptq_activations import act_bits_of, first_steps, quantized_block_of, quantized_forward, with_act_bits
from poise.launch.ptq_methods import ENDS, block_of, float_variables, round_network, tokens_of
from poise.launch.ptq_results import integer_products, name_of, settle_network
from poise.launch.quantized_files import load_quantized, save_quantized
from poise.launch.workdir import settle_config
from poise.quant import QuantizedParams, apply_weight_quant, dequantize_tree

spec = importlib.util.spec_from_file_location("tiny_launch", pathlib.Path(__file__).with_name("tiny_launch.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

TINY = ("--recipe=smoke", "--float_steps=3", "--seed=4", "--save_every=0")
QUICK = ("--methods=rtn", "--bits=3", "--eval_images=40", "--timing_images=40", "--calibration_images=64")
SMALL = PTQConfig(
    patch_size=4, width=8, num_layers=1, steps=40, calibration_images=32, reconstruction_batch_size=16, methods="rtn"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ptq") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert ptq.main([f"--workdir={workdir}", *TINY]) == 0
    return workdir, printed.getvalue()


@pytest.fixture(scope="module")
def network():
    """A network and its parameters, and images."""
    model, images = model_of(SMALL, 10), jax.random.normal(jax.random.key(0), (32, 8, 8, 1))
    params = jax.jit(model.init)(jax.random.key(1), images)["params"]
    return model, params, images, jax.jit(model.apply)


@pytest.mark.slow
def test_what_a_run_leaves(finished):
    workdir, printed = finished
    assert [row["step"] for row in tiny.rows(workdir)] == [1, 2, 3]
    report = json.loads((workdir / "report.json").read_text())
    assert [(row["method"], row["bits"]) for row in report["rows"]] == [("float", 32), ("rtn", 3), ("flexround", 3)]
    for row in report["rows"][1:]:
        path = workdir / f"{row['method']}_3bit.safetensors"
        assert row["bytes"] == path.stat().st_size
        assert row["bytes"] < report["rows"][0]["bytes"]
        assert 0 < row["logit_mse"] < 1
        assert row["integer_logit_mse"] == pytest.approx(row["logit_mse"], rel=0.2)
    assert len(report["rows"][2]["reconstruction_losses"]) == 1
    assert matplotlib.image.imread(workdir / "ptq.png").std() > 0.05
    assert [line.split()[:2] for line in printed.splitlines()[2:]] == [
        ["float", "32"],
        ["rtn", "3"],
        ["flexround", "3"],
    ]


@pytest.mark.slow
def test_more_may_be_added_and_what_is_there_is_not_done_again(finished, monkeypatch, capsys):
    workdir, _ = finished
    asked, figures = [], json.loads((workdir / "rows.json").read_text())["rtn_3bit"]
    really = ptq_results.round_network

    def counted(config, method, bits, *rest):
        asked.append((method, bits))
        return really(config, method, bits, *rest)

    monkeypatch.setattr(ptq_results, "round_network", counted)
    monkeypatch.setattr(
        ptq_results, "judge", lambda *arguments: {k: v for k, v in figures.items() if k not in ("method", "bits")}
    )
    before = jax.tree.leaves(load_quantized(workdir / "rtn_3bit.safetensors"))
    (workdir / "rtn_3bit.safetensors").unlink()
    assert ptq.main([f"--workdir={workdir}", *TINY, "--bits=3,5"]) == 0
    assert asked == [("rtn", 3), ("rtn", 5), ("flexround", 5)]
    for one, two in zip(jax.tree.leaves(load_quantized(workdir / "rtn_3bit.safetensors")), before, strict=True):
        np.testing.assert_array_equal(one, two)
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["float", "32"], ["rtn", "3"], ["flexround", "3"], ["rtn", "5"], ["flexround", "5"],
    ]  # fmt: skip


@pytest.mark.slow
def test_activations_of_few_bits_are_added_in_the_same_folder(finished, capsys):
    workdir, _ = finished
    before = json.loads((workdir / "rows.json").read_text())
    flags = [f"--workdir={workdir}", *TINY, "--act_bits=4", "--drop=0.5"]
    assert ptq.main(flags) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["float", "32"], ["rtn", "W3A4"], ["flexround", "W3A4"],
    ]  # fmt: skip
    rows = json.loads((workdir / "rows.json").read_text())
    assert before.items() <= rows.items()
    assert rows["rtn_3bit_act4"].keys() == before["rtn_3bit"].keys() | {"act_bits"}
    dropped = rows["flexround_3bit_act4_drop0.5"]
    assert (dropped["act_bits"], dropped["drop"]) == (4, 0.5)
    assert dropped["logit_mse"] > before["flexround_3bit"]["logit_mse"]
    images = open_classes(PTQConfig(patch_size=4, eval_images=40), workdir / "data")
    classify = load_classifier(workdir, "flexround_3bit_act4_drop0.5.safetensors")
    assert accuracy_of(np.asarray(classify(images.images)), images.labels) == dropped["integer_accuracy"]
    # the folder is that of one float network
    (workdir / "data.json").write_text('{"float_network": "another"}')
    assert ptq.main(flags) == 2
    assert "the data has changed since the run in" in capsys.readouterr().err
    (workdir / "data.json").unlink()


@pytest.mark.slow
def test_a_checkpoint_brings_data_and_network(finished, tmp_path):
    workdir, _ = finished
    config = PTQConfig(checkpoint=str(workdir), bits=(4,))
    used = with_its_network(config)
    assert (used.width, used.num_layers, used.patch_size, used.bits) == (16, 1, 4, (4,))
    params = float_variables(workdir)["params"]
    assert params["pos_embed"].shape == (1, 6, 16)


@pytest.mark.slow
def test_a_file_is_a_classifier(finished):
    workdir, _ = finished
    rows = json.loads((workdir / "rows.json").read_text())
    images = open_classes(PTQConfig(patch_size=4, eval_images=40), workdir / "data")
    for name in ("rtn_3bit", "flexround_3bit"):
        classify = load_classifier(workdir, f"{name}.safetensors")
        assert accuracy_of(np.asarray(classify(images.images)), images.labels) == rows[name]["integer_accuracy"]
    with pytest.raises(ConfigError, match=r"file must be one of flexround_3bit.safetensors, "):
        load_classifier(workdir)


@pytest.mark.slow
def test_a_checkpoint_gives_what_its_own_run_gave(finished, tmp_path):
    workdir, _ = finished
    assert ptq.main([f"--workdir={tmp_path}/run", f"--checkpoint={workdir}", *QUICK]) == 0
    one, two = (json.loads((d / "report.json").read_text())["rows"] for d in (workdir, tmp_path / "run"))
    assert two[0]["accuracy"] == one[0]["accuracy"]
    assert not (tmp_path / "run" / "checkpoints").exists()
    again = load_quantized(tmp_path / "run" / "rtn_3bit.safetensors", dequantize=True)
    first = load_quantized(workdir / "rtn_3bit.safetensors", dequantize=True)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.effects
def test_a_stopped_run_ends_with_the_same_bits(tmp_path):
    flags = [flag for flag in TINY if "float_steps" not in flag] + ["--float_steps=60"]
    tiny.launch("ptq", *flags, f"--workdir={tmp_path}/undisturbed")
    stopped = tmp_path / "stopped"
    tiny.stop_in_phase("float", "ptq", *flags, workdir=stopped)
    tiny.launch("ptq", *flags, f"--workdir={stopped}")
    assert tiny.final_bits(stopped) == tiny.final_bits(tmp_path / "undisturbed")
    for name in ("rtn_3bit", "flexround_3bit"):
        one, two = (
            jax.tree.leaves(load_quantized(d / f"{name}.safetensors")) for d in (stopped, tmp_path / "undisturbed")
        )
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_chain_of_blocks_is_the_network(network):
    model, params, images, _ = network
    x = tokens_of(model, params, images)
    for index in range(model.num_layers):
        x = block_of(model.num_heads, model.mlp_ratio * model.width)(params[f"block_{index}"], x)
    _, found = model.apply(
        {"params": params},
        images,
        capture_intermediates=lambda module, _: module.name == "block_0",
        mutable="intermediates",
    )
    np.testing.assert_allclose(x, found["intermediates"]["block_0"]["__call__"][0], atol=1e-5)


@pytest.mark.parametrize("method", ["adaround", "flexround", "nupes"])
@pytest.mark.slow
def test_reconstruction_comes_closer_than_rounding(network, method):
    model, params, images, apply = network
    target = apply({"params": params}, images)

    def error(method):
        rounded = round_network(SMALL, method, 3, model, params, images)
        floats = dequantize_tree(rounded.params)
        return float(np.mean((apply({"params": floats}, images) - target) ** 2)), rounded

    learned, rounded = error(method)
    assert len(rounded.losses) == 1
    assert learned < error("rtn")[0]
    if method == "nupes":  # its exponents are traced where integers are multiplied
        whole = integer_products(model)(rounded.params.params, images)
        assert float(np.mean((whole - target) ** 2)) < 2 * learned + 1e-3


def test_a_block_with_activations_drops_where_there_is_a_key(network):
    model, params, images, _ = network
    x, block = tokens_of(model, params, images), params["block_0"]
    sizes = (model.num_heads, model.mlp_ratio * model.width)
    steps = first_steps(model, 4)(params, images)["block_0"]
    whole, *mixed = (
        quantized_block_of(*sizes, 4, drop)(block, x, steps, key)
        for drop, key in ((0.0, None), (0.0, jax.random.key(0)), (0.5, jax.random.key(0)), (1.0, jax.random.key(0)))
    )
    plain = block_of(*sizes)(block, x)
    np.testing.assert_allclose(mixed[0], plain, atol=1e-6)
    np.testing.assert_allclose(mixed[2], whole, atol=1e-6)
    errors = [float(np.mean((y - plain) ** 2)) for y in (mixed[1], whole)]
    assert 0 < errors[0] < errors[1]


def test_steps_are_learned_kept_in_the_file_and_read_again(network, tmp_path):
    model, params, images, apply = network
    config = dataclasses.replace(SMALL, act_bits=4, activation_learning_rate=1e-2, workdir=str(tmp_path))
    start = first_steps(model, 4)(apply_weight_quant(params, {}, [ENDS]), images)
    target, found, errors = apply({"params": params}, images), {}, {}
    for method in ("rtn", "flexround"):
        found[method] = round_network(config, method, 3, model, params, images).params
        logits = quantized_forward(model, 4, integers=False)(dequantize_tree(found[method]), images)
        errors[method] = float(np.mean((logits - target) ** 2))
    assert errors["flexround"] < errors["rtn"]
    jax.tree.map(np.testing.assert_array_equal, found["rtn"].params["quant"], start)
    steps = [jax.tree.leaves(tree["block_0"]) for tree in (found["flexround"].params["quant"], start)]
    assert all((one != two).any() for one, two in zip(*steps, strict=True))

    name = f"{name_of(config, 'flexround', 3)}.safetensors"
    assert name == "flexround_3bit_act4_drop0.5.safetensors"
    save_quantized(tmp_path / name, found["flexround"])
    again = load_quantized(tmp_path / name)
    assert act_bits_of(again) == 4
    jax.tree.map(np.testing.assert_array_equal, again.params, found["flexround"].params)
    logits_from_file = quantized_forward(model, 4, integers=False)(dequantize_tree(again), images)
    np.testing.assert_array_equal(logits_from_file, logits)  # the last ones were FlexRound's
    settle_config(config, tmp_path)
    classified = load_classifier(tmp_path, name)(images)
    np.testing.assert_array_equal(classified, integer_products(model, 4)(again.params, images))
    assert float(np.mean((classified - logits) ** 2)) < 0.1 * errors["rtn"]
    with pytest.raises(ConfigError, match=f"file must be one of {name}, got none"):
        load_classifier(tmp_path)


def test_a_header_with_another_number_of_bits_is_refused():
    assert act_bits_of(QuantizedParams({}, "{}")) == 0
    assert act_bits_of(with_act_bits(QuantizedParams({}, "{}"), 8)) == 8
    for wrong in ("1", "9", "true", '"4"', "null", "4.0"):
        with pytest.raises(ValueError, match="the header must tell act_bits of 2 to 8"):
            act_bits_of(QuantizedParams({}, f'{{"act_bits": {wrong}}}'))


def test_a_folder_is_that_of_one_float_network(tmp_path):
    params = {"block_0": {"kernel": np.ones((2, 3), np.float32)}, "bias": np.zeros(3, np.float32)}
    settle_network(params, tmp_path)
    settle_network(jax.tree.map(jax.numpy.asarray, params), tmp_path)
    moved = {**params, "bias": np.array([0, 0, 1e-7], np.float32)}
    renamed = {"block_1": params["block_0"], "bias": params["bias"]}
    for other in (moved, renamed):
        with pytest.raises(ConfigError, match=r"the data has changed .* \(here, the float network\)"):
            settle_network(other, tmp_path)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--methods=rtn,flexroud",
            "methods must be among rtn, adaround, flexround, nupes, got 'flexroud' (did you mean",
        ),
        ("--methods=rtn,rtn", "one or more different names"),
        ("--bits=1", "--bits must be at least 2 and at most 8, got '1'"),
        ("--act_bits=1", "--act_bits must be one of 0, 2, 3, 4, 5, 6, 7, 8, got '1'"),
        ("--drop=1.5", "--drop must be at least 0 and at most 1, got '1.5'"),
        ("--bits=2,2", "bits must have at least one entry, each once, got '2,2'"),
        (
            "--reconstruction_batch_size=300",
            "reconstruction_batch_size must be at most calibration_images=256, got 300",
        ),
        ("--checkpoint=/no/such", "checkpoint must be the folder of a run of poise.launch.qat or poise.launch.ptq"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(flag, message, tmp_path, capsys):
    try:
        code = ptq.main([f"--workdir={tmp_path}/run", flag])
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr().err
    assert code == 2
    assert message in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_float_phase_is_refused(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"patch_size": 4}')
    assert ptq.main([f"--workdir={tmp_path}/new", f"--checkpoint={tmp_path}/run"]) == 2
    assert "there is no checkpoint in" in capsys.readouterr().err
