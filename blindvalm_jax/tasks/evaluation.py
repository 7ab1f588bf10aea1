"""Tasks put to a model one after the other: the table on the screen, results.json, and lines."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from blindvalm_jax import files, runs
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import answers, catalog, identity, readers, results, standing, tfds_data
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
# What an entry says of what was asked, beside its protocol.
_ASKED = ("file", "majority_file", "window", "stride")
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


def rehearse(asked: Sequence[Asked], model: TrainedModel) -> dict[str, dict[str, Any]]:
    """Puts tasks to a model without computing anything, so that none is refused half way.

    Returns what each entry will say of what was asked (`_ASKED`), by task.

    Raises:
      UserError: the model cannot be asked one of them.
    """
    scorer, found = Rehearsal(model), {}
    for one in asked:
        try:
            entry = one.run(scorer, model.tokenizer).entry
        except UserError as error:
            raise UserError(f"{one.name}: {error}") from error
        found[one.name] = {name: entry[name] for name in _ASKED if name in entry}
    return found


def run(
    asked: Sequence[Asked],
    scorer: Scorer,
    tokenizer: Tokenizer,
    *,
    protocol: str,
    out: Path,
    about: Mapping[str, Any],
    there: Mapping[str, Mapping[str, Any]] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Runs tasks and prints a line for each, unless quiet; `out` gets results.json and TASK.jsonl.

    about: what else results.json says of the model (`identity.about`). Both are written after every
    task. Entries that results.json has of the same model stay in it, those of another are put
    aside; that is said, and what was asked under another protocol or in other windows. there: of
    `rehearse`: tasks that were asked just so by this code before are not asked again; None: all
    are.

    Returns what results.json holds.
    """
    head = {**about, "tokenizer": tokenizer.kind}
    tell = _silent if quiet else functools.partial(print, flush=True)
    code = {"commit": runs.commit(), "code_sha256": runs.CODE_SHA256}
    # In training the answers of a step take the place of those before.
    kept = _kept(out, head, expected=[one.name for one in asked] if quiet else ())
    whole = {"tasks": kept, **head, **code, "versions": runs.versions()}
    tell(HEAD)
    for one in asked:
        before = whole["tasks"].get(one.name)
        wanted = {"protocol": protocol, "code_sha256": runs.CODE_SHA256}
        if there is not None and _is_there(out, one.name, before, {**wanted, **there[one.name]}):
            tell(line_of(one.name, before))
            tell(f"already there: {one.name} (--again asks anew)")
            continue
        outcome = one.run(scorer, tokenizer)
        # Entries that stay may be of other code: each says its own.
        entry = {"protocol": protocol, **code, **outcome.entry}
        out.mkdir(parents=True, exist_ok=True)
        entry["lines"] = results.write_lines(out, one.name, outcome.lines)
        whole["tasks"][one.name] = entry
        files.write_json(out / "results.json", whole)
        tell(line_of(one.name, entry))
        for note in (*outcome.notes, *_replaced(before, entry)):
            tell(f"note: {note}")
    return whole


def _kept(out: Path, head: Mapping[str, Any], *, expected: Collection[str]) -> dict[str, Any]:
    """Entries of results.json in `out` that are of the same model; those of another are put aside.

    expected: names of tasks whose entries may go.
    """
    before = standing.read(out)
    entries = before.get("tasks", {})
    other = identity.differences(before, head) if entries else ""
    if not other:
        return dict(entries)
    if not set(entries) <= {*expected}:
        aside = standing.put_aside(out, "before")
        standing.tell(f"{out} held {', '.join(entries)} of {other}: they are in {aside} now")
    return {}


def _is_there(
    out: Path, task: str, before: Mapping[str, Any] | None, wanted: Mapping[str, Any]
) -> TypeGuard[Mapping[str, Any]]:
    """Whether an entry says that it was asked as wanted, of the same file, and has its lines."""
    if before is None or wanted.get("file") is None:  # a TFDS data set has no file to know it by
        return False
    same = all(before.get(name) == value for name, value in wanted.items())
    return same and results.holds_lines(out, task, before)


def _replaced(before: Mapping[str, Any] | None, entry: Mapping[str, Any]) -> list[str]:
    """A note on an entry of another protocol, or other windows, in the place of which one is."""
    if before is None:
        return []
    names = [x for x in ("protocol", "window", "stride") if before.get(x) != entry.get(x)]
    was = ", ".join(f"{name} {before.get(name)}" for name in names)
    return [f"in the place of what was asked with {was}"] if names else []


def _silent(line: str) -> None:
    """Prints nothing."""


def line_of(name: str, entry: Mapping[str, Any]) -> str:
    """A task's line in the table: accuracies in percent, perplexities as they are."""
    unit = 100 if entry["metric"] == "accuracy" else 1

    def shown(value: float | None, width: int) -> str:
        return " " * width if value is None else f"{unit * value:{width}.2f}"

    ends = [shown(value, 0) for value in entry["interval"]]
    interval = "[{}, {}]".format(*ends) if any(ends) else ""
    return (
        f"{name:22} {shown(entry['score'], 8)} {shown(entry['stderr'], 7)} {interval:>17} "
        f"{shown(entry['majority'], 9)} {shown(entry['random'], 9)} {entry['n']:6}"
    )
