"""Refuses texts that give away what only pictures may tell, whatever templates they come from.

It knows the words of attributes and their forms (reddish, circular), not their synonyms.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence

from blindvalm_jax.errors import UserError
from blindvalm_jax.toyworld.world import Object, attribute_of

_Read = Callable[[str], tuple[list[Object], list[tuple[str, str]]]]


def check(
    captions: Iterable[str],
    sentences: Iterable[str],
    things: Sequence[Object],
    *,
    stated_heldout: float,
) -> None:
    """Reads every text as words; forms such as "reddish" or "circles" count as attribute words.

    Raises:
      UserError: a caption holds a name and an attribute word; a caption or sentence names two
        objects, which may liken one to the other; a sentence holds an attribute word and a dev or
        held-out name while `stated_heldout` is 0, or one that is not true of what it names, or one
        but no name. The first such text and the count of its kind are named.
    """
    read = _reader(things)
    found: dict[str, list[str]] = {}
    for text in captions:
        named, stated = read(text)
        if named and stated:
            found.setdefault("a caption both names and describes", []).append(text)
        if len(set(named)) > 1:
            found.setdefault("a caption names two objects", []).append(text)
    for text in sentences:
        kind = _fault(*read(text), stated_heldout)
        if kind is not None:
            found.setdefault(kind, []).append(text)
    for kind, texts in found.items():
        raise UserError(
            f"the toy world leaks: {kind}: {texts[0]!r}, and {len(texts)} of that kind in all; "
            "its templates must be mended"
        )


def _fault(named: list[Object], stated: list[tuple[str, str]], stated_heldout: float) -> str | None:
    if len(set(named)) > 1:
        return "a sentence names two objects"
    if not stated:
        return None
    if not named:
        return "a sentence holds an attribute word without stating it of an object"
    hidden = [thing.split for thing in named if thing.split != "train"]
    if hidden and not stated_heldout:
        return f"a sentence states an attribute of a {hidden[0]} object"
    if any(thing.value(attribute) != value for thing in named for attribute, value in stated):
        return "a sentence states what is not true of its object"
    return None


def _reader(things: Sequence[Object]) -> _Read:
    by_name = {thing.name: thing for thing in things}
    lengths = sorted({len(name) for name in by_name})

    @functools.cache
    def thing_of(word: str) -> Object | None:
        """A name may have an ending, as in a plural."""
        starts = (by_name.get(word[:length]) for length in lengths)
        return next((thing for thing in starts if thing is not None), None)

    values_of = functools.cache(attribute_of)

    def read(text: str) -> tuple[list[Object], list[tuple[str, str]]]:
        words = re.findall(r"[a-z]+", text.lower())
        named = [thing for thing in map(thing_of, words) if thing is not None]
        stated = [value for value in map(values_of, words) if value is not None]
        return named, stated

    return read
