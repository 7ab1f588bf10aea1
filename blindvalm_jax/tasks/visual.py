"""What things look like: colours, shapes and sizes, asked of a language model without examples.

Templates and candidates are those of the BLIND-VALM evaluation (arXiv 2409.11148); what its scripts
do otherwise than they should is named beside each.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from blindvalm_jax.tasks import comparisons, readers
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
    """Memory Colors (Norlund et al. 2021)."""
    rows = readers.csv_rows(path, ["Index", "Descriptor", "Item", "Color"])
    return [
        Item(
            id=row["Index"],
            words={"descriptor": row["Descriptor"].strip(), "item": row["Item"].strip()},
            answer=row["Color"].strip(),
        )
        for row in rows
    ]


def color_terms(path: Path) -> list[Item]:
    """Color Terms (Bruni et al. 2012)."""
    rows = readers.csv_rows(path, ["object", "color"])
    return [
        Item(id=x["object"], words={"descriptor": "", "item": x["object"]}, answer=x["color"])
        for x in rows
    ]


def vicomte(path: Path) -> list[Item]:
    """ViComTe, colours or shapes (Zhang et al. 2022): the typical value of a thing."""
    return [
        Item(id=f"{number}", words={"item": row["sub"]}, answer=row["obj"])
        for number, row in enumerate(readers.json_rows(path, ("sub", "obj")))
    ]


def shapeit(path: Path) -> list[Item]:
    """ShapeIt (Alper et al. 2023)."""
    rows = readers.csv_rows(path, ["word", "gt", "options"])
    return [Item(id=row["word"], words={"item": row["word"]}, answer=row["gt"]) for row in rows]


def _colors(name: str, source: str, protocol: Protocol) -> ChoiceTask:
    """A task of one-token candidates: as published, but for a prompt that stands alone."""
    published = dataclasses.replace(protocol, scores=("sum",), spelled=True, start=False)
    return ChoiceTask(
        name=name, group="vlu", source=source, corrected=protocol, published=published
    )


def _vicomte_color(name: str, file: str) -> ChoiceTask:
    protocol = Protocol(files=(file,), read=vicomte, ask=asking(_VICOMTE_COLORS))
    return _colors(name, "ViComTe (Zhang et al. 2022)", protocol)


def _vicomte_shape(name: str, file: str) -> ChoiceTask:
    protocol = Protocol(files=(file,), read=vicomte, ask=asking(_SHAPES))
    published = dataclasses.replace(
        protocol,
        scores=("mean_probability",),
        spelled=True,
        start=False,
        faults=(ONE_DISTRIBUTION,),
    )
    return ChoiceTask(
        name=name,
        group="vlu",
        source="ViComTe (Zhang et al. 2022)",
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
        faults=(
            ONE_DISTRIBUTION,
            "log probabilities are added to 1, which is then divided among the tokens too",
        ),
    )
    return ChoiceTask(
        name=name,
        group="vlu",
        source="ShapeIt (Alper et al. 2023)",
        corrected=protocol,
        published=published,
    )


TASKS = (
    _colors(
        "memory_colors",
        "Memory Colors (Norlund et al. 2021)",
        Protocol(files=("memory_color_data.csv",), read=memory_colors, ask=asking(_COLORS)),
    ),
    _colors(
        "color_terms",
        "Color Terms (Bruni et al. 2012)",
        Protocol(files=("color-concrete-objects.csv",), read=color_terms, ask=asking(_COLORS)),
    ),
    _vicomte_color("vicomte_color_all", "test_color_all.jsonl"),
    _vicomte_color("vicomte_color_single", "test_color_single.jsonl"),
    _shapeit("shapeit", _SHAPES_OF),
    _shapeit("shapeit_p0", _SHAPES),
    _shapeit("shapeit_p2", (*_SHAPES_OF, *_SHAPES[:2])),
    _vicomte_shape("vicomte_shape_all", "objectSize.json"),
    _vicomte_shape("vicomte_shape_single", "test_shape.jsonl"),
    *comparisons.TASKS,
)
