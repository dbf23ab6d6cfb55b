"""Official EDM weights to Flax variables and back, without loss. Pure: whoever calls reads and writes the files."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from poise.nets.edm import EDMPrecond, iddpm_levels
from poise.nets.presets import edm_network

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "freqs": "freqs"}


def infer_config(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    r"""Reads a network's configuration from the names and shapes of its official weights.

    Args:
      state_dict: arrays by official name, with or without the prefixes ``model.``, ``module.``, ``_orig_mod.``. Shapes
        suffice, but for the taps of a resampling filter.

    Returns:
      A configuration for :func:`edm_network`. What weights don't show is left to the defaults: dropout; a head width of
      64 (ADM); $\sigma_d$ = 0.5; and the wrapper, which is EDM's unless the grid ``u`` of iDDPM's is there.

    Raises:
      ValueError: if the names or shapes aren't those of such a network, or if its attention shows that the head width
        isn't 64.

    Example:
      >>> from poise.nets import EDM_CHECKPOINTS, infer_config, state_dict_shapes
      >>> import jax.numpy as jnp
      >>> shapes = state_dict_shapes(EDM_CHECKPOINTS["cifar10-32x32-cond-vp"])
      >>> config = infer_config({key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in shapes.items()})
      >>> config["channel_mult"], config["label_dim"]
      ((2, 2, 2), 10)

    References:
      Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*,
      https://arxiv.org/abs/2206.00364
    """
    state_dict = _official_names(state_dict)
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}

    def shape(key: str, ndim: int) -> tuple[int, ...]:
        if len(shapes.get(key, ())) != ndim:
            raise ValueError(f"state_dict must hold {key!r} with {ndim} axes, got {shapes.get(key, 'no such key')}")
        return shapes[key]

    found = [re.match(r"model\.enc\.(\d+)x\1_", key) for key in shapes]
    levels = sorted({int(match[1]) for match in found if match}, reverse=True)
    if not levels:
        raise ValueError("state_dict must hold keys like 'model.enc.32x32_conv.weight', got none")
    resolution = levels[0]
    if levels != [resolution >> level for level in range(len(levels))]:
        raise ValueError(f"state_dict must hold an encoder whose resolution halves level by level, got {levels}")
    is_adm = "model.out_conv.weight" in shapes
    stem, img_channels = shape(f"model.enc.{resolution}x{resolution}_conv.weight", 4)[:2]
    emb_channels, noise_channels = shape("model.map_layer0.weight", 2)
    model_channels = noise_channels if is_adm else stem
    widths = [shape(f"model.enc.{res}x{res}_block0.conv0.weight", 4)[0] for res in levels]
    for name, width in [
        ("noise", noise_channels),
        ("embedding", emb_channels),
        *(("block", width) for width in widths),
    ]:
        if width % model_channels:
            raise ValueError(
                f"state_dict has a {name} width of {width}, no multiple of model_channels={model_channels}"
            )

    def attends(block: str) -> bool:
        return f"model.{block}.qkv.weight" in shapes

    def input_size(key: str) -> int:
        return shape(key, 2)[1] if key in shapes else 0

    def has(layer: str) -> bool:
        return any(key.endswith(f"{layer}.weight") for key in shapes)

    config = {
        "preconditioning": "iddpm" if "u" in shapes else "edm",
        "model_type": "DhariwalUNet" if is_adm else "SongUNet",
        "img_resolution": resolution,
        "img_channels": img_channels,
        "label_dim": input_size("model.map_label.weight"),
        "augment_dim": input_size("model.map_augment.weight"),
        "model_channels": model_channels,
        "channel_mult": tuple(width // model_channels for width in widths),
        "channel_mult_emb": emb_channels // model_channels,
        "num_blocks": sum(
            bool(re.match(rf"model\.enc\.{resolution}x{resolution}_block\d+\.conv0\.weight", k)) for k in shapes
        ),
        "attn_resolutions": tuple(res for res in levels if attends(f"enc.{res}x{res}_block0")),
        "resample_filter": _taps(state_dict),
        "sigma_data": 0.5,
    }
    if is_adm:
        config["channels_per_head"] = 64
        for block, width in zip([f"enc.{res}x{res}_block0" for res in levels], widths, strict=True):
            if attends(block) and width % 64:
                raise ValueError(
                    f"state_dict has attention in the {width} channels of {block!r}, so channels_per_head isn't 64; "
                    "weights don't show it: pass a config"
                )
        middle = f"dec.{levels[-1]}x{levels[-1]}_in0"
        if attends(middle) != (widths[-1] >= 64):
            raise ValueError(
                f"state_dict has {'' if attends(middle) else 'no '}attention in {middle!r} of {widths[-1]} channels, "
                "so channels_per_head isn't 64; weights don't show it: pass a config"
            )
    else:
        decoder = {key.split(".")[2] for key in shapes if key.startswith("model.dec.") and "_aux_norm" in key}
        config |= {
            "embedding_type": "fourier" if "model.map_noise.freqs" in shapes else "positional",
            "channel_mult_noise": noise_channels // model_channels,
            "encoder_type": "residual" if has("_aux_residual") else "skip" if has("_aux_skip") else "standard",
            "decoder_type": "skip" if len(decoder) > 1 else "standard",
        }
    return config


def state_dict_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The official names and shapes of all parameters and buffers of a network.

    Args:
      config: see :func:`edm_network`.

    Returns:
      Shapes by name, sorted by name; dense and convolution weights in torch's layout.

    Raises:
      ValueError: for a configuration that isn't one.

    Example:
      >>> from poise.nets import EDM_CHECKPOINTS, state_dict_shapes
      >>> shapes = state_dict_shapes(EDM_CHECKPOINTS["cifar10-32x32-cond-ve"])
      >>> len(shapes), shapes["model.enc.16x16_aux_residual.weight"]
      (434, (256, 3, 3, 3))

    References:
      Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*,
      https://arxiv.org/abs/2206.00364
    """
    module = edm_network(config)
    shapes = {name: _to_torch(struct).shape for name, struct in _names(_variable_shapes(module)).items()}
    shapes |= {name: value.shape for name, value in _buffers(module, config).items()}
    return dict(sorted(shapes.items()))


