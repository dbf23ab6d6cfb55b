"""Lion-kappa: official trajectories, the optimizers it contains, invariances, dtypes and bad input."""

import importlib.util
import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.optim import Kappa, kappas, lion_kappa, lion_kappa_lyapunov, scale_by_lion_kappa


def trajectory(optimizer, params, grads):
    """Parameters and momentum after every step with given gradients, stacked."""

    def step(carry, grad):
        params, state = carry
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    return jax.jit(lambda params, grads: jax.lax.scan(step, (params, optimizer.init(params)), grads)[1])(params, grads)


def problem(seed=0, steps=12, dtype=np.float64):
    """Parameters and gradients, some of them exactly zero."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (3, 4), "bias": (4,), "scale": ()}
    params = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    grads = {name: rng.normal(size=(steps, *shape)).astype(dtype) for name, shape in shapes.items()}
    grads["bias"][::3] = 0
    return params, grads


def assert_same(actual, expected, atol=1e-15, rtol=1e-13):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.golden
@pytest.mark.golden_pattern("optim", "lion_[!k]*.npz")
def test_golden_lion(golden_file):
    data = np.load(golden_file, allow_pickle=False)
    hparams = json.loads(str(data["hparams"]))
    count = hparams["num_params"]
    names = [f"p{i}" for i in range(count)]
    dtype = data["p0_init"].dtype
    b1, b2 = hparams.get("betas", (0.9, 0.99))
    with jax.enable_x64(dtype == np.float64):
        rate = hparams["lr"]
        if "lr_per_step" in data:
            rates = jnp.asarray(data["lr_per_step"])
            rate = lambda step: rates[step]  # noqa: E731
        optimizer = lion_kappa(
            rate,
            b1=b1,
            b2=b2,
            weight_decay=hparams.get("weight_decay", 0.0),
            cautious_factor=hparams.get("cautious_factor"),
        )
        params = {name: data[f"{name}_init"] for name in names}
        params, state = trajectory(optimizer, params, {name: data[f"{name}_grads"] for name in names})
        momentum = optax.tree.get(state, "mu")
    tolerance = 3e-6 if dtype == np.float32 else 1e-12
    for name in names:
        assert params[name].dtype == dtype
        np.testing.assert_allclose(params[name], data[f"{name}_params"], rtol=0, atol=tolerance)
        np.testing.assert_allclose(momentum[name], data[f"{name}_exp_avg"], rtol=0, atol=tolerance)


@pytest.mark.golden
@pytest.mark.golden_pattern("optim", "lion_kappa*.npz")
def test_golden_lion_kappa(golden_file, reference_kappas):
    """Weights, momentum and the Lyapunov function of every step."""
    data = np.load(golden_file, allow_pickle=False)
    hparams = json.loads(str(data["hparams"]))
    numbers = [hparams[key] for key in ("learning_rate", "weight_decay", "b1", "b2")]
    rate, decay, b1, b2 = numbers
    with jax.enable_x64():
        quadratic, linear = jnp.asarray(data["Q"]), jnp.asarray(data["b"])
        for name, kappa in reference_kappas(hparams).items():
            matrix = name in ("nuclear", "spectral")
            optimizer = lion_kappa(rate, kappa, b1, b2, weight_decay=decay)

            def step(carry, _, optimizer=optimizer, kappa=kappa):
                x, state = carry
                slope, mu = quadratic @ x.ravel() - linear, optax.tree.get(state, "mu")
                loss = x.ravel() @ (slope - linear) / 2
                h = lion_kappa_lyapunov(loss, x, mu, kappa, rate, decay, b1, b2)
                updates, state = optimizer.update(slope.reshape(x.shape), state, x)
                return (optax.apply_updates(x, updates), state), (x.ravel(), mu.ravel(), h)

            x = jnp.asarray(data[f"{name}_x"][0]).reshape(hparams["matrix_shape"] if matrix else -1)
            length = len(data[f"{name}_x"])
            actual = jax.jit(lambda x, step=step, opt=optimizer, length=length: jax.lax.scan(
                step, (x, opt.init(x)), length=length
            )[1])(x)  # fmt: skip
            tolerance = 1e-8 if matrix else 1e-10
            for values, key in zip(actual, ("x", "mu", "H"), strict=True):
                np.testing.assert_allclose(values, data[f"{name}_{key}"], rtol=0, atol=tolerance, err_msg=name)


class TestRelations:
    """Optimizers that Lion-kappa contains."""

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
    @pytest.mark.parametrize("schedule", [False, True])
    def test_sign_is_lion_bit_for_bit(self, dtype, schedule):
        with jax.enable_x64(dtype == jnp.float64):
            params, grads = jax.tree.map(lambda x: jnp.asarray(x, dtype), problem())
            rate = optax.linear_schedule(0.1, 0.01, 10) if schedule else 0.03
            options = dict(b1=0.8, b2=0.95, weight_decay=0.3, mask={"kernel": True, "bias": False, "scale": True})
            ours = trajectory(lion_kappa(rate, **options), params, grads)
            theirs = trajectory(optax.lion(rate, **options), params, grads)
        assert_identical(ours, theirs)

    def test_a_state_of_lion_continues_here(self):
        params, grads = problem(dtype=np.float32)
        grad = jax.tree.map(lambda g: g[0], grads)
        _, state = optax.lion(0.01).update(grad, optax.lion(0.01).init(params), params)
        assert_identical(lion_kappa(0.01).update(grad, state, params), optax.lion(0.01).update(grad, state, params))

    @pytest.mark.parametrize(
        ("kappa", "mode", "slope"),
        [(kappas.huber(1.0), "refined", 1.0), (kappas.tanh(3.0), "smooth", 3.0)],
        ids=["refined", "smooth"],
    )
    def test_huber_and_tanh_are_the_modes_of_lion(self, kappa, mode, slope):
        with jax.enable_x64():
            params, grads = problem()
            ours = trajectory(scale_by_lion_kappa(kappa), params, grads)
            theirs = trajectory(optax.scale_by_lion(mode=mode, smooth_beta=slope), params, grads)
        assert_same(ours, theirs)

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_squared_l2_is_momentum(self, nesterov):
        beta, rate = 0.8, 0.1
        with jax.enable_x64():
            params, grads = problem()
            b1 = beta**2 if nesterov else beta
            ours = lion_kappa(rate, kappas.squared_l2(), b1, beta, weight_decay=0.0)
            theirs = optax.sgd(rate * (1 - beta), momentum=beta, nesterov=nesterov)
            assert_same(trajectory(ours, params, grads)[0], trajectory(theirs, params, grads)[0])

    def test_sign_without_memory_is_sign_descent_and_with_one_rate_signum(self):
        with jax.enable_x64():
            params, grads = problem()
            ours = trajectory(lion_kappa(0.1, b1=0.0, weight_decay=0.0), params, grads)[0]
            assert_same(ours, trajectory(optax.sign_sgd(0.1), params, grads)[0])
            ours = trajectory(lion_kappa(0.1, b1=0.7, b2=0.7, weight_decay=0.0), params, grads)[0]
            assert_same(ours, trajectory(optax.signum(0.1, 0.7), params, grads)[0])

    @pytest.mark.parametrize("kappa", [kappas.sign(), kappas.lp(3.0), kappas.nuclear(fallback=kappas.linf())])
    def test_without_memory_it_is_frank_wolfe(self, kappa):
        rate, decay = 0.1, 2.0
        with jax.enable_x64():
            params, grads = problem()
            params = jax.tree.map(jnp.asarray, params)
            ours, _ = trajectory(lion_kappa(rate, kappa, b1=0.0, weight_decay=decay), params, grads)
            for t in range(3):
                gamma = rate * decay
                vertex = {name: kappa.grad(-jnp.asarray(grads[name][t])) / decay for name in params}
                params = {name: (1 - gamma) * params[name] + gamma * vertex[name] for name in params}
                assert_same(jax.tree.map(lambda x, t=t: x[t], ours), params)

    def test_nuclear_with_one_rate_is_exact_muon(self):
        # Muon approximates the polar factor; ten Newton-Schulz steps of the convergent polynomial are exact.
        with jax.enable_x64():
            rng = np.random.default_rng(1)
            params, grads = rng.normal(size=(3, 4)), rng.normal(size=(3, 3, 4))
            muon = optax.contrib.scale_by_muon(
                ns_coeffs=(1.875, -1.25, 0.375), ns_steps=10, beta=0.9, nesterov=False, eps=0.0
            )
            ours = trajectory(scale_by_lion_kappa(kappas.nuclear(), 0.9, 0.9), params, grads)[0]
            assert_same(ours, trajectory(muon, params, grads)[0], atol=1e-12)

    def test_smooth_kappa_without_memory_or_decay_is_mirror_descent_in_the_dual(self):
        # Dual preconditioning: x <- x - lr grad K(g).
        with jax.enable_x64():
            params, grads = problem()
            kappa = kappas.relativistic(0.5)
            ours, _ = trajectory(lion_kappa(0.1, kappa, b1=0.0, weight_decay=0.0), params, grads)
            steps = grads["kernel"] / np.sqrt(grads["kernel"] ** 2 + 0.25)
            np.testing.assert_allclose(ours["kernel"], params["kernel"] - 0.1 * np.cumsum(steps, 0), atol=1e-14)


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(scale=st.floats(2.0**-20, 2.0**20), seed=st.integers(0, 99))
def test_norms_ignore_the_scale_of_all_gradients(scale, seed):
    params, grads = problem(seed, dtype=np.float32)
    scale = np.float32(2.0 ** np.round(np.log2(scale)))  # a power of two multiplies without rounding
    scaled = jax.tree.map(lambda g: g * scale, grads)
    run = RUN_NORMS
    for ours, theirs in zip(run(params, grads), run(params, scaled), strict=True):
        assert_same(ours, theirs, atol=1e-6, rtol=1e-5)


@jax.jit
def RUN_NORMS(params, grads):
    return [
        trajectory(lion_kappa(0.1, kappa, weight_decay=0.5), params, grads)[0]
        for kappa in (kappas.sign(), kappas.lp(1.5), kappas.linf())
    ]


def test_kappas_that_are_not_even_get_the_papers_sign():
    grad = jnp.array([1.0, 0.0, -1.0])
    updates, _ = scale_by_lion_kappa(kappas.log_sum_exp(), b1=0.0).update(
        grad, scale_by_lion_kappa(kappas.log_sum_exp()).init(grad)
    )
    np.testing.assert_allclose(updates, -jax.nn.softmax(-grad), rtol=1e-6)
    optimizer = lion_kappa(0.1, kappas.log_sum_exp(), b2=0.9, weight_decay=1.0)
    x, _ = trajectory(optimizer, np.full(3, 1 / 3, np.float32), np.tile(3 * grad, (200, 1)))
    np.testing.assert_allclose(x[-1], jax.nn.softmax(-3 * grad), atol=1e-3)
    np.testing.assert_allclose(x.sum(-1), 1, atol=1e-5)


def test_custom_kappa_and_names():
    params, grads = problem(dtype=np.float32)
    own = Kappa(lambda m: jnp.sum(jnp.abs(m)), jnp.sign, lambda y: jnp.where(jnp.all(jnp.abs(y) <= 1), 0.0, jnp.inf))
    named, built = (trajectory(lion_kappa(0.1, kappa), params, grads) for kappa in ("sign", own))
    assert_identical(named, built)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
def test_cautious_factor(factor):
    grad, mu = jnp.array([1.0, -1.0, 2.0, 0.0]), jnp.array([9.0, 9.0, -9.0, 9.0])
    state = optax.ScaleByLionState(jnp.zeros((), jnp.int32), mu)
    updates, _ = scale_by_lion_kappa(b1=0.9, cautious_factor=factor).update(grad, state)
    multiplier = np.array([1.0, factor, factor, factor])
    np.testing.assert_allclose(updates, np.array([1, 1, -1, 1]) * multiplier / multiplier.mean(), rtol=1e-6)


def test_cautious_factor_with_nothing_left_is_zero():
    grad, mu = jnp.array([1.0, -1.0]), jnp.array([-9.0, 9.0])
    state = optax.ScaleByLionState(jnp.zeros((), jnp.int32), mu)
    updates, _ = scale_by_lion_kappa(cautious_factor=0.0).update(grad, state)
    assert updates.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype", "mu_dtype"),
    [("bfloat16", "bfloat16", "float32"), ("float32", "bfloat16", None), ("bfloat16", "float32", None)],
)
def test_mixed_dtypes_are_stable(param_dtype, grad_dtype, mu_dtype):
    params, grad = jnp.ones(3, param_dtype), jnp.ones(3, grad_dtype)
    for rate in (0.1, optax.constant_schedule(0.1)):
        optimizer = lion_kappa(rate, kappas.huber(0.5), mu_dtype=mu_dtype)
        state = optimizer.init(params)
        assert optax.tree.get(state, "mu").dtype == (mu_dtype or param_dtype)
        updates, new_state = optimizer.update(grad, state, params)
        assert updates.dtype == param_dtype
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new_state)


def test_gradients_that_are_none_leave_their_momentum_alone():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    optimizer = lion_kappa(0.1)
    state = optimizer.init(params)
    _, state = optimizer.update({"a": jnp.ones(2), "b": jnp.ones(3)}, state, params)
    updates, new_state = optimizer.update({"a": jnp.ones(2), "b": None}, state, params)
    assert updates["b"] is None
    assert_identical(optax.tree.get(new_state, "mu")["b"], optax.tree.get(state, "mu")["b"])
    assert optax.apply_updates(params, {"a": updates["a"], "b": jnp.zeros(3)})["a"].shape == (2,)


def test_differentiating_through_steps_from_zero_momentum_is_finite():
    target = jnp.array([[1.0, -2.0], [0.5, 0.0]])

    def outer(rate):
        optimizer = lion_kappa(rate, kappas.nuclear(), weight_decay=0.1)
        x, state = jnp.zeros((2, 2)), optimizer.init(target)
        for _ in range(3):
            updates, state = optimizer.update(jnp.where(state[0].count > 0, x - target, 0), state, x)
            x = optax.apply_updates(x, updates)
        return jnp.sum((x - target) ** 2)

    slope = jax.jit(jax.grad(outer))(0.1)
    assert np.isfinite(slope)
    assert slope < 0


def test_region_analysis_makes_a_donated_step_work_in_place_with_the_same_numbers():
    optimizer = lion_kappa(1e-2)

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jnp.linspace(-1, 1, 1000)
    arguments = params, optimizer.init(params), jnp.cos(40 * params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments)
    plain = lowered.compile()
    in_place = lowered.compile({"xla_cpu_copy_insertion_use_region_analysis": True})
    assert in_place.memory_analysis().temp_size_in_bytes == 0
    assert_identical(in_place(*jax.tree.map(jnp.copy, arguments)), plain(*jax.tree.map(jnp.copy, arguments)))


@pytest.mark.effects
def test_effect_of_the_box_on_the_digits():
    """Weights end in the box, many of them at its boundary, and too small a box hurts; five seeds each."""
    script = pathlib.Path(__file__).parents[2] / "docs" / "effects" / "lion_kappa_box.py"
    spec = importlib.util.spec_from_file_location("lion_kappa_box", script)
    box = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(box)
    runs = box.experiment()
    decays = np.array(box.DECAYS)[:, None, None]
    distance, steps = runs["log"]["violation"], box.EVERY * np.arange(runs["log"]["loss"].shape[-1])
    assert (distance <= distance[..., :1] * (1 - box.RATE * decays) ** steps + 1e-6).all()
    assert (runs["scaled_maximum"] > 0.99).all()
    assert (runs["scaled_maximum"] < 1 + 1e-5).all()
    assert (runs["near_boundary"].min(1) > [0.3, 0.25, 0.7]).all()
    assert (runs["test_accuracy"].mean(1) > [0.95, 0.95, 0.2]).all()
    assert runs["test_accuracy"][2].max() < 0.6
    assert (np.diff(runs["log"]["loss"][..., -1].mean(1)) > 0).all()  # a smaller box holds worse minima
    falls = box.experiment(steps=300, descent=True)["log"]["lyapunov"]
    assert (falls[..., -1] < falls[..., 0]).all()
    assert np.diff(falls, axis=-1).max() < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(b1=1.0), r"b1 must lie in \[0, 1\), got 1.0"),
        (dict(b1=-0.1), "b1 must"),
        (dict(b2=1.5), r"b2 must lie in \[0, 1\), got 1.5"),
        (dict(b2=np.nan), "b2 must"),
        (dict(weight_decay=-1e-3), r"weight_decay must lie in \[0, inf\], got -0.001"),
        (dict(learning_rate=-1.0), "learning_rate must"),
        (dict(cautious_factor=1.5), r"cautious_factor must lie in \[0, 1\], got 1.5"),
        (dict(kappa="lion"), r"kappa must be one of .*'sign'.*got 'lion'"),
    ],
)
def test_bad_values_raise_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        lion_kappa(**{"learning_rate": 0.1, **options})


def test_other_bad_input():
    with pytest.raises(TypeError):
        scale_by_lion_kappa(jnp.sign)
    with pytest.raises(ValueError, match="needs the parameters"):
        lion_kappa(0.1).update(jnp.ones(2), lion_kappa(0.1).init(jnp.ones(2)))
    with pytest.raises(TypeError, match=r"complex64.*split_real_and_imaginary"):
        lion_kappa(0.1).init({"a": jnp.ones(2, jnp.complex64)})
    with pytest.raises(ValueError, match=r"fallback"):
        lion_kappa(0.1, "nuclear").update(jnp.ones(2), lion_kappa(0.1).init(jnp.ones(2)), jnp.ones(2))
    with pytest.warns(UserWarning, match="overshoot"):
        lion_kappa(0.5, weight_decay=2.0)
