"""A run on any mesh, under jit or pmap, gives what one device gives, and goes on on another mesh."""

import importlib
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import poise.launch.loop
import poise.launch.mixture2d
from poise.core import Algorithm, fold_in_examples, mean_over
from poise.launch.config import ConfigError
from poise.launch.data import InMemory, NoData
from poise.launch.devices import DeviceError, Placement
from poise.launch.loop import fit
from poise.launch.phase import Phase, Program
from poise.launch.sharding import LeafSpecs, parse_mesh, parse_rules

WIDTH = 128
RULES = "hidden/kernel$=-,model;out/kernel$=model;.*="


def network(axis_name=None):
    """A network of two layers that learns with noisy inputs and the noise's keys as examples count."""
    optimizer = optax.adamw(1e-2)

    def init(key, batch):
        hidden, out = jax.random.split(key)
        params = {
            "hidden": {"kernel": 0.3 * jax.random.normal(hidden, (8, WIDTH)), "bias": jnp.zeros(WIDTH)},
            "out": {"kernel": 0.1 * jax.random.normal(out, (WIDTH, 1))},
        }
        return {"params": params, "optimizer": optimizer.init(params), "frozen": {"target": jnp.ones((8, WIDTH))}}

    def step(state, batch, key):
        keys = fold_in_examples(key, batch["x"].shape[0], axis_name)
        x = batch["x"] + 0.1 * jax.vmap(lambda k: jax.random.normal(k, (8,)))(keys)

        def loss_fn(params):
            hidden = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
            target = (batch["x"] @ state["frozen"]["target"]).mean(1, keepdims=True)
            return jnp.mean((hidden @ params["out"]["kernel"] - target) ** 2)

        loss, grads = mean_over(axis_name, jax.value_and_grad(loss_fn)(state["params"]))
        updates, optimizer_state = optimizer.update(grads, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {**state, "params": params, "optimizer": optimizer_state}, {"loss": loss}

    return Algorithm(init, step)


def train(workdir, steps=6, **options):
    x = np.random.default_rng(0).normal(size=(48, 8)).astype(np.float32)
    phase = Phase("net", lambda previous, axis_name=None: network(axis_name), InMemory({"x": x}, 16, 1), steps)
    return fit([phase], workdir=workdir, **dict(seed=0, save_every_seconds=0, tensorboard=False) | options)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone"), devices=jax.devices()[:1]).state


def assert_close(state, other):
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "split"),
    [
        ({"parallel": "pmap"}, ()),
        ({"mesh": "data:2,fsdp:4"}, (None, "fsdp")),
        ({"mesh": "fsdp:8"}, (None, "fsdp")),
        ({"mesh": "data:4,model:2", "sharding": RULES}, (None, "model")),
    ],
)
@pytest.mark.slow
def test_every_placement_gives_what_one_device_gives(tmp_path, alone, options, split):
    state = train(tmp_path, **options).state
    assert_close(state, alone)
    spec, whole = jax.sharding.PartitionSpec(*split), jax.sharding.PartitionSpec(None, None)
    assert state["optimizer"][0].mu["hidden"]["kernel"].sharding.spec == spec
    # weights over fsdp lie in parts between steps alone
    used = state["params"]["hidden"]["kernel"].sharding
    assert used.is_equivalent_to(jax.sharding.NamedSharding(used.mesh, whole if "fsdp" in split else spec), 2)
    assert state["frozen"]["target"].sharding.is_fully_replicated


def test_between_steps_weights_lie_in_parts():
    placement = Placement(mesh="data:2,fsdp:4")
    phase = Phase("net", lambda previous: network(), InMemory({"x": np.zeros((16, 8), np.float32)}, 16, 1), 1)
    program = Program(phase, None, placement)
    program.compile()
    live, frozen = program.begin(None, jax.random.key(0))
    live, _ = program.step(live, frozen, program.place(0), jax.random.key(1), 0)
    names = program.layout.live_names
    for leaves, name in ((live, "params/hidden/kernel"), (live, "optimizer/0/nu/hidden/kernel")):
        leaf = leaves[names.index(name)]
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(8, WIDTH // 4)}


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tmp_path, alone):
    train(tmp_path, steps=2, mesh="data:2,fsdp:4")
    train(tmp_path, steps=4, parallel="pmap", devices=jax.devices()[:2])
    result = train(tmp_path, mesh="model:2", sharding=RULES, devices=jax.devices()[:4])
    assert result.restored == ("net", 4)
    assert_close(result.state, alone)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_no_data_under_pmap(tmp_path):
    def count(previous, axis_name=None):
        def step(state, batch, key):
            return state + mean_over(axis_name, jnp.ones(())), {}

        return Algorithm(lambda key, batch: jnp.zeros(()), step)

    options = dict(workdir=tmp_path, seed=0, parallel="pmap", tensorboard=False)
    assert float(fit([Phase("count", count, NoData(), 3)], **options).state) == 3


