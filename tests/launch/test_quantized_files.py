import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from poise.launch.quantized_files import load_quantized, save_quantized
from poise.quant import QuantRule, dequantize_tree, export, tree_nbytes


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.fixture(scope="module")
def quantized():
    params = {
        "a": {"kernel": draw((16, 9)), "bias": draw(9).astype(jnp.bfloat16)},
        "b": {"kernel": draw((3, 3, 4, 5))},
        "c": {"kernel": draw((7, 3)), "scale": jnp.float32(2)},
        "head": {"kernel": draw((5, 2))},
    }
    rules = [
        QuantRule("^a", weight_bits=4, method="minmax"),
        QuantRule("^b", weight_bits=2),
        QuantRule("^c", weight_bits=3, method="power", axis=None),
    ]
    return export(params, {"c/kernel": {"exponent": jnp.float32(0.6)}}, rules)


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert [x.dtype for x in jax.tree.leaves(left)] == [x.dtype for x in jax.tree.leaves(right)]


def test_a_round_trip_keeps_every_bit(quantized, tmp_path):
    save_quantized(tmp_path / "model.safetensors", quantized)
    loaded = load_quantized(tmp_path / "model.safetensors")
    same(loaded, quantized)
    assert loaded.header == quantized.header
    same(dequantize_tree(loaded), dequantize_tree(quantized))
    same(load_quantized(tmp_path / "model.safetensors", dequantize=True), dequantize_tree(quantized))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_file_holds_integers_and_is_as_small(quantized, tmp_path):
    file = tmp_path / "model.safetensors"
    save_quantized(file, quantized)
    arrays = load_file(file)
    assert arrays["a/kernel/codes"].dtype == np.uint8
    assert not {name for name in arrays if name in ("a/kernel", "b/kernel", "c/kernel")}
    assert tree_nbytes(quantized) < file.stat().st_size < tree_nbytes(quantized) + 4096


def rewrite(file, change):
    """The file again with its arrays and metadata changed."""
    from safetensors import safe_open

    arrays = load_file(file)
    with safe_open(file, framework="numpy") as reader:
        metadata = reader.metadata()
    written = metadata["quantized"]
    header = json.loads(written)
    change(arrays, header, metadata)
    if metadata["quantized"] == written:
        metadata["quantized"] = json.dumps(header)
    save_file(arrays, file, metadata=metadata)


def described(name, **fields):
    return lambda arrays, header, metadata: header["tensors"][name].update(fields)


