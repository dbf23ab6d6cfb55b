"""Value learning by classification, agents that train on the device, reward comparison, preference optimization."""

from poise.rl.bellman import conservative_penalty, q_learning_target, sarsa_target
from poise.rl.canonicalization import (
    canonicalize_dard,
    canonicalize_epic,
    canonicalize_minimal,
    canonicalize_minimal_potential,
    canonicalize_val,
    canonicalize_value_potential,
)
from poise.rl.cql import CQLConfig, cql
from poise.rl.dqn import DQNConfig, DQNState, dqn, epsilon_greedy, replay_dataset
from poise.rl.environment import (
    Environment,
    EnvStep,
    catch,
    from_gymnax,
    reward_noise,
    step_or_reset,
    sticky_actions,
    time_limit,
)
from poise.rl.mdp import (
    MDP,
    normalized_regret,
    optimal_policy,
    policy_return,
    policy_value,
    potential_shaping,
    random_mdp,
    random_reward,
)
from poise.rl.n_step import StepRecord, Transition, n_step_transition
from poise.rl.preference_losses import dpo_loss, ipo_loss, simpo_loss, tdpo_loss
from poise.rl.ranking_accuracy import (
    alignment_gap,
    attenuated_dpo_loss,
    correctly_ranked,
    flip_difficulty,
    flip_loss_threshold,
    idealized_log_ratio,
    idealized_ranking_accuracy,
    ranking_accuracy,
    ranking_transitions,
    reward_accuracy,
    whole_ranking_accuracy,
)
from poise.rl.replay import ReplayState, replay_add, replay_init, replay_sample
from poise.rl.rollout import Rollout, over_seeds, rollout
from poise.rl.sparse_po import mapo_mask, mask_sparsity, preference_metrics, sparse_po_loss
from poise.rl.starc import epic_distance, reward_norm, standardize, starc_distance
from poise.rl.target_probs import categorical_projection, hl_gauss_probs, two_hot_probs
from poise.rl.td_learner import LearnerState
from poise.rl.token_logprobs import sequence_logprob, token_forward_kl, token_logprobs
from poise.rl.value_grids import atoms, bin_centers, bin_edges
from poise.rl.value_loss import categorical_td_loss, expected_value
from poise.rl.value_transform import ValueTransform, c51, hl_gauss, scalar, softmax_scalar, two_hot

__all__ = [
    "MDP",
    "CQLConfig",
    "DQNConfig",
    "DQNState",
    "EnvStep",
    "Environment",
    "LearnerState",
    "ReplayState",
    "Rollout",
    "StepRecord",
    "Transition",
    "ValueTransform",
    "alignment_gap",
    "atoms",
    "attenuated_dpo_loss",
    "bin_centers",
    "bin_edges",
    "c51",
    "canonicalize_dard",
    "canonicalize_epic",
    "canonicalize_minimal",
    "canonicalize_minimal_potential",
    "canonicalize_val",
    "canonicalize_value_potential",
    "catch",
    "categorical_projection",
    "categorical_td_loss",
    "conservative_penalty",
    "correctly_ranked",
    "cql",
    "dpo_loss",
    "dqn",
    "epic_distance",
    "epsilon_greedy",
    "expected_value",
    "flip_difficulty",
    "flip_loss_threshold",
    "from_gymnax",
    "hl_gauss",
    "hl_gauss_probs",
    "idealized_log_ratio",
    "idealized_ranking_accuracy",
    "ipo_loss",
    "mapo_mask",
    "mask_sparsity",
    "n_step_transition",
    "normalized_regret",
    "optimal_policy",
    "over_seeds",
    "policy_return",
    "policy_value",
    "potential_shaping",
    "preference_metrics",
    "q_learning_target",
    "random_mdp",
    "random_reward",
    "ranking_accuracy",
    "ranking_transitions",
    "replay_add",
    "replay_dataset",
    "replay_init",
    "replay_sample",
    "reward_accuracy",
    "reward_noise",
    "reward_norm",
    "rollout",
    "sarsa_target",
    "scalar",
    "sequence_logprob",
    "simpo_loss",
    "softmax_scalar",
    "sparse_po_loss",
    "standardize",
    "starc_distance",
    "step_or_reset",
    "sticky_actions",
    "tdpo_loss",
    "time_limit",
    "token_forward_kl",
    "token_logprobs",
    "two_hot",
    "two_hot_probs",
    "whole_ranking_accuracy",
]
