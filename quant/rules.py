"""Which layers are quantized, and how: rules by path, and their application to a tree of weights."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from poise.core.arguments import check_choice
from poise.optim.channel_axes import ChannelAxes, flax_channel_axes
from poise.optim.leaves import path_names
from poise.quant.checks import Axis, check_bits
from poise.quant.weight_methods import WEIGHT_METHODS

QParams = dict[str, dict[str, Array]]
"""What the methods learn or keep: by the weight's path ``"block_0/fc1/kernel"``, then by name."""


@dataclasses.dataclass(frozen=True)
class QuantRule:
    """How the layers whose path matches are quantized. In a list of rules the first match wins.

    Attributes:
      path: a regular expression, searched for in the path of a layer's weight, as ``"block_0/fc1/kernel"``. The
        activations that enter a layer are found by the same path.
      weight_bits: bits of the weights, from 1 to 8, from 2 for ``"absmax"``, ``"lsq"``, ``"power"`` and the methods
        after training; None leaves them alone.
      act_bits: bits of the layer's input, from 1 to 8, from 2 with a sign; None leaves it alone.
      method: how weights are quantized: ``"statsq"``, ``"lsq"``, ``"absmax"``, ``"minmax"`` (both with scales that
        follow the weights), ``"mse"`` (with scales that are searched once), or one of the methods after training.
      axis: the axes of the weight that share one scale, None for all, or ``"channel"`` for all but the output
        channels, which are found as :func:`poise.optim.flax_channel_axes` does.
      act_method: ``"lsq"`` with a learned step, or ``"absmax"`` with the largest magnitude of what comes.
      act_axis: the axes of the input that share one step: None for all, ``"token"`` for all but the last but one (the
        number of tokens is then fixed), ``"channel"`` for all but the last, or a number or tuple of numbers.
      act_signed: whether inputs may be negative; False after a softmax or ReLU.
      act_shift: whether a learned vector is added before and after the input's quantizer, zero at first.

    Raises:
      ValueError: if a field is out of range or the path is no regular expression.

    Example:
      >>> from poise.quant import QuantRule
      >>> rules = [QuantRule("head", weight_bits=8, method="lsq"), QuantRule("kernel$", weight_bits=2, act_bits=2)]
      >>> rules[1].method, rules[1].axis
      ('statsq', 'channel')
    """

    path: str
    weight_bits: int | None = None
    act_bits: int | None = None
    method: str = "statsq"
    axis: Axis | str = "channel"
    act_method: str = "lsq"
    act_axis: Axis | str = None
    act_signed: bool = True
    act_shift: bool = False

    def __post_init__(self):
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(f"path must be a regular expression, got {self.path!r}: {error}") from error
        if self.weight_bits is not None:
            check_bits(self.weight_bits, name="weight_bits")
        if self.act_bits is not None:
            check_bits(self.act_bits, name="act_bits")
        check_choice("method", self.method, sorted(WEIGHT_METHODS))
        least = WEIGHT_METHODS[self.method].least_bits
        if self.weight_bits is not None and self.weight_bits < least:
            raise ValueError(f"weight_bits must be in [{least}, 8] for method={self.method!r}, got {self.weight_bits}")
        check_choice("act_method", self.act_method, ("absmax", "lsq"))
        if self.act_bits == 1 and self.act_signed:
            raise ValueError(f"act_bits must be in [2, 8] for act_method={self.act_method!r} with a sign, got 1")
        if isinstance(self.axis, str):
            check_choice("axis", self.axis, ("channel",))
        if isinstance(self.act_axis, str):
            check_choice("act_axis", self.act_axis, ("channel", "token"))
        if self.act_method == "absmax" and not self.act_signed:
            raise ValueError("act_signed must be True for act_method='absmax', got False")


def match_rule(rules: Sequence[QuantRule], path: str) -> QuantRule | None:
    """The first rule whose regular expression is found in a path, or None.

    Args:
      rules: in order of precedence.
      path: of a weight, as ``"block_0/fc1/kernel"``.

    Returns:
      The rule.

    Example:
      >>> from poise.quant import QuantRule, match_rule
      >>> rules = [QuantRule("head", weight_bits=8), QuantRule("kernel$", weight_bits=2)]
      >>> match_rule(rules, "head/kernel").weight_bits, match_rule(rules, "fc1/kernel").weight_bits
      (8, 2)
      >>> match_rule(rules, "fc1/bias") is None
      True
    """
    return next((rule for rule in rules if re.search(rule.path, path)), None)


def _reduced_axes(rule: QuantRule, spec: ChannelAxes, ndim: int) -> Axis:
    if not isinstance(rule.axis, str):
        return rule.axis
    kept = {axis % ndim for axis in (*spec.channel, *spec.batch)}
    return tuple(axis for axis in range(ndim) if axis not in kept)


