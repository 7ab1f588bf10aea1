"""What came of the runs of a sweep, read from its directory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from blindvalm_jax import files, metrics
from blindvalm_jax.errors import UserError
from blindvalm_jax.scaling.results import Result, Score
from blindvalm_jax.sweep import worker
from blindvalm_jax.sweep.manifest import Manifest, State
from blindvalm_jax.sweep.plans import Planned

_TASK = "eval/tasks/"


def read(workdir: Path, runs: Mapping[str, Planned]) -> list[Result]:
    """A result of each run that was planned, in their order, whatever became of it.

    Raises:
      UserError: there is no sweep, or a file of a run is not what it should be.
    """
    if not (workdir / "manifest.jsonl").exists():
        raise UserError(f"{workdir} holds no sweep: it has no manifest.jsonl")
    states = Manifest(workdir).states()
    return [
        _result(name, plan, states.get(name, State()), worker.runs_of(workdir) / name)
        for name, plan in runs.items()
    ]


def notes(workdir: Path, results: list[Result]) -> list[str]:
    """What a reader of the results must know of where and on what the runs were trained."""
    records = {
        result.name: record
        for result in results
        if not result.unusable and (record := _record(worker.runs_of(workdir) / result.name))
    }
    devices = sorted({_devices(record) for record in records.values()})
    lines = [f"Trained on {'; '.join(devices)}."] if devices else []
    if len({record["devices"][0] for record in records.values()}) > 1:
        lines.append("Device-seconds of different devices are not the same: do not compare them.")
    if len({record["tokenizer"]["fingerprint"] for record in records.values()}) > 1:
        lines.append("Runs have different tokenizers: their losses a token cannot be compared.")
    return lines


def _result(name: str, plan: Planned, state: State, directory: Path) -> Result:
    lines, last = metrics.records(directory / "metrics.jsonl"), plan.settings.train.steps
    at_end: dict[str, Any] = {}
    for line in lines:
        if line["step"] == last:
            at_end |= line
    loss = at_end.get("eval/loss") if state.ended == "done" else None
    return Result(
        name=name,
        family=plan.family,
        size=plan.size,
        budget=plan.budget,
        n=plan.n,
        tokens=plan.tokens,
        flops=plan.flops,
        seconds=_seconds(lines, last, directory),
        loss=None if loss is None else float(loss),
        scores=_scores(at_end, directory) if state.ended == "done" else {},
        ended=state.ended,
        about=state.about,
    )


def _seconds(lines: list[dict[str, Any]], steps: int, directory: Path) -> float | None:
    """Device-seconds of the whole run; None before it has updates.

    The first line, with what starting took, is left out where there are others.
    """
    each = [float(x["perf/step_seconds"]) for x in lines if x.get("perf/step_seconds") is not None]
    record = _record(directory)
    if not each or record is None:
        return None
    return median(each[1:] or each) * steps * int(record["devices"][1])


def _scores(at_end: Mapping[str, Any], directory: Path) -> dict[str, Score]:
    """Accuracies of the last update; questions and chance from the answers of the same update."""
    asked = {
        name.removeprefix(_TASK): float(value)
        for name, value in at_end.items()
        if name.startswith(_TASK)
    }
    path = directory / "eval" / "results.json"
    if not asked or not path.exists():
        return {}
    entries = files.read_object(path).get("tasks", {})
    scores = {}
    for task, accuracy in asked.items():
        entry = entries.get(task, {})
        if entry.get("metric") != "accuracy" or not math.isfinite(accuracy):
            continue  # a perplexity
        # Prompts about one item are not so many questions: those that hang together count once.
        count = entry.get("clusters", entry["n"])
        scores[task] = Score(accuracy, int(count), float(entry["random"] or 0.0))
    return scores


def _record(directory: Path) -> dict[str, Any] | None:
    path = directory / "run.json"
    return files.read_object(path) if path.exists() else None


def _devices(record: Mapping[str, Any]) -> str:
    kind, count = record["devices"]
    return f"{count} x {kind}"
