"""Units: a megabyte or so of documents turned into token ids, the costly step of `prepare`.

A unit file is written once and renamed into place; its name carries the hash of its text, so a
restarted run recognises what it need not tokenize again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from blindvalm_jax import files
from blindvalm_jax.data import alignment
from blindvalm_jax.grounding.segments import Rule, Separators

if TYPE_CHECKING:
    from blindvalm_jax.data.clip_bpe import ClipTokenizer
    from blindvalm_jax.data.tokenizers import Tokenizer

# A few seconds of work: what a kill may cost, and small enough to keep many processes busy.
UNIT_CHARACTERS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """What every worker process knows; `tower_tokenizer` None: the tower reads the LM's tokens."""

    tokenizer: Tokenizer
    tower_tokenizer: ClipTokenizer | None
    separators: Separators
    rule: Rule
    sequence_length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitJob:
    """Texts for one unit file; `texts` is empty when the file is there and whole."""

    path: Path
    texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """A finished unit file and its sizes."""

    path: Path
    tokens: int
    tower_tokens: int


@dataclasses.dataclass
class Tally:
    """Documents and characters of a split, counted while they are read."""

    documents: int = 0
    characters: int = 0


def text_hash(text: str) -> int:
    """64 bits that decide a document's split: of its text alone, so equal texts stay together."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def jobs(
    documents: Iterable[tuple[str, str]],
    *,
    directory: Path,
    key: str,
    tallies: dict[str, Tally],
    unit_characters: int = UNIT_CHARACTERS,
) -> Iterator[tuple[str, UnitJob]]:
    """Groups (split, document) into units; yields (split, job), and counts into `tallies`."""
    texts: dict[str, list[str]] = {split: [] for split in tallies}
    sizes = dict.fromkeys(tallies, 0)
    numbers = dict.fromkeys(tallies, 0)

    def close(split: str) -> tuple[str, UnitJob]:
        digest = _digest(key, texts[split])
        path = directory / f"{split}-{numbers[split]:06d}-{digest}.npz"
        job = UnitJob(path=path, texts=() if _is_whole(path) else tuple(texts[split]))
        texts[split], sizes[split] = [], 0
        numbers[split] += 1
        return split, job

    for split, text in documents:
        tallies[split].documents += 1
        tallies[split].characters += len(text)
        texts[split].append(text)
        sizes[split] += len(text)
        if sizes[split] >= unit_characters:
            yield close(split)
    for split in tallies:
        if texts[split]:
            yield close(split)


def encode(encoding: Encoding, job: tuple[str, UnitJob]) -> tuple[str, Unit]:
    """Writes a unit file unless there are no texts for it; runs in a worker process."""
    split, unit = job
    if unit.texts:
        arrays = _encode_texts(encoding, unit.texts)
        with files.replacing(unit.path) as partial, partial.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
    with np.load(unit.path) as arrays:
        tokens, tower_tokens = arrays["sizes"].tolist()
    return split, Unit(path=unit.path, tokens=tokens, tower_tokens=tower_tokens)


def _is_whole(path: Path) -> bool:
    """Whether a unit file can be read to its end; reading checks the checksums of its arrays."""
    try:
        with path.open("rb") as stream, np.load(stream) as arrays:
            sizes = [len(arrays["tokens"]), len(arrays["tower"]) if "tower" in arrays else 0]
            return bool(arrays["sizes"].tolist() == sizes)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return False


def _encode_texts(encoding: Encoding, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """tokens: LM ids, each document after an eos; seen: tower tokens each LM token may look at.

    An eos sees all of the document before it and the tower's end token.
    """
    eos = np.array([encoding.tokenizer.eos_id], np.int32)
    clip = encoding.tower_tokenizer
    if clip is None:
        encoded = encoding.tokenizer.encode_lm_batch(texts)
        return _unit(tokens=[part for ids in encoded for part in (eos, ids)])
    end = np.array([clip.vocab_size - clip.lm_offset - 1], np.int32)
    tokens, tower, seen = [], [], []
    total = 0
    for text in texts:
        aligned = alignment.align(encoding.tokenizer, clip, text)
        tokens += [eos, aligned.lm_ids]
        tower += [end, aligned.clip_ids]
        index = alignment.lm_to_tower_index(aligned, rule=encoding.rule)
        seen += [np.array([total + 1]), total + 1 + index]
        total += 1 + len(aligned.clip_ids)
    return _unit(tokens=tokens, tower=tower, seen=seen)


def _unit(**parts: list[np.ndarray]) -> dict[str, np.ndarray]:
    arrays = {name: np.concatenate(part).astype(np.uint32) for name, part in parts.items()}
    sizes = [len(arrays["tokens"]), len(arrays.get("tower", ()))]
    return {"sizes": np.array(sizes), **arrays}


def _digest(key: str, texts: Sequence[str]) -> str:
    digest = hashlib.blake2b(key.encode(), digest_size=16)
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "big"))
        digest.update(content)
    return digest.hexdigest()