def test_a_phase_that_knows_no_axis_is_refused_under_pmap(tmp_path):
    phase = Phase("plain", lambda previous: network(), InMemory({"x": np.zeros((8, 8))}, 8, 0), 1)
    assert "axis_name" not in inspect.signature(phase.make_algorithm).parameters
    with pytest.raises(DeviceError, match=r"phase 'plain' can't run with parallel=pmap: it knows of no axis_name"):
        fit([phase], workdir=tmp_path, seed=0, parallel="pmap")


def test_batches_are_split_over_data_and_fsdp_and_counted(tmp_path):
    placement = Placement(mesh="data:2,fsdp:2,model:2", sharding=RULES)
    placed = placement.place_batch(np.zeros((8, 3)), 0)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    with pytest.raises(DeviceError, match="has 6 examples, which 4 devices can't share"):
        placement.check_batch(np.zeros((6, 3)), 0, "net")


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", {"data": 8}),
        ("data:8", {"data": 8}),
        ("model:4", {"data": 2, "model": 4}),
        (" data : 2, fsdp:4 ", {"data": 2, "fsdp": 4}),
        ("fsdp:8", {"data": 1, "fsdp": 8}),
    ],
)
def test_meshes(text, sizes):
    assert parse_mesh(text, 8) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:3", r"must take all 8 devices, got 'data:3', which takes 3"),
        ("fsdp:3", r"must take all 8 devices, got 'fsdp:3', which takes 3"),
        ("data", r"a size, as in data:4,fsdp:2, got 'data'"),
        ("data:-1", r"a size, as in data:4,fsdp:2, got 'data:-1'"),
        ("fsd:2", r"axes data, fsdp, model, got 'fsd' \(did you mean fsdp\?\)"),
        ("data:4,data:2", r"each axis once"),
    ],
)
def test_meshes_that_are_none(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_mesh(text, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernel", r"of the form REGEX=AXIS,AXIS separated by ;, got 'kernel'"),
        ("kernel=rows", r"names the axes fsdp, model or -, got 'rows'"),
        ("kernel=data", r"names the axes fsdp, model or -, got 'data'"),
        ("kernel=,fsdp", r"names the axes fsdp, model or -, got ''"),
        ("(=fsdp", r"invalid pattern '\('"),
    ],
)
def test_rules_that_are_none(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_rules(text)


@pytest.mark.parametrize(
    ("mesh", "rules", "message"),
    [
        ("data:4,model:2", "", r"mesh with model:2 needs rules"),
        ("", "kernel=fsdp;.*=", r"the rule 'kernel' names the axis 'fsdp', the mesh has none for weights"),
        ("fsdp:8", [("kernel", ("data",))], r"the rule 'kernel' names the axis 'data', the mesh has fsdp"),
        ("fsdp:8", "kernel=fsdp,fsdp;.*=", r"the rule 'kernel' names an axis twice, in fsdp,fsdp"),
        ("fsdp:8", "kernel=fsdp", r"no rule fits the leaf (params|optimizer)\S+ of shape \(128,\)"),
        ("fsdp:8", "bias=-,fsdp;.*=", r"'bias' has 2 dimensions, the leaf \S+bias has 1"),
        ("fsdp:8", "out/kernel=-,fsdp;.*=", r"splits a dimension of 1 of the leaf \S+out/kernel over fsdp:8"),
        ("fsdp:8", ".*=;kernel=fsdp", r"the rule 'kernel' fits no leaf that an earlier rule left"),
    ],
)
def test_rules_that_do_not_fit(tmp_path, mesh, rules, message):
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, mesh=mesh, sharding=rules)
    assert not (tmp_path / "checkpoints").exists()


def test_pmap_splits_batches_alone(tmp_path):
    with pytest.raises(ConfigError, match="parallel=pmap splits nothing but batches, got mesh 'fsdp:2'"):
        train(tmp_path, parallel="pmap", mesh="fsdp:2")


