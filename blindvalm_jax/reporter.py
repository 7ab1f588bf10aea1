"""Turns what the step returns into metrics with units, for the file and the console."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from blindvalm_jax import flops
from blindvalm_jax.config import Config
from blindvalm_jax.metrics import MetricWriter, StepTimer, duration

# What must be a number, or the run has diverged: the update's and the parameters' norms too, since
# the loss is that of the parameters before the update.
FINITE = ("train/loss", "train/grad_norm", "train/update_norm", "train/param_norm")


class Reporter:
    """Reports a run: losses, speed, memory share; `timer` counts the seconds of updates alone."""

    def __init__(
        self,
        settings: Config,
        workdir: Path,
        *,
        first: int,
        unit: str,
        units_per_row: int,
        flops_per_unit: float,
    ) -> None:
        """Opens metrics.jsonl; first: updates done before; unit: "token" or "pair"."""
        self.timer = StepTimer()
        self._begin, self._updating = time.perf_counter(), 0.0
        self._writer = MetricWriter(
            workdir,
            resume_step=first,
            tensorboard=settings.log.tensorboard,
            active=jax.process_index() == 0,
        )
        self._last, self._logged, self._waited = settings.train.steps, first, 0.0
        self._unit, self._units = f"{unit}s", settings.train.batch_size * units_per_row
        self._flops = flops_per_unit
        kind = jax.devices()[0].device_kind
        self._peak = flops.peak_tflops(kind, settings.log.peak_tflops)

    def log(self, done: int, scalars: Mapping[str, jax.Array], waited: float) -> bool:
        """Writes the metrics of a step; False when it diverged (see `FINITE`)."""
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        updates = done - self._logged
        spent = self.timer.lap()
        self._updating += spent
        seconds = spent / updates
        if self._unit == "tokens":
            values["train/perplexity"] = float(np.exp(values["train/loss"]))
        values[f"train/{self._unit}"] = done * self._units
        values["perf/step_seconds"] = seconds
        values[f"perf/{self._unit}_per_second"] = self._units / seconds
        per_device = self._units / seconds / jax.device_count()
        values[f"perf/{self._unit}_per_second_per_device"] = per_device
        values["perf/data_wait_seconds"] = (waited - self._waited) / updates
        if self._peak:
            values["perf/mfu"] = per_device * self._flops / (self._peak * 1e12)
        values["perf/goodput"] = self._updating / (time.perf_counter() - self._begin)
        values["perf/peak_memory_mib"] = peak_memory_mib()
        self._writer.write(done, values)
        left = duration(seconds * (self._last - done))
        print(
            f"step {done}/{self._last}  loss {values['train/loss']:.4f}  "
            f"lr {values['train/learning_rate']:.2e}  grad {values['train/grad_norm']:.3f}  "
            f"{self._units / seconds:,.0f} {self._unit}/s  left {left}",
            flush=True,
        )
        self._logged, self._waited = done, waited
        return self.is_finite(values)

    @staticmethod
    def is_finite(scalars: Mapping[str, Any]) -> bool:
        """Whether an update left a sound state; waits for it."""
        return all(np.isfinite(scalars[name]) for name in FINITE)

    def evaluated(self, done: int, scalars: Mapping[str, float]) -> None:
        """Writes metrics on held-out data."""
        self._writer.write(done, scalars)
        named = (f"{k.removeprefix('eval/').replace('_', ' ')} {v:.4g}" for k, v in scalars.items())
        print(f"step {done}/{self._last}  held-out {'  '.join(named)}", flush=True)

    def answered(self, done: int, scalars: Mapping[str, float]) -> None:
        """Writes the scores of tasks."""
        self._writer.write(done, scalars)
        named = (f"{name.rpartition('/')[2]} {value:.4g}" for name, value in scalars.items())
        print(f"step {done}/{self._last}  tasks  {'  '.join(named)}", flush=True)

    def close(self) -> None:
        """Closes the files."""
        self._writer.close()


def peak_memory_mib() -> float:
    """Most memory used so far: of the fullest local device, or of this process on a CPU."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks) / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return used / (2**20 if sys.platform == "darwin" else 2**10)
