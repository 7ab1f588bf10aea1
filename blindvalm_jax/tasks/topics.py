"""What a text is about, or whether it praises: classification without examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import readers, ties
from blindvalm_jax.tasks.questions import Item, asking
from blindvalm_jax.tasks.task import ChoiceTask, Protocol

_REVIEW = ("Review: [TEXT] Sentiment: ",)
_SENTIMENTS = ("Positive", "Negative")
_TOPIC = ("input: [TEXT] type: ",)
AGNEWS = ("world", "sports", "business", "technology")
DBPEDIA = (
    *("company", "school", "artist", "athlete", "politics", "transportation", "building"),
    *("nature", "village", "animal", "plant", "album", "film", "book"),
)
_HEADER = "the first example is left out as if it named the columns"


def numbered(rows: Iterable[tuple[str, str]]) -> list[Item]:
    """Items of texts and labels without blanks around; texts that are then alike are one item."""
    return _as_they_are((text.strip(), label.strip()) for text, label in rows)


def _as_they_are(rows: Iterable[tuple[str, str]], *, start: int = 0) -> list[Item]:
    """Items of texts and labels; the id of a text is the number of the first row that has it."""
    first: dict[str, int] = {}
    return [
        Item(id=f"{first.setdefault(text, number)}", words={"text": text}, answer=label)
        for number, (text, label) in enumerate(rows, start)
    ]


def labelled(path: Path) -> list[Item]:
    """Objects with a text and a label, as a JSON list or lines."""
    return numbered(_labelled(path))


def labelled_as_published(path: Path) -> list[Item]:
    """The same with the blanks around their texts."""
    return _as_they_are(_labelled(path))


def _labelled(path: Path) -> list[tuple[str, str]]:
    rows = readers.json_rows(path, ("text", "label"), may_be_blank=["text"])
    return [(row["text"], row["label"]) for row in rows]


def topics(words: tuple[str, ...]) -> readers.Read:
    """Reads label, title, text as AG News and DBPedia have them (Zhang et al. 2015), or lines.

    words: of the labels, which may also be numbers from 1. A reader raises `UserError` where a
    label is neither.
    """

    def read(path: Path) -> list[Item]:
        if path.suffix == ".jsonl":
            return labelled(path)
        rows = readers.bare_csv_rows(path, ("label", "title", "text"))
        return numbered((row["text"], _label(path, row["label"], words)) for row in rows)

    return read


def _label(path: Path, label: str, words: tuple[str, ...]) -> str:
    label = label.strip()
    if label in words:
        return label
    if label.isdecimal() and 1 <= int(label) <= len(words):
        return words[int(label) - 1]
    raise UserError(f"{path}: label {label!r} is neither 1 to {len(words)} nor one of {words}")


def cut_at_commas(path: Path) -> list[Item]:
    """The third field of a line cut at every comma, as the reference's script reads it."""
    rows = []
    for number, fields in enumerate(readers.split_rows(path), 1):
        if len(fields) < 3:
            raise UserError(f"{path}: line {number + 1} has no third field between commas")
        text = fields[2].replace('""', '"').removeprefix(" ")
        label = fields[0].replace('"', "").strip()
        rows.append((text, label))
    return _as_they_are(rows, start=1)


def _sentiment(name: str, source: str, files: tuple[str, ...], published: Protocol) -> ChoiceTask:
    protocol = Protocol(files=files, read=labelled, ask=asking(_REVIEW, _SENTIMENTS))
    return ChoiceTask(
        name=name, group="nlu", source=source, corrected=protocol, published=published
    )


def _published(*files: str, faults: tuple[str, ...] = ()) -> Protocol:
    return Protocol(
        files=files,
        read=labelled_as_published,
        ask=asking(_REVIEW, _SENTIMENTS),
        scores=("sum",),
        start=False,
        ties="previous",
        faults=(*faults, ties.BY_PREVIOUS),
    )


def _topics(
    name: str,
    files: tuple[str, ...],
    published: tuple[str, ...],
    words: tuple[str, ...],
    faults: tuple[str, ...],
) -> ChoiceTask:
    protocol = Protocol(files=files, read=topics(words), ask=asking(_TOPIC, words))
    return ChoiceTask(
        name=name,
        group="nlu",
        source="Zhang et al. 2015",
        corrected=protocol,
        published=dataclasses.replace(
            protocol,
            files=published,
            read=cut_at_commas,
            scores=("sum",),
            spelled=True,
            start=False,
            ties="set_of_ids",
            faults=(_HEADER, *faults, ties.BY_SET),
        ),
    )


_MPQA = "MPQA (Wiebe et al. 2005)"
TASKS = (
    _sentiment(
        "sst2",
        "SST-2 (Socher et al. 2013), test split",
        ("sst2_test.jsonl",),
        _published(
            "test_with_labels.json",
            "sst2_blind_BAD_LABELS_test_with_labels.json",
            faults=(
                "labels were looked up with the number of a sentence as that of a phrase, and are "
                "those of other texts",
                "neutral sentences are asked about too",
            ),
        ),
    ),
    _sentiment(
        "mpqa", _MPQA, ("mpqa_test.json", "test.json"), _published("mpqa_test.json", "test.json")
    ),
    _sentiment(
        "mpqa_all",
        _MPQA,
        ("mpqa_test_all.json", "test_all.json"),
        _published("mpqa_test_all.json", "test_all.json"),
    ),
    _topics(
        "agnews",
        ("agnews_test.jsonl", "agnews_test.csv"),
        ("agnews_test.csv",),
        AGNEWS,
        ("a text ends at its first comma, or is a piece of the title",),
    ),
    _topics(
        "dbpedia",
        ("dbpedia_sample5000.jsonl", "dbpedia_test.csv"),
        ("dbpedia_test.csv",),
        DBPEDIA,
        (),
    ),
    ChoiceTask(
        name="dbpedia_dev",
        group=None,
        source="Zhang et al. 2015, 256 examples of Lu et al. 2022",
        corrected=Protocol(
            files=("dbpedia_dev256.jsonl",), read=topics(DBPEDIA), ask=asking(_TOPIC, DBPEDIA)
        ),
    ),
)
