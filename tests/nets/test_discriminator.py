import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.nets import DiscriminatorHead, head_group_count


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "fastgen_disc*.npz")
def test_official_heads(golden_file):
    z = np.load(golden_file)
    for channels, groups in zip(z["group_in"], z["group_out"], strict=True):
        assert head_group_count(int(channels)) == groups
    with jax.enable_x64():
        names = sorted(name for name in z.files if name.startswith("feat"))
        features = [jnp.asarray(z[name].transpose(0, 2, 3, 1)) for name in names]
        params = {}
        for k in range(len(features)):
            prefix = f"p.discriminator_heads.{k}."
            layers = sorted(
                {int(name.removeprefix(prefix).split(".")[0]) for name in z.files if name.startswith(prefix)}
            )
            head, convolutions = {}, 0
            for layer in layers:
                weight, bias = (jnp.asarray(z[f"{prefix}{layer}.{leaf}"]) for leaf in ("weight", "bias"))
                if weight.ndim == 1:
                    head[f"norm{convolutions - 1}"] = {"scale": weight, "bias": bias}
                else:
                    name = "out" if layer == layers[-1] else f"conv{convolutions}"
                    head[name] = {"kernel": weight.transpose(2, 3, 1, 0), "bias": bias}
                    convolutions += 1
            params[f"head{k}"] = head
        logits = DiscriminatorHead().apply({"params": params}, features)
        assert logits.dtype == jnp.float64
    np.testing.assert_allclose(logits, z["logits"], rtol=0, atol=1e-8)


def features(*shapes):
    return [jnp.asarray(np.random.default_rng(i).standard_normal(s), jnp.float32) for i, s in enumerate(shapes)]


def test_every_size_and_width_has_a_head_of_its_own():
    maps = features((2, 32, 32, 4), (2, 16, 16, 8), (2, 8, 8, 12), (2, 4, 4, 16), (2, 3, 3, 16), (2, 1, 1, 40))
    logits, variables = jax.eval_shape(DiscriminatorHead().init_with_output, jax.random.key(0), maps)
    assert logits.shape == (2, 6)
    convolutions = [sum(name.startswith("conv") for name in variables["params"][f"head{k}"]) for k in range(6)]
    assert convolutions == [4, 3, 2, 1, 1, 1]
    assert variables["params"]["head4"]["conv0"]["kernel"].shape == (3, 3, 16, 16)
    assert variables["params"]["head0"]["conv3"]["kernel"].shape == (4, 4, 4, 4)


def test_heads_are_independent_and_gradients_reach_the_features(random_variables):
    maps = features((2, 8, 8, 8), (2, 4, 4, 8))
    head = DiscriminatorHead()
    variables = random_variables(head, maps)
    logits = head.apply(variables, maps, jnp.ones(2), jnp.zeros(2, jnp.int32))  # the last two are ignored
    other = head.apply(variables, [maps[0], -maps[1]])
    np.testing.assert_array_equal(other[:, 0], logits[:, 0])
    assert (other[:, 1] != logits[:, 1]).all()
    gradients = jax.grad(lambda m: head.apply(variables, m).sum())(maps)
    assert all(np.abs(g).max() > 0 for g in gradients)


def test_bfloat16_heads_give_float32_logits():
    maps = features((2, 8, 8, 8))
    head = DiscriminatorHead(dtype=jnp.bfloat16)
    assert jax.eval_shape(head.init_with_output, jax.random.key(0), maps)[0].dtype == jnp.float32


def test_bad_input():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="features must hold at least one map"):
        DiscriminatorHead().init(key, [])
    with pytest.raises(ValueError, match="features must be square maps"):
        DiscriminatorHead().init(key, features((2, 8, 4, 8)))
    with pytest.raises(ValueError, match="num_channels must be divisible by num_channels // 4 = 2, got 9"):
        DiscriminatorHead().init(key, features((2, 8, 8, 9)))
    with pytest.raises(ValueError, match="num_channels must be positive, got 0"):
        head_group_count(0)
