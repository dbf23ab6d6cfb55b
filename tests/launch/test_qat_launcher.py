"""The launcher of quantization-aware training at its smallest: what it writes, how it resumes, what it refuses."""

import contextlib
import importlib.util
import io
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from poise.launch import qat
from poise.launch.classifier import accuracy_of, logits_of, model_of, open_classes, squared_error
from poise.launch.integer_classifier import load_classifier
from poise.launch.qat import QATConfig
from poise.launch.qat_export import deployed
from poise.launch.qat_phases import annealed, first_state, flat, products_of, quantized_model, rules_of, watch
from poise.launch.qat_results import table
from poise.launch.quantized_files import load_quantized
from poise.nets import QKProductSelfAttention, QKReparamSelfAttention
from poise.quant import apply_weight_quant, export, is_quantized, match_rule, oscillation_init, tensor_codes

spec = importlib.util.spec_from_file_location("tiny_launch", pathlib.Path(__file__).with_name("tiny_launch.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

TINY = ("--recipe=smoke", "--steps=4", "--cga_steps=3", "--float_steps=3", "--num_heads=2", "--seed=4",
        "--eval_every=0", "--save_every=0")  # fmt: skip
SMALL = QATConfig(patch_size=4, width=8, num_layers=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("qat") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert qat.main([f"--workdir={workdir}", *TINY]) == 0
    return workdir, printed.getvalue()


@pytest.mark.slow
def test_what_a_run_leaves(finished):
    workdir, printed = finished
    rows = tiny.rows(workdir)
    assert [(row["phase"], row["step"]) for row in rows] == [
        (phase, step) for phase, steps in (("float", 3), ("qat", 4), ("cga", 3)) for step in range(1, steps + 1)
    ]
    assert all({"loss", "teacher_loss", "oscillating", "flips"} <= row.keys() for row in rows[3:])
    assert any(row["flips"] > 0 for row in rows[3:7])
    assert matplotlib.image.imread(workdir / "oscillation.png").std() > 0.05
    report = json.loads((workdir / "report.json").read_text())
    floating, fake, integers = report["rows"]
    assert floating["logit_mse"] == 0
    assert floating["accuracy"] == rows[2]["eval/accuracy"]
    assert fake["bytes"] is None
    assert integers["bytes"] == (workdir / "model.safetensors").stat().st_size
    assert integers["bytes"] < floating["bytes"]
    assert fake["logit_mse"] == pytest.approx(rows[-1]["eval/logit_mse"], rel=1e-4)
    assert integers["logit_mse"] == pytest.approx(fake["logit_mse"], rel=0.1)
    assert [line.split()[0] for line in printed.splitlines()[2:]] == ["float", "ofq,", "ofq,"]


@pytest.mark.slow
def test_the_file_holds_the_codes_that_were_trained(finished):
    workdir, _ = finished
    config = QATConfig(width=16, num_heads=2, patch_size=4, num_layers=1)
    state = tiny.restore_tree(workdir)
    learned = dict(state["learned"])
    codes = quantized_model(config, 10).codes(learned)
    stored = load_quantized(workdir / "model.safetensors").params
    assert len(codes) == 6
    for path, expected in codes.items():
        leaf = stored
        for name in path.split("/"):
            leaf = leaf[name]
        np.testing.assert_array_equal(tensor_codes(leaf), expected)
    floats = [leaf for leaf in jax.tree.leaves(stored["params"], is_leaf=is_quantized) if not is_quantized(leaf)]
    assert max(np.size(leaf) for leaf in floats) < 128  # no weight is left


@pytest.mark.slow
def test_the_file_and_the_configuration_are_a_classifier(finished):
    """The example of docs/guides/quantization.md."""
    workdir, _ = finished
    report = json.loads((workdir / "report.json").read_text())
    images = open_classes(QATConfig(patch_size=4, eval_images=40), workdir / "data")
    logits = load_classifier(workdir)(jnp.asarray(images.images))
    assert accuracy_of(np.asarray(logits), images.labels) == report["rows"][2]["accuracy"]
    code = [block for block in blocks("quantization.md") if "load_classifier" in block]
    assert len(code) == 1
    scope = {}
    exec(code[0].replace("runs/qat", str(workdir)), scope)
    assert scope["predicted"].shape == (500,)


@pytest.mark.effects
@pytest.mark.parametrize("phase", ["qat", "cga"])
def test_a_stopped_run_ends_with_the_same_bits(finished, phase, tmp_path):
    flags = [flag for flag in TINY if not flag.startswith(("--steps", "--cga_steps"))] + [
        "--steps=40",
        "--cga_steps=40",
    ]
    tiny.launch("qat", *flags, f"--workdir={tmp_path}/undisturbed")
    stopped = tmp_path / "stopped"
    tiny.stop_in_phase(phase, "qat", *flags, workdir=stopped)
    _, errors = tiny.launch("qat", *flags, f"--workdir={stopped}")
    assert "going on from step" in errors
    assert tiny.final_bits(stopped) == tiny.final_bits(tmp_path / "undisturbed")


def blocks(guide):
    text = (pathlib.Path(__file__).parents[2] / "docs" / "guides" / guide).read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def start():
    """A float network's variables and images."""
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 1))
    return jax.jit(model_of(SMALL, 10).init)(jax.random.key(1), images), images


def begun(config, start):
    import optax

    from poise.launch.classifier import ClassifierState

    variables, images = start
    quantized = quantized_model(config, 10)
    make = jax.jit(lambda variables, x: first_state(
        config, quantized, optax.sgd(1.0), ClassifierState(variables, ()), x))  # fmt: skip
    return quantized, make(variables, images)


def test_with_qkr_the_product_is_exported(start):
    config = QATConfig(patch_size=4, width=8, num_layers=1, qkr=True, bits=4)
    quantized, state = begun(config, start)
    assert quantized.model.attention.func is QKReparamSelfAttention
    out, variables = deployed(config, 10), products_of(config, state.learned["variables"])
    assert out.model.attention.func is QKProductSelfAttention
    codes = quantized.codes(state.learned)
    assert set(codes) == {
        f"params/block_0/{name}/kernel"
        for name in ("attention/product", "attention/value", "attention/proj", "fc1", "fc2")
    }
    assert codes["params/block_0/attention/product/kernel"].shape == (8, 16)
    stored = export(variables, state.learned["steps"], out.rules)
    kernel = stored.params["params"]["block_0"]["attention"]["product"]["kernel"]
    np.testing.assert_array_equal(tensor_codes(kernel), codes["params/block_0/attention/product/kernel"])

    import flax.linen as nn

    from poise.nets import activation_quantization

    @jax.jit
    def both(learned, images):
        fake = apply_weight_quant(variables, learned["steps"], out.rules)
        with nn.intercept_methods(activation_quantization(out.rules)):
            exported = out.model.apply(fake, images)
        return quantized.forward(learned, images), exported

    trained, exported = both(state.learned, start[1])
    # A code of an activation that lies at a threshold may fall to the other side; most don't.
    assert np.median(np.abs(trained - exported)) < 1e-5
    np.testing.assert_allclose(trained, exported, atol=0.05)


def test_annealing_moves_no_weight_far_from_a_threshold(start):
    import optax

    config = QATConfig(patch_size=4, width=8, num_layers=1, boundary_range=0.02)
    _, state = begun(config, start)
    optimizer = annealed(config, optax.sgd(1e-3))
    updates, _ = optimizer.update(
        jax.tree.map(jnp.ones_like, state.learned), optimizer.init(state.learned), state.learned
    )
    params = updates["variables"]["params"]
    assert 0 < np.mean(params["block_0"]["fc1"]["kernel"] != 0) < 0.2
    assert np.mean(params["block_0"]["attention"]["query"]["kernel"] != 0) < 0.2
    for free in (params["head"]["kernel"], params["block_0"]["fc1"]["bias"], updates["variables"]["quant"]["head"]):
        assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(free))


