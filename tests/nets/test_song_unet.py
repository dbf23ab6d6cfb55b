import jax
import jax.numpy as jnp
import pytest

from poise.nets import SongUNet


@pytest.mark.parametrize("name", ["embedding_type", "encoder_type", "decoder_type"])
def test_unknown_type(name):
    net = SongUNet(8, 1, model_channels=8, channel_mult=(1,), num_blocks=1, **{name: "transformer"})
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'transformer'"):
        net.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)), jnp.zeros(1))


def test_noise_labels_of_another_batch():
    net = SongUNet(8, 1, model_channels=8, channel_mult=(1,), num_blocks=1)
    with pytest.raises(ValueError, match=r"noise_labels must have shape \[1\] or \[3\], got \(2,\)"):
        net.init(jax.random.key(0), jnp.ones((3, 8, 8, 1)), jnp.zeros(2))


def test_missing_rng_of_label_dropout():
    net = SongUNet(8, 1, label_dim=2, model_channels=8, channel_mult=(1,), num_blocks=1, dropout=0, label_dropout=0.1)
    args = (jnp.ones((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    variables = jax.eval_shape(net.init, jax.random.key(0), *args)
    with pytest.raises(ValueError, match="rngs must hold 'label_dropout'"):
        jax.eval_shape(lambda v: net.apply(v, *args, train=True), variables)


def test_widths_and_attention_follow_the_settings():
    net = SongUNet(8, 3, model_channels=8, channel_mult=(2, 3), num_blocks=2, attn_resolutions=(8,))
    args = (jnp.ones((1, 8, 8, 1)), jnp.zeros(1))
    params = jax.eval_shape(net.init, jax.random.key(0), *args)["params"]
    assert params["enc"]["8x8_conv"]["kernel"].shape == (3, 3, 1, 8)  # the base width, whatever the first multiple
    assert params["dec"]["8x8_block2"]["conv0"]["kernel"].shape == (3, 3, 24, 16)  # 16 of the trunk, 8 of the stem
    with_attention = {name for half in ("enc", "dec") for name, block in params[half].items() if "qkv" in block}
    assert with_attention == {"8x8_block0", "8x8_block1", "8x8_block2", "4x4_in0"}
    assert "qkv" not in params["dec"]["8x8_block0"]
    assert "qkv" not in params["dec"]["8x8_block1"]


def test_fourier_frequencies_are_constants():
    net = SongUNet(8, 1, model_channels=8, channel_mult=(1,), num_blocks=1, embedding_type="fourier")
    variables = jax.eval_shape(net.init, jax.random.key(0), jnp.ones((1, 8, 8, 1)), jnp.zeros(1))
    assert variables["constants"]["map_noise"]["freqs"].shape == (4,)
    assert "map_noise" not in variables["params"]
