"""The diagnostics of Lion-kappa against its theory: descent, the two phases, and solutions in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.optim import (
    Kappa,
    kappas,
    lion_kappa,
    lion_kappa_constraint_violation,
    lion_kappa_lyapunov,
    lion_kappa_stationarity_gap,
)

KAPPAS = {
    "sign": kappas.sign(),
    "lp_1p5": kappas.lp(1.5),
    "lp_2": kappas.lp(2.0),
    "lp_4": kappas.lp(4.0),
    "dead_zone": kappas.dead_zone(0.3),
    "top_k": kappas.top_k(3),
    "huber": kappas.huber(0.3),
    "linf": kappas.linf(),
    "group_l2": kappas.group_l2(axis=0),
    "squared_l2": kappas.squared_l2(),
    "relativistic": kappas.relativistic(0.3),
    "tanh": kappas.tanh(2.0),
    "softsign": kappas.softsign(0.3),
    "arctan": kappas.arctan(2.0),
    "nuclear": kappas.nuclear(),
    "spectral": kappas.spectral(),
}
SMOOTH = ("relativistic", "tanh", "softsign", "arctan", "squared_l2")
# learning rate, weight decay, b1, b2
SETTINGS = np.array([(0.02, 0.7, 0.9, 0.99), (0.1, 1.5, 0.5, 0.9), (0.05, 3.0, 0.0, 0.8), (0.3, 1.0, 0.7, 0.7)])
SHAPE = (3, 4)

every = pytest.mark.parametrize("name", KAPPAS)


def quadratic(seed):
    """A convex quadratic in 12 coordinates, its greatest curvature, and its gradient."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(12, 12)) / 3
    matrix, linear = factor @ factor.T, 2 * rng.normal(size=12)
    loss = lambda x: x.ravel() @ matrix @ x.ravel() / 2 - linear @ x.ravel()  # noqa: E731
    return loss, np.linalg.eigvalsh(matrix)[-1], jax.grad(loss)


def run(kappa, loss, start, rate, decay, b1, b2, steps):
    """Weights, momenta, Lyapunov values and gaps from the start on."""
    optimizer = lion_kappa(rate, kappa, b1, b2, weight_decay=decay)

    def measure(x, state):
        mu = optax.tree.get(state, "mu")
        gap = lion_kappa_stationarity_gap(jax.grad(loss)(x), x, kappa, decay)
        return x, mu, lion_kappa_lyapunov(loss(x), x, mu, kappa, rate, decay, b1, b2), gap

    def step(carry, _):
        x, state = carry
        updates, new_state = optimizer.update(jax.grad(loss)(x), state, x)
        return (optax.apply_updates(x, updates), new_state), measure(x, state)

    return jax.lax.scan(step, (start, optimizer.init(start)), length=steps)[1]


@every
def test_lyapunov_function_falls_up_to_second_order(name):
    loss, curvature, _ = quadratic(0)
    kappa = KAPPAS[name]
    with jax.enable_x64():
        start = 0.02 * np.random.default_rng(1).normal(size=SHAPE)
        runs = jax.jit(jax.vmap(lambda s: run(kappa, loss, start, *s, steps=80)))(SETTINGS)
        x, mu, h, gap = (np.asarray(part) for part in runs)
        squares = ((x[:, 1:] - x[:, :-1]) ** 2).sum((-2, -1))
        assert np.isfinite(h).all()
        assert np.max(np.diff(h) - curvature / 2 * squares) <= 1e-9
        assert (h[:, -1] < h[:, 0]).all()
        assert gap.min() >= -1e-12
        assert (gap[:, -1] < gap[:, 0]).all()
        if name in SMOOTH:
            assert_decrease(kappa, jax.grad(loss), curvature, x, mu, h)


