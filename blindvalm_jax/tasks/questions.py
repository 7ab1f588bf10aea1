"""What a task asks: items, prompts made of them, and the candidates that a model chooses from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from blindvalm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One example of a data set.

    id: tells it from the others; items of one id are asked about the same thing, and are no
    independent evidence. words: what fills a prompt, by name. answer: the right candidate.
    objects: the two that an item compares, in one order whatever theirs is; None of other items.
    """

    id: str
    words: Mapping[str, str]
    answer: str
    objects: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt with its candidates.

    item, template: what it was made of; answer: place of the candidate that counts as right;
    objects: those of the item.
    """

    item: str
    template: int
    prompt: str
    candidates: tuple[str, ...]
    answer: int
    objects: tuple[str, str] | None = None


# From all items of a data set to what is asked.
Ask = Callable[[Sequence[Item]], Iterator[Question]]


def fill(template: str, words: Mapping[str, str]) -> str:
    """A template with words in the place of [NAME]; an empty word takes the blank behind it along.

    Raises:
      UserError: a name has no word.
    """
    for name in re.findall(r"\[([A-Z]+)\]", template):
        if name.lower() not in words:
            raise UserError(f"the prompt {template!r} needs {name}, an item has {[*words]}")
    for name, word in words.items():
        place = f"[{name.upper()}]"
        template = template.replace(place, word) if word else template.replace(f"{place} ", "")
    return template


def choices(items: Sequence[Item]) -> tuple[str, ...]:
    """All answers of a data set, in the order in which they first occur."""
    return tuple(dict.fromkeys(item.answer for item in items))


def asking(templates: Sequence[str], candidates: Sequence[str] = ()) -> Ask:
    """Every template about every item; candidates: the answers of the data set if none are given.

    Raises (when asked):
      UserError: an answer is no candidate.
    """

    def ask(items: Sequence[Item]) -> Iterator[Question]:
        chosen = tuple(candidates) or choices(items)
        places = {candidate: place for place, candidate in enumerate(chosen)}
        for number, template in enumerate(templates):
            for item in items:
                if item.answer not in places:
                    raise UserError(
                        f"item {item.id} has the answer {item.answer!r}, expected one of "
                        f"{', '.join(chosen)}"
                    )
                yield Question(
                    item=item.id,
                    template=number,
                    prompt=fill(template, item.words),
                    candidates=chosen,
                    answer=places[item.answer],
                    objects=item.objects,
                )

    return ask