def from_state_dict(
    state_dict: Mapping[str, Any], config: Mapping[str, Any] | None = None, strict: bool = True
) -> tuple[EDMPrecond, dict[str, PyTree]]:
    """Turns official EDM weights into a module and its variables.

    Convolution kernels go from ``[O, I, kh, kw]`` to ``[kh, kw, I, O]``, dense ones from ``[out, in]`` to
    ``[in, out]``; the weight of a normalization is called ``scale``. Fourier frequencies go to the collection
    ``constants``, so that no optimizer touches them. Resampling filters (and iDDPM's grid) are compared with what the
    configuration says and dropped. Nothing is computed on the values.

    Args:
      state_dict: arrays by official name, with or without the prefixes ``model.``, ``module.``, ``_orig_mod.``.
      config: see :func:`edm_network`; None takes :func:`infer_config`.
      strict: whether keys that the network doesn't have are errors. Without it, the ``logvar_linear`` that FastGen adds
        is left out; anything else unexpected stays an error.

    Returns:
      The denoiser, and its variables ``{"params": ...}``, with NCSN++'s ``"constants"``.

    Raises:
      TypeError: for values that aren't floats, or that jax would round (float64 without ``jax_enable_x64``).
      ValueError: one error that lists every missing, unexpected and wrongly shaped key and every filter that differs.

    Example:
      Weights of a small network that a user exported from torch:

      >>> import numpy as np
      >>> from poise.nets import from_state_dict, state_dict_shapes
      >>> config = {"model_type": "SongUNet", "img_resolution": 8, "img_channels": 1, "model_channels": 8,
      ...           "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": ()}
      >>> weights = {key: np.full(shape, 0.25, np.float32) for key, shape in state_dict_shapes(config).items()}
      >>> module, variables = from_state_dict(weights)
      >>> module.model.channel_mult, variables["params"]["model"]["enc"]["8x8_conv"]["kernel"].shape
      ((1, 2), (3, 3, 1, 8))

    References:
      Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*,
      https://arxiv.org/abs/2206.00364
    """
    state_dict = _official_names(state_dict)
    if not strict:
        state_dict = {key: value for key, value in state_dict.items() if ".logvar_linear." not in key}
    config = infer_config(state_dict) if config is None else config
    module = edm_network(config)
    expected = _variable_shapes(module)
    structs = _names(expected)
    buffers = _buffers(module, config)

    arrays = {key: np.asarray(value) for key, value in state_dict.items()}
    wanted = {name: _to_torch(struct).shape for name, struct in structs.items()}
    wanted |= {name: value.shape for name, value in buffers.items()}
    wrong = [
        f"{key} has shape {arrays[key].shape}, not {wanted[key]}"
        for key in wanted
        if key in arrays and arrays[key].shape != wanted[key]
    ]
    tolerance = {name: 1e-3 if name == "u" else 1e-6 for name in buffers}
    different = [
        f"{key} is {arrays[key].ravel()[:4]}..., not {value.ravel()[:4]}..."
        for key, value in buffers.items()
        if key in arrays
        and arrays[key].shape == value.shape
        and not np.allclose(arrays[key], value, rtol=tolerance[key], atol=1e-6)
    ]
    _raise_for("state_dict", sorted(set(wanted) - set(arrays)), sorted(set(arrays) - set(wanted)), wrong, different)
    for key in structs:
        dtype = arrays[key].dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"state_dict[{key!r}] must be of a float type, got {dtype}")
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise TypeError(
                f"state_dict[{key!r}] is {dtype}, which jax keeps only under jax_enable_x64: convert it first"
            )
    paths = _paths(expected)
    leaves = [jnp.asarray(_to_flax(arrays[name])) for name in paths]
    return module, jax.tree.unflatten(jax.tree.structure(expected), leaves)