def test_first_and_last_layers_have_eight_bits():
    for config in (QATConfig(), QATConfig(method="lsq", bits=3), QATConfig(qkr=True)):
        rules = rules_of(config)
        for name in ("patch_embed", "head", "head_dist"):
            rule = match_rule(rules, f"params/{name}/kernel")
            assert (rule.weight_bits, rule.act_bits, rule.method) == (8, 8, "lsq")
        assert match_rule(rules, "block_0/fc2/kernel").weight_bits == config.bits
        assert not match_rule(rules, "block_0/fc2/kernel").act_signed
        assert match_rule(rules, "block_0/attention/query/kernel").weight_bits == (None if config.qkr else config.bits)


def test_lsq_codes_are_those_of_the_quantizer(start):
    config = QATConfig(patch_size=4, width=8, num_layers=1, method="lsq", bits=3)
    quantized, state = begun(config, start)
    codes = quantized.codes(state.learned)["params/block_0/fc1/kernel"]
    stored = export(state.learned["variables"], state.learned["steps"], quantized.rules)
    np.testing.assert_array_equal(tensor_codes(stored.params["params"]["block_0"]["fc1"]["kernel"]), codes)


def test_the_share_that_oscillates_counts_every_weight_once():
    up = {"b": jnp.array([[1, 0], [0, 0]], jnp.int8), "a": jnp.array([1, 0, 0], jnp.int8)}
    before = oscillation_init(flat(jax.tree.map(jnp.zeros_like, up)))
    state, metrics = watch(before, up)
    assert float(metrics["flips"]) == pytest.approx(2 / 7)
    assert float(metrics["oscillating"]) == 0
    _, metrics = watch(state, {"a": jnp.zeros(3, jnp.int8), "b": up["b"]})
    assert float(metrics["flips"]) == pytest.approx(1 / 7)
    assert float(metrics["oscillating"]) == pytest.approx(1 / 7)


