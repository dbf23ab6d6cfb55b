import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.nets import RatioHead


def make(head, features, seed=0):
    args = (features, jnp.array([0.1, 1.0, 30.0]), jnp.array([0, 1, 1]) if head.label_dim else None)
    return head.init(jax.random.key(seed), *args), args


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_one_logit_for_each_feature_map_and_ratios_near_one():
    features = [draw(3, 4, 4, 8), draw(3, 2, 2, 5)]
    variables, args = make(RatioHead(label_dim=2), features)
    logits = RatioHead(label_dim=2).apply(variables, *args)
    assert logits.shape == (3, 2)
    assert 0 < np.abs(logits).max() < 0.7
    assert variables["params"]["head0_dense0"]["kernel"].shape == (4 * 4 * 8 + 32 + 2, 128)
    assert variables["params"]["head1_dense1"]["kernel"].shape == (128, 128)


def test_level_label_and_feature_matter_for_their_sample_alone():
    head = RatioHead(hidden=(16,), label_dim=2)
    features = [draw(3, 2, 2, 4)]
    variables, (_, sigma, labels) = make(head, features)
    logits = head.apply(variables, features, sigma, labels)
    changes = (
        ([features[0].at[1].add(1.0 * draw(2, 2, 4, seed=5))], sigma, labels),
        (features, sigma.at[1].set(3.0), labels),
        (features, sigma, labels.at[1].set(0)),
    )
    for changed in changes:
        difference = np.abs(head.apply(variables, *changed) - logits)[:, 0]
        assert difference[1] > 1e-6
        assert difference[0] == difference[2] == 0


def test_pooling():
    head = RatioHead(hidden=(16,), pooling="mean")
    features = [draw(3, 4, 4, 8)]
    variables, (_, sigma, _) = make(head, features)
    assert variables["params"]["norm0"]["scale"].shape == (8,)
    moved = [jnp.roll(features[0], 1, axis=2)]
    np.testing.assert_allclose(
        head.apply(variables, moved, sigma), head.apply(variables, features, sigma), rtol=1e-4, atol=1e-6
    )
    vectors = [features[0].mean((1, 2))]
    np.testing.assert_allclose(
        head.apply(variables, vectors, sigma), head.apply(variables, features, sigma), rtol=1e-4, atol=1e-6
    )


def test_one_level_and_no_labels_broadcast():
    head = RatioHead(hidden=(16,), label_dim=2)
    features = [draw(3, 2, 2, 4)]
    variables, _ = make(head, features)
    by_scalar = head.apply(variables, features, 0.5)
    np.testing.assert_array_equal(by_scalar, head.apply(variables, features, jnp.full(3, 0.5), jnp.zeros((3, 2))))


def test_learns_a_log_ratio(quick_jit):
    # p = N(1, 1), q = N(-1, 1) in one feature: log p - log q = 2x. LayerNorm sees (x, -x, 1, -1) / size.
    head = RatioHead(hidden=(32, 32))
    rng = np.random.default_rng(0)

    def lift(x):
        return [jnp.stack([x, -x, jnp.ones_like(x), -jnp.ones_like(x)], -1)]

    sigma = jnp.ones(512)
    x = jnp.asarray(np.concatenate([rng.normal(1, 1, 256), rng.normal(-1, 1, 256)]), jnp.float32)
    sign = jnp.concatenate([jnp.ones(256), -jnp.ones(256)])
    variables = head.init(jax.random.key(0), lift(x), sigma)
    optimizer = optax.adam(3e-3)

    def loss(variables):
        return jax.nn.softplus(-sign * head.apply(variables, lift(x), sigma)[:, 0]).mean()

    @quick_jit
    def train(variables):
        def step(carry, _):
            variables, state = carry
            updates, state = optimizer.update(jax.grad(loss)(variables), state)
            return (optax.apply_updates(variables, updates), state), None

        return jax.lax.scan(step, (variables, optimizer.init(variables)), None, 100)[0][0]

    grid = jnp.linspace(-1.5, 1.5, 9)
    logits = head.apply(train(variables), lift(grid), 1.0)[:, 0]
    np.testing.assert_allclose(logits, 2 * grid, atol=0.8)


def test_dtypes():
    features = [draw(3, 2, 2, 4).astype(jnp.bfloat16)]
    variables, args = make(RatioHead(hidden=(16,)), features)
    assert RatioHead(hidden=(16,)).apply(variables, *args).dtype == jnp.float32
    with jax.enable_x64():
        wide = [jnp.asarray(np.ones((3, 2, 2, 4)))]
        assert RatioHead(hidden=(16,)).apply(variables, wide, args[1]).dtype == jnp.float64


def test_bad_input():
    features, key = [draw(3, 2, 2, 4)], jax.random.key(0)
    with pytest.raises(ValueError, match="features must hold at least one map"):
        RatioHead().init(key, [], 1.0)
    with pytest.raises(ValueError, match=r"sigma must be a scalar or of shape \[1\] or \[3\], got shape \(2,\)"):
        RatioHead().init(key, features, jnp.ones(2))
    with pytest.raises(ValueError, match="class_labels must be None when label_dim is 0"):
        RatioHead().init(key, features, 1.0, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="pooling must be 'flatten' or 'mean', got 'max'"):
        RatioHead(pooling="max").init(key, features, 1.0)
    with pytest.raises(ValueError, match="num_channels must be even"):
        RatioHead(noise_channels=5).init(key, features, 1.0)
