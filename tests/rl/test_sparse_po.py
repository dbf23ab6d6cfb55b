"""SparsePO and MaPO: official masks, losses and gradients, reductions to TDPO and DPO, flat and empty texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poise.nets import SparseTokenMask
from poise.rl import dpo_loss, mapo_mask, mask_sparsity, sparse_po_loss, tdpo_loss, token_forward_kl, token_logprobs


def halves(x):
    return x[: len(x) // 2], x[len(x) // 2 :]


def load(golden_file):
    data = np.load(golden_file)
    names = ("policy_logits", "ref_logits", "labels", "loss_mask", "activations")
    return data, *(jnp.asarray(data[name]) for name in names)


def loss_of_logits(logits, ref, labels, mask, **options):
    parts = (
        token_logprobs(logits, labels, mask),
        token_logprobs(ref, labels, mask),
        token_forward_kl(logits, ref, mask),
    )
    return sparse_po_loss(*(half for part in (*parts, mask) for half in halves(part)), **options)


@pytest.mark.golden
@pytest.mark.golden_pattern("rl", "sparse_po*.npz")
def test_official_mapo(golden_file):
    with jax.enable_x64():
        data, logits, ref, labels, mask, activations = load(golden_file)
        beta = float(data["beta"])
        weights = jax.jit(mapo_mask)(activations, mask)
        np.testing.assert_allclose(weights, data["mapo_mask"], rtol=0, atol=1e-6)
        pair = halves(jnp.asarray(weights))

        def value(logits):
            each = loss_of_logits(logits, ref, labels, mask, beta=beta, reward_mask=pair, kl_mask=pair)
            return each.mean(), each

        (_, ours), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(logits)
        uniform = jax.jit(lambda logits: loss_of_logits(logits, ref, labels, mask, beta=beta))(logits)
    np.testing.assert_allclose(ours, data["mapo_loss"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(gradient, data["mapo_grad_policy_logits"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(uniform, data["mapo_loss_uniform_mask"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(uniform, data["tdpo1_loss"], rtol=0, atol=1e-10)


@pytest.mark.golden
@pytest.mark.golden_pattern("rl", "sparse_po*.npz")
def test_official_sparse_po(golden_file):
    with jax.enable_x64():
        data, logits, ref, labels, mask, hidden = load(golden_file)
        module = SparseTokenMask(len(hidden), epsilon=float(data["mask_layer_norm_eps"]))
        params = {
            "norm": {name: jnp.asarray(data[f"mask_layer_norm_{name}"]) for name in ("scale", "bias")},
            "kernel": jnp.asarray(data["mask_layer_w"]),
            "bias": jnp.asarray(data["mask_layer_b"]),
            "mixer": jnp.asarray(data["mask_mixer_w"]),
        }
        shapes = jax.eval_shape(module.init, jax.random.key(0), hidden)["params"]
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)

        def value(logits, params):
            weights = module.apply({"params": params}, hidden)
            options = {name: float(data[key]) for name, key in (("l1_reward", "l1_u"), ("l1_kl", "l1_d"))}
            pair = halves(weights)
            each = loss_of_logits(
                logits, ref, labels, mask, beta=float(data["beta"]), reward_mask=pair, kl_mask=pair, **options
            )
            return each.mean(), (each, weights)

        run = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))
        (_, (ours, weights)), (to_logits, to_params) = run(logits, params)
    np.testing.assert_allclose(weights, data["sparse_mask"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(ours, data["sparse_loss"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(to_logits, data["sparse_grad_policy_logits"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(to_params["kernel"], data["grad_mask_layer_w"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(to_params["mixer"], data["grad_mask_mixer_w"], rtol=0, atol=1e-10)


def draw(batch=3, sizes=(5, 4)):
    rng = np.random.default_rng(0)
    logps = [jnp.asarray(-rng.exponential(size=(batch, n)), jnp.float32) for n in (*sizes, *sizes)]
    kls = [jnp.asarray(rng.exponential(size=(batch, n)), jnp.float32) for n in sizes]
    masks = [jnp.arange(n) >= 1 + np.arange(batch)[:, None] % 2 for n in sizes]
    weights = tuple(jnp.asarray(rng.exponential(size=(batch, n)), jnp.float32) for n in sizes)
    return logps, kls, masks, weights


def test_reductions():
    logps, kls, masks, weights = draw()
    ones, zeros = tuple(jnp.ones_like(w) for w in weights), tuple(jnp.zeros_like(w) for w in weights)
    args = (*logps, *kls, *masks)
    token = tdpo_loss(*args, beta=0.7, version=1)
    np.testing.assert_allclose(sparse_po_loss(*args, beta=0.7), token, rtol=1e-6)
    np.testing.assert_allclose(sparse_po_loss(*args, beta=0.7, reward_mask=ones, kl_mask=ones), token, rtol=1e-6)
    plain = dpo_loss(*logps, *masks, beta=0.7)
    np.testing.assert_allclose(sparse_po_loss(*args, beta=0.7, kl_mask=zeros), plain, rtol=1e-6)
    scaled = sparse_po_loss(*args, beta=0.7 / 3, reward_mask=tuple(3 * w for w in weights), kl_mask=zeros)
    np.testing.assert_allclose(scaled, sparse_po_loss(*args, beta=0.7, reward_mask=weights, kl_mask=zeros), rtol=1e-5)
    same = (*logps[:2], *logps[:2], *(0 * kl for kl in kls), *masks)
    penalties = sparse_po_loss(*same, reward_mask=weights, kl_mask=weights, l1_reward=0.1, l1_kl=0.2)
    norms = sum(np.where(mask, w, 0).sum(-1) for mask, w in zip(masks, weights, strict=True))
    np.testing.assert_allclose(penalties, np.log(2) + 0.3 * norms, rtol=1e-5)


def test_uncounted_tokens_and_empty_texts():
    logps, kls, masks, weights = draw()
    masks[0] = masks[0].at[2].set(False)

    def total(logps, kls, weights):
        loss = sparse_po_loss(*logps, *kls, *masks, reward_mask=weights, kl_mask=weights, l1_reward=0.1, l1_kl=0.1)
        return loss.sum(), loss

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, loss), gradients = run(logps, kls, weights)
    wild = [
        [jnp.where(m, x, jnp.nan) for m, x in zip(cycle, part, strict=True)]
        for cycle, part in (([*masks, *masks], logps), (masks, kls), (masks, weights))
    ]
    (_, dirty), dirty_gradients = run(wild[0], wild[1], tuple(wild[2]))
    np.testing.assert_array_equal(dirty, loss)
    np.testing.assert_allclose(loss[2], np.log(2), rtol=1e-6)
    for clean, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(dirty_gradients), strict=True):
        np.testing.assert_array_equal(clean, other)
        assert not np.any(np.asarray(clean[2]))
        assert np.any(np.asarray(clean[0]))


weights_of = jax.jit(mapo_mask)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1000), st.floats(0.1, 50), st.floats(-50, 50))
def test_mapo_mask_is_affine_invariant_and_fills_the_unit_interval(seed, scale, shift):
    rng = np.random.default_rng(seed)
    mask = np.arange(6) < 5
    hook = rng.normal(size=(1, 2, 6, 3)).astype(np.float32)
    masks = np.broadcast_to(mask, (2, 6))
    weights = np.asarray(weights_of(hook, masks))
    assert weights[:, :5].min(-1).tolist() == [0, 0]
    np.testing.assert_allclose(weights[:, :5].max(-1), 1, rtol=1e-6)
    assert not weights[:, 5].any()
    moved = weights_of(np.float32(scale * hook + shift), masks)
    np.testing.assert_allclose(moved, weights, rtol=0, atol=1e-6 * (10 + abs(shift) / scale) * 3)


def test_mapo_mask_averages_hooks_within_kinds_and_then_kinds():
    rng = np.random.default_rng(0)
    hooks = [jnp.asarray(rng.normal(size=(2, 5, n)), jnp.float32) for n in (3, 4, 6)]
    mask = jnp.ones((2, 5), bool)
    single = [mapo_mask([hook], mask) for hook in hooks]
    grouped = mapo_mask({"mlp": hooks[:2], "attention": [hooks[2]]}, mask)
    np.testing.assert_allclose(grouped, ((single[0] + single[1]) / 2 + single[2]) / 2, rtol=0, atol=1e-6)
    together = mapo_mask(hooks, mask)
    np.testing.assert_allclose(together, sum(single) / 3, rtol=0, atol=1e-6)
    gradient = jax.grad(lambda hook: mapo_mask([hook], mask).sum())(hooks[0])
    assert not np.any(np.asarray(gradient))


def test_mapo_mask_of_flat_single_and_empty_texts():
    activations = jnp.array([[[3.0], [3.0], [9.0]], [[1.0], [2.0], [jnp.nan]], [[1.0], [2.0], [3.0]]])[None]
    mask = jnp.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert mapo_mask(activations, mask).tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_sparsity():
    weights, mask = jnp.array([[0.0, 0.0, 1.0, 0.0], [0.0] * 4]), jnp.array([[1, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(mask_sparsity(weights, mask), [2 / 3, 0], rtol=1e-6)


def test_bad_arguments():
    logps, kls, masks, weights = draw()
    args = (*logps, *kls, *masks)
    with pytest.raises(ValueError, match="beta must lie in"):
        sparse_po_loss(*args, beta=-1.0)
    with pytest.raises(ValueError, match="l1_kl must lie in"):
        sparse_po_loss(*args, l1_kl=-1.0)
    with pytest.raises(ValueError, match="the rejected reward_mask must have shape"):
        sparse_po_loss(*args, reward_mask=(weights[0], weights[0]))
    with pytest.raises(ValueError, match="activations must hold one or more hooks"):
        mapo_mask({"mlp": []}, masks[0])
    with pytest.raises(ValueError, match="activations without their features must have shape"):
        mapo_mask([jnp.zeros((3, 5, 2)), jnp.zeros((3, 4, 2))], masks[0])