def replaced(name, value):
    return lambda arrays, header, metadata: arrays.update({name: np.asarray(value)})


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("has version 2; this release reads version 1", lambda arrays, header, metadata: header.update(version=2)),
        ("has a header that can't be read", lambda arrays, header, metadata: header.pop("version")),
        ("its format is 'poise-student'", lambda arrays, header, metadata: metadata.update(format="poise-student")),
        ("lacks the codes or the scale of a/kernel", lambda arrays, header, metadata: arrays.pop("a/kernel/codes")),
        (
            "has arrays for a/kernel that don't fit its header",
            lambda arrays, header, metadata: header["tensors"]["a/kernel"].update(shape=[16, 7]),
        ),
        (
            "has a header that doesn't describe b/kernel",
            lambda arrays, header, metadata: header["tensors"]["b/kernel"].pop("bits"),
        ),
        *[
            (f"has arrays for a/kernel that don't fit its header: {told}", described("a/kernel", **fields))
            for told, fields in [
                ("scheme must be one of uniform", {"scheme": "bogus"}),
                ("bits must be in", {"bits": 77}),
                ("dtype must be that of floats, got 'nonsense'", {"dtype": "nonsense"}),
                ("dtype must be that of floats, got 'int8'", {"dtype": "int8"}),
                ("codes must hold 1000000000 of 4 bits", {"shape": [10**9, 9]}),
                ("packed_axis must lie in", {"packed_axis": 0}),
                ("codes must have the dtype int8", {"bits": 5}),
                ("exponent is for scheme='power'", {"scheme": "power"}),
                ("zero_point is for scheme='uniform'", {"scheme": "half_integer"}),
            ]
        ],
        *[
            (f"has a header that doesn't describe a/kernel: .*{told}", described("a/kernel", **fields))
            for told, fields in [
                ("scheme must be of type str", {"scheme": ["uniform"]}),
                ("bits must be of type int, got '4'", {"bits": "4"}),
                ("bits must be of type int, got True", {"bits": True}),
                ("dtype must be of type str, got None", {"dtype": None}),
                ("packed_axis must be of type int", {"packed_axis": "0"}),
                ("shape must be of type list", {"shape": {"0": 16}}),
                ("shape's entries must be of type int", {"shape": [1e9, 9]}),
            ]
        ],
        *[
            (f"has arrays for {name} that don't fit its header: {told}", replaced(f"{name}/{field}", value))
            for told, name, field, value in [
                ("scale must be a scalar or divide", "a/kernel", "scale", np.ones((7, 7), np.float32)),
                ("scale must be floating", "a/kernel", "scale", np.ones((1, 9), np.int32)),
                ("scale must be float32 or float64", "a/kernel", "scale", np.ones((1, 9), np.float16)),
                ("scale must be finite", "a/kernel", "scale", np.full((1, 9), np.nan, np.float32)),
                ("zero_point must have the scale's shape", "a/kernel", "zero_point", np.zeros((1, 3), np.int8)),
                ("zero_point must have the dtype int8", "a/kernel", "zero_point", np.zeros((1, 9), np.int32)),
                ("zero_point must lie in", "a/kernel", "zero_point", np.full((1, 9), 9, np.int8)),
                ("codes must have the dtype uint8", "a/kernel", "codes", np.zeros((8, 9), np.int8)),
                ("codes must have at least one axis", "a/kernel", "codes", np.uint8(1)),
                ("exponent must lie in", "c/kernel", "exponent", np.float32(-1)),
                ("exponent must be floating", "c/kernel", "exponent", np.int32(1)),
            ]
        ],
        ("exponent is for scheme='power'", lambda arrays, header, metadata: arrays.pop("c/kernel/exponent")),
        (
            "has a header that can't be read: tensors must be of type dict",
            lambda arrays, header, metadata: header.update(tensors=["a/kernel"]),
        ),
        (
            "has a header that can't be read: a/kernel must be of type dict",
            lambda arrays, header, metadata: header["tensors"].update({"a/kernel": [4]}),
        ),
        ("has a header that can't be read", lambda arrays, header, metadata: metadata.update(quantized="[1]")),
    ],
)
def test_files_that_are_not_what_they_should_be_are_refused(quantized, tmp_path, message, change):
    file = tmp_path / "model.safetensors"
    save_quantized(file, quantized)
    rewrite(file, change)
    with pytest.raises(ValueError, match=message):
        load_quantized(file)


def test_damaged_and_missing_files_are_told_apart(quantized, tmp_path):
    file = tmp_path / "model.safetensors"
    save_quantized(file, quantized)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        load_quantized(file)
    with pytest.raises(FileNotFoundError, match="no quantized parameters at"):
        load_quantized(tmp_path / "other")


def test_nothing_is_left_of_a_write_that_fails(quantized, tmp_path, monkeypatch):
    import safetensors.numpy

    def fail(arrays, path, metadata):
        del arrays, metadata
        path.write_bytes(b"half")
        raise OSError("disk full")

    file = tmp_path / "model.safetensors"
    save_quantized(file, quantized)
    before = file.read_bytes()
    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_quantized(file, quantized)
    assert file.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_trees_that_paths_can_not_hold_are_refused(tmp_path):
    rules = [QuantRule("kernel", weight_bits=4, method="absmax")]
    for params, message in (
        ({"a/b": {"kernel": draw((4, 2))}}, "keys that are strings without slashes"),
        ({"a": [{"kernel": draw((4, 2))}]}, "nested dictionaries to be written, got list"),
    ):
        with pytest.raises(ValueError, match=message):
            save_quantized(tmp_path / "x", export(params, {}, rules))
    assert not list(tmp_path.iterdir())
