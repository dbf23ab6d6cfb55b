r"""Lion-kappa in small steps follows its differential equation, row by row of the family that this equation makes.

With the momentum $m = -\mu$ and an objective $f$,

    m' = -alpha grad f(x) - gamma m,    x' = dK(m - eps (alpha grad f(x) + gamma m)) - lambda x.

A step of size h of the optimizer has 1 - b2 = h gamma, 1 - b1 = eps gamma, and gradients of (alpha/gamma) f. Where eps
is zero, b1 = b2 looks ahead by the one step that vanishes with h.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special

from poise.optim import kappas, lion_kappa, lion_kappa_lyapunov, lion_kappa_stationarity_gap

# What stands for 1 - b2 = 0: so little that 1000 steps change a number by 1e-9.
TINY = 2.0**-40


class Row(NamedTuple):
    alpha: float = 1.3
    gamma: float = 0.7
    eps: float = 0.0
    decay: float = 0.0

    def rates(self, h):
        """b1, b2 and the factor of the gradients in steps of h."""
        forgotten = max(h * self.gamma, TINY)
        return 1 - max(self.eps * self.gamma, forgotten), 1 - forgotten, h * self.alpha / forgotten


ROWS = {
    "hamiltonian": Row(),
    "hamiltonian_without_friction": Row(gamma=0.0),
    "composite": Row(decay=0.8),
    "mirror": Row(eps=1 / 0.7),
    "frank_wolfe": Row(eps=1 / 0.7, decay=0.8),
    "accelerated_mirror": Row(gamma=0.0, decay=0.8),
    "lion": Row(eps=0.5, decay=0.8),
}

# Kappas, and their gradients written once more.
KAPPAS = {
    "squared_l2": (kappas.squared_l2(), lambda m: m),
    "relativistic": (kappas.relativistic(0.5), lambda m: m / np.hypot(m, 0.5)),
    "log_sum_exp": (kappas.log_sum_exp(), scipy.special.softmax),
}

RELATIVISTIC = KAPPAS["relativistic"][0]

MATRIX = np.array([[2.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.5]])
MINIMUM = np.array([0.4, -0.3, 0.2])
START = np.array([-0.5, 0.4, 0.7])


def loss(x):
    return (x - MINIMUM) @ MATRIX @ (x - MINIMUM) / 2


def slope(x):
    return (x - MINIMUM) @ MATRIX


class Path(NamedTuple):
    """Times, weights, momenta m, and the rates that they were made with."""

    t: np.ndarray
    x: np.ndarray
    m: np.ndarray
    b1: float
    b2: float
    scale: float


@functools.lru_cache
def stepper(kappa, steps):
    @jax.jit
    def run(start, h, b1, b2, scale, decay, minimum, matrix):
        optimizer = lion_kappa(h, kappa, b1, b2, weight_decay=decay)

        def step(carry, _):
            x, state = carry
            updates, new_state = optimizer.update(scale * (x - minimum) @ matrix, state, x)
            return (optax.apply_updates(x, updates), new_state), (x, -optax.tree.get(state, "mu"))

        return jax.lax.scan(step, (start, optimizer.init(start)), length=steps + 1)[1]

    return run


def follow(kappa, row, time, steps, minimum=MINIMUM, start=START):
    """The optimizer's path over a span of time, including both ends."""
    h = time / steps
    b1, b2, scale = row.rates(h)
    x, m = stepper(kappa, steps)(jnp.asarray(start), h, b1, b2, scale, row.decay, minimum, MATRIX)
    return Path(np.linspace(0, time, steps + 1), np.asarray(x), np.asarray(m), b1, b2, scale)


def solve(dual, row, path):
    """The weights of the differential equation at the times of a path."""

    def velocity(t, both):
        x, m = both[:3], both[3:]
        force = row.alpha * slope(x) + row.gamma * m
        return np.concatenate([dual(m - row.eps * force) - row.decay * x, -force])

    both = np.concatenate([START, np.zeros(3)])
    options = dict(t_eval=path.t, method="DOP853", rtol=1e-10, atol=1e-12)
    return scipy.integrate.solve_ivp(velocity, (0, path.t[-1]), both, **options).y[:3].T


