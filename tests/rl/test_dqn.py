"""The agents: what is remembered, what is learned from, all transforms, seeds alone and together, devices, offline."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from poise.nets import ValueMLP
from poise.rl import (
    CQLConfig,
    DQNConfig,
    Environment,
    EnvStep,
    Transition,
    c51,
    catch,
    cql,
    dqn,
    epsilon_greedy,
    hl_gauss,
    over_seeds,
    replay_dataset,
    rollout,
    scalar,
    time_limit,
    two_hot,
)
from poise.rl.td_learner import LearnerState, td_targets

TRANSFORMS = {
    "hl_gauss": functools.partial(hl_gauss, -1.5, 1.5, 21),
    "two_hot": functools.partial(two_hot, -1.5, 1.5, 21),
    "c51": functools.partial(c51, -1.5, 1.5, 21),
    "scalar": scalar,
}
SMALL = DQNConfig(
    num_envs=8,
    buffer_size=2000,
    batch_size=32,
    min_history=100,
    target_period=50,
    epsilon_steps=4000,
    iterations=300,
)


# Programs that run once and briefly are compiled without much optimization.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def agent_of(name, env=None, config=SMALL, rate=3e-3):
    transform = TRANSFORMS[name]()
    env = catch(5, 4) if env is None else env
    return dqn(env, ValueMLP(env.num_actions, transform.num_outputs, (32,)), transform, optax.adam(rate), config)


def counter(limit):
    """An environment whose observation is the step's number, so that every transition can be recognized."""

    def reset(key):
        return jnp.zeros(()), jnp.zeros(1)

    def step(key, state, action):
        state = state + 1
        return state, EnvStep(state[None], state, state >= limit, jnp.zeros((), bool))

    return Environment(reset, step, 2)


