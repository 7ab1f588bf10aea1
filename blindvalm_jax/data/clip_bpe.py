"""CLIP's byte-level BPE: exactly OpenAI's ids, with a cache of words that makes it fast."""

from __future__ import annotations

import hashlib
import heapq
import json
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import regex

from blindvalm_jax.data import tokenizer_files
from blindvalm_jax.data.clip_cleaning import clean_words
from blindvalm_jax.data.token_ends import CleanedWordEnds, Encoded, EncodedWords
from blindvalm_jax.errors import UserError

FAIRSEQ_SPECIALS = 4
FAIRSEQ_PAD = 1
FAIRSEQ_EOS = 2
_CLEANING = "openai-clip: ftfy, unescape twice, collapse, strip, lower; fairseq offset 4"
_MOST_WORDS = 1 << 19
_LONGEST_CACHED = 64
_PIECES = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


class ClipTokenizer:
    """CLIP's tokenizer; as a language model's it has fairseq's four specials in front.

    A literal `<|endoftext|>` is CLIP's own token, as in OpenAI's; documents are separated by
    fairseq's `</s>`, which no text gives.

    BPE pieces never cross white space, so a word's ids do not depend on its neighbours: they are
    kept per word, as bytes ready to be joined.
    """

    kind = "clip"
    lm_offset = FAIRSEQ_SPECIALS
    eos_id = FAIRSEQ_EOS
    pad_id = FAIRSEQ_PAD

    def __init__(self, vocab: dict[str, int], merges: tokenizer_files.Merges) -> None:
        """Takes a vocabulary and merges that belong together (`tokenizer_files.read_clip`)."""
        self._vocab = vocab
        self._merges = merges
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._symbols = tokenizer_files.byte_symbols()
        self._bytes_of = {symbol: byte for byte, symbol in enumerate(self._symbols)}
        self._texts = {index: piece for piece, index in vocab.items()}
        self._words = _WordCache(self)
        self._piece_ids: dict[str, list[int]] = {}
        self._ends = CleanedWordEnds(self._words, self._lengths)
        self.vocab_size = len(vocab) + FAIRSEQ_SPECIALS
        self.fingerprint = fingerprint(vocab, merges, _CLEANING)

    @classmethod
    def from_directory(cls, directory: Path) -> ClipTokenizer:
        """Reads vocab.json and merges.txt, tokenizer.json, or OpenAI's list of merges."""
        return cls(*tokenizer_files.read_clip(directory))

    def __reduce__(self) -> tuple[type, tuple[dict[str, int], tokenizer_files.Merges]]:
        """Pickles what decides the ids, not the caches."""
        return type(self), (self._vocab, self._merges)

    def encode(self, text: str) -> list[int]:
        """OpenAI's ids of a text; no start or end token."""
        return (self.encode_lm(text) - FAIRSEQ_SPECIALS).tolist()

    def encode_lm(self, text: str) -> np.ndarray:
        """int32[n] ids of the language model: OpenAI's ids plus 4."""
        joined = bytearray().join(map(self._words.__getitem__, clean_words(text)))
        return np.frombuffer(joined, np.int32)

    def encode_lm_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_lm` of each text."""
        return [self.encode_lm(text) for text in texts]

    def encode_with_ends(self, text: str) -> Encoded:
        """Language-model ids, and where in the raw text each token ends (see `alignment`)."""
        return Encoded(*self._ends.encode(text)[:2])

    def encode_with_reach(self, text: str) -> Encoded:
        """The same: a token that holds a part of a character ends behind it."""
        return self.encode_with_ends(text)

    def encode_words(self, text: str) -> EncodedWords:
        """`encode_with_ends`, and from where on in the raw text each token is certain."""
        return self._ends.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of own ids: lower case, a blank where a word ends, none at the end."""
        unknown = [index for index in ids if index not in self._texts]
        if unknown:
            raise UserError(f"token id {unknown[0]} is outside CLIP's 0 to {len(self._texts) - 1}")
        pieces = "".join(self._texts[index] for index in ids)
        raw = bytes(self._bytes_of[symbol] for symbol in pieces)
        return (
            raw.decode("utf-8", errors="replace").replace(tokenizer_files.WORD_END, " ").rstrip(" ")
        )

    def token_to_id(self, token: str) -> int | None:
        """Own id of the piece that is this text at a word's end, else inside a word, else None."""
        piece = "".join(self._symbols[byte] for byte in token.encode())
        whole = self._vocab.get(piece + tokenizer_files.WORD_END)
        return self._vocab.get(piece) if whole is None else whole

    def save(self, directory: Path) -> None:
        """Writes vocab.json and merges.txt, which Hugging Face's CLIPTokenizer reads too."""
        directory.mkdir(parents=True, exist_ok=True)
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in self._merges)]
        (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        vocab = json.dumps(self._vocab, ensure_ascii=False)
        (directory / "vocab.json").write_text(vocab, encoding="utf-8")

    def _lengths(self, ids: bytes) -> list[int]:
        """Length in UTF-8 bytes of the tokens whose language-model ids are given as int32 bytes."""
        pieces = (self._texts[index - FAIRSEQ_SPECIALS] for index in memoryview(ids).cast("i"))
        return [len(piece.removesuffix(tokenizer_files.WORD_END)) for piece in pieces]

    def _encode_word(self, word: str) -> bytes:
        if word.isascii() and word.isalpha():
            return array("i", self._encode_piece(word)).tobytes()
        ids = array("i")
        for piece in _PIECES.findall(word):
            ids.extend(self._encode_piece(piece))
        return ids.tobytes()

    def _encode_piece(self, piece: str) -> list[int]:
        ids = self._piece_ids.get(piece)
        if ids is None:
            if piece in tokenizer_files.CLIP_SPECIALS:
                symbols = [piece]
            else:
                symbols = [self._symbols[byte] for byte in piece.encode()]
                symbols[-1] += tokenizer_files.WORD_END
                symbols = merge_symbols(symbols, self._ranks)
            ids = [self._vocab[symbol] + FAIRSEQ_SPECIALS for symbol in symbols]
            if len(piece) <= _LONGEST_CACHED:
                if len(self._piece_ids) >= _MOST_WORDS:
                    self._piece_ids.clear()
                self._piece_ids[piece] = ids
        return ids


class _WordCache(dict[str, bytes]):
    """Ids of cleaned words; starts afresh when full, so that memory stays bounded."""

    def __init__(self, tokenizer: ClipTokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> bytes:
        ids = self._tokenizer._encode_word(word)
        if len(word) <= _LONGEST_CACHED:
            if len(self) >= _MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids


def merge_symbols(symbols: Sequence[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: merges every occurrence of the best-ranked pair, left to right, again.

    A heap of (rank, position) keeps long words near linear; all pairs of one rank are taken out
    before any is merged, because a merge may create a pair of a better rank, which waits its turn.
    """
    # A merged-away part is "", which is in no pair; one more of them guards the right end.
    parts = [*symbols, ""]
    after = list(range(1, len(parts) + 1))
    before = list(range(-1, len(parts) - 1))
    pairs = zip(parts, parts[1:], strict=False)
    heap = [(ranks[pair], left) for left, pair in enumerate(pairs) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        best = heap[0][0]
        batch = []
        while heap and heap[0][0] == best:
            batch.append(heapq.heappop(heap)[1])
        for left in batch:
            right = after[left]
            if ranks.get((parts[left], parts[right])) != best:
                continue
            parts[left] += parts[right]
            parts[right] = ""
            after[left] = following = after[right]
            before[following] = left
            rank = ranks.get((parts[left], parts[following]))
            if rank is not None:
                heapq.heappush(heap, (rank, left))
            previous = before[left]
            rank = ranks.get((parts[previous], parts[left])) if previous >= 0 else None
            if rank is not None:
                heapq.heappush(heap, (rank, previous))
    return [part for part in parts if part]


def fingerprint(vocab: dict[str, int], merges: tokenizer_files.Merges, rule: str) -> str:
    """sha256 of what decides the ids."""
    content = json.dumps([rule, sorted(vocab.items()), merges], ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()
