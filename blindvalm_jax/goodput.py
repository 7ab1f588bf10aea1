"""Where the time of a run goes: into updates, or lost to something else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Literal

from blindvalm_jax import lifetime

Loss = Literal["start", "compile", "data", "evaluation", "checkpoint", "tasks", "profile"]


class Goodput:
    """Seconds since a run's start that were no updates, by what they went into.

    start: before the loop, besides compiling: reading data, checkpoints, weights; data: waiting for
    a batch; the rest is as it says. before: what the run's earlier starts leave, None: not known.
    """

    before: lifetime.Before | None = None

    def __init__(self) -> None:
        """Starts now."""
        self.began, self._begin = lifetime.now(), time.perf_counter()
        self._lost: dict[Loss, float] = dict.fromkeys(
            ("start", "compile", "data", "evaluation", "checkpoint", "tasks", "profile"), 0.0
        )

    @contextlib.contextmanager
    def lost_to(self, what: Loss) -> Iterator[None]:
        """Counts what runs inside as lost to it."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._lost[what] += time.perf_counter() - begin

    def loop_begins(self) -> None:
        """What has passed until now, and is not counted yet, was lost to the start."""
        self._lost["start"] = time.perf_counter() - self._begin - sum(self._lost.values())

    def waited(self, seconds: float) -> None:
        """All waiting for data so far."""
        self._lost["data"] = seconds

    def metrics(self) -> dict[str, float]:
        """`perf/goodput`, the share of the time that went into updates, and seconds lost.

        Where it is known, also what there is of the whole run, over all its starts.
        """
        total = time.perf_counter() - self._begin
        updates = total - sum(self._lost.values())
        found = {
            "perf/goodput": updates / total,
            **{f"perf/lost_{name}_seconds": seconds for name, seconds in self._lost.items()},
        }
        if self.before is not None:
            seconds = self.before.seconds + total
            found["perf/lost_restart_seconds"] = self.before.restart
            found["perf/run_seconds"] = seconds
            found["perf/run_goodput"] = (self.before.updates + updates) / seconds
        return found