def assert_decrease(kappa, slope, curvature, x, mu, h):
    """The full inequality, with the two monotone terms by which the function falls."""
    for setting, xs, mus, hs in zip(SETTINGS, x, mu, h, strict=True):
        rate, decay, b1, b2 = setting
        eta = rate / (1 - rate * decay)

        @jax.vmap
        def terms(x, m, next_x, next_m, b1=b1, b2=b2, decay=decay):
            ahead = b1 * m - (1 - b1) * slope(x)
            w = jax.grad(kappa.conjugate)(decay * next_x)
            first = jnp.vdot(ahead - w, kappa.grad(ahead) - decay * next_x)
            second = jnp.vdot(kappa.grad(next_m) - kappa.grad(ahead), next_m - ahead)
            return first, jnp.where(b2 > b1, second / jnp.where(b2 > b1, b2 - b1, 1), 0)

        first, second = jax.jit(terms)(xs[:-1], -mus[:-1], xs[1:], -mus[1:])
        scale = eta * decay * (1 - b1) + 1 - b2
        fall = eta * ((eta * decay + 1 - b2) / scale * first + b1 * (1 - b2) / scale * second)
        assert first.min() >= -1e-12
        assert second.min() >= -1e-12
        squares = ((xs[1:] - xs[:-1]) ** 2).sum((-2, -1))
        assert np.max(np.diff(hs) + fall - curvature / 2 * squares) <= 1e-9


@pytest.mark.parametrize(
    "name",
    ["sign", "lp_1p5", "dead_zone", "top_k", "linf", "group_l2", "squared_l2", "softsign", "nuclear", "spectral"],
)
def test_two_phases_whatever_the_gradients(name):
    """From outside the distance shrinks by 1 - lr decay a step; inside, nothing leaves."""
    kappa, rate, decay = KAPPAS[name], 0.05, 2.0
    optimizer = lion_kappa(rate, kappa, weight_decay=decay)
    rng = np.random.default_rng(2)
    starts = np.stack([3 * rng.normal(size=SHAPE), 0.01 * rng.normal(size=SHAPE)])
    grads = rng.normal(size=(40, *SHAPE)) * rng.choice([0, 1, 100], size=(40, 1, 1))

    def distances(start):
        def step(carry, grad):
            x, state = carry
            updates, state = optimizer.update(grad, state, x)
            x = optax.apply_updates(x, updates)
            return (x, state), lion_kappa_constraint_violation(x, kappa, decay)

        first = lion_kappa_constraint_violation(start, kappa, decay)
        return jnp.concatenate([first[None], jax.lax.scan(step, (start, optimizer.init(start)), grads)[1]])

    with jax.enable_x64():
        outside, inside = np.asarray(jax.jit(jax.vmap(distances))(starts))
    assert (outside[1:] <= (1 - rate * decay) * outside[:-1] + 1e-13).all()
    assert (outside[0] > 0.1) == (name != "squared_l2")
    assert (inside <= 1e-13).all()


TARGET = np.array([[3.0, -0.2, 0.6, -1.4], [0.1, 2.0, -0.9, 0.3], [-0.7, 0.4, 1.1, -2.5]])


def singular_values_mapped(function):
    u, s, vt = np.linalg.svd(TARGET, full_matrices=False)
    return u * np.asarray(function(s)) @ vt