def test_logits_come_in_batches_of_one_size():
    images = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    sizes = []

    def forward(x):
        sizes.append(len(x))
        return jnp.asarray(2 * x)

    logits = logits_of(forward, images)
    np.testing.assert_allclose(logits, 2 * images)
    assert sizes == [256, 256]
    assert accuracy_of(logits, logits.argmax(-1)) == 1
    assert squared_error(logits, logits + 2) == pytest.approx(4)


def test_the_table_has_a_dash_where_there_is_no_file():
    row = {"method": "m", "bits": 2, "accuracy": 0.5, "logit_mse": 1.0, "bytes": None, "milliseconds": 1.0}
    assert table([row]).splitlines()[-1].split() == ["m", "2", "0.500", "1.000", "-", "1.00"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--bits=5", "--bits must be one of 2, 3, 4, got '5'"),
        ("--method=ofk", "--method must be one of ofq, lsq, got 'ofk'"),
        ("--width=9", "num_heads must divide width=9, got 2"),
        ("--patch_size=3", "patch_size must divide the images' side 8, got 3"),
        ("--data=cifar10", "data must be digits, synthetic, tfds:NAME or folder:PATH, got 'cifar10'"),
        ("--data=folder:/no/such", "there is no folder /no/such"),
        ("--image_size=8", "image_size must be 0 for data=digits"),
        ("--min_learning_rate=1", "min_learning_rate must be at most learning_rate"),
        ("--boundary_range=0.6", "--boundary_range must be at least 0 and at most 0.5, got '0.6'"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(flag, message, tmp_path, capsys):
    try:
        code = qat.main([f"--workdir={tmp_path}/run", flag])
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr().err
    assert code == 2
    assert message in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_qkr_belongs_to_ofq(tmp_path, capsys):
    with pytest.raises(SystemExit):
        qat.main([f"--workdir={tmp_path}/run", "--qkr", "--method=lsq"])
    assert "qkr must be false for method=lsq" in capsys.readouterr().err
