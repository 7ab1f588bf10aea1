"""Where tokens end in the raw text, for tokenizers that work on bytes and text that is cleaned."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np

from blindvalm_jax.data.clip_cleaning import clean_lines, clean_words, is_untouched_ascii

_WORD = re.compile(r"\S+")
# U+0085 is white space, but cleaning may make an ellipsis of it.
_RAW_WORD = re.compile(r"[\S\x85]+")
_MOST_WORDS = 1 << 18
_LONGEST_CACHED = 64
_ID_BYTES = 4


class Encoded(NamedTuple):
    """Tokens and where they end."""

    ids: np.ndarray
    """int32[n], ids of the language model."""
    ends: np.ndarray
    """int32[n], exclusive offsets in characters of the raw text; never decreasing."""


class EncodedWords(NamedTuple):
    """Tokens of cleaned words, where they end, and from where on they are certain."""

    ids: np.ndarray
    """int32[n], ids of the language model."""
    ends: np.ndarray
    """int32[n], exclusive offsets in characters of the raw text; never decreasing."""
    known: np.ndarray
    """int32[n], how much raw text it takes to know the token: its word and a character after it.

    Never decreasing, greater than `ends`; greater than the length of a text that ends in the word.
    """


class _Span(NamedTuple):
    """A word of the raw text: what it is cleaned to on its own, and its place."""

    raw: str
    clean: list[str]
    start: int
    end: int


def complete_characters(text: str) -> np.ndarray:
    """int32[n + 1]: how many characters the first i of the text's n UTF-8 bytes complete."""
    return np.cumsum(np.append(_starts(text), 1), dtype=np.int32) - 1


def begun_characters(text: str) -> np.ndarray:
    """int32[n + 1]: how many characters the first i of the text's n UTF-8 bytes begin."""
    return np.cumsum(np.append(0, _starts(text)), dtype=np.int32)


