"""The quantized phases of a run: training with quantized weights taught by the float network, then annealing."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, PyTree

from poise.core import Algorithm, in_microbatches, mean_over, sum_over
from poise.launch.classifier import (
    ClassifierState,
    Images,
    accuracy_of,
    adamw,
    cross_entropy,
    logits_of,
    model_of,
    squared_error,
)
from poise.launch.phase import Phase
from poise.nets import (
    QKReparamSelfAttention,
    VisionTransformer,
    activation_quantization,
    qk_product_params,
)
from poise.quant import (
    OscillationState,
    QuantRule,
    apply_weight_quant,
    confidence_guided_annealing,
    init_weight_qparams,
    oscillating_fraction,
    oscillation_init,
    oscillation_update,
    quantized_weights,
    statsq_codes,
)
from poise.quant.lsq import lsq_codes

if TYPE_CHECKING:
    from poise.launch.qat import QATConfig

Codes = dict[str, Array]


class QuantizedState(NamedTuple):
    """What quantized training keeps.

    Attributes:
      learned: ``variables``, the float master weights with the activations' steps in the collection ``quant``, and
        ``steps``, what the weights' quantizers learn.
      optimizer: the optimizer's state.
      oscillation: of all codes with few bits, one behind the other; see :class:`poise.quant.OscillationState`.
      frozen: ``teacher``, the float network's variables.
    """

    learned: dict[str, PyTree]
    optimizer: optax.OptState
    oscillation: OscillationState
    frozen: dict[str, PyTree]


class Quantized(NamedTuple):
    """How a network is quantized.

    Attributes:
      model: the network, whose attention may quantize itself.
      rules: for everything else.
      forward: ``(learned, images, train) -> logits``, on quantized weights and activations.
      codes: ``learned -> integers by path``, of the weights with few bits.
    """

    model: VisionTransformer
    rules: tuple[QuantRule, ...]
    forward: Callable[..., Any]
    codes: Callable[[dict[str, PyTree]], Codes]


def rules_of(config: "QATConfig") -> tuple[QuantRule, ...]:
    """8 bits for the first and the last layers, few for the blocks; activations have a step for every token."""
    method = "statsq" if config.method == "ofq" else "lsq"
    block: dict[str, Any] = dict(
        weight_bits=config.bits, act_bits=config.act_bits, method=method, act_axis="token", act_shift=True
    )
    return (
        QuantRule("(patch_embed|head|head_dist)/kernel$", weight_bits=8, act_bits=8, method="lsq"),
        *([QuantRule("attention/")] if config.qkr else []),  # it quantizes itself
        QuantRule("fc2/kernel$", **block, act_signed=False),  # behind a GELU, whose negative lobe the shift brings up
        QuantRule("kernel$", **block),
    )


def quantized_model(config: "QATConfig", num_classes: int, boundary_range: float | None = None) -> Quantized:
    """The network of the run's quantized phases.

    Args:
      config: the run's settings.
      num_classes: logits per head.
      boundary_range: for the product of query and key weights while annealing; None before.

    Returns:
      The network and what belongs to it.
    """
    options: dict[str, Any] = {}
    if config.qkr:
        options["attention"] = functools.partial(
            QKReparamSelfAttention,
            weight_bits=config.bits,
            act_bits=config.act_bits,
            boundary_range=boundary_range,
        )
    model, rules = model_of(config, num_classes, **options), rules_of(config)

    def forward(learned: dict[str, PyTree], images: Array, train: bool = False) -> Any:
        quantized = apply_weight_quant(learned["variables"], learned["steps"], rules)
        with nn.intercept_methods(activation_quantization(rules)):
            return model.apply(quantized, images, train=train)

    def codes(learned: dict[str, PyTree]) -> Codes:
        return codes_of(config, learned, rules)

    return Quantized(model, rules, forward, codes)


def codes_of(config: "QATConfig", learned: dict[str, PyTree], rules: tuple[QuantRule, ...]) -> Codes:
    """The integers of the blocks' weights, by path; with QKR those of the product in place of query and key."""
    found: Codes = {}
    for path, weight, rule, axes in quantized_weights(learned["variables"], rules):
        if rule.weight_bits != config.bits:
            continue
        if rule.method == "statsq":
            found[path] = statsq_codes(weight, bits=config.bits, axis=axes)[0]
        else:
            found[path] = lsq_codes(weight, learned["steps"][path]["step"], bits=config.bits)[0]
    if config.qkr:
        params: Any = traverse_util.flatten_dict(products_of(config, learned["variables"])["params"])
        for path, layer in params.items():
            if "attention" in path and path[-1] == "kernel":
                found["/".join(("params", *path))] = statsq_codes(layer, bits=config.bits, axis=0)[0]
    return found


