"""OpenAI CLIP's text cleaning, exact, with shortcuts for text that it provably leaves alone.

The reference is `ftfy.fix_text`, `html.unescape` twice, whitespace collapsed and stripped, lower
case. ftfy works line by line, so cleaning can be decided line by line too; most lines of real text
need none of it, and ftfy costs far more than the BPE. Why each shortcut changes nothing:

- A line of ASCII is only touched through entities, control characters, and carriage returns,
  which become line breaks: white space either way.
- In other lines ftfy repairs mojibake only where `BADNESS_RE` matches. Each alternative of that
  expression holds two neighbouring non-ASCII characters or one of C1, Œ, œ, Ã, Â, and reaches at
  most six characters, so searching around those decides for the line. A false alarm only costs
  time: the line then goes through ftfy itself.
- The remaining repairs replace single characters (`_REPLACED`), straighten quotes, or compose
  (NFC). Straight quotes match nothing in `BADNESS_RE` that curly ones do not.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import ftfy
from ftfy.badness import BADNESS_RE
from ftfy.chardata import CONTROL_CHARS, HTML_ENTITY_RE, LIGATURES, WIDTH_MAP
from ftfy.fixes import uncurl_quotes

_CONTEXT = 8
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
_REPLACED = re.compile(
    r"[\x80-\x9f\u2028\u2029\ud800-\udfff"
    + "".join(re.escape(chr(code)) for code in (*CONTROL_CHARS, *LIGATURES, *WIDTH_MAP))
    + "]"
)
_SUSPECT = re.compile(r"[^\x00-\x7f]{2,}|[ŒœÃÂ]")


class CleanLine(NamedTuple):
    """A line of raw text and what is left of it before white space is collapsed."""

    raw: str
    clean: str
    one_to_one: bool
    """Character i of `clean` is character i of `raw`, at most in another form."""


def is_untouched_ascii(text: str) -> bool:
    """Whether the text is ASCII that cleaning only lower-cases (white space aside)."""
    return text.isascii() and _CONTROL.search(text) is None and _no_entities(text)


def clean_words(text: str) -> list[str]:
    """The words of the cleaned text, lower-cased; joined by blanks they are the cleaned text."""
    if is_untouched_ascii(text):
        return text.lower().split()
    return "".join(line.clean for line in clean_lines(text)).split()


def clean_lines(text: str) -> Iterator[CleanLine]:
    """Cleans text line by line (lines keep their end), as cleaning the whole would."""
    # ftfy stops decoding entities at the first line that holds a "<", for the rest of the text.
    unescape: bool | str = "auto"
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        raw = text[start:end]
        start = end
        fixed = raw if is_untouched_ascii(raw) else _without_ftfy(raw)
        if fixed is None:
            fixed = ftfy.fix_text(raw, unescape_html=unescape)
            if "&" in fixed:
                fixed = html.unescape(html.unescape(fixed))
            one_to_one = fixed == raw
        else:
            one_to_one = True
        if "<" in raw:
            unescape = False
        clean = fixed.lower()
        yield CleanLine(raw, clean, one_to_one and len(clean) == len(raw))


def _without_ftfy(line: str) -> str | None:
    """What ftfy makes of a line, or None when only ftfy can tell."""
    if line.isascii() or _REPLACED.search(line):
        return None
    for match in _SUSPECT.finditer(line):
        if BADNESS_RE.search(line, max(0, match.start() - _CONTEXT), match.end() + _CONTEXT):
            return None
    straight = uncurl_quotes(line)
    if not _no_entities(straight) or not unicodedata.is_normalized("NFC", straight):
        return None
    return straight


def _no_entities(text: str) -> bool:
    """Whether neither ftfy nor `html` finds an entity, as in "you & me"."""
    return "&" not in text or (HTML_ENTITY_RE.search(text) is None and html.unescape(text) == text)