def _starts(text: str) -> np.ndarray:
    return (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80


class CleanedWordEnds:
    """Tokens with their ends, where text is cleaned as CLIP's is and BPE stops at white space."""

    def __init__(
        self, ids_of: Mapping[str, bytes], lengths_of: Callable[[bytes], Sequence[int]]
    ) -> None:
        """Takes a cleaned word's ids as int32 bytes, and from them tokens' lengths in UTF-8."""
        self._ids_of = ids_of
        self._ends_of = _EndsCache(ids_of, lengths_of)

    def encode(self, text: str) -> EncodedWords:
        """The tokens of a text with their ends; the rules are those of `alignment.align`."""
        if is_untouched_ascii(text):
            return self._exact(text.lower(), 0)
        parts = []
        exact: list[str] = []
        start = done = 0
        for line in clean_lines(text):
            if line.one_to_one:
                exact.append(line.clean)
            else:
                parts.append(self._exact("".join(exact), start))
                parts.append(self._mapped(line.raw, line.clean.split(), done))
                exact, start = [], done + len(line.raw)
            done += len(line.raw)
        parts.append(self._exact("".join(exact), start))
        return _joined(parts)

    def _exact(self, clean: str, start: int) -> EncodedWords:
        """Tokens of text whose cleaned characters stand where the raw ones do."""
        words = clean.split()
        ids = list(map(self._ids_of.__getitem__, words))
        inside = b"".join(map(self._ends_of.__getitem__, words))
        begins = np.array([match.start() for match in _WORD.finditer(clean)], np.int32) + start
        sizes = np.fromiter(map(len, words), np.int32, len(words))
        counts = np.fromiter(map(len, ids), np.int64, len(ids)) // _ID_BYTES
        return EncodedWords(
            np.frombuffer(b"".join(ids), np.int32),
            np.frombuffer(inside, np.int32) + np.repeat(begins, counts),
            np.repeat(begins + sizes + 1, counts),
        )

    def _mapped(self, raw: str, clean: list[str], start: int) -> EncodedWords:
        """Tokens of a line whose cleaning moves characters."""
        spans = [
            _Span(match.group(), clean_words(match.group()), match.start(), match.end())
            for match in _RAW_WORD.finditer(raw)
        ]
        parts = []
        for word, span, end in _place(clean, spans, len(raw)):
            ids = np.frombuffer(self._ids_of[word], np.int32)
            if span is not None and _keeps_characters(span.raw, word):
                ends = np.frombuffer(self._ends_of[word], np.int32) + np.int32(span.start)
            else:
                ends = np.full(ids.size, end, np.int32)
            known = np.full(ids.size, end + start + 1, np.int32)
            parts.append(EncodedWords(ids, ends + np.int32(start), known))
        return _joined(parts)


class _EndsCache(dict[str, bytes]):
    """Of a cleaned word, its tokens' ends in characters, as int32 bytes; afresh when full.

    A token that ends inside a character knows something of it, so it ends with it.
    """

    def __init__(
        self, ids_of: Mapping[str, bytes], lengths_of: Callable[[bytes], Sequence[int]]
    ) -> None:
        super().__init__()
        self._ids_of = ids_of
        self._lengths_of = lengths_of

    def __missing__(self, word: str) -> bytes:
        lengths = self._lengths_of(self._ids_of[word])
        if sum(lengths) != len(word.encode()):
            # CLIP's expression matches no piece at U+0345, which folds to a letter but is none.
            ends = array("i", [len(word)] * len(lengths)).tobytes()
        elif word.isascii():
            ends = array("i", accumulate(lengths)).tobytes()
        else:
            ends = begun_characters(word)[np.cumsum(lengths)].tobytes()
        if len(word) <= _LONGEST_CACHED:
            if len(self) >= _MOST_WORDS:
                self.clear()
            self[word] = ends
        return ends


def _joined(parts: list[EncodedWords]) -> EncodedWords:
    empty = np.zeros(0, np.int32)
    columns = zip(*parts, strict=True) if parts else ((), (), ())
    return EncodedWords(*(np.concatenate([empty, *column]) for column in columns))


def _place(clean: list[str], spans: list[_Span], size: int) -> list[tuple[str, _Span | None, int]]:
    """For each cleaned word of a line: the raw word it is alone the form of, if any, and its end.

    Words that clean the same alone as in the line are matched from both sides. What is left in
    the middle is matched one to one when the counts agree; otherwise all of it ends with the last
    of the raw words in the middle, so that nothing ends too early; `size` is the line's.
    """
    head, first = _matched(clean, [span.clean for span in spans])
    tail, last = _matched(
        clean[head:][::-1], [span.clean[::-1] for span in reversed(spans[first:])]
    )
    rest = clean[head : len(clean) - tail]
    middle = spans[first : len(spans) - last]
    placed = _own(spans[:first])
    if len(rest) == len(middle):
        placed += [(word, span, span.end) for word, span in zip(rest, middle, strict=True)]
    else:
        end = middle[-1].end if middle else (spans[first].start if last else size)
        placed += [(word, None, end) for word in rest]
    return placed + _own(spans[len(spans) - last :])


def _own(spans: list[_Span]) -> list[tuple[str, _Span | None, int]]:
    return [(word, span, span.end) for span in spans for word in span.clean]


def _matched(words: list[str], groups: list[list[str]]) -> tuple[int, int]:
    """How many words, and groups, the longest agreeing beginning covers."""
    covered = 0
    for count, group in enumerate(groups):
        if words[covered : covered + len(group)] != group:
            return covered, count
        covered += len(group)
    return covered, len(groups)


def _keeps_characters(raw: str, clean: str) -> bool:
    """Whether character i of the cleaned word comes from character i of the raw one alone."""
    if len(raw) != len(clean):
        return False
    return raw.lower() == clean or list(clean) == list(
        chain.from_iterable(clean_words(character) or [""] for character in raw)
    )
