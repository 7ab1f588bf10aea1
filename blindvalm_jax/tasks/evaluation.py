"""Tasks put to a model one after the other: the table on the screen, results.json, and lines."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blindvalm_jax import files, runs
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import answers, catalog, places, readers, results, standing, tfds_data
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
    in_training: bool = False,
) -> dict[str, Any]:
    """Runs tasks and prints a line for each; `out` gets results.json and TASK.jsonl after each.

    about: what else results.json says of the model (`identity.about`). Entries that results.json
    has of the same model and protocol stay in it; for others see `standing.settle`. there: of
    `rehearse`: tasks that were asked just so by this code before are not asked again; None: all
    are. in_training: nothing is printed, and entries say that training asked.

    Returns what results.json holds.

    Raises:
      UserError: see `standing.settle`; or a file cannot be written.
    """
    head = {**about, "tokenizer": tokenizer.kind}
    tell = _silent if in_training else functools.partial(print, flush=True)
    code = {"commit": runs.commit(), "code_sha256": runs.CODE_SHA256}
    own = {"in_training": True} if in_training else {}
    names = [one.name for one in asked]
    kept = standing.settle(out, head, protocol=protocol, names=names, in_training=in_training)
    whole = {"tasks": kept, **head, **code, "versions": runs.versions()}
    tell(HEAD)
    for one in asked:
        before: Any = kept.get(one.name)
        wanted = {"protocol": protocol, "code_sha256": runs.CODE_SHA256}
        if there is not None and _is_there(out, one.name, before, {**wanted, **there[one.name]}):
            tell(line_of(one.name, before))
            tell(f"already there: {one.name} (--again asks anew)")
            continue
        outcome = one.run(scorer, tokenizer)
        # Entries that stay may be of other code: each says its own.
        entry = {"protocol": protocol, **code, **own, **outcome.entry}
        content = results.as_lines(outcome.lines)
        kept[one.name] = {**entry, "lines": results.about_lines(content)}
        with standing.writing(out):
            out.mkdir(parents=True, exist_ok=True)
            # The first of both: no file is there that it does not account for.
            files.write_json(out / places.RESULTS, whole)
            files.write_bytes(out / places.lines(one.name), content)
        tell(line_of(one.name, entry))
        for note in outcome.notes:
            tell(f"note: {note}")
        if before is not None and (was := _replaced(before, entry)):
            standing.tell(f"{one.name} is in the place of what was asked with {was}")
    return whole


def _is_there(
    out: Path, task: str, before: Mapping[str, Any] | None, wanted: Mapping[str, Any]
) -> bool:
    """Whether an entry says that it was asked as wanted, of the same file, and has its lines."""
    if before is None or wanted.get("file") is None:  # a TFDS data set has no file to know it by
        return False
    same = all(before.get(name) == value for name, value in wanted.items())
    return same and results.holds_lines(out, task, before)


def _replaced(before: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """What was asked otherwise before, in a few words; "" if nothing was."""
    names = [x for x in ("source", *_ASKED) if before.get(x) != entry.get(x)]
    return ", ".join(f"{name} {_told(before.get(name))}" for name in names)


def _told(value: Any) -> str:
    """A value of an entry; of a file its name and the beginning of its hash."""
    return f"{value['name']} ({value['sha256'][:12]}…)" if isinstance(value, dict) else f"{value}"


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
