"""The weight compander over whole parameter trees, with real models and optimizers, and its effect on the weights."""

import importlib.util
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats
from sklearn.datasets import load_digits

from poise.optim import CompandedParams, adamp, companded_scales, compander, companding, companding_inverse


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3,), name="conv")(x)
        x = nn.LayerNorm(name="norm")(nn.relu(x))
        return nn.Dense(2, name="out")(x)


@pytest.fixture(scope="module")
def setting():
    x = jax.random.normal(jax.random.key(1), (8, 5, 3))
    params = jax.jit(Net().init)(jax.random.key(0), x)["params"]
    return x, params


def loss_of(wc, x):
    return lambda raw: jnp.mean((Net().apply({"params": wc.apply(raw)}, x) - 1.0) ** 2)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("kind", ["arctan", "tanh", "softsign"])
def test_preserve_keeps_the_function(setting, kind, learn):
    _, params = setting
    wc = compander(kind, a=1.2, b=0.7, learn=learn)
    raw = wc.init(params)
    back = wc.apply(raw)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), back, params)
    weights = raw.weights if learn else raw
    np.testing.assert_allclose(
        weights["conv"]["kernel"], companding_inverse(params["conv"]["kernel"], 1.2, 0.7, kind), rtol=1e-6
    )
    for path in (("conv", "bias"), ("norm", "scale"), ("norm", "bias")):
        assert weights[path[0]][path[1]] is params[path[0]][path[1]]


def test_raw_initialization_scales_by_the_slope(setting):
    _, params = setting
    wc = compander(a=2.0, b=1.0, initialization="raw")
    raw = wc.init(params)
    assert raw["out"]["kernel"] is params["out"]["kernel"]
    small = jax.tree.map(lambda w: 1e-3 * w, raw)
    np.testing.assert_allclose(wc.apply(small)["out"]["kernel"], 2 * small["out"]["kernel"], rtol=1e-5)


def test_identity_is_the_plain_model(setting):
    _, params = setting
    wc = compander("identity")
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (wc.init(params), params)), strict=True))
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (wc.apply(params), params)), strict=True))


def test_gradient_is_chained_with_the_slope(setting):
    x, params = setting
    wc = compander(a=1.2, b=0.7)
    raw = wc.init(params)
    by_raw = jax.jit(jax.grad(loss_of(wc, x)))(raw)["out"]["kernel"]
    plain = compander("identity")
    by_params = jax.jit(jax.grad(loss_of(plain, x)))(params)["out"]["kernel"]
    v = raw["out"]["kernel"]
    np.testing.assert_allclose(by_raw, by_params * 1.2 * 0.7 / (0.7**2 + v**2), rtol=1e-5, atol=1e-8)


def test_per_layer_scales_and_masks(setting):
    _, params = setting
    wc = compander(a={"conv": 1.5, "norm": 1.0, "out": 1.1}, b=0.5, mask={"conv": True, "norm": False, "out": True})
    raw = wc.init(params)
    np.testing.assert_allclose(raw["conv"]["bias"], companding_inverse(params["conv"]["bias"], 1.5, 0.5), rtol=1e-6)
    np.testing.assert_allclose(wc.apply(raw)["out"]["kernel"], companding(raw["out"]["kernel"], 1.1, 0.5), rtol=1e-6)
    assert raw["norm"]["scale"] is params["norm"]["scale"]


def test_learned_scales_train_and_stay_positive(setting):
    """Own learning rate and no weight decay for the scales, by labels; both move, for both layers."""
    x, params = setting
    wc = compander(a=1.2, b=0.7, learn=True)
    raw = wc.init(params)
    assert raw.log_a["conv"]["bias"] is None
    tx = optax.partition(
        {"weights": optax.adamw(1e-2, weight_decay=1e-2), "scales": optax.sgd(0.5)},
        CompandedParams("weights", "scales", "scales"),
    )

    def step(carry, _):
        raw, state = carry
        loss, grads = jax.value_and_grad(loss_of(wc, x))(raw)
        updates, state = tx.update(grads, state, raw)
        return (optax.apply_updates(raw, updates), state), loss

    (trained, _), losses = jax.jit(lambda raw: jax.lax.scan(step, (raw, tx.init(raw)), length=50))(raw)
    assert losses[-1] < 0.5 * losses[0]
    for start, end in zip(companded_scales(raw), companded_scales(trained), strict=True):
        for layer in ("conv", "out"):
            assert end[layer]["kernel"].shape == ()
            assert end[layer]["kernel"] > 0
            assert abs(end[layer]["kernel"] - start[layer]["kernel"]) > 1e-3


def test_stacked_layers_learn_one_pair_each():
    params = {"ScanBlock_0": {"kernel": 0.1 * jnp.ones((3, 4, 5)), "bias": jnp.zeros((3, 5))}}
    raw = compander(learn=True).init(params)
    assert raw.log_a["ScanBlock_0"]["kernel"].shape == (3, 1, 1)
    raw = compander(learn=True, stacked={"Scan": 1}).init(params)
    assert raw.log_b["ScanBlock_0"]["kernel"].shape == (1, 4, 1)


def test_low_precision_weights_keep_their_dtype():
    params = {"kernel": jnp.array([[0.1, -0.2]], jnp.bfloat16)}
    wc = compander(learn=True)
    raw = wc.init(params)
    assert raw.weights["kernel"].dtype == jnp.bfloat16
    assert raw.log_a["kernel"].dtype == jnp.float32
    assert wc.apply(raw)["kernel"].dtype == jnp.bfloat16


