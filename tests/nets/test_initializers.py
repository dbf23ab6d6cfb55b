import jax
import numpy as np
import pytest

from poise.nets import LayerInit


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("xavier_uniform", np.sqrt(6 / (9 * 16 + 9 * 48))),
        ("kaiming_uniform", np.sqrt(3 / (9 * 16))),
        ("kaiming_normal", np.sqrt(1 / (9 * 16))),
    ],
)
def test_size_of_draws(mode, expected):
    kernel = LayerInit(mode, gain=2).kernel()(jax.random.key(0), (3, 3, 16, 48))
    bias = LayerInit(mode, bias_gain=2).bias(9 * 16, 9 * 48)(jax.random.key(1), (9 * 16 * 48,))
    for draw in (kernel.ravel(), bias):
        if mode == "kaiming_normal":
            np.testing.assert_allclose(draw.std(), 2 * expected, rtol=0.05)
            assert np.abs(draw).max() > 3 * 2 * expected  # not truncated
        else:
            assert 0.99 * 2 * expected < np.abs(draw).max() <= 2 * expected
            np.testing.assert_allclose(draw.std(), 2 * expected / np.sqrt(3), rtol=0.05)


def test_zero_gain_is_exact():
    init = LayerInit("kaiming_uniform", gain=0)
    assert not np.asarray(init.kernel()(jax.random.key(0), (4, 5))).any()
    assert not np.asarray(init.bias(4, 5)(jax.random.key(0), (5,))).any()


def test_unknown_mode():
    with pytest.raises(ValueError, match=r"mode must be one of .*, got 'orthogonal'"):
        LayerInit("orthogonal")
