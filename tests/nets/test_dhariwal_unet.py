import warnings

import jax
import jax.numpy as jnp
import pytest

from poise.nets import DhariwalUNet

ARGS = (jnp.ones((1, 8, 8, 1)), jnp.zeros(1))


def make(channels_per_head):
    return DhariwalUNet(
        8, 1, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8, 4),
        channels_per_head=channels_per_head,
    )  # fmt: skip


def attention_blocks(net):
    params = jax.eval_shape(net.init, jax.random.key(0), *ARGS)["params"]
    return {f"{half}/{name}" for half in ("enc", "dec") for name, block in params[half].items() if "qkv" in block}


def test_attention_is_in_all_decoder_blocks_of_its_resolutions():
    expected = {f"enc/{res}_block0" for res in ("8x8", "4x4")} | {"dec/4x4_in0"}
    expected |= {f"dec/{res}_block{i}" for res in ("8x8", "4x4") for i in (0, 1)}
    assert attention_blocks(make(8)) == expected


def test_blocks_narrower_than_a_head_have_no_attention_and_say_so():
    with pytest.warns(UserWarning, match="no attention in a block of 8 channels: channels_per_head=16 is more"):
        blocks = attention_blocks(make(16))
    assert blocks == {"enc/4x4_block0", "dec/4x4_in0", "dec/4x4_block0", "dec/4x4_block1"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_blocks(make(8))


def test_head_width_that_does_not_divide():
    with pytest.raises(ValueError, match="channels_per_head=3 must divide the block's 8 channels"):
        attention_blocks(make(3))
    with pytest.raises(ValueError, match="channels_per_head must be positive or None, got 0"):
        attention_blocks(make(0))
