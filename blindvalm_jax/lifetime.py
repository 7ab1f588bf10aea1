"""What became of a run's time before its newest start, from what stands in its directory."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from blindvalm_jax import files, metrics


@dataclasses.dataclass(frozen=True)
class Before:
    """Seconds from the beginning of a run's first start to that of its newest.

    updates: of them, into updates that the newest start goes on from; restart: between the last of
    these and the next start, at each restart: updates and all else that is lost, and down time.
    """

    seconds: float = 0.0
    updates: float = 0.0
    restart: float = 0.0


def now() -> str:
    """Time for `began` in run.json, by the clock of this machine."""
    return datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")


def before(workdir: Path, *, step: int) -> Before | None:
    """Of a run whose newest start stands in run.json; None: an older version began it.

    step: updates done in the checkpoint that the start goes on from. Lines of metrics.jsonl past
    it must still be there: they tell the pace of updates between the last line and the checkpoint.
    """
    starts = files.read_object(workdir / "run.json")["starts"]
    if not all("began" in start for start in (starts[0], starts[-1])):
        return None
    first, newest = (
        datetime.datetime.fromisoformat(start["began"]) for start in (starts[0], starts[-1])
    )
    lines = metrics.records(workdir / "metrics.jsonl")
    kept = [line for line in lines if line["step"] <= step and "perf/run_seconds" in line]
    last: dict[str, Any] = kept[-1] if kept else {"step": 0}
    told = float(last.get("perf/run_seconds", 0.0))
    seconds = max((newest - first).total_seconds(), told)  # another machine's clock may be behind
    since = seconds - told
    unwritten = min((step - last["step"]) * _pace(lines, last["step"]), since)
    return Before(
        seconds,
        told * last.get("perf/run_goodput", 0.0) + unwritten,
        last.get("perf/lost_restart_seconds", 0.0) + since - unwritten,
    )


def _pace(lines: list[dict[str, Any]], step: int) -> float:
    """Seconds of an update past a step: by the next line that tells, else by the last one, else 0.

    Updates whose pace no line tells count as lost.
    """
    told = [line for line in lines if line.get("perf/step_seconds") is not None]
    later = [line for line in told if line["step"] > step]
    found = later[:1] or told[-1:]
    return float(found[0]["perf/step_seconds"]) if found else 0.0
