"""Where the CLIP windows of a row start: a tower reads at most `longest` tokens at a time.

Two rules. `reference` is the one of the original code (reference.md, section 1); it looks ahead,
so a feature depends on later tokens. `causal` decides from the tokens already seen: its whole
state is the length of the current segment, and a token ends the segment when that length has
reached what the token asks for (`Separators.minimum`), in shares of `longest` (at 75 in brackets):
  end of document: 1 token; sentence end: 4/25 (12); clause mark: 3/7 (32); comma or dash: 3/4
  (56); any token: `longest`.
A sentence end waits a little so that "mr." or a one-word reply is no segment of its own; weaker
marks wait longer, since a sentence end, the better place, may still come.

Measured on 2.3 M tokens of novels, speeches, articles and textbooks in rows of 512: the causal
rule gives segments of 25.9 tokens on average (reference: 25.9), 1.4 % under 8 tokens (12.5 %),
0.2 % cut hard at 75 (0.6 %). Waiting for 8 gives 23.0 tokens, for 24 gives 35.8 with more weak
ends; 12 was taken because the tower then sees as much context as under the reference rule.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, Literal, Protocol

import numpy as np

from blindvalm_jax.errors import UserError

Rule = Literal["causal", "reference"]
LONGEST = 75  # CLIP's context of 77 without its start and end token
_NO_RANK = np.int8(127)
_CLIP_VOCABULARY = 49408

# Of a table {text: CLIP's id}, None where CLIP has no such piece (ftfy makes ASCII of some).
_Pieces = dict[str, int | None]

# Reference rule, strongest first, after the end of a document and the pad. With CLIP's ids: every
# piece is the one that ends a word.
_RANKED: _Pieces = {
    **{".": 269, ";": 282, "!": 256, ":": 281, ",": 267, '."': 1081, ',"': 3823, '".': 2811},
    **{'",': 4332, ").": 1818, "),": 2361, "/": 270, "-": 268},
}
_SENTENCE: _Pieces = {
    **{".": 269, "!": 256, "?": 286, '."': 1081, '!"': 2947, '?"': 3283, '".': 2811, '"?': 11727},
    **{".'": 5938, "!'": 13222, "?'": 13610, "'.": 4645, "'?": 17242, ").": 1818, ".)": 5376},
    **{"].": 26262, ".]": 33511, "%.": 12475, "...": 678, "....": 1390, "..": 852, "?!": 2835},
    **{"。": 38000, "！": None, "？": None, "؟": None, "।": None},
}
_CLAUSE: _Pieces = {
    **{";": 282, ":": 281, ")": 264, "]": 316, "):": 4143, ");": 19686, '")': 13112},
    **{'";': 37549, '":': 7811, ":'": 23851},
}
_COMMA: _Pieces = {
    **{",": 267, ',"': 3823, '",': 4332, ",'": 10599, "',": 5662, "),": 2361, "],": 34067},
    **{".,": 5276, "%,": 14505, "--": 2432, "–": 1224, "—": 2005},
    **{"、": 45262, "，": None, "،": None},
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Separators:
    """What each tower token means for the cuts of segments of at most `longest` tokens.

    rank: int8 [V], reference rule: the smaller, the stronger; 127: never.
    minimum: int16 [V], causal rule: the token ends a segment that is at least this long with it.
    """

    rank: np.ndarray
    minimum: np.ndarray
    longest: int

    @property
    def fingerprint(self) -> str:
        """sha256 in hex over both tables."""
        return hashlib.sha256(self.rank.tobytes() + self.minimum.tobytes()).hexdigest()


class Vocabulary(Protocol):
    """What separators are made from: the part of a tokenizer that tells of its ids."""

    @property
    def kind(self) -> str:
        """clip, gpt2 or train."""

    @property
    def vocab_size(self) -> int:
        """Entries of the language model's vocabulary."""

    @property
    def lm_offset(self) -> int:
        """Language-model id = own id + lm_offset."""

    @property
    def eos_id(self) -> int:
        """Language-model id of the document separator."""

    @property
    def pad_id(self) -> int:
        """Language-model id that fills the tail of the last window."""

    def token_to_id(self, token: str) -> int | None:
        """Own id of the piece that is exactly this text (for CLIP: at a word's end, if any)."""


