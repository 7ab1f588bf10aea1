"""Tokenizers of the language model: CLIP's BPE, GPT-2's, or one learned from the text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from blindvalm_jax.data.byte_level_bpe import ByteLevelTokenizer, train
from blindvalm_jax.data.clip_bpe import ClipTokenizer
from blindvalm_jax.data.token_ends import Encoded
from blindvalm_jax.data.tokenizer_files import find_directory
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding.segments import Vocabulary

__all__ = ["KINDS", "ByteLevelTokenizer", "ClipTokenizer", "Encoded", "Tokenizer", "load", "train"]

KINDS = ("clip", "gpt2", "train")


class Tokenizer(Vocabulary, Protocol):
    """Text to ids and back. Instances pickle by content, so spawned workers need no files."""

    @property
    def fingerprint(self) -> str:
        """sha256 in hex over vocabulary, merges and cleaning rule."""

    def encode(self, text: str) -> list[int]:
        """Own ids of a text, no specials."""

    def encode_lm(self, text: str) -> np.ndarray:
        """int32[n] language-model ids of a text."""

    def encode_lm_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_lm` of each text."""

    def encode_with_ends(self, text: str) -> Encoded:
        """Language-model ids, and where in the raw text each token ends (see `alignment`)."""

    def encode_with_reach(self, text: str) -> Encoded:
        """The same, but a token that holds a part of a character ends behind that character."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of own ids."""

    def save(self, directory: Path) -> None:
        """Writes the files that `load(kind, directory)` reads back."""


def load(kind: str, path: str, *, setting: str = "tokenizer.path") -> Tokenizer:
    """Reads a tokenizer from a directory, or from the Hugging Face hub when `path` is a hub id.

    Raises:
      UserError: the kind is unknown, files are missing, or they are of another kind; `setting` is
        the name by which the message calls the path.
    """
    if kind not in KINDS:
        raise UserError(f"unknown tokenizer.kind {kind!r}; known: {', '.join(KINDS)}")
    directory = find_directory(path, setting=setting)
    try:
        if kind == "clip":
            return ClipTokenizer.from_directory(directory)
        return ByteLevelTokenizer.from_directory(kind, directory)
    except UserError as error:
        if setting == "tokenizer.path":
            raise
        raise UserError(f"{setting}: {error}") from error
