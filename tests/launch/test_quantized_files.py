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
    header = json.loads(metadata["quantized"])
    change(arrays, header, metadata)
    metadata["quantized"] = json.dumps(header) if isinstance(header, dict) else header
    save_file(arrays, file, metadata=metadata)


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