def assert_halves(errors, tolerance=0.1):
    """Errors of first order: half as large with half the step, and not zero to begin with."""
    errors = np.abs(errors)
    assert (errors > 1e-5).all()
    np.testing.assert_allclose(errors[:-1] / errors[1:], 2, rtol=tolerance)


def integral(values, path):
    return scipy.integrate.trapezoid(np.asarray(values), path.t)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64():
        yield


@pytest.mark.parametrize("name", KAPPAS)
@pytest.mark.parametrize("row", ROWS)
def test_small_steps_follow_the_differential_equation(row, name):
    """The greatest distance between path and solution is halved with the step."""
    kappa, dual = KAPPAS[name]
    paths = [follow(kappa, ROWS[row], 4.0, steps) for steps in (200, 400, 800)]
    solution = solve(dual, ROWS[row], paths[-1])
    errors = [np.abs(path.x - solution[:: 800 // (len(path.x) - 1)]).max() for path in paths]
    assert_halves(errors)
    assert errors[-1] < 0.02


class TestHamiltonianDescent:
    """lambda = eps = 0: H = alpha f(x) + K(m), with H' = -gamma <m, dK(m)>."""

    def energy(self, kappa, row, path):
        return row.alpha * np.asarray(jax.vmap(loss)(path.x)) + np.asarray(jax.vmap(kappa.value)(path.m))

    def test_energy_is_conserved_without_friction(self):
        """Up to an oscillation of first order that does not grow: over 40 time units it is that of the first 4."""
        kappa, row = RELATIVISTIC, ROWS["hamiltonian_without_friction"]
        ranges = []
        for steps in (2000, 4000):
            path = follow(kappa, row, 40.0, steps)
            energy = self.energy(kappa, row, path)
            ranges.append(np.ptp(energy))
            assert np.ptp(energy) < 1.5 * np.ptp(energy[: steps // 10])
        assert_halves(ranges)
        assert ranges[0] < 0.03 * energy[0]

    def test_a_quadratic_conserves_another_energy_at_any_step(self):
        """Without friction a step is the symplectic Euler method, which keeps |m|^2/2 + alpha (f - h <slope, m>/2)."""
        kappa, row = kappas.squared_l2(), ROWS["hamiltonian_without_friction"]
        path = follow(kappa, row, 200.0, 1000)
        energy = self.energy(kappa, row, path)
        kept = energy - row.alpha * path.t[1] / 2 * np.vecdot(path.x @ MATRIX - MINIMUM @ MATRIX, path.m)
        np.testing.assert_allclose(kept, kept[0], rtol=1e-8)
        assert np.ptp(energy) > 0.02 * energy[0]

    def test_friction_takes_what_the_energy_loses(self):
        kappa, row = RELATIVISTIC, ROWS["hamiltonian"]
        errors = []
        for steps in (400, 800):
            path = follow(kappa, row, 8.0, steps)
            energy = self.energy(kappa, row, path)
            power = row.gamma * np.vecdot(path.m, np.asarray(jax.vmap(kappa.grad)(path.m)))
            assert power.min() >= 0
            taken = scipy.integrate.cumulative_trapezoid(power, path.t, initial=0)
            errors.append(np.abs(energy - energy[0] + taken).max())
            # rises by a step's second order at most, wherever friction is less than that
            assert np.diff(energy).max() <= 4 * path.t[1] ** 2
        assert_halves(errors)
        assert energy[-1] < 0.1 * energy[0]


class TestLyapunovFunction:
    r"""lambda > 0: gamma times the discrete function becomes the continuous one, whose derivative is known.

    H = alpha f + gamma/lambda K*(lambda x) + c (K*(lambda x) + K(m) - lambda <m, x>),
    H' = -(lambda + gamma)/(1 + eps lambda) <m~ - w, dK(m~) - lambda x> - c/eps <m~ - m, dK(m~) - dK(m)>,
    c = (1 - eps gamma)/(1 + eps lambda), m~ = m - eps (alpha grad f + gamma m), w = dK*(lambda x).
    """

    @pytest.mark.parametrize("row", ["composite", "frank_wolfe", "accelerated_mirror", "lion"])
    def test_falls_as_its_derivative_says(self, row):
        kappa, row = RELATIVISTIC, ROWS[row]
        eps, decay = row.eps, row.decay

        @jax.vmap
        def fall(x, m):
            force = row.alpha * slope(x) + row.gamma * m
            ahead = m - eps * force
            outer = jnp.vdot(ahead - jax.grad(kappa.conjugate)(decay * x), kappa.grad(ahead) - decay * x)
            inner = jnp.vdot(-force, kappa.grad(ahead) - kappa.grad(m))
            return jnp.stack([(decay + row.gamma) / (1 + eps * decay) * outer, self.share(row) * inner])

        errors, limits = [], []
        for steps in (400, 800):
            path = follow(kappa, row, 8.0, steps)
            falls = np.asarray(jax.jit(fall)(path.x, path.m))
            assert falls.min() >= -1e-12
            h = self.discrete(kappa, row, path)
            errors.append(h[-1] - h[0] + integral(falls.sum(1), path))
            limits.append(np.abs(h - self.continuous(kappa, row, path)).max())
        assert_halves(errors)
        assert h[-1] < h[0] - 0.1
        assert limits[0] <= 1e-10 or np.allclose(np.divide(limits[:-1], limits[1:]), 2, rtol=0.1)

    @staticmethod
    def share(row):
        return (1 - row.eps * row.gamma) / (1 + row.eps * row.decay)

    @staticmethod
    def discrete(kappa, row, path):
        h, gamma = path.t[1], (1 - path.b2) / path.t[1]
        of_scaled_loss = lambda x, m: lion_kappa_lyapunov(  # noqa: E731
            path.scale * loss(x), x, -m, kappa, h, row.decay, path.b1, path.b2
        )
        return gamma * np.asarray(jax.jit(jax.vmap(of_scaled_loss))(path.x, path.m))

    def continuous(self, kappa, row, path):
        @jax.vmap
        def function(x, m):
            conjugate = kappa.conjugate(row.decay * x)
            between = conjugate + kappa.value(m) - row.decay * jnp.vdot(m, x)
            return row.alpha * loss(x) + row.gamma / row.decay * conjugate + self.share(row) * between

        return np.asarray(jax.jit(function)(path.x, path.m))


def test_composite_descent_ends_in_the_minimum_of_loss_and_penalty():
    """eps = 0 < lambda: the problem is alpha f + gamma/lambda K*(lambda x), whatever the step."""
    kappa, row = RELATIVISTIC, ROWS["composite"]
    path = follow(kappa, row, 60.0, 600)
    x = path.x[-1]
    gap = lion_kappa_stationarity_gap(path.scale * slope(x), jnp.asarray(x), kappa, row.decay)
    assert abs(gap) < 1e-10
    pull = row.gamma * np.asarray(jax.grad(kappa.conjugate)(row.decay * jnp.asarray(x)))
    np.testing.assert_allclose(row.alpha * slope(x), -pull, atol=1e-6)
    assert np.abs(pull).max() > 0.05


class TestMirrorDescent:
    """eps gamma = 1, lambda = 0: x' = dK(-grad f(x)), no momentum."""

    def test_a_closed_form(self):
        """f = sum cosh(x), K = |m|^2/2: tanh(x/2) falls as exp(-t)."""
        errors = []
        for steps in (100, 200, 400):
            optimizer = lion_kappa(2.0 / steps, kappas.squared_l2(), 0.0, 0.5, weight_decay=0.0)
            x = self.descend(optimizer, steps)[-1]
            errors.append(np.abs(np.tanh(x / 2) - np.exp(-2.0) * np.tanh(START / 2)).max())
        assert_halves(errors)

    def test_gradients_follow_mirror_descent_on_kappa(self):
        """With the mirror map f*, here arcsinh, the gradients z make steps of arcsinh z <- arcsinh z - h dK(z)."""
        h, kappa = 0.1, kappas.tanh(2.0)
        z = np.sinh(self.descend(lion_kappa(h, kappa, 0.0, 0.9, weight_decay=0.0), 30))
        mirrored = np.arcsinh(z[:-1]) - h * np.tanh(2 * z[:-1])
        np.testing.assert_allclose(np.arcsinh(z[1:]), mirrored, rtol=0, atol=1e-14)
        preconditioned = np.asarray(jax.vmap(kappa.value)(z))
        assert (np.diff(preconditioned) < 0).all()

    @staticmethod
    def descend(optimizer, steps):
        def step(carry, _):
            x, state = carry
            updates, state = optimizer.update(jnp.sinh(x), state, x)
            x = optax.apply_updates(x, updates)
            return (x, state), x

        x = jnp.asarray(START)
        xs = jax.jit(lambda x: jax.lax.scan(step, (x, optimizer.init(x)), length=steps)[1])(x)
        return np.concatenate([START[None], np.asarray(xs)])


class TestFrankWolfe:
    """eps gamma = 1, lambda > 0, K a norm: x' = lambda (s - x) with s the best point of the ball for the slope."""

    FAR = np.array([2.0, -1.5, 1.0])  # the free minimum, outside of the ball of radius 1/0.8

    def test_the_loss_falls_by_the_gap_and_at_the_rate_of_the_decay(self):
        kappa, row = kappas.lp(2.0), ROWS["frank_wolfe"]._replace(alpha=0.7)
        values = jax.vmap(lambda x: (x - self.FAR) @ MATRIX @ (x - self.FAR) / 2)
        gap = jax.vmap(lambda x: lion_kappa_stationarity_gap((x - self.FAR) @ MATRIX, x, kappa, row.decay))
        radius = 1 / row.decay
        on_sphere = lambda price: np.linalg.solve(MATRIX + price * np.eye(3), MATRIX @ self.FAR)  # noqa: E731
        price = scipy.optimize.brentq(lambda p: np.linalg.norm(on_sphere(p)) - radius, 0, 100, xtol=1e-14)
        best = float(values(on_sphere(price)[None])[0])
        errors = []
        for steps in (400, 800):
            path = follow(kappa, row, 4.0, steps, self.FAR, 0.5 * START)
            f, gaps = np.asarray(values(path.x)), np.asarray(gap(path.x))
            errors.append(f[-1] - f[0] + integral(gaps, path))
            # f' = -gap <= -lambda (f - best), and one second order a step
            assert (gaps >= row.decay * (f - best) - 1e-12).all()
            step = path.t[1]
            square = np.square(np.diff(path.x, axis=0)).sum(1)
            curvature = np.linalg.eigvalsh(MATRIX)[-1]
            assert (f[1:] - best <= (1 - step * row.decay) * (f[:-1] - best) + curvature / 2 * square + 1e-12).all()
        assert_halves(errors)
        assert f[-1] - best <= np.exp(-row.decay * 4.0) * (f[0] - best) + abs(errors[-1])


class TestAcceleratedMirrorDescent:
    """gamma = eps = 0 < lambda: the dual sums up gradients, the weights follow its mirror image.

    E = alpha (f - f*) + K(m) + K*(lambda x*) - lambda <m, x*> has E' = -alpha lambda <grad f, x - x*> <= 0.
    """

    def test_the_sum_of_loss_and_distance_in_the_dual_falls(self):
        kappa, row = RELATIVISTIC, ROWS["accelerated_mirror"]
        end = float(kappa.conjugate(row.decay * jnp.asarray(MINIMUM)))
        errors = []
        for steps in (400, 800):
            path = follow(kappa, row, 8.0, steps)
            value = np.asarray(jax.vmap(loss)(path.x))
            dual = np.asarray(jax.vmap(kappa.value)(path.m)) + end - row.decay * path.m @ MINIMUM
            assert dual.min() >= -1e-12
            sum_ = row.alpha * value + dual
            power = row.alpha * row.decay * np.vecdot(path.x @ MATRIX - MINIMUM @ MATRIX, path.x - MINIMUM)
            errors.append(sum_[-1] - sum_[0] + integral(power, path))
            # so the mean loss along the way is below E(0)/(alpha lambda t), up to that error
            assert row.alpha * row.decay * integral(value, path) <= sum_[0] + abs(errors[-1])
        assert_halves(errors)
        assert sum_[-1] < 0.2 * sum_[0]
