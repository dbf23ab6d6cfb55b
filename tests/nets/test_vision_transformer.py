"""The vision transformer: published sizes, heads, quantized attention and layers, bad input."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.nets import QKReparamSelfAttention, VisionTransformer, activation_quantization, vision_transformer
from poise.quant import QuantRule, apply_weight_quant, init_weight_qparams

SMALL = VisionTransformer(3, patch_size=4, width=8, num_heads=2, num_layers=1, mlp_ratio=2)
IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 1)), jnp.float32)


@pytest.mark.parametrize(("size", "millions"), [("tiny", 5.910800), ("small", 22.436432), ("base", 87.338192)])
def test_parameters_of_the_published_sizes(size, millions):
    """The numbers of timm's distilled models with 1000 classes: 5910800, 22436432 and 87338192."""
    model = vision_transformer(size, 1000)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == round(millions * 1e6)


@pytest.fixture(scope="module")
def small(quick_jit):
    """The small model's variables and its logits, compiled: of both heads, and for an evaluation."""
    variables = quick_jit(SMALL.init)(jax.random.key(0), IMAGES)
    both = lambda variables, images: (  # noqa: E731
        SMALL.apply(variables, images, train=True),
        SMALL.apply(variables, images),
    )
    return variables, quick_jit(both)


def test_heads(small):
    variables, apply = small
    (first, second), mean = apply(variables, IMAGES)
    assert first.shape == second.shape == (2, 3)
    assert jnp.abs(first - second).max() > 1e-3
    np.testing.assert_allclose(mean, (first + second) / 2, rtol=1e-5)
    plain = SMALL.clone(distilled=False)
    logits, variables = jax.eval_shape(functools.partial(plain.init_with_output, train=True), jax.random.key(0), IMAGES)
    assert "dist_token" not in variables["params"]
    assert logits.shape == (2, 3)


def test_tokens_see_each_other_and_know_their_places(small):
    variables, apply = small
    shuffled = jnp.concatenate([IMAGES[:, 4:], IMAGES[:, :4]], axis=1)
    assert jnp.abs(apply(variables, shuffled)[1] - apply(variables, IMAGES)[1]).max() > 1e-5
    no_places = {"params": variables["params"] | {"pos_embed": jnp.zeros((1, 6, 8))}}
    expected = apply(no_places, IMAGES)[1]
    np.testing.assert_allclose(apply(no_places, shuffled)[1], expected, rtol=0, atol=1e-6)


def test_the_recipe_of_the_oscillation_free_method(quick_jit):
    """8 bits for the first and last layers, StatsQ inside, steps per token, attention by QKR: one step changes all."""
    attention = functools.partial(QKReparamSelfAttention, weight_bits=2, act_bits=2)
    model = SMALL.clone(attention=attention)
    rules = [
        QuantRule("attention/"),
        QuantRule("patch_embed", weight_bits=8, method="lsq", act_bits=8, act_axis="channel"),
        QuantRule("head", weight_bits=8, method="lsq", act_bits=8),
        QuantRule("fc2", weight_bits=2, act_bits=2, act_axis="token", act_shift=True, act_signed=False),
        QuantRule("fc1", weight_bits=2, act_bits=2, act_axis="token", act_shift=True),
    ]
    with nn.intercept_methods(activation_quantization(rules)):
        variables = quick_jit(model.init)(jax.random.key(0), IMAGES)
        learned = {**variables, "weights": init_weight_qparams(variables["params"], rules)}
        assert set(learned["weights"]) == {"patch_embed/kernel", "head/kernel", "head_dist/kernel"}

        def loss(learned):
            params = apply_weight_quant(learned["params"], learned["weights"], rules)
            logits = model.apply({"params": params, "quant": learned["quant"]}, IMAGES, train=True)
            return sum(jnp.mean((part - 1.0) ** 2) for part in logits)

        value, slopes = quick_jit(jax.value_and_grad(loss))(learned)
    assert np.isfinite(value)
    assert set(slopes["quant"]["block_0"]) == {"attention", "fc1", "fc2"}
    flat = jax.tree_util.tree_leaves_with_path(slopes)
    still = [jax.tree_util.keystr(path) for path, leaf in flat if not np.isfinite(leaf).all() or not leaf.any()]
    assert not still


def test_bad_input():
    for model, message in [
        (SMALL.clone(patch_size=3), r"patch_size must divide the sides \(8, 8\) of the images, got 3"),
        (SMALL.clone(num_heads=3), "num_heads must divide the width 8 of x, got 3"),
        (SMALL.clone(num_layers=0), "num_layers must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    with pytest.raises(ValueError, match="size must be one of tiny, small, base, got 'huge'"):
        vision_transformer("huge", 10)
