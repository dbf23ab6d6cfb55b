"""Value learning by classification, agents that train on the device, reward comparison, preference optimization."""

from poise.rl.bellman import conservative_penalty, q_learning_target, sarsa_target
from poise.rl.target_probs import categorical_projection, hl_gauss_probs, two_hot_probs
from poise.rl.value_grids import atoms, bin_centers, bin_edges
from poise.rl.value_loss import categorical_td_loss, expected_value
from poise.rl.value_transform import ValueTransform, c51, hl_gauss, scalar, softmax_scalar, two_hot

__all__ = [
    "ValueTransform",
    "atoms",
    "bin_centers",
    "bin_edges",
    "c51",
    "categorical_projection",
    "categorical_td_loss",
    "conservative_penalty",
    "expected_value",
    "hl_gauss",
    "hl_gauss_probs",
    "q_learning_target",
    "sarsa_target",
    "scalar",
    "softmax_scalar",
    "two_hot",
    "two_hot_probs",
]
