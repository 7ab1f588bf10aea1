"""What is known of a model's answers to a task: the entry of results.json, and a line an answer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from blindvalm_jax import files
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import catalog, entries, places, readers, statistics
from blindvalm_jax.tasks.answers import Answers
from blindvalm_jax.tasks.questions import Item, Question
from blindvalm_jax.tasks.task import ChoiceTask, Protocol

# What results.json has to say of the whole.
_HEAD = ("tasks", "model", "step", "tokenizer", "commit")
_AGAIN = "evaluate again to have it"
Name = TypeVar("Name", str, int)


def summary(
    task: ChoiceTask,
    protocol: Protocol,
    items: Sequence[Item],
    questions: Sequence[Question],
    answers: Answers,
    *,
    file: readers.File | None = None,
) -> dict[str, Any]:
    """The entry of results.json; file: the one the items are of, None of a TFDS data set.

    score: accuracy, counted as the protocol does, and so are majority and random; stderr, interval:
    of it, clustered as clustered_by says; None of a single item. clusters: how many items, or
    objects. per_prompt, per_item: accuracy by template, and by item. answers: how often each
    candidate was chosen and right.
    """
    way = protocol.scores[0]
    about = [question.item for question in questions]
    objects = [question.objects for question in questions if question.objects is not None]
    found = statistics.accuracy(answers.right[way], about, objects=objects or None)
    without = catalog.baselines(questions)
    share = protocol.share
    counted = share * answers.right[way]
    by_template = _means([question.template for question in questions], counted)
    return {
        "metric": "accuracy",
        "score": share * found.mean,
        "stderr": None if math.isnan(found.stderr) else share * found.stderr,
        "interval": [share * found.low, share * found.high],
        "n": len(items),
        "questions": found.questions,
        "clusters": found.clusters,
        "clustered_by": statistics.BY_OBJECT if objects else statistics.BY_ITEM,
        "majority": share * without.majority,
        "random": share * without.random,
        "per_prompt": [by_template[template] for template in sorted(by_template)],
        "per_item": _means(about, counted),
        "prompts": _prompts(questions),
        "scored_by": way,
        "beside": {
            other: share * float(answers.right[other].mean()) for other in protocol.scores[1:]
        },
        "answers": _histogram(questions, answers),
        "prompts_cut": answers.cut,
        "faults": list(protocol.faults),
        "source": task.source,
        "file": None if file is None else file.entry,
    }


def _means(names: Sequence[Name], values: np.ndarray) -> dict[Name, float]:
    """The mean of the values of each name, in the order in which they first occur."""
    of: dict[Name, list[float]] = {}
    for name, value in zip(names, values.tolist(), strict=True):
        of.setdefault(name, []).append(value)
    return {name: sum(own) / len(own) for name, own in of.items()}


def lines(
    questions: Sequence[Question], answers: Answers, protocol: Protocol
) -> Iterator[dict[str, Any]]:
    """Every question with its scores and answer; objects are said where it compares some."""
    way = protocol.scores[0]
    for question, scores, place, right in zip(
        questions, answers.scores, answers.chosen[way], answers.right[way], strict=True
    ):
        asked = dataclasses.asdict(question)
        yield {
            **{name: value for name, value in asked.items() if value is not None},
            "scores": [float(score) for score in scores],
            "chosen": int(place),
            "right": bool(right),
        }


def read(directory: Path) -> tuple[dict[str, Any], Path]:
    """What results.json holds that lies in a directory, or in eval of a run; and where it lies.

    Raises:
      UserError: there is none, or something is missing in it or not what it should be.
    """
    there = directory / "eval" if not (directory / places.RESULTS).exists() else directory
    path = there / places.RESULTS
    found = files.read_object(path, hint=f"{directory} has not been evaluated")
    lacking = [name for name in _HEAD if name not in found]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)}: {_AGAIN}")
    if not isinstance(found["tasks"], dict):
        raise UserError(f"{path}: tasks must be a table, got {found['tasks']!r}")
    if not found["tasks"]:
        raise UserError(f"{path} has the results of no task: {_AGAIN}")
    grounding = found.get("grounding")
    images = grounding.get("images") if isinstance(grounding, dict) else grounding
    for name, value in (("grounding", grounding), ("grounding.images", images)):
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{path}: {name} must be a table or null, got {value!r}")
    for task, entry in found["tasks"].items():
        if wrong := entries.problem(task, entry):
            raise UserError(f"{path} {wrong}: {_AGAIN}")
    return found, there


def as_lines(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """What TASK.jsonl holds."""
    text = (json.dumps(line, ensure_ascii=False, allow_nan=False) for line in lines)
    return "".join(f"{line}\n" for line in text).encode()


def about_lines(content: bytes) -> dict[str, Any]:
    """What an entry says of its TASK.jsonl: how many lines, and their hash."""
    return {"count": content.count(b"\n"), "sha256": hashlib.sha256(content).hexdigest()}


def holds_lines(directory: Path, task: str, entry: Mapping[str, Any]) -> bool:
    """Whether TASK.jsonl is the one that an entry was written with."""
    try:
        content = (directory / places.lines(task)).read_bytes()
    except OSError:
        return False
    return "lines" in entry and _is_of(content, entry)


def _is_of(content: bytes, entry: Mapping[str, Any]) -> bool:
    return bool(entry["lines"]["sha256"] == hashlib.sha256(content).hexdigest())


def read_lines(directory: Path, task: str, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for every question about a task, or document of it, as `read` found the directory.

    entry: the task's; one of an older version says nothing of its lines.

    Raises:
      UserError: they are not there, are others than the entry was written with, or one is no JSON
        object or lacks what the metric needs.
    """
    path = directory / places.lines(task)
    try:
        content = path.read_bytes()
        lines = [json.loads(line) for line in content.decode().split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}; {_AGAIN}") from error
    if "lines" in entry and not _is_of(content, entry):
        raise UserError(
            f"{path} holds other lines than {directory / places.RESULTS} was written with: "
            "evaluate again to have both"
        )
    for number, line in enumerate(lines, 1):
        if wrong := entries.line_problem(line, entry):
            raise UserError(f"{path}: line {number} {wrong}; {_AGAIN}")
    return lines


def _prompts(questions: Sequence[Question]) -> list[str]:
    """The first prompt of every template."""
    first: dict[int, str] = {}
    for question in questions:
        first.setdefault(question.template, question.prompt)
    return [prompt for _, prompt in sorted(first.items())]


def _histogram(questions: Sequence[Question], answers: Answers) -> dict[str, list[int]]:
    """Candidate -> how often it was chosen, and how often right; places where all differ."""
    way = next(iter(answers.chosen))
    same = len({question.candidates for question in questions}) == 1

    def named(question: Question, place: int) -> str:
        return question.candidates[place] if same else f"candidate {place + 1}"

    pairs = list(zip(questions, answers.chosen[way], strict=True))
    chosen = Counter(named(question, int(place)) for question, place in pairs)
    right = Counter(named(question, question.answer) for question in questions)
    return {word: [chosen[word], right[word]] for word in sorted({*chosen, *right})}
