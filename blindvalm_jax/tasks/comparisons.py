"""Which of two things is larger or taller: pairs, asked in both orders.

Two kinds of prompts: "which", where the candidates are the two things, and "than", where they are
the words of the comparison and the right one is said of the thing that is named first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import readers, ties
from blindvalm_jax.tasks.questions import Ask, Item, Question, asking, fill
from blindvalm_jax.tasks.task import ONE_DISTRIBUTION, ChoiceTask, Protocol

_MORE, _LESS = "more", "less"  # what A is to B
_WHICH_SIZE = (
    "Which is bigger? [A] or [B]",
    "Which is smaller? [A] or [B]",
    "Which is larger? [A] or [B]",
    "Which is tinier? [A] or [B]",
    "Which has a bigger size? [A] or [B]",
    "Which has a smaller size? [A] or [B]",
    "Which one is larger in size? [A] or [B]",
    "Which one is smaller in size? [A] or [B]",
)
_WHICH_HEIGHT = (
    "Which is taller? [A] or [B]",
    "Which is shorter? [A] or [B]",
    "Which is the tallest? [A] or [B]",
    "Which is the shortest? [A] or [B]",
)
# A first alone: as pairs are asked in both orders, B first would ask the same again.
_THAN_SIZE = (
    "[A] is larger or smaller than [B]?",
    "The size of [A] is larger or smaller than [B]?",
    "[A] has a larger or smaller size than [B]?",
    "[A] has a larger or a smaller size than [B]?",
)
_THAN_HEIGHT = ("[A] is taller or shorter than [B]?",)
# Templates take turns in which thing they name first. The fourth was two: a comma is missing in
# the script.
_THAN_SIZE_PUBLISHED = (
    "[A] is larger or smaller than [B]?",
    "[B] is larger or smaller than [A]?",
    "The size of [A] is larger or smaller than [B]?",
    "The size of [B] is larger or smaller than [A]?[A] has a larger or smaller size than [B]?",
    "[B] has a larger or a smaller size than [A]?",
)
_THAN_HEIGHT_PUBLISHED = (*_THAN_HEIGHT, "[B] is taller or shorter than [A]?")
_YES_NO = (
    "Is [A] bigger than [B]?",
    "Is [A] larger than [B]?",
    "Is [A] taller than [B]?",
    "[A] is bigger than [B], is it true?",
    "[A] is larger than [B], is it true?",
    "[A] is taller than [B], is it true?",
)
# The last three are one: two commas are missing in the script.
_YES_NO_PUBLISHED = (*_YES_NO[:3], "".join(_YES_NO[3:]))
_ANSWERS = ("no", "yes")  # as in the script, no wins a tie
_COUNTED_TWICE = "each answer is counted twice in the total, so that the accuracy is half"
_ONE_ORDER = "pairs are asked in the order of the file"


def pairs(
    path: Path, *, first: str, second: str, relation: str, more: object, less: object
) -> list[Item]:
    """Pairs A, B in the order of a file; relation: its field, `more` where A is the more.

    Raises:
      UserError: the relation is neither `more` nor `less`, or pairs contradict each other.
    """
    said = {(type(more), more): _MORE, (type(less), less): _LESS}
    found = []
    for number, row in enumerate(readers.json_rows(path, (first, second), (relation,)), 1):
        value = row[relation]
        if not isinstance(value, int | str) or (type(value), value) not in said:
            raise UserError(
                f"{path}: example {number} has {value!r} as {relation}, expected {more!r} or "
                f"{less!r}"
            )
        found.append(_pair(row[first], row[second], said[type(value), value]))
    return _agreeing(path, found)


def _pair(a: str, b: str, answer: str) -> Item:
    """An item whose id and objects are those of the pair in both orders; no blanks around names."""
    a, b = a.strip(), b.strip()
    objects = (min(a, b), max(a, b))
    return Item(id=" | ".join(objects), words={"a": a, "b": b}, answer=answer, objects=objects)


def _agreeing(path: Path, items: list[Item]) -> list[Item]:
    """The items of a file, if no two of them contradict each other."""
    try:
        both_orders(items)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return items


def _sized(path: Path) -> list[Item]:
    return pairs(path, first="sub", second="obj", relation="size", more="big", less="small")


def _labelled(path: Path) -> list[Item]:
    return pairs(path, first="obj_a", second="obj_b", relation="label", more=1, less=0)


def _larger_first(path: Path) -> list[Item]:
    """Lines of two words, the larger thing first; all are asked whether that is so."""
    found = []
    for number, line in enumerate(readers.lines_of(path), 1):
        words = line.split()
        if len(words) != 2:
            raise UserError(f"{path}:{number} has {len(words)} words, expected LARGER SMALLER")
        found.append(_pair(words[0], words[1], "yes"))
    _agreeing(path, [dataclasses.replace(item, answer=_MORE) for item in found])
    return found


def _larger_first_and_last(path: Path) -> list[Item]:
    """The same, and each pair the other way round, of which the right answer is no."""
    found = _larger_first(path)
    return [*found, *(dataclasses.replace(turned(item), answer="no") for item in found)]


def both_orders(items: Sequence[Item]) -> list[Item]:
    """Every pair in both orders, each asked once: those of the items, and those turned round.

    Items that say the same of a pair, in one order or both, are one pair here, however many rows
    they are of the file (`n` of an entry counts rows).

    Raises:
      UserError: two items contradict each other, or a thing is compared with itself.
    """
    found: dict[tuple[str, str], Item] = {}
    for item in items:
        a, b = item.words["a"], item.words["b"]
        if a == b:
            raise UserError(f"{a!r} is compared with itself: leave it out")
        alike = found.get((a, b), item), found.get((b, a), turned(item))
        if alike[0].answer != item.answer or alike[1].answer == item.answer:
            raise UserError(f"{a!r} is said to be both more and less than {b!r}: leave one out")
        found.setdefault((a, b), item)
    for item in list(found.values()):
        found.setdefault((item.words["b"], item.words["a"]), turned(item))
    return list(found.values())


def turned(item: Item) -> Item:
    """A pair the other way round."""
    return dataclasses.replace(
        item,
        words={"a": item.words["b"], "b": item.words["a"]},
        answer=_LESS if item.answer == _MORE else _MORE,
    )


def which(templates: Sequence[str]) -> Ask:
    """Asks which thing is more (first template, and every second) or less (the others)."""

    def ask(items: Sequence[Item]) -> Iterator[Question]:
        for number, template in enumerate(templates):
            for item in items:
                a_is_right = (item.answer == _MORE) == (number % 2 == 0)
                yield Question(
                    item=item.id,
                    template=number,
                    prompt=fill(template, item.words),
                    candidates=(item.words["a"], item.words["b"]),
                    answer=0 if a_is_right else 1,
                    objects=item.objects,
                )

    return ask


def than(
    templates: Sequence[str], more: str, less: str, *, right: Callable[[int, Item], bool]
) -> Ask:
    """Asks what the thing named first is; right: whether `more` counts as the answer."""

    def ask(items: Sequence[Item]) -> Iterator[Question]:
        for number, template in enumerate(templates):
            for item in items:
                yield Question(
                    item=item.id,
                    template=number,
                    prompt=fill(template, item.words),
                    candidates=(more, less),
                    answer=0 if right(number, item) else 1,
                    objects=item.objects,
                )

    return ask


def _of_a(number: int, item: Item) -> bool:
    """All templates name A first."""
    return item.answer == _MORE


def _of_first(number: int, item: Item) -> bool:
    """Templates take turns in which thing they name first."""
    return (item.answer == _MORE) == (number % 2 == 0)


def _by_place(number: int, item: Item) -> bool:
    """Of heights the script compares with a word that depends on the template alone."""
    return number % 2 == 0


def _turned(ask: Ask) -> Ask:
    return lambda items: ask(both_orders(items))


def _once(ask: Ask) -> Ask:
    """Rows that are alike are asked as one."""
    return lambda items: ask(list({(*item.words.values(),): item for item in items}.values()))


def _task(
    name: str,
    source: str,
    files: tuple[str, ...],
    read: readers.Read,
    *,
    ask: Ask,
    published: Ask,
    faults: tuple[str, ...] = (),
) -> ChoiceTask:
    protocol = Protocol(files=files, read=read, ask=_turned(ask))
    return ChoiceTask(
        name=name,
        group="vlu",
        source=source,
        corrected=protocol,
        published=dataclasses.replace(
            protocol,
            ask=published,
            scores=("mean", "sum"),
            share=0.5,
            spelled=True,
            start=False,
            ties="set_of_tuples",
            faults=(_COUNTED_TWICE, _ONE_ORDER, ONE_DISTRIBUTION, *faults, ties.BY_SET),
        ),
    )


def _both(
    name: str, source: str, files: tuple[str, ...], read: readers.Read
) -> tuple[ChoiceTask, ChoiceTask]:
    size = functools.partial(than, more="larger", less="smaller")
    return (
        _task(name, source, files, read, ask=which(_WHICH_SIZE), published=which(_WHICH_SIZE)),
        _task(
            f"{name}_than",
            source,
            files,
            read,
            ask=size(_THAN_SIZE, right=_of_a),
            published=size(_THAN_SIZE_PUBLISHED, right=_of_first),
            faults=("two templates are one, and the last is scored as if it named A first",),
        ),
    )


def _size_pairs() -> ChoiceTask:
    protocol = Protocol(
        files=("sizePairsFull.txt",),
        read=_larger_first_and_last,
        ask=_once(asking(_YES_NO, _ANSWERS)),
    )
    return ChoiceTask(
        name="size_pairs_legacy",
        group="vlu",
        source="Relative Size (Bagherinezhad et al. 2016), asked as in VALM (arXiv 2205.10178)",
        corrected=protocol,
        published=dataclasses.replace(
            protocol,
            read=_larger_first,
            ask=asking(_YES_NO_PUBLISHED, _ANSWERS),
            scores=("sum",),
            start=False,
            faults=(
                "the larger thing is always named first: who always says yes is always right",
                "three templates are one: two commas are missing",
            ),
        ),
    )


_TNWT = "Things not Written in Text (Liu et al. 2022)"
TASKS = (
    *_both(
        "relative_size",
        "Relative Size (Bagherinezhad et al. 2016)",
        ("relative_size.jsonl",),
        _sized,
    ),
    *_both("vicomte_size", "ViComTe (Zhang et al. 2022)", ("combined_size.jsonl",), _sized),
    *_both("tnwit_size", _TNWT, ("tnwit_size.json",), _labelled),
    _task(
        "tnwit_height",
        _TNWT,
        ("tnwit_height.json",),
        _labelled,
        ask=which(_WHICH_HEIGHT),
        published=which(_WHICH_HEIGHT),
    ),
    _task(
        "tnwit_height_than",
        _TNWT,
        ("tnwit_height.json",),
        _labelled,
        ask=than(_THAN_HEIGHT, "taller", "shorter", right=_of_a),
        published=than(_THAN_HEIGHT_PUBLISHED, "taller", "shorter", right=_by_place),
        faults=("what counts as right depends on the template alone, not on the pair",),
    ),
    _size_pairs(),
)
