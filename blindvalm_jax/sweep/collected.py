"""What came of the runs of a sweep, read from its directory."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from blindvalm_jax import changes, files, metrics
from blindvalm_jax.errors import UserError
from blindvalm_jax.scaling.results import Result, Score
from blindvalm_jax.sweep import outcome, trunks, worker
from blindvalm_jax.sweep.grids import Planned
from blindvalm_jax.sweep.manifest import Manifest, State


def read(workdir: Path, runs: Mapping[str, Planned]) -> list[Result]:
    """A result of each run that was planned, in their order, whatever became of it.

    Raises:
      UserError: there is no sweep, its runs were planned with settings that make them others, or a
        file of a run is not what it should be.
    """
    if not (workdir / "manifest.jsonl").exists():
        raise UserError(f"{workdir} holds no sweep: it has no manifest.jsonl")
    manifest, place = Manifest(workdir), worker.runs_of(workdir)
    settings = {name: plan.settings for name, plan in runs.items()}
    manifest.check(settings, free=(*changes.OF_COMPUTING, *changes.OF_PLACES))
    states = manifest.states()
    windows: dict[tuple[Any, ...], list[_Window]] = {}
    for name, plan in runs.items():
        for window in _windows(place / name):
            windows.setdefault(_alike(plan, window.on), []).append(window)
    return [
        _result(name, plan, states.get(name, State()), place / name, windows, _root(name, runs))
        for name, plan in runs.items()
    ]


def notes(workdir: Path, results: Sequence[Result]) -> list[str]:
    """What a reader of the results must know of where and on what the runs were trained.

    Raises:
      UserError: the record of a run lacks something.
    """
    used = [worker.runs_of(workdir) / result.name for result in results if not result.unusable]
    records = [_record(directory) for directory in used]
    every = {start.on or record.on for record in records for start in record.starts}
    devices = sorted({(on.kind, on.number) for on in every})
    lines = []
    if devices:
        lines.append(f"Trained on {', '.join(f'{count} x {kind}' for kind, count in devices)}.")
    ways = sorted({on.computed for on in every if on.computed})
    if len(ways) > 1:
        lines.append(f"Computed in different ways, which are timed apart: {'; '.join(ways)}.")
    if commits := sorted({record.commit for record in records if record.commit}):
        lines.append(f"Code of the runs: {', '.join(commits)}.")
    names = {result.name for result in results}
    if others := [name for name in Manifest(workdir).states() if name not in names]:
        lines.append(f"In the directory and not in this config: {', '.join(others)}.")
    if len({record.tokenizer for record in records}) > 1:
        lines.append("Runs have different tokenizers: their losses a token cannot be compared.")
    return lines


def costs_otherwise(
    workdir: Path, runs: Mapping[str, Planned], results: Sequence[Result]
) -> list[str]:
    """A line if a token cost other FLOPs by the records of runs than by what was planned.

    Raises:
      UserError: the record of a run lacks something.
    """
    off = []
    for name in (result.name for result in results if not result.unusable):
        recorded = _record(worker.runs_of(workdir) / name).flops
        counted = runs[name].account.of_devices
        if recorded is not None and not math.isclose(recorded, counted, rel_tol=1e-4):
            off.append(f"{name} {recorded:.4g} and not {counted:.4g}")
    if not off:
        return []
    more = f" (and {len(off) - 1} more runs)" if len(off) > 1 else ""
    return [
        f"Runs recorded other FLOPs a token than are counted here, {off[0]}{more}: they were "
        "trained with another vocabulary, tower or text than this config tells, or by code that "
        "counted otherwise."
    ]


@dataclasses.dataclass(frozen=True)
class _On:
    """Devices, their kind and number, and how they computed, as JSON, "" of starts without it."""

    kind: str
    number: int
    computed: str


class _Window(NamedTuple):
    """Updates between two lines of metrics, the seconds of each, and on what they were made."""

    updates: int
    seconds: float
    on: _On


def _result(
    name: str,
    plan: Planned,
    state: State,
    directory: Path,
    windows: Mapping[tuple[Any, ...], Sequence[_Window]],
    trunk: str,
) -> Result:
    at_end = outcome.of(directory)
    last = plan.settings.train.steps
    done = state.ended == "done" and at_end["step"] == last
    on = None if at_end["step"] is None else _record(directory).on
    of_language = plan.account.unit == "token"
    loss = at_end["loss"] if done and of_language else None
    alike = [] if on is None else windows.get(_alike(plan, on), [])
    return Result(
        name=name,
        family=plan.family,
        size=plan.size,
        budget=plan.budget,
        n=plan.n,
        tokens=plan.tokens,
        flops=plan.flops,
        seconds=_median(alike) * last * on.number if on and alike else None,
        loss=None if loss is None else float(loss),
        scores=_scores(at_end["scores"], directory) if done else {},
        device=on.kind if on and alike else "",
        ended=state.ended,
        about=state.about or ("" if of_language else "it trains a CLIP"),
        trunk=trunk,
    )


def _root(name: str, runs: Mapping[str, Planned]) -> str:
    """The run that the beginning of a run is that of, "" if it is its own."""
    trunk, root = trunks.of(runs[name].settings), ""
    while trunk is not None:
        root = trunk.run
        trunk = trunks.of(runs[root].settings) if root in runs else None
    return root


def _windows(directory: Path) -> list[_Window]:
    """Of a run, without the first line of each start, in which starting took its time."""
    lines = metrics.records(directory / "metrics.jsonl")
    timed = [x for x in lines if x.get("perf/step_seconds") is not None]
    starts = _record(directory).starts if timed else ()
    found = []
    for before, now in itertools.pairwise(timed):
        # A start drops the lines of steps that it takes again.
        began = next((start for start in reversed(starts) if start.step < now["step"]), None)
        if began is None or began.on is None:
            continue
        if began.step < before["step"] < now["step"]:
            updates = now["step"] - before["step"]
            found.append(_Window(updates, float(now["perf/step_seconds"]), began.on))
    return found


def _alike(plan: Planned, on: _On) -> tuple[Any, ...]:
    """What runs have in common whose updates take the same time, however many they have.

    A branch has few updates of its own, and those of its trunk tell as much.
    """
    settings = plan.settings
    rows, length = settings.train.batch_size, settings.data.sequence_length
    return plan.family, plan.size, plan.n, rows, length, on


def _median(windows: Sequence[_Window]) -> float:
    """Seconds of an update: the median of updates."""
    ordered = sorted(windows, key=lambda window: window.seconds)
    half = sum(window.updates for window in ordered) / 2
    done = itertools.accumulate(window.updates for window in ordered)
    return next(x.seconds for x, sofar in zip(ordered, done, strict=True) if sofar >= half)


def _scores(asked: Mapping[str, float], directory: Path) -> dict[str, Score]:
    """Accuracies of the last update; how many questions, and chance, as its answers say."""
    if not asked:
        return {}
    path = directory / "eval" / "results.json"
    answers = files.read_object(path, hint="it says how many questions a task has")
    try:
        entries = answers["tasks"]
        if missing := sorted(asked.keys() - entries.keys()):
            raise UserError(f"{path} lacks {', '.join(missing)}, which metrics.jsonl has scores of")
        # Prompts about one item are not so many questions: those that hang together count once.
        return {
            task: Score(
                float(accuracy), int(entry.get("clusters", entry["n"])), float(entry["random"] or 0)
            )
            for task, accuracy in asked.items()
            if (entry := entries[task])["metric"] == "accuracy"
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"scores of {', '.join(asked)}: {path} and metrics.jsonl do not tell them ({error!r})"
        ) from error


class _Start(NamedTuple):
    """From which step a run was trained on what; None where nothing tells."""

    step: int
    on: _On | None


@dataclasses.dataclass(frozen=True)
class _Record:
    """What run.json says of where a run was trained, last and from each start on.

    commit: of the code that trained it last, "" where it was in none. flops: model FLOPs of a
    token without the search of a host; None: it does not say.
    """

    on: _On
    starts: tuple[_Start, ...]
    tokenizer: str
    commit: str
    flops: float | None


def _record(directory: Path) -> _Record:
    path = directory / "run.json"
    record = files.read_object(path, hint="the record of a run that has metrics")
    try:
        starts = record["starts"]
        last = _on({**starts[-1], "devices": record["devices"]})
        # Before starts had devices, all were taken for those of the last one.
        older = last if not any("devices" in start for start in starts) else None
        found = (
            _Start(int(start["step"]), _on(start) if "devices" in start else older)
            for start in starts
        )
        return _Record(
            on=last,
            starts=tuple(found),
            tokenizer=str(record["tokenizer"]["fingerprint"]),
            commit=str(record.get("commit") or ""),
            flops=float(record["flops_per_token"]["total"])
            if "flops_per_token" in record
            else None,
        )
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} lacks starts, devices, tokenizer or the FLOPs of a token: {error!r}"
        ) from error


def _on(start: Mapping[str, Any]) -> _On:
    kind, number = start["devices"]
    computed = json.dumps(start["computed"], sort_keys=True) if "computed" in start else ""
    return _On(str(kind), int(number), computed)