def products_of(config: "QATConfig", variables: PyTree) -> PyTree:
    """The variables with the product of query and key weights in place of these, as :class:`QKProductSelfAttention`."""
    params = {
        name: {**block, "attention": qk_product_params(block["attention"], config.num_heads)}
        if name.startswith("block_")
        else block
        for name, block in variables["params"].items()
    }
    return {**variables, "params": params}


def watch(oscillation: OscillationState, codes: Codes) -> tuple[OscillationState, dict[str, Array]]:
    """Takes the codes after a step into account.

    Args:
      oscillation: of all codes, one behind the other.
      codes: by path.

    Returns:
      The new state, and ``oscillating``, the share of weights that go back and forth, and ``flips``, the share whose
      code changed in this step.
    """
    new = oscillation_update(oscillation, flat(codes))
    flips = jnp.mean(new.codes != oscillation.codes)
    return new, {"oscillating": oscillating_fraction(new), "flips": flips}


def flat(codes: Codes) -> Array:
    """All codes, one behind the other in the order of their paths."""
    return jnp.concatenate([codes[path].ravel() for path in sorted(codes)])


def quantized_training(
    config: "QATConfig",
    teacher: VisionTransformer,
    quantized: Quantized,
    optimizer: optax.GradientTransformation,
    init: Callable[[Array, dict[str, Array]], QuantizedState],
    axis_name: str | None,
) -> Algorithm:
    r"""Training of a quantized network by labels and by its float self.

    The loss is $-\log p_{cls}(y) - w\sum_k p_T(k)\log p_{dist}(k)$ with the class head, the distillation head, and
    the float network's probabilities.

    Args:
      config: the run's settings.
      teacher: the float network.
      quantized: the quantized one.
      optimizer: of what is learned.
      init: makes the first state.
      axis_name: of the devices that share a batch under pmap.

    Returns:
      The algorithm; its metrics are ``loss``, ``label_loss``, ``teacher_loss``, ``accuracy``, ``grad_norm``, and those
      of :func:`watch`.
    """
    forward = in_microbatches(quantized.forward, config.microbatches)

    def step(state: QuantizedState, batch: dict[str, Array], key: Array) -> tuple[QuantizedState, dict[str, Array]]:
        del key  # nothing is drawn
        soft = jax.nn.softmax(cast(Array, teacher.apply(state.frozen["teacher"], batch["image"])))

        def loss_fn(learned: dict[str, PyTree]) -> tuple[Array, dict[str, Array]]:
            head, distilled = forward(learned, batch["image"], train=True)
            label_loss = cross_entropy(head, batch["label"])
            teacher_loss = optax.softmax_cross_entropy(distilled, soft).mean()
            right = ((head + distilled).argmax(-1) == batch["label"]).mean()
            metrics = {"label_loss": label_loss, "teacher_loss": teacher_loss, "accuracy": right}
            return label_loss + config.distill_weight * teacher_loss, metrics

        (loss, metrics), grads = mean_over(axis_name, jax.value_and_grad(loss_fn, has_aux=True)(state.learned))
        grads = as_of_whole_batch(grads, config.microbatches * sum_over(axis_name, 1))
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.learned)
        learned: Any = optax.apply_updates(state.learned, updates)
        oscillation, moves = watch(state.oscillation, quantized.codes(learned))
        new = QuantizedState(learned, optimizer_state, oscillation, state.frozen)
        return new, {"loss": loss, **metrics, "grad_norm": optax.tree.norm(grads), **moves}

    return Algorithm(init, step)


def as_of_whole_batch(grads: dict[str, PyTree], num_parts: int) -> dict[str, PyTree]:
    r"""Gradients of activation steps as a whole batch has them.

    LSQ scales them by $1/\sqrt N$ for the $N$ entries that it saw.

    Args:
      grads: of what is learned, averaged over devices.
      num_parts: that a batch came in, of devices and microbatches.
    """
    if num_parts == 1:
        return grads
    share = num_parts**-0.5

    def scaled(path: Any, grad: Array) -> Array:
        return grad * share if path[-1].key == "step" else grad

    quant = jax.tree_util.tree_map_with_path(scaled, grads["variables"]["quant"])
    return {**grads, "variables": {**grads["variables"], "quant": quant}}


