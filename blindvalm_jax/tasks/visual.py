"""What things look like: colours, shapes and sizes, asked of a language model without examples.

Templates and candidates are those of the BLIND-VALM evaluation (arXiv 2409.11148); what its scripts
do otherwise than they should is named beside each.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import comparisons, readers, ties
from blindvalm_jax.tasks.questions import Item, asking
from blindvalm_jax.tasks.task import ONE_DISTRIBUTION, ChoiceTask, Protocol

_COLORS = (
    "Q: What is the color of [DESCRIPTOR] [ITEM]? A: It is",
    "Q: What is the colour of [DESCRIPTOR] [ITEM] ? A: It is ",
    "What is the color of [DESCRIPTOR] [ITEM]? It is",
    "What is the colour of [DESCRIPTOR] [ITEM]? ",
    "What is the usual color of [DESCRIPTOR] [ITEM]?",
    "What is the typical color of [DESCRIPTOR] [ITEM]?",
    "The color of [DESCRIPTOR] [ITEM] is",
    "The usual color of [DESCRIPTOR] [ITEM] is",
    "[DESCRIPTOR] [ITEM] usually has the color of",
)
# VALM's own list: two templates are others.
_COLORS_VALM = (
    *(_COLORS[0], _COLORS[2], *_COLORS[4:8]),
    "The common color of [DESCRIPTOR] [ITEM] is",
    "The typical color of [DESCRIPTOR] [ITEM] is",
    _COLORS[8],
)
_VICOMTE_COLORS = (
    "[ITEM] can be of color ",
    "[ITEM] has color ",
    "The color of [ITEM] can be ",
    "The color of the [ITEM] is ",
    "[ITEM] is ",
    "This [ITEM] is ",
    "[ITEM] is of color ",
)
_SHAPES = (
    "[ITEM] can be shape",
    "[ITEM] has shape",
    "[ITEM] is of shape",
    "The shape of [ITEM] can be",
    "The shape of the [ITEM] is",
)
_SHAPES_OF = (
    "[ITEM] can be shape of",
    "[ITEM] has shape of",
    *_SHAPES[2:],
    "[ITEM] is",
    "This [ITEM] is",
)


def memory_colors(path: Path) -> list[Item]:
    """Memory Colors (Norlund et al. 2021).

    Raises:
      UserError: two rows have one index, or see `readers.csv_rows`.
    """
    columns = ["Index", "Descriptor", "Item", "Color"]
    rows = _stripped(readers.csv_rows(path, columns, may_be_blank=["Descriptor"]))
    for index, count in Counter(row["Index"] for row in rows).items():
        if count > 1:
            raise UserError(
                f"{path}: {count} rows have {index} as Index, expected one: number them anew"
            )
    return [
        Item(
            id=row["Index"],
            words={"descriptor": row["Descriptor"], "item": row["Item"]},
            answer=row["Color"],
        )
        for row in rows
    ]


def _stripped(rows: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """Fields without blanks around, which would be other candidates; the scripts drop them too."""
    return [{name: field.strip() for name, field in row.items()} for row in rows]


def color_terms(path: Path) -> list[Item]:
    """Color Terms (Bruni et al. 2012)."""
    rows = _stripped(readers.csv_rows(path, ["object", "color"]))
    return [
        Item(id=x["object"], words={"descriptor": "", "item": x["object"]}, answer=x["color"])
        for x in rows
    ]


def color_terms_valm(path: Path) -> list[Item]:
    """Color Terms as VALM's script fills its templates: the name of the descriptor stays there."""
    return [
        dataclasses.replace(item, words={**item.words, "descriptor": "[DESCRIPTOR]"})
        for item in color_terms(path)
    ]


def _vicomte(path: Path, answer: str) -> list[Item]:
    return [
        Item(id=f"{number}", words={"item": row["sub"].strip()}, answer=row[answer].strip())
        for number, row in enumerate(readers.json_rows(path, ("sub", answer)))
    ]


def vicomte(path: Path) -> list[Item]:
    """ViComTe, colours or shapes (Zhang et al. 2022): the typical value of a thing."""
    return _vicomte(path, "obj")


def vicomte_alt(path: Path) -> list[Item]:
    """The same things with a value that they do not have as the answer."""
    return _vicomte(path, "alt")


def shapeit(path: Path) -> list[Item]:
    """ShapeIt (Alper et al. 2023)."""
    columns = ["word", "gt", "options"]
    rows = _stripped(readers.csv_rows(path, columns, may_be_blank=["options"]))
    return [Item(id=row["word"], words={"item": row["word"]}, answer=row["gt"]) for row in rows]