@pytest.mark.parametrize("n_step", [1, 3])
def test_what_is_remembered(n_step):
    """Episodes of 4 steps, the rewards 1 to 4, cut after 2 of every second: all is known."""
    sizes = {"num_envs": 3, "buffer_size": 50, "batch_size": 4, "min_history": 50, "iterations": 10}
    config = DQNConfig(**sizes, n_step=n_step, gamma=0.5)
    for env, terminal in ((counter(4), True), (time_limit(counter(9), 4), False)):
        agent = agent_of("scalar", env, config)
        state, metrics = quick_jit(agent.step)(agent.init(jax.random.key(0), ()), (), jax.random.key(1))
        size = int(state.replay.size)
        assert size == 3 * (10 - n_step + 1)
        assert int(state.replay.insert) == size
        data = jax.tree.map(np.asarray, replay_dataset(state))
        starts = (np.arange(size) // 3) % 4
        np.testing.assert_array_equal(data.observation[:, 0], starts)
        last = np.minimum(starts + n_step, 4)
        np.testing.assert_array_equal(data.next_observation[:, 0], last)  # never that of a new start
        rewards = [sum(0.5**k * (s + k + 1) for k in range(e - s)) for s, e in zip(starts, last, strict=True)]
        np.testing.assert_allclose(data.reward, rewards, rtol=1e-6)
        alive = 1.0 if not terminal else np.where(last == 4, 0, 1)
        np.testing.assert_allclose(data.discount, alive * 0.5 ** (last - starts), rtol=1e-6)
        assert float(metrics["episodes"]) == 6
        assert float(metrics["return_mean"]) == 10
        np.testing.assert_array_equal(state.last_return, 10)


def test_nothing_is_learned_before_there_is_enough():
    config = SMALL._replace(min_history=81, iterations=10, target_period=1)
    agent = agent_of("hl_gauss", config=config)
    start = agent.init(jax.random.key(0), ())
    step = quick_jit(agent.step)
    state, metrics = step(start, (), jax.random.key(1))
    for new, old in zip(jax.tree.leaves(state.learner), jax.tree.leaves(start.learner), strict=True):
        np.testing.assert_array_equal(new, old)
    assert float(metrics["loss"]) == 0
    state, metrics = step(state, (), jax.random.key(2))
    assert int(state.learner.updates) == 10
    assert float(metrics["loss"]) > 1
    assert float(metrics["env_steps"]) == 160
    np.testing.assert_allclose(metrics["epsilon"], 1 - 0.95 * 160 / 4000, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["hl_gauss", *(pytest.param(n, marks=pytest.mark.slow) for n in ("two_hot", "c51", "scalar"))]
)
@pytest.mark.slow
def test_catch_is_learned_over_seeds(name):
    """Two seeds; a random agent gets about -0.5 on average and the best one 1."""
    agent = over_seeds(agent_of(name), 2)
    state = jax.jit(agent.init)(jax.random.key(0), ())
    step = jax.jit(agent.step, donate_argnums=0)
    for i in range(4):
        state, metrics = step(state, (), jax.random.key(i))
        assert metrics["loss"].shape == (2,)
    assert np.all(np.asarray(metrics["return_mean"]) > 0.6)
    assert np.all(np.asarray(metrics["target_not_finite"]) == 0)
    if name != "scalar":
        assert np.all(np.asarray(metrics["excess_loss"]) > -1e-3)
        assert np.all(np.asarray(metrics["excess_loss"]) < 0.5)
        assert np.all(np.asarray(metrics["target_out_of_support"]) < 0.05)
    transform, env = TRANSFORMS[name](), catch(5, 4)
    net = ValueMLP(3, transform.num_outputs, (32,))
    params = jax.tree.map(lambda leaf: leaf[0], state.learner.params)
    play = jax.jit(lambda params, key: rollout(env, net, transform, params, key, num_episodes=64, max_steps=6))
    played = play(params, jax.random.key(9))
    assert played.finished.all()
    assert np.all(np.asarray(played.lengths) == 4)
    assert float(played.returns.mean()) > 0.8


@pytest.mark.slow
def test_variants_learn_too():
    config = SMALL._replace(double=True, n_step=3)
    agent = agent_of("hl_gauss", time_limit(catch(5, 4), 50), config)
    state, step = agent.init(jax.random.key(0), ()), jax.jit(agent.step)
    for i in range(4):
        state, metrics = step(state, (), jax.random.key(i))
    assert float(metrics["return_mean"]) > 0.6


@pytest.mark.slow
def test_a_seed_makes_the_same_run_alone_and_devices_change_nothing():
    config = SMALL._replace(iterations=8, min_history=16, buffer_size=100, batch_size=8)
    single = agent_of("hl_gauss", config=config)
    agent = over_seeds(single, 8)
    state, keys = quick_jit(agent.init)(jax.random.key(0), ()), jax.random.key(1)
    step = quick_jit(agent.step)
    together, metrics = step(state, (), keys)
    alone = quick_jit(single.init)(jax.random.fold_in(jax.random.key(0), 3), ())
    alone, alone_metrics = quick_jit(single.step)(alone, (), jax.random.fold_in(keys, 3))
    np.testing.assert_allclose(alone_metrics["loss"], metrics["loss"][3], rtol=1e-4)
    np.testing.assert_array_equal(alone.replay.data.action, together.replay.data.action[3])

    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharded = jax.device_put(state, NamedSharding(mesh, PartitionSpec("data")))
    spread, spread_metrics = step(sharded, (), keys)
    assert len(spread.replay.data.reward.sharding.device_set) == 8
    np.testing.assert_array_equal(spread.replay.data.action, together.replay.data.action)
    for a, b in zip(jax.tree.leaves(spread.learner.params), jax.tree.leaves(together.learner.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    np.testing.assert_allclose(spread_metrics["loss"], metrics["loss"], rtol=1e-4)


@pytest.mark.parametrize("name", ["hl_gauss", "c51"])
def test_targets_are_those_of_the_chosen_network(name):
    transform = TRANSFORMS[name]()
    net = ValueMLP(3, transform.num_outputs, (8,))
    x = jax.random.normal(jax.random.key(0), (5, 4))
    params, older = (net.init(jax.random.key(i), x) for i in (1, 2))
    state = LearnerState(params, older, (), jnp.zeros((), jnp.int32))
    reward, discount = jnp.linspace(-1.0, 1.0, 5), jnp.array([0.9, 0.0, 0.9, 0.9, 0.0])
    batch = Transition(x, jnp.zeros(5, int), reward, discount, x + 1)
    own, old = transform.decode(net.apply(params, x + 1)), transform.decode(net.apply(older, x + 1))
    for double in (False, True):
        values = td_targets(net, transform, state, batch, double).values
        choice = np.argmax(own if double else old, -1)
        np.testing.assert_allclose(values, reward + discount * old[np.arange(5), choice], rtol=1e-5, atol=1e-6)


@functools.cache
def offline_data(size):
    """Played at random on catch, by a network that never learned."""
    config = SMALL._replace(buffer_size=size, batch_size=2, min_history=size, epsilon_end=1.0, iterations=size // 8)
    agent = agent_of("scalar", config=config)
    state, _ = quick_jit(agent.step)(agent.init(jax.random.key(0), ()), (), jax.random.key(1))
    return replay_dataset(state)


@pytest.mark.slow
def test_offline_learning_from_random_play():
    data = offline_data(1600)
    transform, env = TRANSFORMS["hl_gauss"](), catch(5, 4)
    net = ValueMLP(3, transform.num_outputs, (32,))
    play = jax.jit(lambda params, key: rollout(env, net, transform, params, key, num_episodes=100, max_steps=5).returns)
    learned = {}
    for weight in (0.1, 20.0):
        config = CQLConfig(conservative_weight=weight, target_period=50, iterations=600)
        agent = cql(net, transform, optax.adam(3e-3), config)
        state = agent.init(jax.random.key(0), data)
        state, metrics = jax.jit(agent.step)(state, data, jax.random.key(1))
        assert int(state.updates) == 600
        learned[weight] = metrics | {"return": play(state.params, jax.random.key(2)).mean()}
    assert float(learned[0.1]["return"]) > 0.3  # a random agent gets about -0.5
    assert float(learned[20.0]["conservative_penalty"]) < float(learned[0.1]["conservative_penalty"])


def test_without_a_penalty_nothing_is_reported_of_it():
    data = offline_data(400)
    transform = scalar()
    agent = cql(ValueMLP(3, 1, (4,)), transform, optax.sgd(0.1), CQLConfig(conservative_weight=0.0, iterations=2))
    _, metrics = quick_jit(agent.step)(agent.init(jax.random.key(0), data), data, jax.random.key(1))
    assert "conservative_penalty" not in metrics
    np.testing.assert_allclose(metrics["loss"], metrics["td_loss"])


def test_nan_rewards_are_seen():
    data = offline_data(400)
    data = data._replace(reward=jnp.full_like(data.reward, jnp.nan))
    transform = TRANSFORMS["hl_gauss"]()
    agent = cql(ValueMLP(3, 21, (4,)), transform, optax.sgd(0.1), CQLConfig(iterations=1))
    _, metrics = quick_jit(agent.step)(agent.init(jax.random.key(0), data), data, jax.random.key(1))
    assert float(metrics["target_not_finite"]) == 1
    assert np.isnan(metrics["loss"])


def test_epsilon_greedy():
    q = jnp.tile(jnp.array([0.0, 5.0, 1.0]), (6000, 1))
    counts = np.bincount(epsilon_greedy(jax.random.key(0), q, 0.3), minlength=3) / 6000
    np.testing.assert_allclose(counts, [0.1, 0.8, 0.1], rtol=0, atol=0.02)
    assert np.all(np.asarray(epsilon_greedy(jax.random.key(0), q, 0.0)) == 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_envs": 0}, "num_envs must be at least 1"),
        ({"gamma": 1.5}, "gamma must lie in"),
        ({"epsilon_end": -0.1}, "epsilon_end must lie in"),
        ({"min_history": 3000}, r"min_history must be in \[0, 2000\]"),
        ({"buffer_size": 4, "min_history": 0}, "buffer_size must be at least num_envs = 8"),
        ({"n_step": 0}, "n_step must be at least 1"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        agent_of("scalar", config=SMALL._replace(**change))


def test_bad_settings_of_the_rest():
    net, transform, tx = ValueMLP(3, 1, (4,)), scalar(), optax.sgd(0.1)
    with pytest.raises(ValueError, match="conservative_weight must lie in"):
        cql(net, transform, tx, CQLConfig(conservative_weight=-1.0))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        cql(net, transform, tx, CQLConfig(batch_size=0))
    with pytest.raises(ValueError, match="num_seeds must be at least 1"):
        over_seeds(agent_of("scalar"), 0)
    with pytest.raises(ValueError, match="num_episodes must be at least 1"):
        rollout(catch(), net, transform, {}, jax.random.key(0), num_episodes=0)
    with pytest.raises(ValueError, match="state must hold transitions"):
        replay_dataset(agent_of("scalar").init(jax.random.key(0), ()))