def test_under_jit_vmap_pmap_and_sharding(setting):
    _, params = setting
    wc = compander(a=1.2, b=0.7)
    raw = wc.init(params)
    expected = wc.apply(raw)
    many = jax.tree.map(lambda x: jnp.stack([x, x]), raw)
    for mapped in (jax.vmap(wc.apply)(many), jax.pmap(wc.apply)(many)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-6), mapped, expected)
    jitted = jax.jit(wc.init)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), jitted, raw)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        kernel = jax.device_put(0.1 * jnp.ones((16, 8)), jax.NamedSharding(mesh, jax.P("model", None)))
        for learn in (False, True):
            wc = compander(learn=learn)
            back = jax.jit(lambda p: wc.apply(wc.init(p)))({"kernel": kernel})["kernel"]
            assert jax.typeof(back) == jax.typeof(kernel)


def test_nnx_models():
    graph, params = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    wc, tx, x = compander(a=1.2, b=0.7, learn=True), adamp(1e-2), jnp.ones((4, 3))
    raw = wc.init(params)

    @jax.jit
    def losses(raw):
        loss = lambda raw: jnp.mean((nnx.merge(graph, wc.apply(raw))(x) - 1) ** 2)  # noqa: E731
        updates, _ = tx.update(jax.grad(loss)(raw), tx.init(raw), raw)
        return loss(raw), loss(optax.apply_updates(raw, updates))

    before, after = losses(raw)
    assert after < before


def test_weights_beyond_the_bound_are_refused_or_clipped():
    params = {"layer": {"kernel": jnp.array([[0.1, -0.4]])}}
    with pytest.raises(ValueError, match=r"params at layer/kernel must be below the bound 0.3142 .* got 0.4"):
        compander().init(params)
    wc = compander(clip=0.9)
    np.testing.assert_allclose(wc.apply(wc.init(params))["layer"]["kernel"], [[0.1, -0.9 * 0.1 * np.pi]], rtol=1e-5)
    traced = jax.jit(lambda p: compander().apply(compander().init(p)))(params)["layer"]["kernel"]
    np.testing.assert_allclose(traced, [[0.1, -0.1 * np.pi]], rtol=1e-4)
    assert (compander(initialization="raw").init(params)["layer"]["kernel"] == params["layer"]["kernel"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a": 0.0}, "a must lie"),
        ({"b": {"x": -1.0}}, "b must lie"),
        ({"initialization": "zeros"}, "initialization must be one of preserve, raw, got 'zeros'"),
        ({"clip": 1.0}, "clip must lie"),
        ({"kind": "identity", "learn": True}, "learn must be False"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        compander(**options)


def test_bad_trees():
    with pytest.raises(ValueError, match="mask must choose at least one leaf"):
        compander().init({"bias": jnp.ones(2)})
    with pytest.raises(TypeError, match="raw must be the CompandedParams"):
        compander(learn=True).apply({"kernel": jnp.ones((2, 2))})


class Digits(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(32)(x))
        return nn.Dense(10)(x)


def digits_run(wc, seeds, steps):
    """Trains on 300 digits from several seeds; the kernel between the hidden layers of each."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images[:300] / 16.0, jnp.float32), jnp.asarray(labels[:300])
    model, tx = Digits(), optax.sgd(0.05, 0.9)

    def loss(raw, rows):
        logits = model.apply({"params": wc.apply(raw)}, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    @jax.jit
    def train(key, batches):
        def step(carry, rows):
            raw, state = carry
            updates, state = tx.update(jax.grad(loss)(raw, rows), state)
            return (optax.apply_updates(raw, updates), state), None

        raw = wc.init(model.init(key, x[:1])["params"])
        (raw, _), _ = jax.lax.scan(step, (raw, tx.init(raw)), batches)
        return wc.apply(raw)["Dense_1"]["kernel"]

    batches = np.random.default_rng(0).integers(0, 300, (seeds, steps, 32))
    return np.stack([train(jax.random.key(seed), batches[seed]) for seed in range(seeds)])


def distribution(kernels):
    """Largest magnitude, kurtosis and the share below a tenth of the standard deviation, one of each per seed."""
    flat = np.asarray(kernels, np.float64).reshape(len(kernels), -1)
    small = (np.abs(flat) < 0.1 * flat.std(1, keepdims=True)).mean(1)
    return np.abs(flat).max(1), stats.kurtosis(flat, axis=1, fisher=False), small


def test_compresses_large_weights_and_empties_the_neighbourhood_of_zero():
    """After 300 steps on digits: smaller extremes, lighter tails, fewer weights near zero than in the plain net."""
    plain = distribution(digits_run(compander("identity"), 3, 300))
    companded = distribution(digits_run(compander(a=0.2, b=0.1, clip=0.99), 3, 300))
    print("max, kurtosis, share near zero:", plain, companded)
    for before, after in zip(plain, companded, strict=True):
        assert after.max() < before.min()


@pytest.mark.effects
def test_effect_on_the_weights_of_a_digits_network():
    """Five seeds, 1000 steps: smaller extremes, lighter tails, fewer weights near zero, the accuracy about the same."""
    script = pathlib.Path(__file__).parents[2] / "docs" / "effects" / "compander_weights.py"
    spec = importlib.util.spec_from_file_location("compander_weights", script)
    effect = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(effect)
    runs = {name: effect.distribution(run) for name, run in effect.experiment().items()}
    plain = runs.pop("plain")
    for run in runs.values():
        assert run["maximum"].max() < plain["maximum"].min()
        assert run["kurtosis"].max() < 0.7 * plain["kurtosis"].min()
        assert run["near_zero"].mean() < 0.9 * plain["near_zero"].mean()
        assert abs(run["test_accuracy"].mean() - plain["test_accuracy"].mean()) < 0.02
    for name in ("arctan", "tanh", "softsign"):
        assert runs[name]["maximum"].max() < 0.4 * plain["maximum"].mean()
