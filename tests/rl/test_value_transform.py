"""Four representations of a value: round trips, losses, Bellman targets, and the fixed point of a chain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.nets import ValueMLP
from poise.rl import (
    atoms,
    bin_edges,
    c51,
    categorical_projection,
    categorical_td_loss,
    expected_value,
    hl_gauss,
    hl_gauss_probs,
    q_learning_target,
    scalar,
    softmax_scalar,
    two_hot,
    two_hot_probs,
)
from poise.rl.value_transform import action_outputs

MAKERS = {
    "hl_gauss": functools.partial(hl_gauss, -2.0, 3.0, 41),
    "hl_gauss_centred": functools.partial(hl_gauss, -2.0, 3.0, 41, centred=True),
    "two_hot": functools.partial(two_hot, -2.0, 3.0, 41),
    "c51": functools.partial(c51, -2.0, 3.0, 41),
    "scalar": scalar,
}
every_transform = pytest.mark.parametrize("name", MAKERS)


def outputs_of(transform, values):
    """Outputs that the loss of an encoded value is least for."""
    encoded = transform.encode(values)
    return encoded if transform.support is None else jnp.log(encoded)


@every_transform
def test_round_trip(name):
    transform = MAKERS[name]()
    values = jnp.linspace(-1.0, 2.0, 12).reshape(3, 4)  # more than 3 sigma from the ends
    encoded = transform.encode(values)
    assert encoded.shape == (3, 4, transform.num_outputs)
    np.testing.assert_allclose(transform.decode(outputs_of(transform, values)), values, rtol=0, atol=2e-5)


@every_transform
def test_loss_is_least_at_the_encoded_value(name):
    transform = MAKERS[name]()
    values = jnp.array([0.0, 1.3])
    encoded = transform.encode(values)
    best, gradient = jax.value_and_grad(lambda o: transform.loss(o, encoded).sum())(outputs_of(transform, values) + 0.0)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)
    other = transform.loss(outputs_of(transform, values + 0.4), encoded).sum()
    assert float(other) > float(best) + 0.1


def test_parts_are_the_functions_they_name():
    y, logits = jnp.array([0.2, 9.0]), jax.random.normal(jax.random.key(0), (2, 5))
    transform = hl_gauss(-1.0, 4.0, 5, 0.5)
    np.testing.assert_allclose(transform.encode(y), hl_gauss_probs(y, bin_edges(-1.0, 4.0, 5), 0.5), rtol=1e-6)
    np.testing.assert_array_equal(
        transform.loss(logits, transform.encode(y)), categorical_td_loss(logits, transform.encode(y))
    )
    np.testing.assert_array_equal(transform.decode(logits), expected_value(logits, transform.support))
    grid = atoms(-1.0, 3.0, 5)
    np.testing.assert_array_equal(two_hot(-1.0, 3.0, 5).encode(y), two_hot_probs(y, grid))
    reward, discount = jnp.array([0.5, -3.0]), jnp.array([0.9, 0.0])
    moved = reward[:, None] + discount[:, None] * grid
    expected = categorical_projection(moved, jax.nn.softmax(logits), grid)
    np.testing.assert_array_equal(c51(-1.0, 3.0, 5).project(reward, discount, logits), expected)
    np.testing.assert_array_equal(expected[1], jax.nn.one_hot(0, 5))


def test_softmax_scalar_has_the_read_out_of_atoms_and_the_loss_of_scalars():
    transform, logits = softmax_scalar(-1.0, 3.0, 5), jax.random.normal(jax.random.key(0), (2, 5))
    values = jnp.array([0.5, 20.0])
    error = (transform.decode(logits) - values) ** 2
    np.testing.assert_allclose(transform.loss(logits, transform.encode(values)), error, rtol=1e-6)
    np.testing.assert_array_equal(transform.decode(logits), two_hot(-1.0, 3.0, 5).decode(logits))


def test_outputs_of_an_action():
    outputs = jnp.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(action_outputs(outputs, jnp.array([2, 0])), outputs[jnp.arange(2), jnp.array([2, 0])])


@pytest.mark.parametrize("name", ["hl_gauss", "two_hot", "c51", "scalar"])
def test_all_converge_to_the_values_of_a_chain(name):
    """Two states; action 1 in state 0 goes on for nothing, every other action ends the episode with a reward."""
    transform = MAKERS[name]()
    reward = jnp.array([[0.2, 0.0], [1.0, -0.5]])
    discount = jnp.array([[0.0, 0.9], [0.0, 0.0]])
    q_star = jnp.array([[0.2, 0.9], [1.0, -0.5]])
    tx = optax.adam(0.05)

    def target_of(outputs):
        values = transform.decode(outputs)[1]
        if transform.project is None:
            q_next = jnp.broadcast_to(values, (2, 2, 2))
            return transform.encode(q_learning_target(reward, discount, q_next))
        best = outputs[1, jnp.argmax(values)]
        return transform.project(reward, discount, jnp.broadcast_to(best, (2, 2, len(best))))

    def step(carry, _):
        outputs, state = carry
        target = target_of(outputs)
        gradient = jax.grad(lambda o: transform.loss(o, target).sum())(outputs)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(outputs, updates), state), None

    start = jnp.zeros((2, 2, transform.num_outputs))
    (outputs, _), _ = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), length=1000))()
    width = 5.0 / 41
    np.testing.assert_allclose(transform.decode(outputs), q_star, rtol=0, atol=width)


def test_a_flax_regressor_learns_through_a_transform():
    """The drop-in use: same network but for its outputs, loss and read-out from the transform."""
    x = jnp.linspace(-1.0, 1.0, 64)[:, None]
    y = jnp.sin(3 * x[:, 0])
    transform = hl_gauss(-1.5, 1.5, 31)
    net, tx = ValueMLP(1, transform.num_outputs, (32,)), optax.adam(0.02)
    params = net.init(jax.random.key(0), x)

    def step(carry, _):
        params, state = carry
        loss = lambda p: transform.loss(net.apply(p, x)[:, 0], transform.encode(y)).mean()  # noqa: E731
        updates, state = tx.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=300))(params)
    error = jnp.sqrt(jnp.mean((transform.decode(net.apply(params, x)[:, 0]) - y) ** 2))
    assert float(error) < 0.05


def test_float64_stays():
    with jax.enable_x64():
        for name in ("hl_gauss", "two_hot", "scalar"):
            transform, y = MAKERS[name](), jnp.array([0.1, 1.0])
            assert transform.encode(y).dtype == jnp.float64
            assert transform.decode(outputs_of(transform, y)).dtype == jnp.float64
            assert transform.encode(y.astype(jnp.float32)).dtype == jnp.float32


def test_bad_arguments():
    with pytest.raises(ValueError, match="sigma_ratio must lie in"):
        hl_gauss(0.0, 1.0, sigma_ratio=0.0)
    with pytest.raises(ValueError, match="v_min must be below v_max"):
        c51(1.0, 0.0)
    with pytest.raises(ValueError, match="num_atoms must be at least 2"):
        two_hot(0.0, 1.0, 1)
    with pytest.raises(ValueError, match="outputs must have 1 number per value"):
        scalar().decode(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"targets must have shape \(4, 1\), one number per value, got \(4, 1, 1\)"):
        scalar().loss(jnp.zeros((4, 1)), jnp.zeros((4, 1, 1)))