def quantized_weights(params: PyTree, rules: Sequence[QuantRule]) -> Iterator[tuple[str, Any, QuantRule, Axis]]:
    """The weights that rules quantize: path, array, rule and the axes of a group, in the order of the tree's leaves.

    Only arrays with at least two axes are weights, and none that is called ``bias`` or ``scale``.

    Args:
      params: parameters, of linen or nnx or any other tree of arrays.
      rules: the first match wins.

    Yields:
      Path, array, rule, axes.

    Raises:
      ValueError: if a weight that matches does not hold floats.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import QuantRule, quantized_weights
      >>> params = {"fc": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
      >>> [(path, axes) for path, _, _, axes in quantized_weights(params, [QuantRule("fc", weight_bits=4)])]
      [('fc/kernel', (0,))]
    """
    matched = []
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    for index, (path, leaf) in enumerate(flat):
        name = "/".join(path_names(path))
        rule = match_rule(rules, name)
        if rule is not None and rule.weight_bits is not None and jnp.ndim(leaf) > 1:
            matched.append((index, name, leaf, rule))
    if not matched:
        return
    specs = treedef.flatten_up_to(flax_channel_axes(params))
    for index, name, leaf, rule in matched:
        if (spec := specs[index]) is None:
            continue
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"params must hold floats where a rule quantizes them, got {leaf.dtype} at {name}")
        yield name, leaf, rule, _reduced_axes(rule, spec, jnp.ndim(leaf))


def init_weight_qparams(params: PyTree, rules: Sequence[QuantRule]) -> QParams:
    """What the rules' methods learn or keep, from the weights as they are.

    Args:
      params: parameters, of linen or nnx or any other tree of arrays.
      rules: the first match wins.

    Returns:
      For every weight whose method has parameters (``"lsq"``: ``step``; ``"mse"``: ``scale`` and ``zero_point``), these
      by name, under the weight's path. It is a tree of float arrays, to be trained beside the weights, or empty.

    Raises:
      ValueError: if a weight is no float array, not finite, or does not suit its rule, with its path.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import QuantRule, init_weight_qparams
      >>> params = {"fc": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
      >>> jax.tree.map(jnp.shape, init_weight_qparams(params, [QuantRule("fc", weight_bits=4, method="lsq")]))
      {'fc/kernel': {'step': (1, 2)}}
    """
    qparams = {}
    for name, leaf, rule, axes in quantized_weights(params, rules):
        bits = rule.weight_bits
        assert bits is not None  # of rules that quantized_weights yields
        try:
            parameters = WEIGHT_METHODS[rule.method].init(leaf, bits, axes)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if parameters:
            qparams[name] = parameters
    return qparams


def apply_weight_quant(params: PyTree, qparams: QParams, rules: Sequence[QuantRule]) -> PyTree:
    """Parameters with quantized weights, which any ``apply_fn`` takes in place of the float ones.

    Gradients flow to ``params`` and ``qparams`` as each method defines them:

        def loss(params, qparams, batch):
            return cross_entropy(model.apply({"params": apply_weight_quant(params, qparams, rules)}, batch), ...)

    For nnx, ``params`` is the state of ``nnx.split``, and ``nnx.merge`` makes a quantized model of the result.

    Args:
      params: parameters, of linen or nnx or any other tree of arrays.
      qparams: of :func:`init_weight_qparams`, or trained from there.
      rules: the first match wins.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Raises:
      ValueError: if ``qparams`` lacks what a weight needs or has what none does, or a weight does not suit its rule.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import QuantRule, apply_weight_quant
      >>> params = {"fc": {"kernel": jnp.array([[0.3, 2.0], [-0.7, 0.0]]), "bias": jnp.array([0.1, 0.2])}}
      >>> quantized = apply_weight_quant(params, {}, [QuantRule("kernel$", weight_bits=1)])
      >>> quantized["fc"]["kernel"].tolist(), [f"{b:.1f}" for b in quantized["fc"]["bias"]]
      ([[0.5, 1.0], [-0.5, 1.0]], ['0.1', '0.2'])
    """
    new, unused = {}, set(qparams)
    for name, leaf, rule, axes in quantized_weights(params, rules):
        unused.discard(name)
        bits = rule.weight_bits
        assert bits is not None  # of rules that quantized_weights yields
        try:
            new[name] = WEIGHT_METHODS[rule.method].apply(leaf, qparams.get(name, {}), bits, axes)
        except KeyError as error:
            raise ValueError(f"qparams must hold {error} of {name} for the method {rule.method!r}") from error
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if unused:
        raise ValueError(f"qparams must hold nothing but what the rules quantize, got {sorted(unused)}")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: new.get("/".join(path_names(path)), leaf), params)
