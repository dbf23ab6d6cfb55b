"""Target-based surrogates: the official trajectories, majorization, special cases, and what they buy."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.optim import Armijo, TargetLineSearch, sso, sso_step, target_line_search, target_surrogate

quick = settings(max_examples=10, deadline=None)


def linear(params, batch):
    return batch[0] @ params["w"].T + params["b"]


def squared(z, batch):
    return jnp.sum((z - batch[1]) ** 2)


def logistic(z, batch):
    """The summed logistic loss; labels in {0, 1}."""
    z = z.reshape(batch[1].shape)
    return jnp.sum(jnp.logaddexp(0.0, z) - batch[1] * z)


def cross_entropy(z, batch):
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(z, batch[1]))


LOSSES = {"mse": squared, "bce": logistic, "ce": cross_entropy}


@pytest.mark.golden
@pytest.mark.golden_pattern("optim", "sso_*.npz")
def test_official_trajectory(golden_file):
    """Weights, inverse steps and full losses after every outer step."""
    data = np.load(golden_file)
    hparams = json.loads(str(data["hparams"]))
    loss_fn = LOSSES[hparams["loss"]]
    expand = hparams["expand"] ** (1 / hparams["n_batches_per_epoch"])
    algorithm = sso(
        linear,
        loss_fn,
        eta=hparams["stepsize"] / 2,
        inner_steps=hparams["inner_steps"],
        schedule=hparams["schedule"],
        num_steps=hparams["outer_steps"],
        line_search=TargetLineSearch(c=hparams["outer_c"]) if hparams["algo"] == "SLS" else None,
        armijo=Armijo(
            c=hparams["armijo_c"],
            shrink=hparams["backtrack"],
            expand=expand,
            initial_step=float(hparams["init_inner_step"]),
        ),
    )
    tolerance = 1e-10 if hparams["schedule"] == "constant" else 1e-6
    with jax.enable_x64():
        x, y = jnp.asarray(data["X"]), jnp.asarray(data["y"])

        def step(carry, rows):
            params, state = carry
            params, state, _ = algorithm.step(params, state, (x[rows], y[rows]))
            return (params, state), (params, state.inverse_step, loss_fn(linear(params, (x, y)), (x, y)))

        params = {"w": jnp.asarray(data["w_init"]), "b": jnp.asarray(data["b_init"])}
        start = (params, algorithm.init(params))
        _, (trajectory, inverse, losses) = jax.jit(lambda c, i: jax.lax.scan(step, c, i))(start, data["batch_index"])
    np.testing.assert_allclose(trajectory["w"], data["w"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(trajectory["b"], data["b"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(inverse, data["outer_inverse_stepsize"], rtol=1e-12)
    np.testing.assert_allclose(losses, data["full_loss_sum"], rtol=10 * tolerance)


def problem(seed, n=12, d=4):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((n, d)), rng.standard_normal(d)
    return x, (rng.random(n) < 0.5).astype(float), w


def predict(w, batch):
    return batch[0] @ w


@quick
@given(st.integers(0, 10**6), st.floats(0.05, 4.0))
def test_surrogate_touches_and_majorizes(seed, eta):
    """Equal value and gradient at the start; for eta <= 1/L = 4 above the logistic loss everywhere."""
    with jax.enable_x64():
        x, y, w = problem(seed)
        batch = (jnp.asarray(x), jnp.asarray(y))
        value, slope, elsewhere, loss = surrogate_at(jnp.asarray(w), batch, eta)
        direct = jax.grad(lambda w: logistic(predict(w, batch), batch))(jnp.asarray(w))
        np.testing.assert_allclose(value, loss[0], rtol=1e-13)
        np.testing.assert_allclose(slope, direct, rtol=1e-10, atol=1e-12)
        assert (elsewhere >= loss[1:] - 1e-9).all()


@jax.jit
def surrogate_at(w, batch, eta):
    z = predict(w, batch)
    loss, grads = jax.value_and_grad(logistic)(z, batch)
    surrogate = target_surrogate(predict, z, grads, eta, loss)
    points = w + jnp.linspace(-3, 3, 20)[:, None] * jnp.roll(w, 1)
    others = jax.vmap(lambda p: logistic(predict(p, batch), batch))(points)
    value, slope = jax.value_and_grad(surrogate)(w, batch)
    return value, slope, jax.vmap(lambda p: surrogate(p, batch))(points), jnp.concatenate([loss[None], others])


def test_one_inner_step_is_gradient_descent():
    with jax.enable_x64():
        x, y, w = map(jnp.asarray, problem(1))
        new, info = sso_step(predict, logistic, w, (x, y), eta=0.7, inner_steps=1, inner_optimizer=optax.sgd(0.03))
        grad = jax.grad(lambda w: logistic(predict(w, (x, y)), (x, y)))(w)
        np.testing.assert_allclose(new, w - 0.03 * grad, rtol=1e-13)
        assert float(info.loss) == pytest.approx(float(logistic(predict(w, (x, y)), (x, y))), rel=1e-14)
        assert int(info.inner_steps) == 1


def test_linear_model_solved_exactly_is_a_projected_step():
    """theta - eta X^+ G; with half the squared error and eta = 1 that is the least-squares solution."""
    with jax.enable_x64():
        x, y, w = map(jnp.asarray, problem(2))
        run = jax.jit(functools.partial(sso_step, predict, eta=1.5, inner_steps=400), static_argnums=0)
        new, _ = run(logistic, w, (x, y))
        grads = jax.grad(logistic)(x @ w, (x, y))
        np.testing.assert_allclose(new, w - 1.5 * jnp.linalg.pinv(x) @ grads, rtol=1e-5)
        half = lambda z, batch: 0.5 * squared(z, batch)  # noqa: E731
        new, info = sso_step(predict, half, w, (x, y), eta=1.0, inner_steps=400)
        np.testing.assert_allclose(new, jnp.linalg.lstsq(x, y)[0], rtol=1e-5)
        assert half(x @ new, (x, y)) == pytest.approx(float(info.loss + info.surrogate_change), rel=1e-9)


def test_full_batch_loss_falls_at_every_step():
    """With eta = 1/L any number of inner steps brings descent, here on a tree of two outputs of a two-layer net."""

    def net(params, batch):
        hidden = jnp.tanh(batch[0] @ params["inner"])
        return {"a": hidden @ params["outer"], "b": hidden[:, 0]}

    def loss(z, batch):
        return logistic(z["a"], batch) + 0.5 * jnp.sum((z["b"] - batch[1]) ** 2)

    with jax.enable_x64():
        x, y, _ = map(jnp.asarray, problem(3))
        rng = np.random.default_rng(4)
        params = {"inner": jnp.asarray(rng.standard_normal((4, 5))), "outer": jnp.asarray(rng.standard_normal(5))}
        algorithm = sso(net, loss, eta=1.0, inner_steps=7)
        step = lambda c, _: (lambda p, s, i: ((p, s), i))(*algorithm.step(*c, (x, y)))  # noqa: E731
        _, info = jax.jit(lambda c: jax.lax.scan(step, c, length=30))((params, algorithm.init(params)))
        assert (info.surrogate_change < 0).all()
        assert (info.loss[1:] <= info.loss[:-1] + info.surrogate_change[:-1] + 1e-12).all()


@quick
@given(st.integers(0, 10**6), st.floats(0.02, 50.0))
def test_line_search_accepts_what_the_condition_says(seed, start):
    with jax.enable_x64():
        _, y, z = problem(seed, n=4)
        loss = lambda z: logistic(z, (None, jnp.asarray(y)))  # noqa: E731
        z = jnp.asarray(z)
        grads = jax.grad(loss)(z)
        options = TargetLineSearch()
        inverse = float(target_line_search(loss, z, grads, start, options))
        accepted = lambda r: loss(z - grads / r) <= loss(z) - options.c / r * (grads**2).sum()  # noqa: E731
        assert accepted(inverse)
        assert inverse == pytest.approx(start / 1.8) or not accepted(inverse * options.shrink * (1 - 1e-9))


def test_line_search_is_clipped_and_survives_nan():
    z = jnp.array([1.0, 2.0])
    flat = target_line_search(lambda z: 0.0 * z.sum(), z, 0 * z, 1e-4)
    assert float(flat) == pytest.approx(1e-4)
    moved_is_nan = lambda at: jnp.where(jnp.any(at != z), jnp.nan, 1.0)  # noqa: E731
    assert float(target_line_search(moved_is_nan, z, z, 1.0)) == pytest.approx(1e4)  # of 0.9^-100 / 1.8, clipped
    few = TargetLineSearch(max_backtracks=3)
    assert float(target_line_search(moved_is_nan, z, z, 1.0, few)) == pytest.approx(0.9**-3 / 1.8)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0]),
        ("stochastic", [1.0, 2**-0.5, 3**-0.5]),
        ("exponential", [3 ** (-1 / 3), 3 ** (-2 / 3), 1 / 3]),
        (lambda count: 0.5**count, [1.0, 0.5, 0.25]),
    ],
)
def test_schedules(schedule, expected):
    x, y, w = (jnp.asarray(a, jnp.float32) for a in problem(5))
    algorithm = sso(predict, logistic, eta=2.0, inner_steps=1, schedule=schedule, num_steps=3)
    state, used = algorithm.init(w), []
    step = jax.jit(algorithm.step)
    for _ in range(3):
        w, state, info = step(w, state, (x, y))
        used.append(float(info.eta))
    np.testing.assert_allclose(used, 2.0 * np.array(expected), rtol=1e-6)


def test_many_cheap_steps_beat_one_at_the_same_number_of_oracle_calls():
    """Ill-conditioned logistic regression, 60 gradients of the loss each: more inner steps reach a lower loss."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 20)) * np.logspace(0, -1.5, 20)
    labels = rng.random(300) < 1 / (1 + np.exp(-x @ (rng.standard_normal(20) / np.logspace(0, -1.5, 20))))
    batch = (jnp.asarray(x, jnp.float32), jnp.asarray(labels, jnp.float32))
    smooth = float(np.linalg.eigvalsh(x.T @ x)[-1])  # of ||Xw||^2/2; the surrogate's curvature is this over eta

    def final(inner_steps):
        algorithm = sso(predict, logistic, eta=4.0, inner_steps=inner_steps, inner_optimizer=optax.sgd(4.0 / smooth))
        step = lambda c, _: (lambda p, s, i: ((p, s), i.loss / 300))(*algorithm.step(*c, batch))  # noqa: E731
        w = jnp.zeros(20)
        return np.asarray(jax.jit(lambda c: jax.lax.scan(step, c, length=60))((w, algorithm.init(w)))[1])

    one, ten, hundred = final(1), final(10), final(100)
    print("losses after 60 gradients with 1, 10, 100 inner steps:", one[-1], ten[-1], hundred[-1])
    for losses in (one, ten, hundred):
        assert (np.diff(losses) < 1e-6).all()
    assert hundred[-1] < ten[-1] < one[-1]
    assert one[-1] - hundred[-1] > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.0}, r"eta must lie in \(0, inf\], got 0.0"),
        ({"inner_steps": 0}, "inner_steps must be at least 1, got 0"),
        ({"schedule": "cosine"}, "schedule must be one of"),
        ({"schedule": "exponential"}, "num_steps must be given"),
        ({"line_search": TargetLineSearch(shrink=1.0)}, "shrink must lie"),
        ({"line_search": TargetLineSearch(expand=0.5)}, "expand must lie"),
        ({"armijo": Armijo(c=1.0)}, "c must lie"),
        ({"armijo": Armijo(initial_step=0.0)}, "initial_step must lie"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        sso(predict, logistic, **{"eta": 1.0, "inner_steps": 1, **options})


def test_bad_surrogates():
    z = jnp.zeros(3)
    with pytest.raises(ValueError, match="eta must lie"):
        target_surrogate(predict, z, z, -1.0)
    with pytest.raises(ValueError, match="structure and shapes of outputs"):
        target_surrogate(predict, z, {"z": z}, 1.0)
    with pytest.raises(ValueError, match="structure and shapes of outputs"):
        target_surrogate(predict, z, jnp.zeros(4), 1.0)
