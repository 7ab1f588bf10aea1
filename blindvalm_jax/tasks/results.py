"""What is known of a model's answers to a task: the entry of results.json, and a line an answer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blindvalm_jax import files
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import catalog, readers, statistics
from blindvalm_jax.tasks.answers import Answers
from blindvalm_jax.tasks.questions import Item, Question
from blindvalm_jax.tasks.task import ChoiceTask, Protocol

# What results.json has to say, of the whole and of every task.
_HEAD = ("tasks", "model", "step", "tokenizer", "commit")
_ENTRY = (
    *("protocol", "metric", "score", "stderr", "interval", "n", "majority", "random"),
    *("per_prompt", "faults", "source"),
)


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
    objects. per_prompt: accuracy by template. answers: how often each candidate was chosen and
    right.
    """
    way = protocol.scores[0]
    about = [question.item for question in questions]
    objects = [question.objects for question in questions if question.objects is not None]
    found = statistics.accuracy(answers.right[way], about, objects=objects or None)
    without = catalog.baselines(questions)
    per_prompt: dict[int, list[bool]] = {}
    for question, right in zip(questions, answers.right[way], strict=True):
        per_prompt.setdefault(question.template, []).append(bool(right))
    share = protocol.share
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
        "per_prompt": [share * sum(of) / len(of) for _, of in sorted(per_prompt.items())],
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
      UserError: there is none, or something is missing in it.
    """
    place = directory / "eval" if not (directory / "results.json").exists() else directory
    path = place / "results.json"
    found = files.read_object(path, hint=f"{directory} has not been evaluated")
    lacking = [name for name in _HEAD if name not in found]
    if not lacking and not isinstance(found["tasks"], dict):
        raise UserError(f"{path}: tasks must be a table, got {found['tasks']!r}")
    if not lacking:
        for task, entry in found["tasks"].items():
            lacking += [f"{task}.{name}" for name in _ENTRY if name not in entry]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking[:5])}: evaluate again to have it")
    return found, place


def read_lines(directory: Path, task: str) -> list[dict[str, Any]]:
    """A line for every question about a task, or document of it, as `read` found the directory.

    Raises:
      UserError: they are not there, or are no lines of JSON.
    """
    path = directory / f"{task}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; evaluate again to have it") from error


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