def to_state_dict(variables: Mapping[str, PyTree], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Turns variables back into official EDM weights, the inverse of :func:`from_state_dict` bit for bit.

    Args:
      variables: the variables of the network that :func:`edm_network` makes of the configuration. Collections other
        than ``params`` and ``constants`` are left out.
      config: the network's configuration; see :func:`edm_network`.

    Returns:
      Contiguous arrays by official name, sorted by name, with the prefix ``model.`` and with the resampling filters
      (and iDDPM's grid, which is computed anew).

    Raises:
      ValueError: one error that lists every missing, unexpected and wrongly shaped variable.

    Example:
      >>> import numpy as np
      >>> from poise.nets import from_state_dict, state_dict_shapes, to_state_dict
      >>> config = {"model_type": "SongUNet", "img_resolution": 8, "img_channels": 1, "model_channels": 8,
      ...           "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": ()}
      >>> weights = {key: np.full(shape, 0.25, np.float32) for key, shape in state_dict_shapes(config).items()}
      >>> back = to_state_dict(from_state_dict(weights)[1], config)
      >>> all((back[key] == weights[key]).all() for key in weights)
      True

    References:
      Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*,
      https://arxiv.org/abs/2206.00364
    """
    module = edm_network(config)
    structs = _names(_variable_shapes(module))
    leaves = _names({key: variables[key] for key in ("params", "constants") if key in variables})
    wrong = [
        f"{key} has shape {tuple(leaves[key].shape)}, not {struct.shape}"
        for key, struct in structs.items()
        if key in leaves and tuple(leaves[key].shape) != struct.shape
    ]
    _raise_for("variables", sorted(set(structs) - set(leaves)), sorted(set(leaves) - set(structs)), wrong, [])
    arrays = {name: np.ascontiguousarray(_to_torch(np.asarray(value))) for name, value in leaves.items()}
    return dict(sorted((arrays | _buffers(module, config)).items()))


def _official_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Strips wrappers' prefixes and puts ``model.`` in front of the network's keys."""
    renamed = {}
    for key, value in state_dict.items():
        name = re.sub(r"^((module|_orig_mod)\.)+", "", key)
        name = re.sub(r"^model\.((module|_orig_mod)\.)+", "model.", name)
        if name != "u" and not name.startswith("model."):
            name = f"model.{name}"
        if name in renamed:
            raise ValueError(f"state_dict must hold each key once, got {name!r} with and without a prefix")
        renamed[name] = value
    return renamed


def _variable_shapes(module: Any) -> PyTree:
    return _trace(module)


@functools.lru_cache(maxsize=16)  # tracing a large network takes a second
def _trace(module: EDMPrecond) -> PyTree:
    model = module.model
    x = jax.ShapeDtypeStruct((1, model.img_resolution, model.img_resolution, model.in_channels), jnp.float32)
    sigma = jax.ShapeDtypeStruct((1,), jnp.float32)
    return jax.eval_shape(module.init, jax.ShapeDtypeStruct((), jax.random.key(0).dtype), x, sigma)


def _paths(variables: PyTree) -> list[str]:
    """The official names of all leaves, in the order of ``jax.tree.leaves``."""
    paths: list[list[str]] = [
        [key.key for key in path] for path, _ in jax.tree_util.tree_flatten_with_path(variables)[0]
    ]
    return [".".join([*path[1:-1], _LEAVES.get(path[-1]) or path[-1]]) for path in paths]


def _names(variables: PyTree) -> dict[str, Any]:
    return dict(zip(_paths(variables), jax.tree.leaves(variables), strict=True))


def _to_torch(x: Any) -> Any:
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(x.shape), (0,))
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(tuple(x.shape[axis] for axis in axes), x.dtype)
    return x.transpose(axes)


def _to_flax(x: np.ndarray) -> np.ndarray:
    return x.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(x.ndim, (0,)))


