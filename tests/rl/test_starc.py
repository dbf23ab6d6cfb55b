"""Canonical rewards and distances: official values, invariances, the regret bound, trivial rewards, correlation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.rl import (
    MDP,
    canonicalize_dard,
    canonicalize_epic,
    canonicalize_minimal,
    canonicalize_minimal_potential,
    canonicalize_val,
    canonicalize_value_potential,
    epic_distance,
    normalized_regret,
    optimal_policy,
    policy_return,
    potential_shaping,
    random_mdp,
    random_reward,
    reward_norm,
    standardize,
    starc_distance,
)
from poise.rl.starc import CANONICALIZATIONS

FORMS = {
    "val": canonicalize_val,
    "value_potential": canonicalize_value_potential,
    "epic": canonicalize_epic,
    "dard": canonicalize_dard,
    "minimal_potential": canonicalize_minimal_potential,
    "minimal": canonicalize_minimal,
    "minimal_weighted": functools.partial(canonicalize_minimal, weighted=True),
}
every_form = pytest.mark.parametrize("name", FORMS)
# Programs that run once: compiled without much optimization.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
compiled = {name: quick_jit(form) for name, form in FORMS.items()}


def load(golden_file):
    data = np.load(golden_file)
    mdp = MDP(jnp.asarray(data["transition"]), float(data["discount"]), jnp.asarray(data["init_dist"]))
    return data, mdp


@pytest.mark.golden
@pytest.mark.golden_pattern("rl", "starc*.npz")
def test_official_canonical_rewards(golden_file):
    with jax.enable_x64():
        data, mdp = load(golden_file)
        for name in ("epic", "dard", "val", "value_potential"):
            for i in (1, 2):
                ours = compiled[name](jnp.asarray(data[f"reward_{i}"]), mdp)
                atol = 1e-7 if name.startswith("val") else 1e-10  # the reference iterates
                np.testing.assert_allclose(ours, data[f"canon_{name}_{i}"], rtol=0, atol=atol, err_msg=name)
        minimal = compiled["minimal_potential"](jnp.asarray(data["reward_1"]), mdp)
        official = data["canon_minimal_potential_l2_1"]
        np.testing.assert_allclose(minimal, official, rtol=0, atol=5e-3)  # the reference searches
        np.testing.assert_allclose(reward_norm(minimal), np.linalg.norm(official), rtol=0, atol=1e-6)


@pytest.mark.golden
@pytest.mark.golden_pattern("rl", "starc*.npz")
def test_official_distances(golden_file):
    with jax.enable_x64():
        data, mdp = load(golden_file)
        pair = jnp.asarray(data["reward_1"]), jnp.asarray(data["reward_2"])
        names = [str(name) for name in data["distance_names"]]

        @quick_jit
        def distances(first, second):
            return jnp.stack([starc_distance(first, second, mdp, *name.split("|")) for name in names])

        np.testing.assert_allclose(distances(*pair), data["distances"], rtol=0, atol=1e-6)
        for name in ("epic", "dard"):
            ours = starc_distance(*pair, mdp, name)
            np.testing.assert_allclose(ours, data[f"{name}_l2_distance"], rtol=0, atol=1e-6)


@pytest.mark.golden
@pytest.mark.golden_pattern("rl", "starc*.npz")
def test_official_transformed_rewards(golden_file):
    """Shaping leaves all forms as they are; redistribution leaves VAL and the full minimal forms alone."""
    with jax.enable_x64():
        data, mdp = load(golden_file)
        plain, shaped, spread = (jnp.asarray(data[f"reward_1{end}"]) for end in ("", "_shaped", "_redistributed"))
        by_hand = potential_shaping(plain, jnp.asarray(data["potential"]), mdp.discount)
        np.testing.assert_allclose(shaped, by_hand, rtol=0, atol=1e-10)
        for name, form in compiled.items():
            canonical = form(plain, mdp)
            np.testing.assert_allclose(form(shaped, mdp), canonical, rtol=0, atol=1e-9, err_msg=name)
            moved = np.abs(np.asarray(form(spread, mdp)) - np.asarray(canonical)).max()
            if name in ("val", "minimal", "minimal_weighted"):
                assert moved < 1e-9, name
            else:
                assert moved > 1e-2, name


@functools.cache
def instance(seed=0, states=5, actions=3):
    with jax.enable_x64():
        mdp = random_mdp(jax.random.key(seed), states, actions, 0.9, threshold=0.0)
        rewards = [jax.random.normal(jax.random.key(seed + i), (states, actions, states)) for i in (10, 20, 30)]
    return mdp, rewards


@every_form
def test_linear_and_idempotent(name):
    mdp, (first, second, _) = instance()
    form = compiled[name]
    with jax.enable_x64():
        canonical = form(first, mdp)
        combined = form(2 * first - 3 * second, mdp)
        np.testing.assert_allclose(combined, 2 * canonical - 3 * form(second, mdp), rtol=0, atol=1e-10)
        again = np.abs(np.asarray(form(canonical, mdp)) - np.asarray(canonical)).max()
    if name == "dard":
        assert again > 1e-2
    else:
        assert again < 1e-10


def test_val_is_the_advantage():
    mdp, (reward, _, _) = instance()
    with jax.enable_x64():
        reference = jax.random.dirichlet(jax.random.key(1), jnp.ones(3), (5,))
        canonical = canonicalize_val(reward, mdp, reference)
        np.testing.assert_allclose((reference * canonical[..., 0]).sum(-1), 0, atol=1e-12)
        own = policy_return(mdp, reward, reference)
        policies = jax.random.dirichlet(jax.random.key(2), jnp.ones(3), (4, 5))
        returns = jax.jit(jax.vmap(policy_return, in_axes=(None, None, 0)))
        gain = np.asarray(returns(mdp, reward, policies)) - float(own)
        np.testing.assert_allclose(returns(mdp, canonical, policies), gain, rtol=0, atol=1e-12)
        best = jax.jit(optimal_policy)
        np.testing.assert_array_equal(best(mdp, canonical), best(mdp, reward))


def test_minimal_forms_are_minimal():
    """A general least-squares solver over potentials and redistributions finds the same norms."""
    mdp, (reward, _, _) = instance()
    tau = np.asarray(mdp.transition)
    eye = np.eye(5)
    shaping = np.stack([0.9 * np.broadcast_to(e, (5, 3, 5)) - e[:, None, None] for e in eye]).reshape(5, -1).T
    with jax.enable_x64():
        ours = {
            name: np.asarray(compiled[name](reward, mdp))
            for name in ("minimal_potential", "minimal", "minimal_weighted", "val")
        }
    flat = np.asarray(reward).ravel()
    best = np.linalg.lstsq(shaping, -flat, rcond=None)[0]
    np.testing.assert_allclose(ours["minimal_potential"].ravel(), flat + shaping @ best, rtol=0, atol=1e-10)
    norms = {}
    for name, weights in (("minimal", np.ones_like(tau)), ("minimal_weighted", tau)):
        spreads = []
        for s, a, t in np.ndindex(tau.shape):
            if tau[s, a, t] == 0:  # a transition that never happens may give anything
                spread = np.zeros(tau.shape)
                spread[s, a, t] = 1
            else:
                spread = np.zeros(tau.shape)
                spread[s, a, t] = 1
                spread[s, a] -= tau[s, a, t]
            spreads.append(spread.ravel())
        design = np.concatenate([shaping, np.stack(spreads, 1)], 1) * np.sqrt(weights).ravel()[:, None]
        target = flat * np.sqrt(weights).ravel()
        solution = np.linalg.lstsq(design, -target, rcond=None)[0]
        norms[name] = np.linalg.norm(target + design @ solution)
        weighted = ours[name] * np.sqrt(weights)
        np.testing.assert_allclose(np.linalg.norm(weighted), norms[name], rtol=1e-7)
    assert norms["minimal"] < np.linalg.norm(ours["val"])
    expected = (tau * np.asarray(reward)).sum(-1)
    # The minimal form differs from the reward by shaping and redistribution: means agree up to a potential.
    gap = ((tau * ours["minimal"]).sum(-1) - expected).ravel()
    moves = (0.9 * tau - eye[:, None, :]).reshape(-1, 5)
    assert np.linalg.norm(gap - moves @ np.linalg.lstsq(moves, gap, rcond=None)[0]) < 1e-10


@pytest.mark.parametrize("name", ["val", "minimal", "epic"])
@pytest.mark.parametrize("order", [2, "weighted_inf"])
def test_distances_are_a_pseudometric(name, order):
    mdp, rewards = instance()
    with jax.enable_x64():
        distance = jax.jit(functools.partial(starc_distance, canonicalization=name, norm=order, metric=order))
        a, b, c = rewards
        ab, bc, ac = (float(distance(*pair, mdp)) for pair in ((a, b), (b, c), (a, c)))
        assert ac <= ab + bc
        assert ab <= 2 + 1e-12
        np.testing.assert_allclose(ab, distance(b, a, mdp), rtol=1e-12)
        assert distance(a, potential_shaping(7 * a, jnp.arange(5.0), 0.9), mdp) < 1e-10
        np.testing.assert_allclose(distance(a, -a, mdp), 2, rtol=1e-12)
        trivial = potential_shaping(jnp.full_like(a, 1e6), 1e6 * jnp.arange(5.0), 0.9)
        np.testing.assert_allclose(distance(trivial, a, mdp), 1, rtol=1e-12)
        assert distance(trivial, jnp.zeros_like(a), mdp) == 0


def test_the_bound_on_regret():
    """What is lost by optimizing another reward is at most sqrt(2)/(1-gamma) |c(R1)| d(R1, R2)."""

    def losses(key):
        keys = jax.random.split(key, 3)
        mdp = random_mdp(keys[0], 5, 3, 0.8)
        first = random_reward(keys[1], mdp)
        second = first + 0.5 * jax.random.normal(keys[2], first.shape)
        policy = optimal_policy(mdp, second)
        lost = policy_return(mdp, first, optimal_policy(mdp, first)) - policy_return(mdp, first, policy)
        size = reward_norm(canonicalize_val(first, mdp))
        return lost, jnp.sqrt(2) / (1 - 0.8) * size * starc_distance(first, second, mdp)

    with jax.enable_x64():
        lost, bound = quick_jit(jax.vmap(losses))(jax.random.split(jax.random.key(0), 30))
    assert np.all(np.asarray(lost) <= np.asarray(bound))
    assert np.asarray(lost).max() > 0.1


def test_redistribution_is_nothing_in_a_deterministic_environment():
    """Where each action leads to one state, only that entry counts."""
    with jax.enable_x64():
        mdp = random_mdp(jax.random.key(0), 4, 2, 0.9, threshold=np.inf)
        reward = jax.random.normal(jax.random.key(1), (4, 2, 4))
        visited = mdp.transition * reward
        for name in ("val", "minimal", "minimal_weighted"):
            np.testing.assert_allclose(compiled[name](visited, mdp), compiled[name](reward, mdp), rtol=0, atol=1e-10)


def test_epic_distance_is_pearsons():
    mdp, (first, second, _) = instance()
    with jax.enable_x64():
        d_s, d_a = jnp.array([0.1, 0.2, 0.3, 0.25, 0.15]), jnp.array([0.5, 0.2, 0.3])
        canonical = [np.asarray(canonicalize_epic(r, mdp, d_s, d_a)).ravel() for r in (first, second)]
        weights = np.einsum("s,a,t->sat", d_s, d_a, d_s).ravel()
        np.testing.assert_allclose([c @ weights for c in canonical], 0, atol=1e-12)
        covariance = np.cov(np.stack(canonical), aweights=weights, ddof=0)
        rho = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
        distance = epic_distance(first, second, mdp, d_s, d_a)
        np.testing.assert_allclose(distance, np.sqrt((1 - rho) / 2), rtol=1e-10)
        np.testing.assert_allclose(epic_distance(first, -3 * first, mdp), 1, rtol=1e-12)
        assert epic_distance(first, 3 * first + 5, mdp) < 1e-10
        np.testing.assert_allclose(epic_distance(first, jnp.ones_like(first), mdp), 0.5, rtol=1e-12)
        uniform = jnp.full(first.shape, 1 / first.size)
        plain = epic_distance(first, second, mdp)
        np.testing.assert_allclose(epic_distance(first, second, mdp, coverage=uniform), plain, rtol=1e-10)
        np.testing.assert_allclose(plain, starc_distance(first, second, mdp, "epic") / 2, rtol=1e-10)


def test_float32_gradients_and_vmap():
    mdp, rewards = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), instance())
    stack = jnp.stack(rewards)
    distance = jax.jit(jax.vmap(lambda r: starc_distance(stack[0], r, mdp)))
    many = distance(stack)
    assert many.dtype == jnp.float32
    assert many[0] < 1e-6
    np.testing.assert_allclose(many[1], starc_distance(stack[0], stack[1], mdp), rtol=1e-5)
    slope = jax.jit(jax.grad(lambda r: starc_distance(stack[0], r, mdp)))
    for reward in (stack[1], stack[0], jnp.zeros_like(stack[0]), jnp.ones_like(stack[0])):
        assert np.isfinite(slope(reward)).all()
    constant = jnp.full_like(stack[0], 3.3)
    np.testing.assert_allclose(starc_distance(constant, stack[0], mdp), 1, rtol=1e-5)
    half = stack.astype(jnp.bfloat16)
    assert standardize(half[0], mdp).dtype == jnp.float32


def test_norms():
    reward = jnp.array([[[3.0, -4.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]])
    weights = jnp.array([[[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.75], [1.0, 0.0]]])
    np.testing.assert_allclose([reward_norm(reward, p) for p in (1, 2, np.inf)], [8, np.sqrt(26), 4], rtol=1e-6)
    weighted = [reward_norm(reward, p, weights) for p in ("1", "2", "inf")]
    np.testing.assert_allclose(weighted, [4.25, np.sqrt(4.5 + 8 + 0.75), 2], rtol=1e-6)
    np.testing.assert_allclose(reward_norm(1e30 * reward), 1e30 * np.sqrt(26), rtol=1e-6)
    for p in (1, 2, np.inf):
        assert np.isfinite(jax.grad(functools.partial(reward_norm, order=p))(jnp.zeros((1, 1, 1)))).all()


def correlations(seed, environments=6, pairs=6, steps=6):
    """Of distance and mean regret, over interpolations between random rewards."""

    def one(key):
        keys = jax.random.split(key, 3)
        mdp = random_mdp(keys[0], 16, 4)
        first, other = random_reward(keys[1], mdp), random_reward(keys[2], mdp)
        rewards = first + jnp.linspace(1 / steps, 1, steps)[:, None, None, None] * (other - first)

        def compare(second):
            best, own = optimal_policy(mdp, first), optimal_policy(mdp, second)
            regret = (normalized_regret(mdp, first, own) + normalized_regret(mdp, second, best)) / 2
            names = ("val", "epic", "dard", "none")
            return regret, jnp.stack([starc_distance(first, second, mdp, name) for name in names])

        return jax.vmap(compare)(rewards)

    keys = jax.random.split(jax.random.key(seed), environments * pairs)
    regret, distance = jax.jit(jax.vmap(one))(keys)
    distance = np.asarray(distance).reshape(-1, 4)
    return [np.corrcoef(np.asarray(regret).ravel(), column)[0, 1] for column in distance.T]


@pytest.mark.slow
def test_val_follows_regret_best():
    with jax.enable_x64():
        val, epic, dard, none = np.mean([correlations(seed) for seed in range(2)], axis=0)
    assert val > epic + 0.03
    assert val > dard + 0.03
    assert min(epic, dard) > none


def test_bad_arguments():
    mdp, reward = random_mdp(jax.random.key(0), 3, 2), jnp.zeros((3, 2, 3))
    with pytest.raises(ValueError, match="canonicalization must be one of val, minimal"):
        standardize(reward, mdp, "starc")
    for name in ("norm", "metric"):
        with pytest.raises(ValueError, match=f"{name} must be 1, 2, inf"):
            starc_distance(reward, reward, mdp, **{name: 3})
    with pytest.raises(ValueError, match=r"reward_2 must have shape \(3, 2, 3\)"):
        starc_distance(reward, jnp.zeros((3, 2, 2)), mdp)
    with pytest.raises(ValueError, match="weights must have shape"):
        reward_norm(reward, 2, jnp.ones((3, 2, 2)))
    with pytest.raises(ValueError, match="order must not be weighted"):
        reward_norm(reward, "weighted_2")
    with pytest.raises(ValueError, match="state_dist must be nonnegative and sum to 1"):
        canonicalize_epic(reward, mdp, jnp.ones(3))
    with pytest.raises(ValueError, match="coverage must be nonnegative and sum to 1"):
        epic_distance(reward, reward, mdp, coverage=jnp.ones((3, 2, 3)))
    assert set(CANONICALIZATIONS) == {*FORMS, "none"}
