"""Rows that a trained model is asked with: new texts, placed as training's windows place theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from blindvalm_jax.data import alignment, manifest
from blindvalm_jax.data.clip_bpe import ClipTokenizer
from blindvalm_jax.data.shards import TOWER_LENGTH_MULTIPLE
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import segments

Rows = dict[str, np.ndarray]  # as `data.pipeline.Batches` names them


class Reading(NamedTuple):
    """What a tower with a tokenizer of its own reads of a row of the language model's tokens."""

    tower: np.ndarray
    """int32[m], the tower's ids that the last token may look at."""
    seen: np.ndarray
    """int32[n], how many of them each token may look at."""


def reading(
    tokens: np.ndarray, *, tokenizer: Tokenizer, tower_tokenizer: ClipTokenizer, rule: segments.Rule
) -> Reading:
    """The text that tokens spell, as `data.units` places it in the stream of training.

    An end-of-text token begins a document: it looks at the tower's end token and all before. A row
    that begins inside a document is read as if its text began there.
    """
    end_id = tower_tokenizer.vocab_size - tower_tokenizer.lm_offset - 1
    tower, seen, total = [np.zeros(0, np.int32)], [], 0
    for part in np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id)):
        if len(part) and part[0] == tokenizer.eos_id:
            total += 1
            tower.append(np.array([end_id], np.int32))
            seen.append(np.array([total], np.int32))
            part = part[1:]
        aligned = alignment.align_ids(tokenizer, tower_tokenizer, part)
        seen.append(total + alignment.lm_to_tower_index(aligned, rule=rule))
        tower.append(aligned.clip_ids)
        total += len(aligned.clip_ids)
    index = np.concatenate(seen)
    return Reading(np.concatenate(tower)[: index[-1]], index)


def language_rows(
    ids: Sequence[np.ndarray], *, vocab_size: int, pad_id: int, length: int, longest: int | None
) -> Rows:
    """tokens, targets int32 [B, T] and weights float32 [B, T], padded behind to one length.

    length: T, 0: the longest row's. longest: most positions that the model has, None: any number.

    Raises:
      UserError: there is no row, or one is empty, too long or holds no ids of the vocabulary.
    """
    counts = np.array([len(row) for row in ids])
    if not counts.size or not counts.all():
        raise UserError(
            "a batch needs at least one row and each row a token: give text, or leave the "
            "end-of-text token in front"
        )
    length = length or int(counts.max())
    if counts.max() > length:
        raise UserError(f"a text of {counts.max()} tokens does not fit in rows of {length}")
    if longest is not None and length > longest:
        raise UserError(
            f"rows of {length} tokens exceed the model's {longest} learned positions: cut the text"
        )
    tokens = np.full((len(ids), length + 1), pad_id, np.int32)
    for number, (row, values) in enumerate(zip(tokens, ids, strict=True)):
        wrong = values[(values < 0) | (values >= vocab_size) | (values != values.astype(np.int32))]
        if wrong.size:
            raise UserError(f"row {number}: token ids are 0 to {vocab_size - 1}, got {wrong[0]}")
        row[: len(values)] = values
    real = np.arange(1, length + 1) < counts[:, None]
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": real.astype(np.float32)}


def shared_tower(
    tokens: np.ndarray,
    counts: np.ndarray,
    *,
    tokenizer: Tokenizer,
    rule: segments.Rule,
    separators: segments.Separators,
) -> Rows:
    """What a tower reads of the language model's tokens [B, T], `counts` [B] of them real."""
    ids = manifest.tower_table(tokenizer)[tokens]
    starts = segments.starts(ids, rule=rule, separators=separators, counts=counts)
    return {"tower_tokens": ids, "tower_starts": starts}


def aligned_tower(
    readings: Sequence[Reading],
    *,
    length: int,
    rule: segments.Rule,
    separators: segments.Separators,
) -> Rows:
    """What a tower with tokens of its own reads; behind a text its last index stays.

    length: T. The tower's rows are as long as the fullest, rounded up as those of windows are.
    """
    counts = np.array([len(read.tower) for read in readings])
    width = -(-max(int(counts.max()), 1) // TOWER_LENGTH_MULTIPLE) * TOWER_LENGTH_MULTIPLE
    tower = np.zeros((len(readings), width), np.int32)
    index = np.zeros((len(readings), length), np.int32)
    for number, read in enumerate(readings):
        tower[number, : counts[number]] = read.tower
        index[number] = counts[number]
        index[number, : len(read.seen)] = read.seen
    starts = segments.starts(tower, rule=rule, separators=separators, counts=counts)
    return {"tower_tokens": tower, "tower_starts": starts, "tower_index": index}
