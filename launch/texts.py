"""Texts as tokens: the documentation that ships inside CPython, files, TFDS sets; bytes or trained byte pairs."""

import os
import pathlib
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from poise.launch.data import DataError

_HELD_OUT_SHARE = 10  # one part in ten to choose settings on, another to report


@runtime_checkable
class Codec(Protocol):
    """What turns text into tokens and back.

    Attributes:
      vocab_size: the number of different tokens.
    """

    vocab_size: int

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens ``[n]``, int32."""
        ...

    def decode(self, tokens: np.ndarray) -> str:
        """The text; what is no valid UTF-8 is replaced."""
        ...


class ByteCodec:
    """Every byte is a token.

    Example:
      >>> from poise.launch.texts import ByteCodec
      >>> codec = ByteCodec()
      >>> codec.encode(b"ab").tolist(), codec.decode(codec.encode("poise".encode()))
      ([97, 98], 'poise')
    """

    vocab_size = 256

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens ``[n]``, int32."""
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """The text; what is no valid UTF-8 is replaced."""
        return bytes(np.asarray(tokens, np.uint8)).decode("utf-8", errors="replace")


def require_tokenizers() -> Any:
    """The library of byte pairs.

    Raises:
      DataError: if it isn't installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise DataError('a vocabulary of byte pairs needs the extra "text": pip install ".[text]"') from None
    return tokenizers


class BytePairCodec:
    """Pairs of bytes that are often neighbours, merged again and again, by Hugging Face's ``tokenizers``.

    Args:
      vocab_size: the number of tokens, at least 257.
      text: what the merges are learned from, such as the training text.
      description: the JSON of :meth:`to_json` instead, for a codec as it was.

    Raises:
      DataError: if ``tokenizers`` isn't installed or the description is damaged.
    """

    def __init__(self, vocab_size: int = 512, text: bytes = b"", description: str = ""):
        tokenizers = require_tokenizers()
        if description:
            try:
                self._tokenizer: Any = tokenizers.Tokenizer.from_str(description)
            except Exception as error:  # the library raises nothing more precise
                raise DataError(f"the description of the byte pairs is damaged: {error}") from error
        else:
            self._tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
            self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            self._tokenizer.decoder = tokenizers.decoders.ByteLevel()
            trainer = tokenizers.trainers.BpeTrainer(
                vocab_size=vocab_size,
                initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            self._tokenizer.train_from_iterator([text.decode("utf-8", errors="replace")], trainer)
        self.vocab_size = self._tokenizer.get_vocab_size()

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens ``[n]``, int32."""
        return np.asarray(self._tokenizer.encode(text.decode("utf-8", errors="replace")).ids, np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """The text."""
        return self._tokenizer.decode([int(token) for token in tokens])

    def to_json(self) -> str:
        """The whole codec as text."""
        return self._tokenizer.to_str()


class TextSplits(NamedTuple):
    """A text in three parts, one after the other.

    Attributes:
      train: bytes to train on.
      validation: to choose settings on.
      test: to report.
    """

    train: bytes
    validation: bytes
    test: bytes


def open_text(data: str, data_dir: str | os.PathLike[str] = "", text_key: str = "text") -> TextSplits:
    """Reads a text by its name on the command line and splits it, eight tenths and twice one, in its order.

    Args:
      data: ``"topics"``, the help texts of ``pydoc_data.topics`` that every CPython ships (their words are those of the
        interpreter's version); ``"file:PATH"``, a file or a folder of ``.txt`` files; ``"tfds:NAME"``, the split
        ``train`` of a prepared set, all examples joined by empty lines.
      data_dir: where TFDS sets are looked for.
      text_key: the feature of a TFDS set that holds the text.

    Returns:
      The parts.

    Raises:
      DataError: if there is no such text, or next to nothing in it.
    """
    kind, _, place = data.partition(":")
    if kind == "topics":
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    elif kind == "file":
        text = _read_files(pathlib.Path(place).expanduser())
    elif kind == "tfds":
        text = _read_tfds(place, data_dir, text_key)
    else:
        raise DataError(f"data must be topics, file:PATH or tfds:NAME, got {data!r}")
    if len(text) < 1000:
        raise DataError(f"the text of {data} must have at least 1000 bytes, got {len(text)}")
    held_out = len(text) // _HELD_OUT_SHARE
    return TextSplits(text[: -2 * held_out], text[-2 * held_out : -held_out], text[-held_out:])


def _read_files(path: pathlib.Path) -> bytes:
    try:
        if not path.is_dir():
            return path.read_bytes()
        files = sorted(path.glob("**/*.txt"))
        if not files:
            raise DataError(f"the folder {path} holds no .txt file")
        return b"\n\n".join(file.read_bytes() for file in files)
    except OSError as error:
        raise DataError(f"the text {path} can't be read: {error.strerror or error}") from error


def _read_tfds(name: str, data_dir: str | os.PathLike[str], text_key: str) -> bytes:
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder(name, data_dir=str(data_dir) or None, file_format="array_record")
        source: Any = builder.as_data_source("train")
        features = list(builder.info.features)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"the TFDS data set {name!r} cannot be opened ({reason[:200]}); prepare it with "
            f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        ) from error
    if text_key not in features:
        raise DataError(f"text_key must be a feature of {name!r}, one of {', '.join(features)}, got {text_key!r}")
    rows = (source[index][text_key] for index in range(len(source)))
    return b"\n\n".join(row if isinstance(row, bytes) else str(row).encode() for row in rows)
