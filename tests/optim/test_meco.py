"""Compositional maximum likelihood: exact gradients where they are known, invariances, landscapes, a stochastic run."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.optim import (
    MecoState,
    average_gradients,
    effective_sample_size_from_log_weights,
    meco_init,
    meco_loss,
    nce_loss,
)

quick = settings(max_examples=10, deadline=None)


def family(theta, x):
    """An exponential family on a finite space: f = <theta, (x, x^2, sin x)>."""
    return theta @ jnp.stack([x, x**2, jnp.sin(x)])


SPACE = np.linspace(-2.0, 2.0, 9)


@jax.jit
def gradients(theta, data, noise, log_q, log_u, gamma, shift):
    """Loss, state and gradient of one step, from a given estimate of log Z, with a constant added to f."""

    def loss(theta):
        state = MecoState(log_u, jnp.ones((), jnp.int32))
        return meco_loss(family(theta, data) + shift, family(theta, noise) + shift - log_q, state, gamma)

    (value, state), grad = jax.value_and_grad(loss, has_aux=True)(theta)
    return value, state.log_normalizer, grad


def batch(seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(3), rng.standard_normal(6), rng.standard_normal(8), rng.standard_normal(8)


@quick
@given(st.integers(0, 10**6))
def test_enumeration_is_exact_likelihood(seed):
    """Noise that runs through the whole space once, q uniform, gamma = 1: value and gradient of the exact NLL."""
    with jax.enable_x64():
        theta, data, _, _ = batch(seed)
        value, log_z, grad = gradients(theta, data, SPACE, -np.log(9.0), 0.7, 1.0, 0.0)
        exact, slope = exact_nll(theta, data)
        np.testing.assert_allclose(value, exact, rtol=1e-12)
        np.testing.assert_allclose(grad, slope, rtol=1e-10, atol=1e-12)
        assert float(log_z) == pytest.approx(float(jax.nn.logsumexp(family(theta, SPACE))), rel=1e-12)


@jax.jit
@jax.value_and_grad
def exact_nll(theta, data):
    return -jnp.mean(family(theta, data)) + jax.nn.logsumexp(family(theta, SPACE))


@quick
@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.floats(-200.0, 200.0))
def test_update_in_closed_form_and_invariance_to_constants(seed, gamma, shift):
    """u and G written out; adding a constant to f leaves G unchanged once u carries it."""
    with jax.enable_x64():
        theta, data, noise, log_q = batch(seed)
        value, log_u, grad = gradients(theta, data, noise, log_q, 0.4, gamma, 0.0)
        weights = np.exp(np.asarray(family(theta, noise)) - log_q)
        u = (1 - gamma) * np.exp(0.4) + gamma * weights.mean()
        features = lambda x: np.stack([x, x**2, np.sin(x)])  # noqa: E731
        expected = -features(data).mean(1) + (weights / u * features(noise)).mean(1)
        assert float(log_u) == pytest.approx(np.log(u), rel=1e-12, abs=1e-12)
        assert float(value) == pytest.approx(float(-family(theta, data).mean() + np.log(u)), rel=1e-12, abs=1e-12)
        np.testing.assert_allclose(grad, expected, rtol=1e-10, atol=1e-12)
        shifted = gradients(theta, data, noise, log_q, 0.4 + shift, gamma, shift)
        np.testing.assert_allclose(shifted[2], grad, rtol=1e-9, atol=1e-11)
        assert float(shifted[1] - shift) == pytest.approx(float(log_u), abs=1e-11)


def test_self_normalized_importance_sampling_and_the_model_as_noise():
    with jax.enable_x64():
        theta, data, noise, log_q = batch(3)
        _, _, grad = gradients(theta, data, noise, log_q, 5.0, 1.0, 0.0)
        share = jax.nn.softmax(family(theta, noise) - log_q)
        features = lambda x: np.stack([x, x**2, np.sin(x)])  # noqa: E731
        by_hand = -features(data).mean(1) + features(noise) @ np.asarray(share)
        np.testing.assert_allclose(grad, by_hand, rtol=1e-11)
        # q = p_theta: all weights are Z, whatever gamma once u is Z
        log_z = 1.3
        model = np.asarray(family(theta, noise)) - log_z
        _, log_u, _ = gradients(theta, data, noise, model, log_z, 0.3, 0.0)
        assert float(log_u) == pytest.approx(log_z, rel=1e-13)
        assert float(effective_sample_size_from_log_weights(family(theta, noise) - model)) == pytest.approx(8.0)


def test_first_batch_sets_the_estimate():
    log_weights = jnp.log(jnp.array([1.0, 2.0, 6.0]))
    _, first = meco_loss(jnp.zeros(2), log_weights, meco_init(), 0.1)
    assert float(first.log_normalizer) == pytest.approx(np.log(3.0), rel=1e-6)
    _, again = meco_loss(jnp.zeros(2), log_weights, meco_init(log_weights), 0.1)
    assert float(again.log_normalizer) == pytest.approx(np.log(3.0), rel=1e-6)
    assert (int(first.count), int(again.count)) == (1, 2)


def test_recursive_estimate_follows_without_lag():
    """If the noise enumerates the space, the recursive estimate stays exact while theta moves; the average lags."""
    with jax.enable_x64():
        log_q = -np.log(9.0)
        thetas = [np.array([t, 0.0, 0.0]) for t in np.linspace(0, 1.5, 8)]
        at = [family(theta, SPACE) - log_q for theta in thetas]
        lagging = recursive = meco_init(at[0])

        @jax.jit
        def both(lagging, recursive, now, before):
            args = jnp.zeros(1), now
            return meco_loss(*args, lagging, 0.2)[1], meco_loss(*args, recursive, 0.2, before)[1]

        for before, now in itertools.pairwise(at):
            lagging, recursive = both(lagging, recursive, now, before)
        exact = float(jax.nn.logsumexp(family(thetas[-1], SPACE)))
        assert float(recursive.log_normalizer) == pytest.approx(exact, rel=1e-12)
        assert float(lagging.log_normalizer) < exact - 0.1
        # a difference that would turn the estimate negative falls back to the average
        state = MecoState(jnp.asarray(0.0), jnp.ones((), jnp.int32))
        _, after = meco_loss(jnp.zeros(1), jnp.zeros(1), state, 0.5, jnp.array([3.0]))
        assert float(after.log_normalizer) == pytest.approx(0.0, abs=1e-12)


@jax.jit
def step_from_one(f_data, log_weights):
    """From an estimate of 1: the loss, the state and the gradient by values of f that also move the weights."""
    state = MecoState(jnp.zeros(()), jnp.ones((), jnp.int32))
    run = lambda f: meco_loss(f, log_weights + f.sum(), state, 0.5)  # noqa: E731
    (loss, state), grad = jax.value_and_grad(run, has_aux=True)(f_data)
    return loss, state, grad


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_zero_and_huge_weights(dtype):
    """Weights of zero, of e^800, and all zero: values and gradients stay finite."""
    for log_weights in ([-jnp.inf, 0.0], [800.0, -800.0], [-jnp.inf, -jnp.inf]):
        log_weights = jnp.asarray(log_weights, dtype)
        loss, state, grad = step_from_one(jnp.zeros(2, dtype), log_weights)
        assert grad.dtype == dtype
        assert loss.dtype == jnp.float32
        assert all(bool(jnp.isfinite(x).all()) for x in (loss, state.log_normalizer, grad))
    assert float(state.log_normalizer) == 0.0
    assert float(effective_sample_size_from_log_weights(log_weights)) == 0.0


def landscape(theta, center):
    """Population gradients by quadrature for data N(R, 1) and noise N(0, 1): of the NLL, and of NCE in (theta, c)."""
    z = jnp.linspace(-12.0, 12.0 + center, 801)
    normal = lambda mean: jnp.exp(-0.5 * (z - mean) ** 2) / jnp.sqrt(2 * jnp.pi)  # noqa: E731
    cell = z[1] - z[0]
    f = lambda theta: -0.5 * (z - theta) ** 2  # noqa: E731
    log_q = -0.5 * z**2 - 0.5 * jnp.log(2 * jnp.pi)

    def nll(theta):
        return -jnp.sum(normal(center) * f(theta)) * cell + jnp.log(jnp.sum(jnp.exp(f(theta))) * cell)

    def nce(both):
        ratio = f(both[0]) - both[1] - log_q
        data, noise = normal(center) * jax.nn.log_sigmoid(ratio), normal(0.0) * jax.nn.log_sigmoid(-ratio)
        return -(jnp.sum(data) + jnp.sum(noise)) * cell

    return jax.grad(nll)(theta[0]), jax.grad(nce)(theta)


def test_population_landscape():
    """The NLL's gradient is theta - R anywhere; NCE's vanishes between data and noise the further these are apart."""
    with jax.enable_x64():
        half_log = 0.5 * np.log(2 * np.pi)  # the true log Z, where c stands
        slopes = []
        for center in (4.0, 8.0, 16.0):
            by_nll, by_nce = jax.jit(landscape)(jnp.array([center / 2, half_log]), center)
            assert float(by_nll) == pytest.approx(-center / 2, rel=1e-9)
            slopes.append(float(by_nce[0]))
        print("NCE's slope at R/2 for R = 4, 8, 16:", slopes)
        np.testing.assert_allclose(slopes, [-0.23, -0.069, -2e-4], rtol=0.2)

        def descend(center, rate, pick):
            step = lambda t, _: (t - rate * pick(landscape(t, center)), None)  # noqa: E731
            return jax.lax.scan(step, jnp.array([0.0, half_log]), length=1000)[0][0]

        run = jax.jit(descend, static_argnums=2)
        for center, expected in ((4.0, 0.042), (8.0, 0.92)):
            by_nll = float(run(center, 0.1, lambda g: jnp.array([g[0], 0.0]))) - center
            by_nce = float(run(center, 1.0, lambda g: g[1])) - center
            assert abs(by_nll) < 1e-9
            assert abs(by_nce) == pytest.approx(expected, rel=0.1)


def test_finds_the_mean_if_the_noise_covers_the_data():
    """3 seeds, data N(3, 1), noise N(0, 3^2): batches of 128, both averages in use, the error ends near 0.02."""

    @jax.jit
    @jax.vmap
    def run(samples):
        tx = optax.chain(average_gradients(0.5), optax.sgd(optax.cosine_decay_schedule(0.05, 1000)))

        def step(carry, sample):
            theta, state, opt = carry
            x, z = 3 + sample[0], 3 * sample[1]
            log_q = -0.5 * (z / 3) ** 2

            def loss(theta):
                return meco_loss(-0.5 * (x - theta) ** 2, -0.5 * (z - theta) ** 2 - log_q, state, 0.3)

            grad, state = jax.grad(loss, has_aux=True)(theta)
            updates, opt = tx.update(grad, opt, theta)
            return (theta + updates, state, opt), None

        theta = jnp.zeros(())
        return jax.lax.scan(step, (theta, meco_init(), tx.init(theta)), samples)[0][0]

    samples = np.random.default_rng(0).standard_normal((3, 1000, 2, 128)).astype(np.float32)
    errors = np.abs(np.asarray(run(samples)) - 3)
    print("errors of the mean:", errors)
    assert errors.max() < 0.1


def test_effective_sample_size_warns_of_noise_elsewhere():
    z = jax.random.normal(jax.random.key(0), (4096,))
    sizes = [float(effective_sample_size_from_log_weights(-0.5 * (z - r) ** 2 + 0.5 * z**2)) for r in (0.0, 1.0, 3.0)]
    assert sizes[0] == pytest.approx(4096)
    assert sizes[1] == pytest.approx(4096 * np.exp(-1), rel=0.3)
    assert sizes[2] < 60


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: meco_loss(jnp.zeros(2), jnp.zeros(2), meco_init(), 0.0), r"gamma must lie in \(0, 1\], got 0.0"),
        (lambda: meco_loss(jnp.zeros(2), jnp.zeros(2), meco_init(), 1.5), "gamma must lie"),
        (lambda: meco_loss(jnp.zeros(2), jnp.array([jnp.inf]), meco_init(), 0.5), "log_weights must be below infinity"),
        (lambda: meco_init(jnp.array([jnp.nan])), "log_weights must be below infinity"),
        (lambda: effective_sample_size_from_log_weights(jnp.zeros(0)), "at least one sample"),
        (lambda: nce_loss(*jnp.zeros((3, 2)), jnp.array([0.0, -jnp.inf]), 0.0), "log_q_noise must be finite"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
