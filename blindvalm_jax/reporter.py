"""Turns what the step returns into metrics with units, for the file and the console."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from blindvalm_jax import flops, process_log
from blindvalm_jax.config import Config
from blindvalm_jax.console import is_first, say
from blindvalm_jax.errors import Preempted
from blindvalm_jax.goodput import Goodput, Loss
from blindvalm_jax.guard import GuardState
from blindvalm_jax.incidents import Incidents
from blindvalm_jax.metrics import StepTimer, duration
from blindvalm_jax.profiling import Profile
from blindvalm_jax.sinks import Ending, Sinks


class Reporter:
    """Reports a run: losses, speed, memory share, incidents; evaluations and the like are timed."""

    def __init__(
        self,
        settings: Config,
        workdir: Path,
        *,
        first: int,
        unit: str,
        units_per_row: int,
        flops_per_unit: float,
        guard: GuardState | None,
        goodput: Goodput,
    ) -> None:
        """Opens metrics.jsonl and what else is asked for.

        first: updates done before; unit: "token" or "pair"; guard: memory of the guard at `first`.
        """
        # Before time is taken: a server may keep this waiting.
        self._sinks = Sinks(settings.log, workdir, resume_step=first)
        self._timer, self._goodput = StepTimer(), goodput
        goodput.loop_begins()
        self._incidents = Incidents(settings.train, workdir, guard)
        self._profile = Profile(workdir / "profile", settings.log.profile_steps)
        self._ending: Ending = "done"
        self._last, self._logged, self._waited = settings.train.steps, first, 0.0
        self._unit, self._units = f"{unit}s", settings.train.batch_size * units_per_row
        self._flops = flops_per_unit
        kind = jax.devices()[0].device_kind
        self._peak = flops.peak_tflops(kind, settings.log.peak_tflops)

    @contextlib.contextmanager
    def pause(self, what: Loss) -> Iterator[None]:
        """Leaves out of the time of updates what runs inside."""
        begin = time.perf_counter()
        with self._goodput.lost_to(what):
            yield
        self._timer.pause(time.perf_counter() - begin)

    def trace_begins(self, step: int) -> None:
        """Before a step: a profiler trace of it, where settings ask for one."""
        with self.pause("profile"):
            self._profile.before(step)

    def trace_ends(self, step: int, scalars: Mapping[str, jax.Array]) -> None:
        """Behind a step: the end of its trace, if it is the last one traced."""
        if self._profile.ends_at(step):
            jax.block_until_ready(scalars)
            with self.pause("profile"):
                self._profile.close()

    def log(
        self, done: int, scalars: Mapping[str, jax.Array], waited: float, damaged: Sequence[str]
    ) -> str | None:
        """Writes the metrics of a step; says why the run has diverged, if it has.

        waited: seconds so far for batches; damaged: what was found damaged in the data so far.
        """
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        diverged = self._incidents.divergence(values)
        self._incidents.tell_updates(values)
        self._incidents.tell_damaged(done, damaged)
        updates, spent = done - self._logged, self._timer.lap()
        if self._unit == "tokens":
            with np.errstate(over="ignore"):
                values["train/perplexity"] = float(np.exp(values["train/loss"]))
        values[f"train/{self._unit}"] = done * self._units
        if damaged:
            values["data/replaced_records"] = len(damaged)
        speed = here = ""
        if not self._profile.any_in(self._logged + 1, done):
            seconds = spent / updates
            values |= self._speed(seconds, (waited - self._waited) / updates)
            here = f"  {seconds:.3f} s a step, {values['perf/data_wait_seconds']:.3f} s for data"
            speed = f"  {self._units / seconds:,.0f} {self._unit}/s"
            speed += f"  left {duration(seconds * (self._last - done))}"
        self._goodput.waited(waited)
        values |= self._goodput.metrics()
        values["perf/peak_memory_mib"] = peak = peak_memory_mib()
        self._sinks.write(done, {k: v for k, v in values.items() if not k.startswith("guard/")})
        if is_first():
            said = f"loss {values['train/loss']:.4f}  lr {values['train/learning_rate']:.2e}"
            say(f"step {done}/{self._last}  {said}  grad {values['train/grad_norm']:.3f}{speed}")
        else:  # what is the same on all need not stand in each log
            process_log.write(f"step {done}/{self._last}{here}  memory {peak:,.0f} MiB at most")
        self._logged, self._waited = done, waited
        return diverged

    def _speed(self, seconds: float, waited: float) -> dict[str, float]:
        """Metrics of an update that took so many seconds, and of those waited for its batch."""
        rate = self._units / seconds
        per_device = rate / jax.device_count()
        found = {
            "perf/step_seconds": seconds,
            f"perf/{self._unit}_per_second": rate,
            f"perf/{self._unit}_per_second_per_device": per_device,
            "perf/data_wait_seconds": waited,
        }
        if self._peak:
            found["perf/mfu"] = per_device * self._flops / (self._peak * 1e12)
        return found

    def divergence(self, scalars: Mapping[str, Any]) -> str | None:
        """Why the run has diverged, None if an update left a sound state; waits for it."""
        return self._incidents.divergence(scalars)

    def diverged(self, done: int, reason: str) -> None:
        """Records that the run ends so."""
        self._incidents.diverged(done, reason)
        self._ending = "failed"

    def evaluated(self, done: int, scalars: Mapping[str, float], damaged: Sequence[str]) -> None:
        """Writes metrics on held-out data; damaged: see `log`."""
        self._incidents.tell_damaged(done, damaged)
        self._sinks.write(done, scalars)
        named = (f"{k.removeprefix('eval/').replace('_', ' ')} {v:.4g}" for k, v in scalars.items())
        say(f"step {done}/{self._last}  held-out {'  '.join(named)}")

    def answered(self, done: int, scalars: Mapping[str, float]) -> None:
        """Writes the scores of tasks."""
        self._sinks.write(done, scalars)
        named = (f"{name.rpartition('/')[2]} {value:.4g}" for name, value in scalars.items())
        say(f"step {done}/{self._last}  tasks  {'  '.join(named)}")

    def __enter__(self) -> Reporter:
        """Reports until the block ends."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Closes the files, and a trace that is under way."""
        self._profile.close()
        if kind is not None and issubclass(kind, Preempted):
            self._ending = "preempted"
        elif kind is not None:
            self._ending = "failed"
        self._sinks.close(self._ending)


def peak_memory_mib() -> float:
    """Most memory used so far: of the fullest local device, or of this process on a CPU."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks) / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return used / (2**20 if sys.platform == "darwin" else 2**10)
