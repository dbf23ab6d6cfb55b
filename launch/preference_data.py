"""Pairs of a chosen and a rejected text as tokens: from the synthetic experiment, or from a file of JSON lines."""

import functools
import hashlib
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from poise.launch.data import DataError, epoch_order
from poise.launch.trigger_task import VOCAB, trigger_source, trigger_texts

if TYPE_CHECKING:
    from poise.launch.preference import PreferenceConfig

END = 256  # begins, separates and ends texts of bytes; also what short ones are filled up with
_CORPUS, _MIXED = 2_000, 500


class Pairs(NamedTuple):
    """Tokens ``[pairs, length]`` and, for each position but the last, whether the token after it counts.

    Attributes:
      chosen: the preferred texts.
      rejected: the others.
      chosen_mask: what counts of the preferred texts.
      rejected_mask: what counts of the others.
    """

    chosen: Int[np.ndarray, "pairs length"]
    rejected: Int[np.ndarray, "pairs length"]
    chosen_mask: Bool[np.ndarray, "pairs positions"]
    rejected_mask: Bool[np.ndarray, "pairs positions"]


class PreferenceData(NamedTuple):
    """All texts of a run.

    Attributes:
      corpus: what the reference learns from, ``[texts, length]``.
      corpus_mask: what counts of it.
      train: pairs to learn from.
      held_out: pairs to judge by.
      vocab_size: the number of tokens.
      mixed: of the synthetic experiment, texts of either kind to judge by; None for a file.
      digest: tells this data from any other.
    """

    corpus: Int[np.ndarray, "texts length"]
    corpus_mask: Bool[np.ndarray, "texts positions"]
    train: Pairs
    held_out: Pairs
    vocab_size: int
    mixed: Int[np.ndarray, "mixed length"] | None
    digest: str


def open_pairs(config: "PreferenceConfig") -> PreferenceData:
    """The data that the flags name.

    Args:
      config: the run's settings.

    Raises:
      DataError: if a file can't be used; the message names its line.
    """
    kind, _, path = config.data.partition(":")
    return (
        trigger_pairs(config.seed, config.num_pairs, config.num_held_out)
        if kind == "trigger"
        else file_pairs(path, config.seed, config.num_pairs, config.num_held_out, config.max_length)
    )


def facts_of(data: PreferenceData) -> dict[str, Any]:
    """What a run notes of its data, see :func:`poise.launch.workdir.settle_data`."""
    return {"digest": data.digest, "pairs": len(data.train.chosen), "held_out": len(data.held_out.chosen)}


def _digest(*arrays: np.ndarray) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(str((array.shape, array.dtype)).encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


@functools.partial(jax.jit, static_argnums=1)
def _draw(key, count, shares):
    source_key, text_key = jax.random.split(key)
    return trigger_texts(text_key, count, trigger_source(source_key), shares)


def trigger_pairs(seed: int, num_pairs: int, num_held_out: int) -> PreferenceData:
    """The synthetic experiment, see :mod:`poise.launch.trigger_task`.

    Args:
      seed: of source and texts.
      num_pairs: to learn from.
      num_held_out: to judge by.

    Example:
      >>> from poise.launch.preference_data import trigger_pairs
      >>> data = trigger_pairs(0, num_pairs=3, num_held_out=2)
      >>> data.train.chosen.shape, data.held_out.rejected_mask.shape
      ((3, 16), (2, 15))
    """
    count = num_pairs + num_held_out
    counts = {"corpus": (_CORPUS, 0.5), "mixed": (_MIXED, 0.5), "chosen": (count, 1.0), "rejected": (count, 0.0)}
    shares = np.concatenate([np.full(number, share, np.float32) for number, share in counts.values()])
    drawn = np.asarray(_draw(jax.random.key(seed), len(shares), shares), np.int32)
    ends = np.cumsum([number for number, _ in counts.values()])[:-1]
    corpus, mixed, chosen, rejected = np.split(drawn, ends)

    def whole(tokens):
        return np.ones((len(tokens), tokens.shape[1] - 1), bool)

    train, held_out = (
        Pairs(chosen[part], rejected[part], whole(chosen[part]), whole(rejected[part]))
        for part in (slice(num_pairs), slice(num_pairs, None))
    )
    return PreferenceData(corpus, whole(corpus), train, held_out, VOCAB, mixed, _digest(corpus, chosen, rejected))


def read_jsonl(path: str) -> list[tuple[str, str, str]]:
    """Prompts, chosen and rejected texts of a file of JSON objects, one a line; empty lines are passed over.

    Args:
      path: the file.

    Raises:
      DataError: if it can't be read, has fewer than two pairs, or naming the first line that isn't such an object.
    """
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} must hold an object, got {type(row).__name__}")
        for name in ("prompt", "chosen", "rejected"):
            if not isinstance(row.get(name), str):
                raise DataError(f"{where}: {name} must be a text, got {json.dumps(row.get(name))[:40]}")
            try:
                row[name].encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{where}: {name} is no valid Unicode: {error.reason}") from error
        if row["chosen"] == row["rejected"]:
            raise DataError(f"{where}: chosen and rejected are the same text")
        found.append((row["prompt"], row["chosen"], row["rejected"]))
    if len(found) < 2:
        raise DataError(f"{path} must hold two or more pairs, got {len(found)}")
    return found


