"""CLIP's cleaning: the shortcuts change nothing, and what they rest on holds for this ftfy."""

from __future__ import annotations

import sys

import pytest
import regex
from ftfy.badness import BADNESS_RE

from blindvalm_jax.data.clip_cleaning import clean_lines, clean_words
from tests import tiny_tokenizers as tiny


@pytest.mark.parametrize("parts", [tiny.HARD, tiny.PLAIN], ids=["hard", "plain"])
def test_cleaning_equals_its_definition(parts: list[str]) -> None:
    for text in tiny.random_texts(1, 3000, parts):
        assert " ".join(clean_words(text)) == tiny.reference_clean(text), ascii(text)


def test_cleaning_of_whole_documents_equals_its_definition() -> None:
    """Entities stop being decoded by ftfy after the first line with a "<"."""
    for text in tiny.random_texts(2, 200, tiny.HARD, longest=400):
        assert " ".join(clean_words(text)) == tiny.reference_clean(text), ascii(text)


def test_cleaning_of_mojibake_equals_its_definition() -> None:
    parts = [part for part in tiny.HARD if not any(0xD800 <= ord(c) <= 0xDFFF for c in part)]
    for text in tiny.random_texts(3, 1500, parts, longest=20):
        for encoding in ("latin-1", "sloppy-windows-1252", "macroman", "sloppy-windows-1251"):
            broken = f"the {text.encode().decode(encoding)} cat"
            assert " ".join(clean_words(broken)) == tiny.reference_clean(broken), ascii(broken)


def test_a_lone_character_among_ascii_is_mojibake_only_if_it_is_looked_at() -> None:
    """What the shortcut in clip_cleaning rests on, for this release of ftfy."""
    looked_at = {*map(chr, range(0x80, 0xA0)), *"ŒœÃÂ"}
    contexts = ["{}", "a{}a", "a {} a", "A{}.", ".{}1", "1 {}(", "'{}\n", "a{} "]
    for code in range(0x80, 0x10000):
        if chr(code) not in looked_at and not 0xD800 <= code <= 0xDFFF:
            for context in contexts:
                assert not BADNESS_RE.search(context.format(chr(code))), hex(code)


def test_white_space_is_the_same_for_split_and_for_the_reference() -> None:
    """U+001C to U+001F are removed by ftfy before either is asked."""
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    split = {code for code, character in enumerate(every) if character.isspace()}
    reference = {match.start() for match in regex.finditer(r"\s", every)}
    assert split - reference == set(range(0x1C, 0x20))
    assert reference <= split


def test_lines_are_the_text_and_claim_one_to_one_only_when_it_is() -> None:
    for text in tiny.random_texts(12, 500, tiny.HARD):
        lines = list(clean_lines(text))
        assert "".join(line.raw for line in lines) == text
        for raw, clean, one_to_one in lines:
            assert not one_to_one or len(raw) == len(clean)
            if one_to_one:
                alone = ["".join(clean_words(character)) for character in raw if character != "Σ"]
                there = [c for c, r in zip(clean, raw, strict=True) if r != "Σ"]
                assert alone == ["".join(c.split()) for c in there], ascii(raw)


@pytest.mark.parametrize("text", ["you & me", "AT&T", "R & D; &;", "“Yes” — naïve & café"])
def test_text_without_entities_skips_ftfy(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftfy.fix_text", None)
    assert clean_words(text) == text.lower().replace("“", '"').replace("”", '"').split()
