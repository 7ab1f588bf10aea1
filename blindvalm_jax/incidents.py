"""What goes wrong in the loop and is survived, or is not: said, and written to events.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from blindvalm_jax import events, process_log
from blindvalm_jax.config import TrainConfig
from blindvalm_jax.console import is_first, say, say_here
from blindvalm_jax.guard import GuardState

# What must be a number of any state that is kept. Norms of the update and the parameters, since the
# loss is that of the parameters before the update.
_STATE = ("train/update_norm", "train/param_norm")
_BATCH = ("train/loss", "train/grad_norm")
_SAID = 10  # damaged records, one line each


class Incidents:
    """Tells what the guard of the update did, and what was damaged in the data, once each."""

    def __init__(self, settings: TrainConfig, workdir: Path, guard: GuardState | None) -> None:
        """guard: its memory when the loop begins."""
        self._settings, self._workdir = settings, workdir
        found = jax.device_get(guard)
        self._counts = {
            "skipped": 0 if found is None else int(found.skipped.count),
            "clipped": 0 if found is None else int(found.clipped.count),
        }
        self._stormy = dict.fromkeys(self._counts, False)
        self._damaged = 0

    def divergence(self, scalars: Mapping[str, Any]) -> str | None:
        """Why a state is not to be kept or trained on; None: it is sound. Waits for its update."""
        skips = self._settings.on_nonfinite == "skip"
        for name in _STATE if skips else (*_BATCH, *_STATE):
            if not np.isfinite(scalars[name]):
                return f"{name} is {float(scalars[name])}"
        if not skips or int(scalars["guard/longest"]) < self._settings.nonfinite_limit:
            return None
        return (
            f"{int(scalars['guard/longest'])} updates in a row had a loss or a gradient that is "
            "not finite, and were skipped (train.nonfinite_limit)"
        )

    def tell_updates(self, scalars: Mapping[str, float]) -> None:
        """Tells which updates the guard changed since the last time; a storm is said once."""
        for name, known in self._counts.items():
            count = int(scalars.get(f"train/{name}_updates", 0))
            if count > known:
                self._changed(name, scalars, new=count - known, count=count)
            self._stormy[name] = count > known
            self._counts[name] = count

    def tell_damaged(self, done: int, damaged: Sequence[str]) -> None:
        """Tells of records that were found damaged since the last time."""
        new = damaged[self._damaged :]  # others are found meanwhile
        for number, what in enumerate(new, start=self._damaged + 1):
            events.record(self._workdir, "replaced", step=done, record=what, count=number)
            said = f"note: {what}; another is read in its place ({number} so far)"
            if number <= _SAID:
                place = events.FILE if is_first() else process_log.DIRECTORY
                say_here(said + (f"; further ones: {place}" if number == _SAID else ""))
            else:
                process_log.write(said)
        self._damaged += len(new)

    def _changed(self, name: str, scalars: Mapping[str, float], *, new: int, count: int) -> None:
        """Tells of updates that were skipped or clipped since the last time."""
        step = int(scalars[f"guard/{name}_step"])
        loss, norm = scalars[f"guard/{name}_loss"], scalars[f"guard/{name}_norm"]
        reason = "spike" if np.isfinite(loss) and np.isfinite(norm) else "not finite"
        about = {"loss": loss, "grad_norm": norm, "reason": reason, "new": new, "count": count}
        events.record(self._workdir, name, step=step, **about)
        if not self._stormy[name]:
            say(
                f"step {step}: update {name}, {reason}: loss {loss:.4g}, gradient norm {norm:.4g} "
                f"({count} {name} so far)"
            )

    def diverged(self, done: int, reason: str) -> None:
        """Records the end of a run."""
        events.record(self._workdir, "diverged", step=done, reason=reason)


def say_ended_before(workdir: Path, *, step: int) -> None:
    """Says, of a run resumed at a step, that it has diverged behind it: so it will again."""
    ends = [e for e in events.read(workdir) if e["event"] == "diverged" and e["step"] > step]
    if ends:
        say(
            f"note: from here this run has diverged before, last at step {ends[-1]['step']} "
            f"({ends[-1].get('reason')}; {len(ends)} in all): with the same settings and code it "
            "ends the same way"
        )