@pytest.mark.parametrize(
    ("name", "solution"),
    [
        ("sign", lambda radius: np.clip(TARGET, -radius, radius)),
        ("lp_2", lambda radius: TARGET * min(1, radius / np.linalg.norm(TARGET))),
        ("linf", lambda radius: optax.projections.projection_l1_ball(jnp.asarray(TARGET), radius)),
        ("dead_zone", lambda radius: np.clip(np.sign(TARGET) * np.maximum(abs(TARGET) - 0.3, 0), -radius, radius)),
        ("huber", lambda radius: np.clip(TARGET / (1 + 0.3 / radius), -radius, radius)),
        ("squared_l2", lambda radius: TARGET / (1 + 1 / radius)),
        ("group_l2", lambda radius: TARGET * np.minimum(1, radius / np.linalg.norm(TARGET, axis=0))),
        ("nuclear", lambda radius: singular_values_mapped(lambda s: np.minimum(s, radius))),
        (
            "spectral",
            lambda radius: singular_values_mapped(
                lambda s: optax.projections.projection_simplex(jnp.asarray(s), radius)
            ),
        ),
    ],
)
def test_gap_vanishes_at_the_solution_and_the_optimizer_finds_it(name, solution):
    """The projection of a point, or its proximal map, for the loss |x - target|^2 / 2."""
    kappa, decay = KAPPAS[name], 1.25
    with jax.enable_x64():
        expected = jnp.asarray(solution(1 / decay))
        gap = lion_kappa_stationarity_gap(expected - TARGET, expected, kappa, decay)
        assert abs(gap) <= 1e-12
        nearby = 0.9 * expected
        assert lion_kappa_stationarity_gap(nearby - TARGET, nearby, kappa, decay) > 1e-3
        optimizer = lion_kappa(optax.exponential_decay(0.1, 100, 0.5), kappa, 0.5, 0.5, weight_decay=decay)

        def step(carry, _):
            x, state = carry
            updates, state = optimizer.update(x - TARGET, state, x)
            return (optax.apply_updates(x, updates), state), None

        x, _ = jax.jit(lambda x: jax.lax.scan(step, (x, optimizer.init(x)), length=1500)[0])(jnp.zeros(SHAPE))
        np.testing.assert_allclose(x, expected, atol=2e-3)
        last = lion_kappa_stationarity_gap(x - TARGET, x, kappa, decay)
        assert -1e-12 <= last < 0.02


def test_the_step_with_decay_of_the_new_weights_is_the_same_algorithm():
    eta, decay, b1, b2 = 0.1, 2.0, 0.8, 0.9
    loss, _, slope = quadratic(4)
    with jax.enable_x64():
        start = jnp.asarray(np.random.default_rng(5).normal(size=SHAPE))
        xs, *_ = run(kappas.tanh(2.0), loss, start, eta / (1 + eta * decay), decay, b1, b2, steps=20)
        x, mu = start, jnp.zeros(SHAPE)
        for t in range(20):
            np.testing.assert_allclose(xs[t], x, atol=1e-13)
            g = slope(x)
            x = (x - eta * jnp.tanh(2 * (b1 * mu + (1 - b1) * g))) / (1 + eta * decay)
            mu = b2 * mu + (1 - b2) * g


PARAMS = {"kernel": np.float32([[0.5, -0.25]]), "bias": np.float32([3.0]), "frozen": None}
MU = {"kernel": np.float32([[1.0, 2.0]]), "bias": np.float32([-0.5]), "frozen": None}
MASKED = dict(weight_decay=2.0, mask={"kernel": True, "bias": False, "frozen": False})