def test_a_module_called_opt_is_no_optimizer():
    placement = Placement(mesh="fsdp:8")
    split = jax.sharding.NamedSharding(placement.mesh, jax.sharding.PartitionSpec("fsdp"))
    found = placement.together(["params/opt/kernel", "student_opt/0/mu", "opt_state/nu", "optimizer/mu"], [split] * 4)
    assert ["fsdp" in sharding.spec for sharding in found] == [False, True, True, True]


def test_small_odd_and_random_leaves_stay_whole():
    specs = LeafSpecs({"data": 2, "fsdp": 4})
    assert tuple(specs.spec("w", jnp.zeros((512, 1024)))) == (None, "fsdp")
    assert tuple(specs.spec("w", jnp.zeros((513, 1023)))) == ()
    assert tuple(specs.spec("b", jnp.zeros(64))) == ()
    assert tuple(specs.spec("count", jnp.zeros(()))) == ()
    assert tuple(specs.spec("key", jax.random.split(jax.random.key(0), 4096), is_key=True)) == ()


# Each launcher at its smallest, with what might depend on how a batch is spread: unlike texts, dropout, seeds.
# The one phase of ptq is the first of qat.
LAUNCHERS = {
    "value": (
        "--num_seeds=8", "--updates=20", "--updates_per_step=5", "--num_envs=2", "--batch_size=4", "--buffer_size=20",
        "--min_history=4", "--hidden=4", "--losses=hl_gauss",
    ),
    "preference": (
        "--num_layers=1", "--width=4", "--pretrain_steps=2", "--steps=2", "--batch_size=16", "--mask_dropout=0.5",
        "--methods=sparse_po_independent,ipo", "--max_length=32",
    ),
    "lm": ("--recipe=smoke", "--steps=3", "--width=8", "--eval_tokens=128", "--batch_size=16", "--variants=softmax"),
    "qat": ("--recipe=smoke", "--float_steps=3", "--steps=2", "--cga_steps=0"),
    "distill": ("--recipe=mixture2d", "--warmup_steps=3", "--steps=3", "--batch_size=16", "--fake_updates=1"),
}  # fmt: skip


class Caught(Exception):
    """What a launcher was about to train."""


def phases_of(name, flags, monkeypatch):
    def caught(phases, *, seed, start=None, **options):
        raise Caught(phases, seed, start)

    with monkeypatch.context() as patch:
        for module in (poise.launch.loop, poise.launch.mixture2d):
            patch.setattr(module, "fit", caught)
        with pytest.raises(Caught) as found:
            importlib.import_module(f"poise.launch.{name}").main(flags)
    phases, seed, start = found.value.args
    return [phase._replace(evaluate=None, render=None) for phase in phases], seed, start


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("lm", "preference") else pytest.mark.effects)
        for name in LAUNCHERS
    ],
)
def test_every_launcher_gives_on_eight_devices_and_in_parts_what_it_gives_on_one(name, tmp_path, monkeypatch):
    flags = [f"--workdir={tmp_path}/run", *LAUNCHERS[name]]
    if name == "preference":
        texts = [{"prompt": f"{i}? ", "chosen": "yes" * (1 + i % 5), "rejected": "no" * (1 + i % 3)} for i in range(20)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, texts)))
        flags.append(f"--data=jsonl:{tmp_path}/pairs.jsonl")
    phases, seed, start = phases_of(name, flags, monkeypatch)
    rows = {}
    for label, options in {"one": {"devices": jax.devices()[:1]}, "jit": {}, "pmap": {"parallel": "pmap"}}.items():
        fit(phases, workdir=tmp_path / label, seed=seed, start=start, tensorboard=False, **options)
        rows[label] = [json.loads(line) for line in (tmp_path / label / "metrics.jsonl").read_text().splitlines()]
    if name != "value":  # which has no batches of examples
        phases, _, _ = phases_of(name, [*flags, "--microbatches=2"], monkeypatch)
        fit(phases, workdir=tmp_path / "parts", seed=seed, start=start, tensorboard=False, devices=jax.devices()[:1])
        lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
        rows["parts"] = [json.loads(line) for line in lines]
    assert len(rows["one"]) == sum(phase.num_steps for phase in phases)
    for label in rows:
        for one, eight in zip(rows["one"], rows[label], strict=True):
            where = f"{label}, phase {one['phase']}, step {one['step']}: "
            for metric in set(one) - {"phase", "reward_accuracy"}:  # the latter begins with ties
                np.testing.assert_allclose(eight[metric], one[metric], rtol=1e-5, atol=1e-5, err_msg=where + metric)