def first_state(
    config: "QATConfig",
    quantized: Quantized,
    optimizer: optax.GradientTransformation,
    previous: ClassifierState,
    images: Array,
) -> QuantizedState:
    """The float network with quantizers, whose steps start from its weights and from one batch."""
    params = dict(previous.variables["params"])
    if config.qkr:  # no bias of query and key
        for name in [name for name in params if name.startswith("block_")]:
            attention = dict(params[name]["attention"])
            attention |= {key: {"kernel": attention[key]["kernel"]} for key in ("query", "key")}
            params[name] = {**params[name], "attention": attention}
    steps = init_weight_qparams({"params": params}, quantized.rules)
    with nn.intercept_methods(activation_quantization(quantized.rules)):
        weights = apply_weight_quant({"params": params}, steps, quantized.rules)
        _, found = quantized.model.apply(weights, images, mutable=["quant"])
    learned = {"variables": {"params": params, "quant": found["quant"]}, "steps": steps}
    oscillation = oscillation_init(flat(quantized.codes(learned)))
    return QuantizedState(learned, optimizer.init(learned), oscillation, {"teacher": previous.variables})


def annealed(config: "QATConfig", optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer under confidence-guided annealing of the weights with few bits."""
    rules = rules_of(config)

    def mask(learned: dict[str, PyTree]) -> dict[str, PyTree]:
        chosen = {path for path, _, rule, _ in quantized_weights(learned["variables"], rules)
                  if rule.weight_bits == config.bits}  # fmt: skip

        def quantized(path: Any, leaf: Any) -> bool:
            del leaf
            name = "/".join(str(entry.key) for entry in path)
            return name in chosen or (config.qkr and name.endswith(("value/kernel", "proj/kernel")))

        variables = jax.tree_util.tree_map_with_path(quantized, learned["variables"])
        return {"variables": variables, "steps": jax.tree.map(lambda _: False, learned["steps"])}

    return confidence_guided_annealing(
        optimizer, bits=config.bits, boundary_range=config.boundary_range, axis=0, mask=mask
    )


def quantized_phases(config: "QATConfig", images: Images) -> tuple[Phase, ...]:
    """The phases ``qat`` and, for OFQ, ``cga``, which follow the phase ``float``.

    Args:
      config: the run's settings.
      images: what is learned.

    Returns:
      One or two phases.
    """
    teacher = model_of(config, images.num_classes)
    evaluate = evaluator(config, images)

    falling = optax.cosine_decay_schedule(
        config.learning_rate, config.steps, config.min_learning_rate / config.learning_rate
    )

    def qat(previous: Any, axis_name: str | None = None) -> Algorithm:
        quantized = quantized_model(config, images.num_classes)
        optimizer = adamw(falling, config.weight_decay)

        def init(key: Array, batch: dict[str, Array]) -> QuantizedState:
            del key
            return first_state(config, quantized, optimizer, previous, batch["image"])

        return quantized_training(config, teacher, quantized, optimizer, init, axis_name)

    def cga(previous: Any, axis_name: str | None = None) -> Algorithm:
        quantized = quantized_model(config, images.num_classes, config.boundary_range)
        optimizer = annealed(config, adamw(optax.constant_schedule(config.min_learning_rate), config.weight_decay))
        # The optimizer's state is of the same kind: momentum and all go on.
        return quantized_training(config, teacher, quantized, optimizer, lambda key, batch: previous, axis_name)

    options: dict[str, Any] = {"evaluate": evaluate, "evaluate_every": config.eval_every}
    phases = [Phase("qat", qat, images.train, config.steps, **options)]
    if config.method == "ofq" and config.cga_steps:
        phases.append(Phase("cga", cga, images.train, config.cga_steps, **options))
    return tuple(phases)


def evaluator(config: "QATConfig", images: Images) -> Callable[[QuantizedState, Any], dict[str, float]]:
    """``(state, key) -> accuracy`` on held-out images and the squared error of the logits to the float network's."""
    forward = jax.jit(quantized_model(config, images.num_classes).forward)
    teacher = jax.jit(model_of(config, images.num_classes).apply)

    def evaluate(state: QuantizedState, key: Any) -> dict[str, float]:
        del key
        logits = logits_of(lambda x: forward(state.learned, x), images.images)
        target = logits_of(lambda x: teacher(state.frozen["teacher"], x), images.images)
        return {"accuracy": accuracy_of(logits, images.labels), "logit_mse": squared_error(logits, target)}

    return evaluate
