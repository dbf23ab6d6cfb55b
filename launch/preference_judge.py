"""What is reported of a policy: which held-out pairs it ranks right, and how far it went from the reference."""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from poise.launch.preference_data import Pairs, PreferenceData
from poise.launch.preference_phases import Seen, make_look, make_model
from poise.launch.trigger_task import GOOD, TRIGGER
from poise.nets import Transformer
from poise.rl import (
    correctly_ranked,
    idealized_ranking_accuracy,
    ranking_accuracy,
    ranking_transitions,
    reward_accuracy,
    sequence_logprob,
)

if TYPE_CHECKING:
    from poise.launch.preference import PreferenceConfig

_BATCH = 256


class Likelihoods(NamedTuple):
    """Log-probabilities of held-out pairs' tokens, ``[pairs, positions]``, under policy and reference.

    Attributes:
      chosen: of the preferred texts under the policy.
      rejected: of the others.
      ref_chosen: of the preferred texts under the reference.
      ref_rejected: of the others.
      kl_chosen: the policy's divergence at the preferred texts' tokens.
      kl_rejected: at the others'.
    """

    chosen: Array
    rejected: Array
    ref_chosen: Array
    ref_rejected: Array
    kl_chosen: Array
    kl_rejected: Array


class Judge:
    """Judges the policies of one loss.

    Args:
      config: the run's settings.
      method: the loss.
      model: the decoder.
      data: the run's texts.
    """

    def __init__(self, config: "PreferenceConfig", method: str, model: Transformer, data: PreferenceData):
        self._held_out, self._mixed, self._raters, self._beta = data.held_out, data.mixed, config.raters, config.beta
        self._look = jax.jit(make_look(config, method, model))

    def __call__(self, trained: dict[str, PyTree], ref: PyTree) -> dict[str, float]:
        """Figures by name.

        Args:
          trained: the variables of policy and masks.
          ref: those of the reference.
        """
        found = pair_figures(self.likelihoods(trained, ref), self._held_out, self._raters, self._beta)
        if self._mixed is not None:
            whole = np.ones((len(self._mixed), self._mixed.shape[1] - 1), bool)
            found |= trigger_figures(self.see(trained, ref, self._mixed, whole), self._mixed)
        return found

    def see(
        self,
        trained: dict[str, PyTree],
        ref: PyTree,
        tokens: Int[np.ndarray, "texts length"],
        mask: Bool[np.ndarray, "texts positions"],
    ) -> Seen:
        """What policy and reference say of texts, a number of texts at a time."""
        parts = []
        for first in range(0, len(tokens), _BATCH):
            index = np.arange(first, first + _BATCH) % len(tokens)  # all parts are filled up, so that one compiles
            parts.append(jax.device_get(self._look(trained, ref, tokens[index], mask[index])))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(tokens)], *parts)

    def likelihoods(self, trained: dict[str, PyTree], ref: PyTree) -> Likelihoods:
        """Of the held-out pairs."""
        chosen, rejected, chosen_mask, rejected_mask = self._held_out
        seen = [self.see(trained, ref, *side) for side in ((chosen, chosen_mask), (rejected, rejected_mask))]
        return Likelihoods(*(getattr(side, name) for name in ("logps", "ref_logps", "kl") for side in seen))


def make_judges(config: "PreferenceConfig", data: PreferenceData) -> dict[str, Judge]:
    """A judge for each loss, by its name.

    Args:
      config: the run's settings.
      data: its texts.
    """
    model = make_model(config, data.vocab_size)
    return {method: Judge(config, method, model, data) for method in config.method_names}


def pair_figures(found: Likelihoods, pairs: Pairs, raters: float, beta: float) -> dict[str, float]:
    """Ranking before and after, and the mean divergence.

    Args:
      found: likelihoods of the pairs.
      pairs: the pairs.
      raters: the share of raters that agree with a pair.
      beta: strength of the reference.

    Returns:
      ``ranking_accuracy`` and ``ranking_accuracy_before``, the same by the mean over tokens (``normalized_...``),
      ``idealized_accuracy``, ``reward_accuracy``, ``reward_margin``, the mean of the chosen text's implicit reward less
      the other's, the shares of all pairs that were ``flipped_right`` and ``flipped_wrong``, and ``kl``, a token's.
    """
    masks = jnp.asarray(pairs.chosen_mask), jnp.asarray(pairs.rejected_mask)

    def both(chosen, rejected, normalize):
        return tuple(
            sequence_logprob(jnp.asarray(logps), mask, length_normalize=normalize)
            for logps, mask in zip((chosen, rejected), masks, strict=True)
        )

    after, before = both(found.chosen, found.rejected, False), both(found.ref_chosen, found.ref_rejected, False)
    changes = ranking_transitions(correctly_ranked(*before), correctly_ranked(*after)) / len(pairs.chosen)
    total = found.kl_chosen.sum() + found.kl_rejected.sum()
    figures = {
        "ranking_accuracy_before": ranking_accuracy(*before),
        "ranking_accuracy": ranking_accuracy(*after),
        "normalized_accuracy_before": ranking_accuracy(*both(found.ref_chosen, found.ref_rejected, True)),
        "normalized_accuracy": ranking_accuracy(*both(found.chosen, found.rejected, True)),
        "idealized_accuracy": idealized_ranking_accuracy(*before, alpha=raters, beta=beta),
        "reward_accuracy": reward_accuracy(*after, *before),
        "reward_margin": beta * jnp.mean((after[0] - before[0]) - (after[1] - before[1])),
        "flipped_right": changes[0, 1],
        "flipped_wrong": changes[1, 0],
        "kl": total / max(1, pairs.chosen_mask.sum() + pairs.rejected_mask.sum()),
    }
    return {name: float(value) for name, value in figures.items()}


def trigger_figures(seen: Seen, tokens: Int[np.ndarray, "texts length"]) -> dict[str, float]:
    """What the synthetic experiment is made for: what changed behind the trigger, and what changed elsewhere.

    Args:
      seen: what was said of the texts.
      tokens: the texts.

    Returns:
      ``good_after_trigger``, the probability of a good token there; ``kl_at_trigger`` and ``kl_off_trigger``; with
      weights of rewards also ``mask_at_trigger``, ``mask_off_trigger`` and ``mask_zeros``, the share that is 0.
    """
    at = tokens[:, :-1] == TRIGGER

    def mean(values: Float[np.ndarray, "..."], where: Bool[np.ndarray, "..."]) -> float:
        return float(values[where].mean()) if where.any() else 0.0

    probs = np.asarray(jax.nn.softmax(seen.logits))
    found = {
        "good_after_trigger": mean(probs[..., list(GOOD)].sum(-1), at),
        "kl_at_trigger": mean(np.asarray(seen.kl), at),
        "kl_off_trigger": mean(np.asarray(seen.kl), ~at),
    }
    if seen.weights is not None:
        weights = np.asarray(seen.weights[0])
        found |= {"mask_at_trigger": mean(weights, at), "mask_off_trigger": mean(weights, ~at)}
        found["mask_zeros"] = float(np.mean(weights == 0))
    return found
