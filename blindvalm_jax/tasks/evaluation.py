"""Tasks put to a model one after the other: the table on the screen, results.json, and lines."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blindvalm_jax import files, runs
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import answers, catalog, readers, results, tfds_data
from blindvalm_jax.tasks.asked import Asked, Outcome, Windows
from blindvalm_jax.tasks.last_word import AskedLastWords, LastWordTask
from blindvalm_jax.tasks.perplexity import AskedTexts, TextTask
from blindvalm_jax.tasks.questions import Item, Question
from blindvalm_jax.tasks.scoring import Rehearsal, Scorer
from blindvalm_jax.tasks.task import ChoiceTask, Protocol
from blindvalm_jax.tasks.texts import OwnTexts
from blindvalm_jax.trained import TrainedModel

PROTOCOLS = ("corrected", "published")
WINDOWS = Windows()
HEAD = (
    f"{'task':22} {'score':>8} {'stderr':>7} {'95 % interval':>17} {'majority':>9} {'random':>9} "
    f"{'n':>6}"
)


@dataclasses.dataclass(frozen=True)
class AskedChoice:
    """A task of choices under one protocol, its files read."""

    task: ChoiceTask
    protocol: Protocol
    items: list[Item]
    questions: list[Question]
    file: readers.File | None = None

    @property
    def name(self) -> str:
        """Of the task."""
        return self.task.name

    def run(self, scorer: Scorer, tokenizer: Tokenizer) -> Outcome:
        """Asks the model."""
        said = answers.answer(scorer, tokenizer, self.protocol, self.questions)
        entry = results.summary(
            self.task, self.protocol, self.items, self.questions, said, file=self.file
        )
        notes = () if self.file is None else self.file.notes
        if said.cut:
            notes = (
                *notes,
                f"{said.cut} prompts lost their beginning: {scorer.longest} positions",
            )
        return Outcome(entry, list(results.lines(self.questions, said, self.protocol)), notes)


def read(
    names: Sequence[str],
    protocol: str,
    data: Path | None,
    *,
    cut: Windows = WINDOWS,
    tfds: Path | None = None,
) -> list[Asked]:
    """Tasks by their names or groups, under a protocol; every file is read.

    A group has the tasks that know the protocol. data: None if none is named. cut: how texts are
    cut. tfds: directory of prepared TFDS datasets, to be read instead of files.

    Raises:
      UserError: there is no such task, it has no such protocol, or its file is not there or not
        what it should be.
    """
    found: list[Asked] = []
    for task in catalog.chosen(names):
        if isinstance(task, ChoiceTask) and protocol not in task.protocols:
            if task.name in names:
                [other] = task.protocols
                raise UserError(
                    f"{task.name} has no protocol {protocol!r}: take --protocol={other}"
                )
        elif isinstance(task, OwnTexts):
            found.append(task.open(protocol, cut))
        elif tfds is not None:
            found.append(_prepared(task, protocol, tfds, cut))
        elif data is None:
            raise UserError("--data is missing (see --help)")
        else:
            try:
                found.append(_opened(task, protocol, data, cut))
            except UserError as error:
                out = "" if task.name in names else "; to leave it out, name the tasks you want"
                raise UserError(f"{task.name}: {error}{out}") from error
    return found


def _opened(
    task: ChoiceTask | TextTask | LastWordTask, protocol: str, data: Path, cut: Windows
) -> Asked:
    """A task with its data from files."""
    if not isinstance(task, ChoiceTask):
        return task.open(protocol, data, cut)
    way = task.protocols[protocol]
    items = way.items(data)
    return AskedChoice(task, way, items, way.questions(items), way.file(data))


def _prepared(
    task: ChoiceTask | TextTask | LastWordTask, protocol: str, tfds: Path, cut: Windows
) -> Asked:
    """A task with its data from TFDS."""
    if protocol != "corrected":
        raise UserError("the published protocol reads the files of --data, not --tfds_dir")
    if isinstance(task, ChoiceTask):
        source, items = tfds_data.items(task.name, tfds)
        questions = task.corrected.questions(items)
        return AskedChoice(
            dataclasses.replace(task, source=source), task.corrected, items, questions
        )
    if task.name not in ("lambada", "lambada_perplexity"):
        raise UserError(
            f"{task.name} is not read from --tfds_dir, since TFDS has no such dataset: give its "
            "files with --data"
        )
    source, passages = tfds_data.passages(tfds)
    if isinstance(task, LastWordTask):
        return AskedLastWords(task.name, source, protocol, passages)
    return AskedTexts(task.name, source, "passage", passages, None, cut)


def about(model: str, *, step: int, dtype: str) -> dict[str, Any]:
    """What results.json says of a model: its directory or hub id, and how it is asked."""
    path = Path(model)
    where = str(path.resolve()) if path.exists() else model
    return {"model": where, "step": step, "dtype": dtype}


def rehearse(asked: Sequence[Asked], model: TrainedModel) -> None:
    """Puts tasks to a model without computing anything, so that none is refused half way.

    Raises:
      UserError: the model cannot be asked one of them.
    """
    scorer = Rehearsal(model)
    for one in asked:
        try:
            one.run(scorer, model.tokenizer)
        except UserError as error:
            raise UserError(f"{one.name}: {error}") from error


def run(
    asked: Sequence[Asked],
    scorer: Scorer,
    tokenizer: Tokenizer,
    *,
    protocol: str,
    out: Path,
    about: Mapping[str, Any],
    quiet: bool = False,
) -> dict[str, Any]:
    """Runs tasks and prints a line for each, unless quiet; `out` gets results.json and TASK.jsonl.

    about: what else results.json says of the model. Both are written after every task. Tasks that
    results.json has of the same model stay in it; of another they go, which is said.

    Returns what results.json holds.
    """
    head = {**about, "tokenizer": tokenizer.kind}
    tell = _silent if quiet else functools.partial(print, flush=True)
    commit = runs.commit()
    whole = {
        "tasks": _kept(out, head, tell),
        **head,
        "commit": commit,
        "versions": runs.versions(),
    }
    tell(HEAD)
    for one in asked:
        outcome = one.run(scorer, tokenizer)
        # Entries that stay may be of other code: each says its own.
        entry = {"protocol": protocol, "commit": commit, **outcome.entry}
        whole["tasks"][one.name] = entry
        text = "".join(f"{_json(line)}\n" for line in outcome.lines)
        out.mkdir(parents=True, exist_ok=True)
        files.write_bytes(out / f"{one.name}.jsonl", text.encode())
        files.write_json(out / "results.json", whole)
        tell(line_of(one.name, entry))
        for note in outcome.notes:
            tell(f"note: {note}")
    return whole


def _kept(out: Path, head: Mapping[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """Entries of results.json in `out` that are of the same model."""
    path = out / "results.json"
    if not path.exists():
        return {}
    before = files.read_object(path)
    other = [name for name, value in head.items() if before.get(name) != value]
    there = before.get("tasks")
    if not other and isinstance(there, dict):
        return there
    was = ", ".join(f"{name} {before.get(name)!r}" for name in other) or "no tasks"
    tell(f"note: {path} is replaced: it was of {was}")
    return {}


def _json(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False)


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
