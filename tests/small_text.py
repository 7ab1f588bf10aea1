"""Small texts and tokenizers for the tests of data, made here: no file is needed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from blindvalm_jax.data import byte_level_bpe, tokenizer_files
from blindvalm_jax.data.clip_bpe import ClipTokenizer
from blindvalm_jax.data.corpora import FileSource

_WORDS = [
    "The",
    "the",
    "a",
    "Cat",
    "sat",
    "on",
    "mat",
    "naïve",
    "漢字",
    "don't",
    "it's",
    "🙂",
    "3.14",
]
_WORDS += ["AT&T", "Über", "—", "x-ray", "(so)", '"yes"']
_MERGES = [("t", "h"), ("th", "e</w>"), ("c", "a"), ("ca", "t</w>"), ("a", "t</w>")]


def documents(count: int, *, seed: int = 0, longest: int = 120) -> list[str]:
    """Random documents of words, separators and line breaks; no two alike."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        words = rng.choice(_WORDS, rng.integers(1, longest))
        ends = rng.choice(
            ["", ".", ",", "!", "?", ";", "\n", " \t"], len(words), p=[0.65] + [0.05] * 7
        )
        body = " ".join(word + end for word, end in zip(words, ends, strict=True))
        found.append(f"{number} {body}")
    return found


def write_text(path: Path, texts: list[str]) -> FileSource:
    """A .txt file of documents, as a source."""
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return FileSource((str(path),))


def small_clip() -> ClipTokenizer:
    """CLIP's format with five merges."""
    symbols = tokenizer_files.byte_symbols()
    letters = [symbols[byte] for byte in tokenizer_files.openai_order()]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    pieces += ["".join(pair) for pair in _MERGES]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return ClipTokenizer({piece: index for index, piece in enumerate(pieces)}, _MERGES)


def small_bpe() -> byte_level_bpe.ByteLevelTokenizer:
    """A byte-level BPE that merges across the words of these documents."""
    return byte_level_bpe.train(iter(documents(20, seed=9)), vocab_size=330)


def die(state: None, job: int) -> None:
    """Ends the process it runs in, as a lack of memory would."""
    os._exit(1)