def encode_pair(
    prompt: str, chosen: str, rejected: str, max_length: int
) -> tuple[list[list[int]], list[int], list[bool]]:
    """Both texts as bytes between marks of the end, the prompt in front.

    Where one is longer than ``max_length``, the prompt loses its beginning, in both texts alike, and where that is not
    enough the completion its end.

    Args:
      prompt: what both begin with.
      chosen: how the preferred one goes on.
      rejected: how the other does.
      max_length: tokens of a text.

    Returns:
      The tokens of both, the place where each completion starts, and whether each was cut.

    Example:
      >>> from poise.launch.preference_data import encode_pair
      >>> encode_pair("ab", "c", "de", 10)
      ([[256, 97, 98, 99, 256], [256, 97, 98, 100, 101, 256]], [3, 3], [False, False])
      >>> encode_pair("ab", "c", "de", 4)
      ([[256, 99, 256], [256, 100, 101, 256]], [1, 1], [True, True])
    """
    ends = [[*text.encode(), END] for text in (chosen, rejected)]
    whole = prompt.encode()
    room = max(0, max_length - 1 - max(map(len, ends)))
    kept = whole[len(whole) - min(room, len(whole)) :]
    texts = [[END, *kept, *end][:max_length] for end in ends]
    cut = [len(text) < 1 + len(whole) + len(end) for text, end in zip(texts, ends, strict=True)]
    return texts, [1 + len(kept)] * 2, cut


def file_pairs(path: str, seed: int, num_pairs: int, num_held_out: int, max_length: int) -> PreferenceData:
    """The pairs of a file as bytes; says how many texts were cut.

    Args:
      path: see :func:`read_jsonl`.
      seed: of the choice of held-out pairs.
      num_pairs: to learn from, at most.
      num_held_out: to judge by, at most; never more than a fifth, but one.
      max_length: tokens of a text.

    Raises:
      DataError: as :func:`read_jsonl`.
    """
    rows = read_jsonl(path)
    encoded = [encode_pair(*row, max_length) for row in rows]
    cuts = sum(sum(cut) for _, _, cut in encoded)
    if cuts:
        print(f"{cuts} of {2 * len(rows)} texts are longer than max_length={max_length} and are cut", file=sys.stderr)
    length = max(len(text) for texts, _, _ in encoded for text in texts)
    tokens = np.full((len(rows), 2, length), END, np.int32)
    counts = np.zeros((len(rows), 2, length - 1), bool)  # of the completion
    reads = np.zeros_like(counts)  # of the whole text
    for i, (texts, starts, _) in enumerate(encoded):
        for side, (text, start) in enumerate(zip(texts, starts, strict=True)):
            tokens[i, side, : len(text)] = text
            counts[i, side, start - 1 : len(text) - 1] = True
            reads[i, side, : len(text) - 1] = True
    order = epoch_order(seed, 0, len(rows))
    held = max(1, min(num_held_out, len(rows) // 5))
    parts = order[held : held + num_pairs], order[:held]
    train, held_out = (Pairs(tokens[p, 0], tokens[p, 1], counts[p, 0], counts[p, 1]) for p in parts)
    corpus, corpus_mask = (np.concatenate([array[parts[0], 0], array[parts[0], 1]]) for array in (tokens, reads))
    return PreferenceData(corpus, corpus_mask, train, held_out, END + 1, None, _digest(tokens, counts))
