"""Small tokenizers in the real formats, and texts that are hard to clean, for tests."""

from __future__ import annotations

import html
import json
import random
from pathlib import Path

import ftfy
import regex

from blindvalm_jax.data import tokenizer_files as files

WORDS = [
    *["the", "then", "and", "an", "in", "ing", "ring", "red", "reds", "green", "cat", "caf"],
    *["café", "naïve", "it's", "don't", "10", "...", "!!", "—", "für", "fi", "日本語", "привет"],
    *["εἰμί", "ñandú", "😀", "œuvre"],
]

HARD = [
    *"aAbBeEiIoOsStTrR 019.,;:!?-_'\"()<>/",
    *" \t\n\n\r\f\x00\x1b\x1c\x7f\x85\xa0\xad\u200b\u2003\u2028\u206a\u3000\ufeff\ufffa",
    *"‘’“”–—…éèêñüßœŒÃÂÅØÙÎÐ€™£¢§¬¨ˆ˜†±²³µ¶·×÷°º»«¿¡",
    *"İıŉſΣσςάβεžŠЖжвЂГўВµИ日本語ｆ１ﾊﾟ한ㄱ😀👍🏽\u0301\u0308\u0345\ud83d\ude00\ufffd",
    *["&amp;", "&amp;lt;", "&lt;b", "&#39;", "&quot", "&nbsp;", "&EACUTE;", "&", "&&", "&NewLine;"],
    *["<|startoftext|>", "<|endoftext|>", "\x1b[31m", "Ã©", "â€™", "â€œ", "Ã ", " Ã la ", "ﬁ", "Ĳ"],
    *["the ", "cat ", "ring", "don't ", "it's ", " 10", "naïve ", "café ", " and", " red\n"],
]
PLAIN = [*"abcdefghij klmnopqrstuvwxyz ABCDE 0123456789 .,;:!?'\"-()& ", *(f"{w} " for w in WORDS)]


def merges_of(words: list[str], end: str) -> files.Merges:
    """Merges that build every prefix of every word, left to right."""
    symbols = files.byte_symbols()
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        parts = [symbols[byte] for byte in word.encode()]
        parts[-1] += end
        made = parts[0]
        for part in parts[1:]:
            merges[made, part] = None
            made += part
    return list(merges)


def clip_parts() -> tuple[dict[str, int], files.Merges]:
    """Vocabulary and merges of a tiny CLIP, ids in OpenAI's order."""
    merges = merges_of(WORDS, files.WORD_END)
    symbols = files.byte_symbols()
    alphabet = [symbols[byte] for byte in files.openai_order()]
    pieces = [*alphabet, *(symbol + files.WORD_END for symbol in alphabet)]
    pieces += [left + right for left, right in merges]
    return {p: i for i, p in enumerate([*pieces, *files.CLIP_SPECIALS])}, merges


def gpt2_parts() -> tuple[dict[str, int], files.Merges]:
    """Vocabulary and merges of a tiny GPT-2."""
    merges = merges_of([*(f" {word}" for word in WORDS), *WORDS], "")
    pieces = [*files.byte_symbols(), *(left + right for left, right in merges), "<|endoftext|>"]
    return {piece: index for index, piece in enumerate(pieces)}, merges


def write_pair(directory: Path, vocab: dict[str, int], merges: files.Merges) -> Path:
    """Writes vocab.json and merges.txt as Hugging Face does."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def random_texts(seed: int, count: int, parts: list[str], longest: int = 40) -> list[str]:
    """Texts of random parts, the empty text among them."""
    rng = random.Random(seed)
    return ["".join(rng.choices(parts, k=rng.randint(0, longest))) for _ in range(count)]


def reference_clean(text: str) -> str:
    """OpenAI's cleaning as its definition reads, on the whole text at once."""
    fixed = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", fixed.strip()).strip().lower()
