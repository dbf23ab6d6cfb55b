"""The phases of a language-model run: one for each kind of attention, all on the same batches."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from poise.attention import dot_product_attention, softplus_attention
from poise.core import Algorithm, in_microbatches, mean_over
from poise.launch.data import DataError, Shuffled
from poise.launch.phase import Phase
from poise.nets import Transformer

if TYPE_CHECKING:
    from poise.launch.lm import LanguageModelConfig

VARIANTS: dict[str, Callable[..., Array]] = {
    "softmax": dot_product_attention,
    # what the scale and the normalization of softplus attention do without softplus
    "softmax_scaled": functools.partial(dot_product_attention, qk_norm=True, scale="length"),
    "lssa": functools.partial(softplus_attention, reweight=False),
    "lssar_p3": functools.partial(softplus_attention, power=3.0),
    "lssar_p15": functools.partial(softplus_attention, power=15.0),
}
QUARTERS = 4
_TOKENS_AT_ONCE = 8192  # of an evaluation


class LanguageModelState(NamedTuple):
    """What a language model's training keeps.

    Attributes:
      params: the model's parameters.
      optimizer: the optimizer's state.
    """

    params: PyTree
    optimizer: optax.OptState


def language_model(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    axis_name: str | None = None,
    num_microbatches: int = 1,
) -> Algorithm:
    """Training by the cross-entropy of every next token of ``{"tokens": [batch, length + 1]}``.

    Args:
      model: the network.
      optimizer: of its parameters.
      axis_name: of the devices that share a batch under pmap.
      num_microbatches: parts of a batch that are computed one after the other.

    Returns:
      The algorithm; its metrics are ``loss``, in nats per token, and ``grad_norm``.
    """
    losses = in_microbatches(functools.partial(token_losses, model), num_microbatches)

    def init(key: Array, batch: dict[str, Array]) -> LanguageModelState:
        params = model.init(key, batch["tokens"][:1, :-1])["params"]
        return LanguageModelState(params, optimizer.init(params))

    def step(
        state: LanguageModelState, batch: dict[str, Array], key: Array
    ) -> tuple[LanguageModelState, dict[str, Array]]:
        del key  # nothing is drawn

        def loss_fn(params: PyTree) -> Array:
            return losses(params, batch["tokens"]).mean()

        loss, grads = mean_over(axis_name, jax.value_and_grad(loss_fn)(state.params))
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        new = LanguageModelState(optax.apply_updates(state.params, updates), optimizer_state)
        return new, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    return Algorithm(init, step)


def token_losses(
    model: Transformer, params: PyTree, tokens: Int[Array, "batch places"]
) -> Float[Array, "batch length"]:
    """The cross-entropy of every token but the first, in nats."""
    logits: Any = model.apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def model_of(config: "LanguageModelConfig", variant: str, vocab_size: int) -> Transformer:
    """The network with one kind of attention."""
    return Transformer(
        vocab_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        width=config.width,
        mlp_ratio=config.mlp_ratio,
        attention=VARIANTS[variant],
        rope_base=config.rope_base,
        dtype=jnp.bfloat16 if config.precision == "bfloat16" else None,
    )


def optimizer_of(config: "LanguageModelConfig") -> optax.GradientTransformation:
    """AdamW with warm-up, a cosine to a tenth and clipping."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0 if config.warmup_steps else config.learning_rate,
        config.learning_rate,
        config.warmup_steps,
        max(config.decay_steps, config.warmup_steps + 1),
        config.learning_rate / 10,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=config.weight_decay))


def windows(tokens: np.ndarray, length: int, batch_size: int, seed: int) -> Shuffled:
    """Batches ``{"tokens": [batch_size, length + 1]}`` that begin anywhere in the text, every place once an epoch.

    Raises:
      DataError: if the text is shorter than a window.
    """
    if len(tokens) <= length:
        raise DataError(f"the training text has {len(tokens)} tokens, which is too short for windows of {length + 1}")
    places = np.arange(length + 1)
    return Shuffled(lambda first: {"tokens": tokens[first[:, None] + places]}, len(tokens) - length, batch_size, seed)


def evaluation_windows(tokens: np.ndarray, lengths: Sequence[int], at_most: int) -> dict[int, np.ndarray]:
    """The same predicted tokens cut into windows of each length: ``[number, length + 1]``, neighbours share one token.

    Raises:
      DataError: if the text is shorter than the longest window.
    """
    longest = max(lengths)
    whole = min(at_most, len(tokens) - 1) // longest * longest
    if not whole or any(longest % length for length in lengths):
        raise DataError(
            f"the held-out text of {len(tokens)} tokens must hold a window of {longest + 1}; lower eval_factors "
            "or length"
        )
    return {length: np.stack([tokens[i : i + length + 1] for i in range(0, whole, length)]) for length in lengths}


def evaluator(model: Transformer, cut: dict[int, np.ndarray], unit: int) -> Callable[[PyTree], dict[str, float]]:
    """``params -> figures``: the mean loss at each length, ``loss_8x``, and in quarters of the window, ``loss_8x_q4``.

    Args:
      model: the network.
      cut: of :func:`evaluation_windows`.
      unit: the length that is called 1x.

    Returns:
      The function, compiled once for each length.
    """
    jitted = jax.jit(functools.partial(token_losses, model))

    def evaluate(params: PyTree) -> dict[str, float]:
        figures: dict[str, float] = {}
        for length, tokens in cut.items():
            rows = max(1, min(len(tokens), _TOKENS_AT_ONCE // length))
            padded = np.concatenate([tokens, np.repeat(tokens[:1], -len(tokens) % rows, 0)])
            losses = np.concatenate(
                [np.asarray(jitted(params, part)) for part in np.split(padded, len(padded) // rows)]
            )
            losses = losses[: len(tokens)].astype(np.float64)
            name = f"loss_{length // unit}x"
            figures[name] = float(losses.mean())
            if length % QUARTERS == 0:
                quarters = losses.reshape(len(losses), QUARTERS, -1).mean((0, 2))
                figures |= {f"{name}_q{index + 1}": float(quarter) for index, quarter in enumerate(quarters)}
        return figures

    return evaluate


def language_model_phases(
    config: "LanguageModelConfig", train: np.ndarray, held_out: np.ndarray, vocab_size: int
) -> tuple[Phase, ...]:
    """A phase for each of the configuration's kinds of attention.

    Args:
      config: the run's settings.
      train: tokens to train on.
      held_out: tokens that the losses are reported of.
      vocab_size: the number of different tokens.

    Returns:
      The phases, named as the kinds of attention.

    Raises:
      DataError: if a text is too short.
    """
    data = windows(train, config.length, config.batch_size, config.seed)
    lengths = [config.length * factor for factor in config.eval_factors]
    cut = evaluation_windows(held_out, lengths, config.eval_tokens)
    optimizer = optimizer_of(config)

    def phase(variant: str) -> Phase:
        model = model_of(config, variant, vocab_size)
        evaluate = evaluator(model, cut, config.length)

        def make_algorithm(previous: Any, axis_name: str | None = None) -> Algorithm:
            del previous  # no kind of attention knows of another
            return language_model(model, optimizer, axis_name, config.microbatches)

        return Phase(
            variant,
            make_algorithm,
            data,
            config.steps,
            evaluate=lambda state, key: evaluate(state.params),
            evaluate_every=config.eval_every,
        )

    return tuple(phase(variant) for variant in config.variant_names)
