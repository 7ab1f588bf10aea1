"""Tasks put to a model one after the other: the table on the screen, results.json, and lines."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blindvalm_jax import files, runs
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import answers, catalog, results
from blindvalm_jax.tasks.questions import Item, Question
from blindvalm_jax.tasks.scoring import Scorer
from blindvalm_jax.tasks.task import ChoiceTask, Protocol

PROTOCOLS = ("corrected", "published")
HEAD = (
    f"{'task':22} {'score':>8} {'stderr':>7} {'95 % interval':>17} {'majority':>9} {'random':>9} "
    f"{'n':>6}"
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a task has given: its entry of results.json, a line for each question, and notes."""

    entry: dict[str, Any]
    lines: list[dict[str, Any]]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class AskedChoice:
    """A task of choices under one protocol, its files read."""

    task: ChoiceTask
    protocol: Protocol
    items: list[Item]
    questions: list[Question]

    @property
    def name(self) -> str:
        """Of the task."""
        return self.task.name

    def run(self, scorer: Scorer, tokenizer: Tokenizer) -> Outcome:
        """Asks the model."""
        said = answers.answer(scorer, tokenizer, self.protocol, self.questions)
        entry = results.summary(self.task, self.protocol, self.items, self.questions, said)
        notes: tuple[str, ...] = ()
        if said.cut:
            notes = (f"{said.cut} prompts lost their beginning: {scorer.longest} positions",)
        return Outcome(entry, list(results.lines(self.questions, said, self.protocol)), notes)


def read(names: Sequence[str], protocol: str, data: Path) -> list[AskedChoice]:
    """Tasks by their names or groups, under a protocol; every file is read.

    A group has the tasks that know the protocol.

    Raises:
      UserError: there is no such task, it has no such protocol, or its file is not there or not
        what it should be.
    """
    found = []
    for task in catalog.chosen(names):
        if _left_out(task, protocol, names):
            continue
        way = task.corrected if protocol == "corrected" else task.published
        if way is None:
            raise UserError(f"{task.name} was not published with a protocol: take corrected")
        items = way.items(data)
        found.append(AskedChoice(task, way, items, way.questions(items)))
    return found


def _left_out(task: object, protocol: str, names: Sequence[str]) -> bool:
    """Whether a task that belongs to a group is not asked under the protocol.

    Raises:
      UserError: it is named itself.
    """
    if not isinstance(task, ChoiceTask) or protocol == "published" or not task.only_published:
        return False
    if task.name in names:
        raise UserError(f"{task.name} has no protocol {protocol!r}: take --protocol=published")
    return True


def run(
    asked: Sequence[AskedChoice],
    scorer: Scorer,
    tokenizer: Tokenizer,
    *,
    protocol: str,
    out: Path,
    about: Mapping[str, Any],
    quiet: bool = False,
) -> dict[str, Any]:
    """Runs tasks and prints a line for each, unless quiet; `out` gets results.json and TASK.jsonl.

    about: what else results.json says of the model. Returns what results.json holds.
    """
    found: dict[str, Any] = {}
    tell = _silent if quiet else functools.partial(print, flush=True)
    tell(HEAD)
    for one in asked:
        outcome = one.run(scorer, tokenizer)
        found[one.name] = {"protocol": protocol, **outcome.entry}
        text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in outcome.lines)
        out.mkdir(parents=True, exist_ok=True)
        files.write_bytes(out / f"{one.name}.jsonl", text.encode())
        tell(line_of(one.name, found[one.name]))
        for note in outcome.notes:
            tell(f"note: {note}")
    whole = {
        "tasks": found,
        **about,
        "tokenizer": tokenizer.kind,
        "commit": runs.commit(),
        "versions": runs.versions(),
    }
    files.write_json(out / "results.json", whole)
    return whole


def _silent(line: str) -> None:
    """Prints nothing."""


def line_of(name: str, entry: Mapping[str, Any]) -> str:
    """A task's line in the table: accuracies in percent, perplexities as they are."""
    unit = 100 if entry["metric"] == "accuracy" else 1

    def shown(value: float | None, width: int) -> str:
        return " " * width if value is None else f"{unit * value:{width}.2f}"

    interval = "[{}, {}]".format(*(shown(value, 0) for value in entry["interval"]))
    return (
        f"{name:22} {shown(entry['score'], 8)} {shown(entry['stderr'], 7)} {interval:>17} "
        f"{shown(entry['majority'], 9)} {shown(entry['random'], 9)} {entry['n']:6}"
    )
