"""Texts by name, their parts, and tokens that become the text again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.launch.data import DataError
from poise.launch.texts import ByteCodec, BytePairCodec, open_text


def test_the_help_texts_of_cpython_in_three_parts():
    splits = open_text("topics")
    sizes = [len(part) for part in splits]
    assert sizes[1] == sizes[2] == sum(sizes) // 10
    assert sum(sizes) > 400_000
    assert b"statement" in splits.train
    assert splits.test not in splits.train


@given(st.binary(max_size=50))
def test_bytes_become_themselves_again(text):
    codec = ByteCodec()
    tokens = codec.encode(text)
    assert tokens.dtype == np.int32
    assert codec.decode(tokens) == text.decode("utf-8", errors="replace")


def test_byte_pairs_are_shorter_and_become_the_text_again():
    pytest.importorskip("tokenizers")
    text = "weighing the balance, weighing the weights, ünïcödé — 好\n" * 30
    codec = BytePairCodec(300, text.encode())
    tokens = codec.encode(text.encode())
    assert 256 < codec.vocab_size <= 300  # so short a text has not enough pairs
    assert len(tokens) < len(text.encode()) / 2
    assert codec.decode(tokens) == text
    again = BytePairCodec(description=codec.to_json())
    np.testing.assert_array_equal(again.encode(text.encode()), tokens)


def test_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"b" * 1500)
    (tmp_path / "a.txt").write_bytes(b"a" * 1500)
    (tmp_path / "c.md").write_bytes(b"c" * 1500)
    whole = b"".join(open_text(f"file:{tmp_path}"))
    assert whole == b"a" * 1500 + b"\n\n" + b"b" * 1500
    assert b"".join(open_text(f"file:{tmp_path / 'c.md'}")) == b"c" * 1500


def test_what_is_no_text(tmp_path):
    with pytest.raises(DataError, match="data must be topics, file:PATH or tfds:NAME, got 'wiki'"):
        open_text("wiki")
    with pytest.raises(DataError, match=r"missing.txt can't be read: No such file"):
        open_text(f"file:{tmp_path / 'missing.txt'}")
    with pytest.raises(DataError, match=r"holds no \.txt file"):
        open_text(f"file:{tmp_path}")
    (tmp_path / "short.txt").write_bytes(b"short")
    with pytest.raises(DataError, match="at least 1000 bytes, got 5"):
        open_text(f"file:{tmp_path / 'short.txt'}")
    with pytest.raises(DataError, match="the TFDS data set 'no_such_text' cannot be opened"):
        open_text("tfds:no_such_text", tmp_path)