def _taps(state_dict: Mapping[str, Any]) -> tuple[int | float, ...]:
    """The taps of the first resampling filter, in units of the outermost one."""
    for key in sorted(state_dict):
        if key.endswith(".resample_filter"):
            value = state_dict[key]
            if len(value.shape) != 4:
                raise ValueError(f"state_dict[{key!r}] must have shape [1, 1, n, n], got {tuple(value.shape)}")
            if isinstance(value, jax.ShapeDtypeStruct):
                return (1, 3, 3, 1) if value.shape[-1] == 4 else (1, 1)
            rows = np.asarray(value, np.float64)[0, 0].sum(1)
            scaled = rows / rows[0] if rows[0] else rows
            rounded = np.round(scaled)
            taps = rounded if np.allclose(scaled, rounded, atol=1e-5) else scaled
            return tuple(int(tap) if tap == int(tap) else float(tap) for tap in taps)
    return (1, 1)


def _buffers(module: EDMPrecond, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The official buffers that poise recomputes: the resampling filters, and iDDPM's grid of noise levels."""
    model = module.model
    taps = np.asarray(model.resample_filter, np.float32)
    kernel = np.outer(taps, taps)[None, None] / np.square(taps.sum())
    levels = [model.img_resolution >> level for level in range(len(model.channel_mult))]
    keys = []
    for res in levels[1:]:
        keys += [f"enc.{res}x{res}_down.{layer}" for layer in ("conv0", "skip")]
        extra = {"residual": "aux_residual", "skip": "aux_down"}.get(getattr(model, "encoder_type", "standard"))
        keys += [f"enc.{res}x{res}_{extra}"] if extra else []
    for res in levels[:-1]:
        keys += [f"dec.{res}x{res}_up.{layer}" for layer in ("conv0", "skip")]
        keys += [f"dec.{res}x{res}_aux_up"] if getattr(model, "decoder_type", "standard") == "skip" else []
    buffers = {f"model.{key}.resample_filter": kernel for key in keys}
    if module.preconditioning == "iddpm":
        buffers["u"] = iddpm_levels().astype(np.float32)
    return buffers


def _raise_for(
    argument: str, missing: Sequence[str], unexpected: Sequence[str], wrong: Sequence[str], different: Sequence[str]
) -> None:
    problems = [
        f"{len(entries)} {kind}: " + "; ".join(entries)
        for kind, entries in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrongly shaped", wrong),
            ("different from the configuration", different),
        )
        if entries
    ]
    if problems:
        raise ValueError(f"{argument} doesn't fit the network. " + ". ".join(problems))