class TestTrees:
    def test_lyapunov_adds_up_and_leaves_without_decay_are_free(self):
        h = lion_kappa_lyapunov(1.0, PARAMS, MU, learning_rate=0.1, b1=0.5, b2=0.9, **MASKED)
        eta = 0.1 / 0.8
        kernel = eta * 0.5 / (eta * 2 * 0.5 + 0.1) * (3.0 + 2 * (0.5 - 0.5))
        bias = 0.1 * 0.5 / 0.1 * 0.5
        np.testing.assert_allclose(h, 1 + kernel + bias, rtol=1e-6)

    def test_violation_and_gap_add_up(self):
        assert lion_kappa_constraint_violation(PARAMS, **MASKED) == 0
        assert lion_kappa_constraint_violation(PARAMS, weight_decay=2.0) == 2.5
        assert lion_kappa_constraint_violation(PARAMS, weight_decay=0.0) == 0
        assert lion_kappa_constraint_violation({}, weight_decay=2.0) == 0
        gap = lion_kappa_stationarity_gap(MU, PARAMS, **MASKED)
        np.testing.assert_allclose(gap, 3 + 2 * (0.5 - 0.5) + 0.5, rtol=1e-6)
        assert lion_kappa_stationarity_gap(MU, PARAMS, weight_decay=2.0) == np.inf
        assert lion_kappa_lyapunov(1.0, PARAMS, MU, weight_decay=2.0) == np.inf

    def test_gradients_that_are_none_are_left_out(self):
        grads = MU | {"bias": None}
        assert np.isfinite(lion_kappa_stationarity_gap(grads, PARAMS, weight_decay=1.0))

    def test_kappas_that_name_no_violation_tell_membership(self):
        ball = Kappa(
            jnp.linalg.norm, lambda m: m / jnp.linalg.norm(m), lambda y: jnp.where(jnp.vdot(y, y) < 1, 0, jnp.inf)
        )
        assert lion_kappa_constraint_violation(jnp.array([0.1, 0.2]), ball, 1.0) == 0
        assert lion_kappa_constraint_violation(jnp.array([1.0, 2.0]), ball, 1.0) == np.inf


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_that_rest_on_the_boundary_count_as_inside(dtype):
    """Constant gradients drive every weight to the boundary, where rounding may put it a little beyond."""
    decay = 3.0
    optimizer = lion_kappa(0.03, weight_decay=decay)
    x = jnp.zeros(4, dtype)

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(-jnp.ones_like(x), state, x)
        return (optax.apply_updates(x, updates), state), None

    (x, state), _ = jax.jit(lambda x: jax.lax.scan(step, (x, optimizer.init(x)), length=600))(x)
    assert (x > 0.95 / decay).all()
    h = lion_kappa_lyapunov(jnp.float32(0), x, optax.tree.get(state, "mu"), weight_decay=decay, learning_rate=0.03)
    gap = lion_kappa_stationarity_gap(-jnp.ones_like(x), x, weight_decay=decay)
    assert np.isfinite(h)
    assert h.dtype == gap.dtype == jnp.float32
    assert abs(gap) <= 4 * 0.05


def test_diagnostics_log_from_a_jitted_loop_with_traced_settings():
    loss = lambda params: jnp.sum((params["w"] - 2.0) ** 2)  # noqa: E731

    @jax.jit
    def train(rate, decay):
        optimizer = lion_kappa(rate, weight_decay=decay)
        params = {"w": jnp.full(3, 2.5)}

        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            log = {
                "lyapunov": lion_kappa_lyapunov(
                    value, params, optax.tree.get(state, "mu"), learning_rate=rate, weight_decay=decay
                ),
                "gap": lion_kappa_stationarity_gap(grads, params, weight_decay=decay),
                "violation": lion_kappa_constraint_violation(params, weight_decay=decay),
            }
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), log

        return jax.lax.scan(step, (params, optimizer.init(params)), length=300)[1]

    log = jax.vmap(train, in_axes=(0, None))(jnp.array([0.05, 0.1]), 1.0)
    assert (log["violation"][:, 0] == 1.5).all()
    assert (log["violation"][:, -1] < 1e-5).all()
    assert (log["lyapunov"][:, 0] == np.inf).all()
    np.testing.assert_allclose(log["lyapunov"][:, -1], 3.0, rtol=1e-3)
    np.testing.assert_allclose(log["gap"][:, -1], 0.0, atol=1e-3)


def test_bad_input():
    x = jnp.ones(2)
    with pytest.raises(ValueError, match=r"learning_rate \* weight_decay must be below 1, got 0.5 \* 2.0"):
        lion_kappa_lyapunov(0.0, x, x, learning_rate=0.5, weight_decay=2.0)
    with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \(2,\)"):
        lion_kappa_lyapunov(x, x, x)
    with pytest.raises(ValueError, match="b2 must"):
        lion_kappa_lyapunov(0.0, x, x, b2=1.0)
    with pytest.raises(ValueError, match="weight_decay must"):
        lion_kappa_stationarity_gap(x, x, weight_decay=-1.0)
    with pytest.raises(ValueError, match="weight_decay must"):
        lion_kappa_constraint_violation(x, weight_decay=-1.0)
    with pytest.raises(ValueError, match="kappa must be one of"):
        lion_kappa_constraint_violation(x, "lion")
    with pytest.warns(UserWarning, match="b1=0.9 above b2=0.8"):
        lion_kappa_lyapunov(0.0, x, x, b1=0.9, b2=0.8)
