"""Which CLIP token a language-model token may look at, when the two are not the same tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from blindvalm_jax.data.byte_level_bpe import ByteLevelTokenizer
from blindvalm_jax.data.clip_bpe import ClipTokenizer
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding.segments import Rule


class Aligned(NamedTuple):
    """One text in two tokenizations; ends are exclusive character offsets in the raw text."""

    lm_ids: np.ndarray
    """int32[n], language-model ids."""
    lm_end: np.ndarray
    """int32[n], never decreasing."""
    clip_ids: np.ndarray
    """int32[m], CLIP's own ids: `clip.encode(text)`."""
    clip_end: np.ndarray
    """int32[m], never decreasing."""
    clip_known: np.ndarray
    """int32[m], never decreasing: how much text it takes to know that this is the token."""


def align(lm: Tokenizer, clip: ClipTokenizer, text: str) -> Aligned:
    """Tokenizes a text twice and gives the end of every token in the raw text.

    Nothing a language-model token is given may come from text after it. A token that ends inside
    a character, as byte-level tokens may, therefore ends before that character if it is the
    language model's, and after it if it is CLIP's. CLIP cleans text first, which moves characters;
    its tokens are placed so that none is said to end before the raw text it is made of:

    - in a line whose cleaning changes characters one for one, offsets are exact;
    - in other lines, cleaned words are matched with raw words (both end at white space, which no
      CLIP token crosses) through what each raw word is cleaned to alone. In a word whose
      characters are kept one for one offsets are exact; otherwise all its tokens end where the
      raw word ends;
    - where words clean differently alone than in their line, the words in between are matched in
      order if there are as many cleaned as raw ones; if not, all end with the last of them.

    CLIP's ids are those of the whole text in every case. How CLIP splits a word depends on all its
    letters ("stat" is one token, in "statuette" it is two others), so a token is known only with
    one character of white space after its word, `clip_known`; at a text's end never. Text that
    reaches a token's `clip_known` gives the same tokens up to there whatever follows, if cleaning
    leaves it alone or changes only single characters. In a line that ftfy repairs (mojibake,
    entities) a later character of the same line may still change how an earlier word is read.

    Raises:
      UserError: `lm` normalises text, so that its tokens have no place in it, or is CLIP's, whose
        tokens need no alignment with themselves and have no ends that suit both sides.
    """
    return _aligned(clip, text, *_byte_level(lm).encode_with_ends(text))


def align_ids(lm: Tokenizer, clip: ClipTokenizer, ids: np.ndarray) -> Aligned:
    """A text given by the language model's ids, whichever way they spell it; see `align`.

    Where they begin or end inside a character the tower reads nothing of that character.

    Raises:
      UserError: `lm` is CLIP's.
    """
    text, ends = _byte_level(lm).decode_with_ends(ids.tolist())
    return _aligned(clip, text, ids, ends)


def _byte_level(lm: Tokenizer) -> ByteLevelTokenizer:
    if not isinstance(lm, ByteLevelTokenizer):
        raise UserError(
            "a language model with CLIP's tokens is not aligned: let the tower read its tokens, "
            "or set tokenizer.kind=gpt2"
        )
    return lm


def _aligned(clip: ClipTokenizer, text: str, lm_ids: np.ndarray, lm_end: np.ndarray) -> Aligned:
    words = clip.encode_words(text)
    clip_ids = words.ids - np.int32(clip.lm_offset)
    return Aligned(lm_ids, lm_end, clip_ids, words.ends, words.known)


def lm_to_tower_index(aligned: Aligned, *, rule: Rule) -> np.ndarray:
    """int32[n]: for each language-model token, how many CLIP tokens of its text it may look at.

    0 is the tower's start token, k its k-th token. `causal`: those that are known by the token's
    end, so that no later text changes them (see `align`). `reference`: those that end at or before
    its end, the word being read included; how that word is split then tells of its next letters.
    """
    reached = aligned.clip_known if rule == "causal" else aligned.clip_end
    return np.searchsorted(reached, aligned.lm_end, side="right").astype(np.int32)