def clip_separators(longest: int = LONGEST) -> Separators:
    """Separators of CLIP's vocabulary (49,408 entries; eos 49407, pad 0)."""
    pieces = _RANKED | _SENTENCE | _CLAUSE | _COMMA
    return _separators(
        pieces.get, size=_CLIP_VOCABULARY, eos=_CLIP_VOCABULARY - 1, pad=0, longest=longest
    )


def separators_for(tokenizer: Vocabulary, longest: int = LONGEST) -> Separators:
    """Separators of any tokenizer whose own ids the tower reads, by the text of its pieces."""
    size = tokenizer.vocab_size - tokenizer.lm_offset
    clip = tokenizer.kind == "clip"
    return _separators(
        tokenizer.token_to_id,
        size=size,
        eos=size - 1 if clip else tokenizer.eos_id,
        pad=0 if clip else tokenizer.pad_id,
        longest=longest,
    )


def starts(
    ids: np.ndarray,
    *,
    rule: Rule,
    separators: Separators,
    counts: np.ndarray | None = None,
) -> np.ndarray:
    """True where a segment begins: bool [B, S] for tower ids [B, S]; position 0 always.

    `counts` [B] says how many ids of a row are real: the cuts are those of the row without its
    padding, which is cut every `longest`.

    Raises:
      UserError: the rule is unknown.
    """
    sizes = np.full(len(ids), ids.shape[1]) if counts is None else np.asarray(counts)
    if rule == "reference":
        found = _reference_starts(ids, sizes, separators)
    elif rule == "causal":
        found = _causal_starts(ids, separators)
    else:
        raise UserError(f"segment rule must be causal or reference, got {rule!r}")
    if counts is not None:
        past = np.arange(ids.shape[1]) - sizes[:, None]
        found = np.where(past < 0, found, past % separators.longest == 0)
        found[:, 0] = True
    return found


def step(length: Any, ids: Any, *, minimum: Any) -> Any:
    """Causal rule, one token on: length of the segment so far -> length after `ids`, 0 = it ended.

    A token starts a segment when the length before it is 0. Works on integers and on integer
    arrays [B] of numpy or JAX (then `minimum` must be such an array too).
    """
    longer = length + 1
    return longer * (longer < minimum[ids])


def lengths(starts_S: np.ndarray) -> np.ndarray:
    """Lengths of the segments of one row of starts, int [segments]."""
    return np.diff(np.append(np.flatnonzero(starts_S), len(starts_S)))


def _separators(find: Any, *, size: int, eos: int, pad: int, longest: int) -> Separators:
    if not 2 <= longest <= np.iinfo(np.int16).max:
        raise UserError(f"longest segment must be 2 ... 32767 tokens, got {longest}")
    rank = np.full(size, _NO_RANK, np.int8)
    for strength, text in reversed(list(enumerate(_RANKED, start=2))):
        _set(rank, find(text), strength)
    rank[pad] = 1
    rank[eos] = 0
    minimum = np.full(size, longest, np.int16)
    for pieces, least in (
        (_COMMA, round(longest * 3 / 4)),
        (_CLAUSE, round(longest * 3 / 7)),
        (_SENTENCE, max(1, round(longest * 4 / 25))),
    ):
        for text in pieces:
            _set(minimum, find(text), least)
    minimum[eos] = 1
    return Separators(rank=rank, minimum=minimum, longest=longest)


def _set(table: np.ndarray, index: int | None, value: int) -> None:
    if index is not None:
        table[index] = value


def _reference_starts(ids: np.ndarray, sizes: np.ndarray, separators: Separators) -> np.ndarray:
    longest = separators.longest
    found = np.zeros(ids.shape, bool)
    found[:, :1] = True
    ranks = separators.rank[ids]
    row = np.arange(len(ids))
    begin = np.zeros(len(ids), np.int64)
    offsets = np.arange(longest)
    while True:
        open_ = sizes[row] - begin > longest
        row, begin = row[open_], begin[open_]
        if not len(row):
            return found
        window = ranks[row[:, None], begin[:, None] + offsets]
        first = window.argmin(1)  # the first of the strongest
        matched = window[np.arange(len(row)), first] != _NO_RANK
        begin = begin + np.where(matched, first + 1, longest)
        found[row, begin] = True


def _causal_starts(ids: np.ndarray, separators: Separators) -> np.ndarray:
    found = np.zeros(ids.shape, bool)
    length = np.zeros(len(ids), np.int64)
    for position in range(ids.shape[1]):
        found[:, position] = length == 0
        length = step(length, ids[:, position], minimum=separators.minimum)
    return found
