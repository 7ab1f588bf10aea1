"""What came of the runs of a sweep: one `Result` each, as CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from blindvalm_jax.errors import UserError

FLOPS, SECONDS = "model FLOPs", "device-seconds"  # the two budgets, as `Points.unit` names them


@dataclasses.dataclass(frozen=True)
class Score:
    """Of a task, at the last update.

    accuracy: a share; questions: how many there are that do not hang together; chance: the share
    that a guess gets right.
    """

    accuracy: float
    questions: int
    chance: float


@dataclasses.dataclass(frozen=True)
class Once:
    """What families need that is done once; share: of the largest budget, how many times.

    flops, share: None where nothing tells them.
    """

    what: str
    families: tuple[str, ...]
    flops: float | None
    share: float | None


@dataclasses.dataclass(frozen=True)
class Result:
    """A run: what it is, what it cost, and what came of it.

    size: "4x64", layers x width. budget: model FLOPs that its group has in common. n: trained
    parameters with the tied head, without the padding of the vocabulary. tokens, flops and seconds
    (of all devices together; None: not known) are of the whole run. loss: held out, at the last
    update; None unless done. device: the kind that seconds are of, "" where they are not known.
    ended: done, diverged, failed, preempted, or "". about: why. trunk:
    the run that its beginning is that of, "" if it has one of its own.
    """

    name: str
    family: str
    size: str
    budget: float
    n: int
    tokens: int
    flops: float
    seconds: float | None
    loss: float | None
    scores: Mapping[str, Score]
    ended: str
    about: str
    trunk: str = ""
    device: str = ""

    @property
    def unusable(self) -> str:
        """Why an analysis leaves it out; "" if it does not."""
        why = f": {self.about}" if self.about else ""
        if self.ended in ("diverged", "failed"):
            return f"{self.ended}{why}"
        if self.ended != "done":
            return f"unfinished{': ' + self.ended if self.ended else ''}{why}"
        if self.loss is None:
            return f"done, and has no held-out loss of its last update{why}"
        if not (math.isfinite(self.loss) and self.loss > 0):
            return f"done, and its held-out loss is {self.loss:g}{why}"
        return ""

    @property
    def held_out(self) -> float:
        """The loss of a usable run."""
        if self.loss is None:
            raise ValueError(f"run {self.name} has no loss: {self.unusable}")
        return self.loss

    def cost(self, unit: str) -> float | None:
        """What it cost in model FLOPs or device-seconds; None: not known."""
        return {FLOPS: self.flops, SECONDS: self.seconds}[unit]


_NEEDED = tuple(
    field.name
    for field in dataclasses.fields(Result)
    if field.name != "scores" and field.default is dataclasses.MISSING
)
_COLUMNS = tuple(field.name for field in dataclasses.fields(Result) if field.name != "scores")
_KINDS = {"n": int, "tokens": int} | dict.fromkeys(("budget", "flops", "seconds", "loss"), float)
_OPTIONAL = ("seconds", "loss")


def usable(results: Iterable[Result]) -> list[Result]:
    """Those that are done and have a finite loss."""
    return [result for result in results if not result.unusable]


def left_out(results: Iterable[Result]) -> dict[str, str]:
    """Why each of the others is not used, by its name."""
    return {result.name: result.unusable for result in results if result.unusable}


def tasks_of(results: Iterable[Result]) -> list[str]:
    """All tasks that any of them was asked, sorted."""
    return sorted({task for result in results for task in result.scores})


def as_csv(results: Sequence[Result]) -> str:
    """A line a run; a task has three columns: accuracy, questions and chance."""
    tasks = tasks_of(results)
    fields = [field.name for field in dataclasses.fields(Score)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*_COLUMNS, *(f"{task} {name}" for task in tasks for name in fields)])
    for result in results:
        values = [getattr(result, name) for name in _COLUMNS]
        for task in tasks:
            score = result.scores.get(task)
            values += [None if score is None else getattr(score, name) for name in fields]
        writer.writerow(["" if value is None else value for value in values])
    return stream.getvalue()


def from_csv(text: str) -> list[Result]:
    """The results of a CSV that `as_csv` made.

    Raises:
      UserError: a column is missing, or a cell is not what it should be.
    """
    reader = csv.DictReader(io.StringIO(text))
    names = list(reader.fieldnames or ())
    if missing := [name for name in _NEEDED if name not in names]:
        raise UserError(f"results.csv lacks the columns {', '.join(missing)}")
    tasks = [name.removesuffix(" accuracy") for name in names if name.endswith(" accuracy")]
    found = []
    for number, row in enumerate(reader, start=2):
        try:
            found.append(_result(row, tasks))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"results.csv, line {number}: {error}") from error
    return found


def as_json(result: Result) -> dict[str, Any]:
    """A run as JSON has it, null for a number that is not finite."""
    values = dataclasses.asdict(result)
    for name in _OPTIONAL:
        if values[name] is not None and not math.isfinite(values[name]):
            values[name] = None
    return values


def _result(row: Mapping[str, str], tasks: Sequence[str]) -> Result:
    values: dict[str, Any] = {}
    for name in (name for name in _COLUMNS if name in row):
        empty = row[name] == "" and name in _OPTIONAL
        values[name] = None if empty else _KINDS.get(name, str)(row[name])
    scores = {
        task: Score(
            accuracy=float(row[f"{task} accuracy"]),
            questions=int(row[f"{task} questions"]),
            chance=float(row[f"{task} chance"]),
        )
        for task in tasks
        if row[f"{task} accuracy"] != ""
    }
    return Result(**values, scores=scores)
