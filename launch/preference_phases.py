"""The phases of a comparison of preference losses: the reference, then each loss from it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from poise.attention import dot_product_attention
from poise.core import Algorithm, fold_in_examples, in_microbatches, mean_over, sum_over
from poise.launch.activations import with_activations
from poise.launch.data import InMemory
from poise.launch.phase import Phase
from poise.launch.preference_data import PreferenceData
from poise.nets import SparseTokenMask, Transformer
from poise.rl import (
    dpo_loss,
    ipo_loss,
    mapo_mask,
    preference_metrics,
    sparse_po_loss,
    tdpo_loss,
    token_forward_kl,
    token_logprobs,
)

if TYPE_CHECKING:
    from poise.launch.preference import PreferenceConfig

PRETRAIN = "pretrain"


class LanguageState(NamedTuple):
    """A language model in training.

    Attributes:
      params: its variables.
      opt_state: the optimizer's state.
      step: finished updates.
    """

    params: PyTree
    opt_state: PyTree
    step: Int[Array, ""]


class PreferenceState(NamedTuple):
    """A policy in training.

    Attributes:
      trained: the variables of the ``policy`` and of the ``masks``, by name.
      opt_state: the optimizer's state.
      step: finished updates.
      frozen: the variables of the reference, ``ref``.
    """

    trained: dict[str, PyTree]
    opt_state: PyTree
    step: Int[Array, ""]
    frozen: dict[str, PyTree]


class Seen(NamedTuple):
    """What policy and reference say of texts, a number for each token but the first.

    Attributes:
      logps: log-probabilities of the tokens under the policy.
      ref_logps: under the reference.
      kl: divergence of the policy from the reference.
      weights: of rewards and of divergences; None where all are 1.
      logits: the policy's, the vocabulary last.
    """

    logps: Float[Array, "batch positions"]
    ref_logps: Float[Array, "batch positions"]
    kl: Float[Array, "batch positions"]
    weights: tuple[Array, Array] | None
    logits: Float[Array, "batch positions vocab"]


def make_model(config: "PreferenceConfig", vocab_size: int) -> Transformer:
    """The decoder that the flags describe."""
    return Transformer(vocab_size, config.num_layers, config.num_heads, config.width, attention=dot_product_attention)


def mask_names(method: str) -> tuple[str, ...]:
    """The learned masks of a loss; one for rewards and divergences, two, or none."""
    return {"sparse_po": ("common",), "sparse_po_independent": ("reward", "kl")}.get(method, ())


def make_look(
    config: "PreferenceConfig", method: str, model: Transformer, num_microbatches: int = 1
) -> Callable[..., Seen]:
    """A function that shows texts to policy and reference.

    Args:
      config: the run's settings.
      method: the loss.
      model: the decoder.
      num_microbatches: parts of the texts that the policy sees one after the other.

    Returns:
      ``(trained, ref, tokens, mask, keys=None) -> Seen``; with a key for each text learned masks have dropout.
    """
    net = SparseTokenMask(config.num_layers, dropout=config.mask_dropout)
    apply = in_microbatches(model.apply, num_microbatches)

    def mask_of(variables: PyTree, hidden: Array, keys: Array | None, index: int) -> Array:
        if keys is None:
            return cast(Array, net.apply(variables, hidden))

        def one(hidden: Array, key: Array) -> Any:
            return net.apply(variables, hidden, train=True, rngs={"dropout": jax.random.fold_in(key, index)})

        return jax.vmap(one, in_axes=(1, 0))(hidden, keys)

    def look(trained: dict[str, PyTree], ref: PyTree, tokens: Array, mask: Array, keys: Array | None = None) -> Seen:
        logits = cast(Any, apply(trained["policy"], tokens[:, :-1]))
        base, activations = with_activations(model, ref, tokens[:, :-1])
        labels = tokens[:, 1:]
        weights: tuple[Array, Array] | None = None
        if method == "mapo":
            fixed = mapo_mask(activations._asdict(), mask)
            weights = (fixed, fixed)
        elif mask_names(method):
            found = [
                mask_of(trained["masks"][name], activations.residual, keys, i)
                for i, name in enumerate(mask_names(method))
            ]
            weights = (found[0], found[-1])
        return Seen(
            token_logprobs(logits, labels, mask),
            token_logprobs(base, labels, mask),
            token_forward_kl(logits, base, mask),
            weights,
            logits,
        )

    return look


def pretrain_algorithm(config: "PreferenceConfig", model: Transformer, axis_name: str | None = None) -> Algorithm:
    """Language modelling: the mean log-loss of the tokens that count.

    Args:
      config: the run's settings.
      model: the decoder.
      axis_name: of the devices that share a batch under pmap.
    """
    optimizer = optax.adam(config.pretrain_learning_rate)
    apply = in_microbatches(model.apply, config.microbatches)

    def init(key, batch):
        params = model.init(key, batch["tokens"][:, :-1])
        return LanguageState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def step(state, batch, key):
        del key
        tokens, mask = batch["tokens"], batch["mask"]
        count = jnp.maximum(sum_over(axis_name, jnp.sum(mask)), 1)

        def objective(params):
            logps = token_logprobs(cast(Any, apply(params, tokens[:, :-1])), tokens[:, 1:], mask)
            return -jnp.sum(logps) / count

        loss, grads = sum_over(axis_name, jax.value_and_grad(objective)(state.params))
        updates, opt_state = optimizer.update(grads, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        return LanguageState(params, opt_state, state.step + 1), {"loss": loss}

    return Algorithm(init, step)


def preference_algorithm(
    config: "PreferenceConfig",
    method: str,
    model: Transformer,
    previous: LanguageState | PreferenceState,
    axis_name: str | None = None,
) -> Algorithm:
    """Training by one loss, from the reference.

    Args:
      config: the run's settings.
      method: the loss.
      model: the decoder.
      previous: the state of the phase before, which holds the reference.
      axis_name: of the devices that share a batch under pmap.
    """
    look = make_look(config, method, model, config.microbatches)
    net = SparseTokenMask(config.num_layers)
    optimizer = optax.adamw(
        config.learning_rate, weight_decay=config.mask_weight_decay, mask={"policy": False, "masks": True}
    )

    def init(key, batch):
        ref = previous.frozen["ref"] if isinstance(previous, PreferenceState) else previous.params
        hidden = jnp.zeros((config.num_layers, 1, batch["chosen"].shape[1] - 1, config.width))
        masks = {name: net.init(jax.random.fold_in(key, i), hidden) for i, name in enumerate(mask_names(method))}
        trained = {"policy": ref, "masks": masks}
        return PreferenceState(trained, optimizer.init(trained), jnp.zeros((), jnp.int32), {"ref": ref})

    def step(state, batch, key):
        tokens = jnp.concatenate([batch["chosen"], batch["rejected"]])
        mask = jnp.concatenate([batch["chosen_mask"], batch["rejected_mask"]])
        sides = (fold_in_examples(jax.random.fold_in(key, i), len(batch["chosen"]), axis_name) for i in range(2))
        keys = jnp.concatenate(list(sides))

        def objective(trained):
            seen = look(trained, state.frozen["ref"], tokens, mask, keys)
            loss, kind = pair_loss(config, method, seen, mask)
            return jnp.mean(loss), (seen, kind)

        (loss, (seen, pairs)), grads = jax.value_and_grad(objective, has_aux=True)(state.trained)
        loss, grads = mean_over(axis_name, (loss, grads))
        if axis_name is not None:
            pairs = jax.lax.all_gather(pairs, axis_name, tiled=True)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        trained: Any = optax.apply_updates(state.trained, updates)
        metrics = {"loss": loss, **preference_metrics(*pairs, beta=config.beta)}
        total, count = sum_over(axis_name, (jnp.sum(seen.kl), jnp.sum(mask)))
        metrics["kl"] = total / jnp.maximum(count, 1)
        return PreferenceState(trained, opt_state, state.step + 1, state.frozen), metrics

    return Algorithm(init, step)


def _halves(values: Array) -> tuple[Array, Array]:
    """Of the chosen and of the rejected texts."""
    half = values.shape[0] // 2
    return values[:half], values[half:]


def pair_loss(
    config: "PreferenceConfig", method: str, seen: Seen, mask: Array
) -> tuple[Float[Array, " pairs"], tuple[Array, ...]]:
    """The loss of each pair, chosen texts first and rejected ones after them.

    Args:
      config: the run's settings.
      method: the loss.
      seen: what was said of all texts.
      mask: what counts of them.

    Returns:
      The losses, and what :func:`poise.rl.preference_metrics` takes.
    """
    pairs = (*_halves(seen.logps), *_halves(seen.ref_logps))
    masks, kl = _halves(mask), _halves(seen.kl)
    if method == "dpo":
        loss = dpo_loss(*pairs, *masks, beta=config.beta)
    elif method == "ipo":
        loss = ipo_loss(*pairs, *masks, beta=config.beta)
    elif method == "tdpo":
        loss = tdpo_loss(*pairs, *kl, *masks, beta=config.beta)
    else:
        assert seen.weights is not None
        rewards, divergences = map(_halves, seen.weights)
        l1 = config.l1 if mask_names(method) else 0.0  # weights that nobody learns have nothing to gain
        loss = sparse_po_loss(
            *pairs, *kl, *masks, beta=config.beta, reward_mask=rewards, kl_mask=divergences, l1_reward=l1, l1_kl=l1
        )
    return loss, (*pairs, *masks)


def preference_phases(
    config: "PreferenceConfig", data: PreferenceData, judges: Mapping[str, Callable[..., Mapping[str, float]]]
) -> tuple[Phase, ...]:
    """Puts the run together.

    Args:
      config: the run's settings.
      data: its texts.
      judges: by loss, from trained variables and the reference's to figures.

    Returns:
      The phase that makes the reference, then one for each loss; each hands the reference on.
    """
    model = make_model(config, data.vocab_size)
    pretrain = Phase(
        name=PRETRAIN,
        make_algorithm=lambda _, axis_name=None: pretrain_algorithm(config, model, axis_name),
        data=InMemory({"tokens": data.corpus, "mask": data.corpus_mask}, config.batch_size, config.seed),
        num_steps=config.pretrain_steps,
    )
    pairs = InMemory(data.train._asdict(), config.batch_size, config.seed)

    def one(method: str) -> Phase:
        judge = judges[method]
        return Phase(
            name=method,
            make_algorithm=lambda previous, axis_name=None: preference_algorithm(
                config, method, model, cast(Any, previous), axis_name
            ),
            data=pairs,
            num_steps=config.steps,
            evaluate=lambda state, key: judge(state.trained, state.frozen["ref"]),
            evaluate_every=config.eval_every,
        )

    return (pretrain, *map(one, config.method_names))
