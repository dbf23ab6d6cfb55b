"""DPO, IPO, SimPO, TDPO: official losses and gradients, how they reduce to each other, texts without tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.rl import (
    dpo_loss,
    ipo_loss,
    preference_metrics,
    simpo_loss,
    tdpo_loss,
    token_forward_kl,
    token_logprobs,
)


def halves(x):
    return x[: len(x) // 2], x[len(x) // 2 :]


@pytest.mark.golden
@pytest.mark.golden_pattern("rl", "preference_losses*.npz")
def test_official_losses(golden_file):
    data = np.load(golden_file)
    beta, smoothing, gamma = (float(data[name]) for name in ("beta", "label_smoothing", "simpo_gamma"))
    mask = data["completion_mask"]
    lengths = mask.sum(-1, keepdims=True)
    losses = {
        "sigmoid": functools.partial(dpo_loss, beta=beta),
        "robust": functools.partial(dpo_loss, beta=beta, label_smoothing=smoothing, kind="robust"),
        "hinge": functools.partial(dpo_loss, beta=beta, kind="hinge"),
        "sigmoid_norm": functools.partial(dpo_loss, beta=beta, length_normalize=True),
        "ipo": functools.partial(ipo_loss, beta=beta),
    }
    with jax.enable_x64():
        policy, ref, masks = (
            jnp.asarray(data[name]) for name in ("token_logp_policy", "token_logp_ref", "completion_mask")
        )
        for name, loss in losses.items():

            def value(policy, loss=loss):
                each = loss(*halves(policy), *halves(ref), *halves(masks))
                return each.mean(), each

            (_, ours), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(policy)
            np.testing.assert_allclose(ours, data[f"{name}_loss"], rtol=0, atol=1e-10, err_msg=name)
            # A sum moves with each of its tokens alike.
            expected = data[f"{name}_grad_policy_logps"][:, None] * mask
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-10, err_msg=name)
        for name, eps in (("simpo", 0.0), ("simpo_smoothed", smoothing)):

            def value(policy, eps=eps):
                each = simpo_loss(*halves(policy), *halves(masks), beta=beta, gamma=gamma, label_smoothing=eps)
                return each.mean(), each

            (_, ours), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(policy)
            np.testing.assert_allclose(ours, data[f"{name}_loss"], rtol=0, atol=1e-10)
            expected = data[f"{name}_grad_avg_logps"][:, None] * mask / lengths
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-10)


@pytest.mark.golden
@pytest.mark.golden_pattern("rl", "sparse_po*.npz")
def test_official_token_level_dpo(golden_file):
    data = np.load(golden_file)
    with jax.enable_x64():
        logits, ref, labels, mask = (
            jnp.asarray(data[name]) for name in ("policy_logits", "ref_logits", "labels", "loss_mask")
        )
        for version in (1, 2):

            def value(logits, version=version):
                logps, base = token_logprobs(logits, labels, mask), token_logprobs(ref, labels, mask)
                parts = (logps, base, token_forward_kl(logits, ref, mask), mask)
                pairs = [half for part in parts for half in halves(part)]
                each = tdpo_loss(*pairs, beta=float(data["beta"]), version=version, alpha=float(data["alpha"]))
                return each.mean(), each

            (_, ours), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(logits)
            np.testing.assert_allclose(ours, data[f"tdpo{version}_loss"], rtol=0, atol=1e-10)
            np.testing.assert_allclose(gradient, data[f"tdpo{version}_grad_policy_logits"], rtol=0, atol=1e-10)


def draw(seed=0, batch=3, chosen=5, rejected=4):
    """Log-probabilities under policy and reference, divergences, and masks of completions; of two lengths."""
    rng = np.random.default_rng(seed)
    sizes = (chosen, rejected)
    logps = [jnp.asarray(-rng.exponential(size=(batch, n)), jnp.float32) for n in (*sizes, *sizes)]
    kls = [jnp.asarray(rng.exponential(size=(batch, n)), jnp.float32) for n in sizes]
    masks = [jnp.arange(n) >= 1 + np.arange(batch)[:, None] % 2 for n in sizes]
    return logps, kls, masks


REFERENCED = {
    "sigmoid": dpo_loss,
    "smoothed": functools.partial(dpo_loss, label_smoothing=0.2),
    "robust": functools.partial(dpo_loss, kind="robust", label_smoothing=0.2),
    "hinge": functools.partial(dpo_loss, kind="hinge"),
    "ipo": ipo_loss,
}
every_loss = pytest.mark.parametrize("name", REFERENCED)


def test_policy_equal_to_the_reference():
    (chosen, rejected, _, _), kls, masks = draw()
    same = (chosen, rejected, chosen, rejected)
    log2 = np.full(3, np.log(2), np.float32)
    np.testing.assert_allclose(dpo_loss(*same, *masks), log2, rtol=1e-6)
    np.testing.assert_allclose(dpo_loss(*same, *masks, label_smoothing=0.3), log2, rtol=1e-6)
    np.testing.assert_allclose(dpo_loss(*same, *masks, kind="robust", label_smoothing=0.3), log2, rtol=1e-5)
    np.testing.assert_allclose(ipo_loss(*same, *masks, beta=0.5), 1.0, rtol=1e-6)
    zero = [0 * kl for kl in kls]
    for version in (1, 2):
        np.testing.assert_allclose(tdpo_loss(*same, *zero, *masks, version=version), log2, rtol=1e-6)
    metrics = preference_metrics(*same, *masks)
    assert all(value == 0 for value in metrics.values())


def test_reductions():
    logps, kls, masks = draw()
    plain = dpo_loss(*logps, *masks, beta=0.7)
    np.testing.assert_array_equal(tdpo_loss(*logps, *kls, *masks, beta=0.7, version=2, alpha=0.0), plain)
    np.testing.assert_allclose(dpo_loss(*logps, *masks, beta=0.7, kind="robust"), plain, rtol=1e-6)
    values, gradients = [], []
    for version in (1, 2):
        f = lambda kl, v=version: tdpo_loss(*logps, kl, kls[1], *masks, beta=0.7, version=v, alpha=1.0)  # noqa: E731
        values.append(f(kls[0]))
        gradients.append(jax.grad(lambda kl, f=f: f(kl).sum())(kls[0]))
    np.testing.assert_allclose(values[0], values[1], rtol=1e-6)
    assert np.any(np.asarray(gradients[0]))
    assert not np.any(np.asarray(gradients[1]))
    # Smoothing averages the losses of both orders; the unbiased form undoes a share of flipped labels.
    swapped = dpo_loss(*logps[1::-1], *logps[3:1:-1], *masks[::-1], beta=0.7)
    smooth = dpo_loss(*logps, *masks, beta=0.7, label_smoothing=0.2)
    np.testing.assert_allclose(smooth, 0.8 * plain + 0.2 * swapped, rtol=1e-5)
    robust = [
        dpo_loss(*logps, *masks, beta=0.7, kind="robust", label_smoothing=0.2),
        dpo_loss(*logps[1::-1], *logps[3:1:-1], *masks[::-1], beta=0.7, kind="robust", label_smoothing=0.2),
    ]
    np.testing.assert_allclose(0.8 * robust[0] + 0.2 * robust[1], plain, rtol=1e-5)


def test_swapping_the_texts_turns_the_margin_around():
    logps, _, masks = draw()
    loss = np.asarray(dpo_loss(*logps, *masks))
    swapped = np.asarray(dpo_loss(*logps[1::-1], *logps[3:1:-1], *masks[::-1]))
    z = np.log(np.expm1(swapped))  # softplus(z) of the other order
    np.testing.assert_allclose(loss, np.log1p(np.exp(-z)), rtol=1e-5)
    metrics, other = preference_metrics(*logps, *masks), preference_metrics(*logps[1::-1], *logps[3:1:-1], *masks[::-1])
    np.testing.assert_allclose(metrics["reward_margin"], -other["reward_margin"], rtol=1e-6)
    np.testing.assert_allclose(metrics["reward_accuracy"], 1 - other["reward_accuracy"], rtol=1e-6)


@every_loss
def test_nothing_but_counted_tokens_matters(name):
    logps, _, masks = draw()
    both = [*masks, *masks]
    wild = [jnp.where(mask, x, jnp.nan) for x, mask in zip(logps, both, strict=True)]
    loss = REFERENCED[name]

    def total(policy, rest):
        return loss(policy, *rest, *masks).sum()

    clean = jax.jit(jax.value_and_grad(total))(logps[0], logps[1:])
    dirty = jax.jit(jax.value_and_grad(total))(wild[0], wild[1:])
    np.testing.assert_array_equal(dirty[0], clean[0])
    np.testing.assert_array_equal(dirty[1], clean[1])
    assert np.any(np.asarray(clean[1]))


def test_texts_without_tokens():
    """Nothing to compare: log 2 and no gradient for that pair, counted in the metrics."""
    logps, kls, masks = draw()
    masks[1] = masks[1].at[1].set(False)

    def losses(policy):
        rest = (*logps[1:], *kls, *masks)
        return (
            dpo_loss(policy, *logps[1:], *masks),
            tdpo_loss(policy, *rest),
            ipo_loss(policy, *logps[1:], *masks, beta=1.0),
        )

    dpo, tdpo, ipo = losses(logps[0])
    np.testing.assert_allclose([dpo[1], tdpo[1], ipo[1]], [np.log(2), np.log(2), 0.25], rtol=1e-6)
    gradient = jax.grad(lambda p: sum(loss.sum() for loss in losses(p)))(logps[0])
    assert not np.any(np.asarray(gradient[1]))
    assert np.any(np.asarray(gradient[0]))
    metrics = preference_metrics(*logps, *masks)
    np.testing.assert_allclose(metrics["empty_pairs"], 1 / 3, rtol=1e-6)
    both = [x[np.array([0, 2])] for x in (*logps, *masks)]
    np.testing.assert_allclose(metrics["reward_margin"], preference_metrics(*both)["reward_margin"], rtol=1e-6)
    nothing = preference_metrics(*logps, *(m & False for m in masks))
    assert [float(nothing[n]) for n in ("reward_margin", "reward_accuracy", "empty_pairs")] == [0, 0, 1]


def test_extreme_margins_are_finite():
    far, mask = jnp.array([[-1e4]]), jnp.array([[1]])
    zero = jnp.zeros((1, 1))
    for chosen, rejected in ((far, zero), (zero, far)):
        value, gradient = jax.value_and_grad(lambda p, r=rejected: dpo_loss(p, r, zero, zero, mask, mask).sum())(chosen)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_dtypes_and_vmap(dtype):
    with jax.enable_x64():
        logps, kls, masks = draw()
        logps, kls = [x.astype(dtype) for x in logps], [x.astype(dtype) for x in kls]
        wide = jnp.promote_types(dtype, jnp.float32)
        args = (*logps, *kls, *masks)
        loss = jax.jit(tdpo_loss)(*args)
        assert loss.dtype == wide
        for name, f in REFERENCED.items():
            assert f(*logps, *masks).dtype == wide, name
        assert simpo_loss(*logps[:2], *masks).dtype == wide
        np.testing.assert_allclose(jax.vmap(tdpo_loss)(*args), loss, rtol=1e-6)


def test_bad_arguments():
    logps, kls, masks = draw()
    with pytest.raises(ValueError, match="beta must lie in"):
        dpo_loss(*logps, *masks, beta=0.0)
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 0.5\)"):
        dpo_loss(*logps, *masks, label_smoothing=0.5)
    with pytest.raises(ValueError, match="kind must be one of sigmoid, robust, hinge"):
        dpo_loss(*logps, *masks, kind="ipo")
    with pytest.raises(ValueError, match="version must be 1 or 2, got 3"):
        tdpo_loss(*logps, *kls, *masks, version=3)
    with pytest.raises(ValueError, match="alpha must lie in"):
        tdpo_loss(*logps, *kls, *masks, alpha=-1.0)
    with pytest.raises(ValueError, match="gamma must lie in"):
        simpo_loss(*logps[:2], *masks, gamma=-0.1)
    with pytest.raises(ValueError, match=r"ref_chosen must have shape \(3, 5\)"):
        dpo_loss(logps[0], logps[1], logps[1], logps[3], *masks)
    with pytest.raises(ValueError, match=r"rejected_mask must have shape \(3, 4\)"):
        ipo_loss(*logps, masks[0], masks[0])
    with pytest.raises(ValueError, match=r"kl_rejected must have shape \(3, 4\)"):
        tdpo_loss(*logps, kls[0], kls[0], *masks)
    with pytest.raises(TypeError, match="chosen_mask must be boolean or integer"):
        dpo_loss(*logps, masks[0].astype(float), masks[1])
