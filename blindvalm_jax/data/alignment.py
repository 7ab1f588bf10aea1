"""Which CLIP token a language-model token may look at, when the two are not the same tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from blindvalm_jax.data.clip_bpe import ClipTokenizer
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError


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

    CLIP's ids are those of the whole text in every case.

    Raises:
      UserError: `lm` normalises text, so that its tokens have no place in it, or is CLIP's, whose
        tokens need no alignment with themselves and have no ends that suit both sides.
    """
    if isinstance(lm, ClipTokenizer):
        raise UserError(
            "a language model with CLIP's tokens is not aligned: let the tower read its tokens, "
            "or set tokenizer.kind=gpt2"
        )
    lm_ids, lm_end = lm.encode_with_ends(text)
    clip_ids, clip_end = clip.encode_with_ends(text)
    return Aligned(lm_ids, lm_end, clip_ids - np.int32(clip.lm_offset), clip_end)


def lm_to_tower_index(aligned: Aligned) -> np.ndarray:
    """int32[n]: for each language-model token, how many CLIP tokens end at or before its end.

    0 is the tower's start token, k its k-th token: the last one whose text is all known.
    """
    return np.searchsorted(aligned.clip_end, aligned.lm_end, side="right").astype(np.int32)
