"""What a run of a sweep ended with, by what it wrote: for its line in the manifest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from blindvalm_jax import events, metrics

_TASKS = "eval/tasks/"


def of(run: Path) -> dict[str, Any]:
    """Of the last update that metrics.jsonl of a run tells of: step, loss and scores.

    loss: on held-out data, None where it was not measured; scores: by task, as they were reported.
    None without a line.
    """
    lines = metrics.records(run / "metrics.jsonl")
    step = max((line["step"] for line in lines), default=None)
    at: dict[str, Any] = {}
    for line in lines:
        if line["step"] == step:
            at |= line
    scores = {name.removeprefix(_TASKS): x for name, x in at.items() if name.startswith(_TASKS)}
    return {"step": step, "loss": at.get("eval/loss"), "scores": scores}


def of_divergence(run: Path) -> str:
    """At which step a run has diverged and why; "" where events.jsonl tells of none."""
    ends = [event for event in events.read(run) if event["event"] == "diverged"]
    return f"at step {ends[-1]['step']}: {ends[-1].get('reason')}" if ends else ""


def about(text: str, sweep: Path) -> str:
    """What was said, with the places in the directory of the sweep as they are called inside it.

    So that the line is right where the directory was moved to, and the same in another one.
    """
    for place in (sweep.absolute(), sweep):
        text = re.sub(rf"(?<![\w./~-]){re.escape(f'{place}/')}", "", text)
    return text