def _as_published(protocol: Protocol, *faults: str) -> Protocol:
    """A protocol of one-token candidates as the reference carries it out."""
    return dataclasses.replace(
        protocol,
        scores=("sum",),
        spelled=True,
        start=False,
        ties="set_of_ids",
        faults=(*faults, ties.BY_SET),
    )


def _colors(name: str, source: str, protocol: Protocol) -> ChoiceTask:
    """A task of one-token candidates: as published, but for a prompt that stands alone."""
    published = _as_published(protocol)
    return ChoiceTask(
        name=name, group="vlu", source=source, corrected=protocol, published=published
    )


def _only_published(name: str, source: str, protocol: Protocol, *faults: str) -> ChoiceTask:
    """A variant that is here only because figures of it were printed."""
    return ChoiceTask(
        name=name,
        group="vlu",
        source=source,
        corrected=protocol,
        published=_as_published(protocol, *faults),
        only_published=True,
    )


def _vicomte_color(name: str, file: str) -> tuple[ChoiceTask, ChoiceTask]:
    protocol = Protocol(files=(file,), read=vicomte, ask=asking(_VICOMTE_COLORS))
    wrong = dataclasses.replace(protocol, read=vicomte_alt)
    return (
        _colors(name, _VICOMTE, protocol),
        _only_published(f"{name}_alt", _VICOMTE, wrong, _DISTRACTOR),
    )


def _vicomte_shape(name: str, file: str) -> ChoiceTask:
    protocol = Protocol(files=(file,), read=vicomte, ask=asking(_SHAPES))
    published = dataclasses.replace(
        protocol,
        scores=("mean_probability",),
        spelled=True,
        start=False,
        ties="set_of_tuples",
        faults=(ONE_DISTRIBUTION, ties.BY_SET),
    )
    return ChoiceTask(
        name=name,
        group="vlu",
        source=_VICOMTE,
        corrected=protocol,
        published=published,
    )


def _shapeit(name: str, templates: tuple[str, ...]) -> ChoiceTask:
    protocol = Protocol(files=("shape_association.csv",), read=shapeit, ask=asking(templates))
    published = dataclasses.replace(
        protocol,
        scores=("mean_from_one", "sum_from_one"),
        spelled=True,
        start=False,
        ties="set_of_tuples",
        faults=(
            ONE_DISTRIBUTION,
            "log probabilities are added to 1, which is then divided among the tokens too",
            ties.BY_SET,
        ),
    )
    return ChoiceTask(
        name=name,
        group="vlu",
        source="ShapeIt (Alper et al. 2023)",
        corrected=protocol,
        published=published,
    )


_MEMORY_COLORS = "Memory Colors (Norlund et al. 2021)"
_COLOR_TERMS = "Color Terms (Bruni et al. 2012)"
_VICOMTE = "ViComTe (Zhang et al. 2022)"
_DISTRACTOR = "what counts as right is a colour that the thing does not have"
_THINGS = Protocol(files=("memory_color_data.csv",), read=memory_colors, ask=asking(_COLORS))
_OBJECTS = Protocol(files=("color-concrete-objects.csv",), read=color_terms, ask=asking(_COLORS))
TASKS = (
    _colors("memory_colors", _MEMORY_COLORS, _THINGS),
    _only_published(
        "memory_colors_valm",
        _MEMORY_COLORS,
        dataclasses.replace(_THINGS, ask=asking(_COLORS_VALM)),
    ),
    _colors("color_terms", _COLOR_TERMS, _OBJECTS),
    _only_published(
        "color_terms_valm",
        _COLOR_TERMS,
        dataclasses.replace(_OBJECTS, read=color_terms_valm, ask=asking(_COLORS_VALM)),
        "every prompt holds the word [DESCRIPTOR]",
    ),
    *_vicomte_color("vicomte_color_all", "test_color_all.jsonl"),
    *_vicomte_color("vicomte_color_single", "test_color_single.jsonl"),
    _shapeit("shapeit", _SHAPES_OF),
    _shapeit("shapeit_p0", _SHAPES),
    _shapeit("shapeit_p2", (*_SHAPES_OF, *_SHAPES[:2])),
    _vicomte_shape("vicomte_shape_all", "objectSize.json"),
    _vicomte_shape("vicomte_shape_single", "test_shape.jsonl"),
    *comparisons.TASKS,
)
