"""The files of an evaluation, by their names in its directory."""

from __future__ import annotations

from collections.abc import Sequence

RESULTS, PAGE, FIGURES = "results.json", "report.md", "figures"
SCORES = f"{FIGURES}/scores.png"


def lines(task: str) -> str:
    """Of a task's answers."""
    return f"{task}.jsonl"


def figure(task: str) -> str:
    """Of what a task was answered."""
    return f"{FIGURES}/{task}.png"


def written(tasks: Sequence[str], *, page: bool) -> list[str]:
    """All files of these tasks, results.json last; page: with those of the page."""
    found = [lines(task) for task in tasks]
    if page:
        found += [figure(task) for task in tasks] + [PAGE, SCORES]
    return [*found, RESULTS]
