"""Where the numbers of a run go: metrics.jsonl always, TensorBoard and W&B on request."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from blindvalm_jax import metrics, weights_and_biases
from blindvalm_jax.config import LogConfig
from blindvalm_jax.console import is_first, warn
from blindvalm_jax.errors import UserError, first_line

Ending = Literal["done", "preempted", "failed"]


class Sink(Protocol):
    """Takes the metrics of one step after the other; several calls may be of one step."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars; whatever it raises, the run goes on without it."""

    def close(self, ending: Ending) -> None:
        """The run, or this start of it, has ended so."""


class Sinks:
    """All that settings ask for, on the first process; on the others nothing.

    What fails besides metrics.jsonl, which has everything, is said once and left out.
    """

    def __init__(self, settings: LogConfig, workdir: Path, *, resume_step: int) -> None:
        """Opens them. Lines past `resume_step` are of a run that was cut off, see `MetricsFile`."""
        self._file: MetricsFile | None = None
        self._others: dict[str, Sink] = {}
        if not is_first():
            return
        self._file = MetricsFile(workdir / "metrics.jsonl", resume_step=resume_step)
        asked: dict[str, Callable[[], Sink]] = {}
        if settings.tensorboard:
            asked["TensorBoard"] = functools.partial(
                TensorBoard, workdir / "tensorboard", resume_step=resume_step
            )
        if settings.wandb:
            asked["Weights & Biases"] = functools.partial(
                weights_and_biases.Run, settings.wandb, workdir, written=self._file.written
            )
        for name, make in asked.items():
            try:
                self._others[name] = make()
            except Exception as error:
                _warn(name, error, f"has what comes after step {resume_step}")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step to all."""
        if self._file is not None:
            self._file.write(step, scalars)
        for name, sink in list(self._others.items()):
            try:
                sink.write(step, scalars)
            except Exception as error:
                del self._others[name]
                _warn(name, error, f"has what comes from step {step} on")
                with contextlib.suppress(Exception):
                    sink.close("failed")

    def close(self, ending: Ending) -> None:
        """Closes all."""
        if self._file is not None:
            self._file.close()
        for name, sink in self._others.items():
            try:
                sink.close(ending)
            except Exception as error:
                _warn(name, error, "may have the last steps")


def check(settings: LogConfig, workdir: Path) -> None:
    """Refuses to start without what is asked for; the first process alone needs it.

    Raises:
      UserError: metrics.jsonl cannot be written, a library is not installed, nobody is logged in.
    """
    if not is_first():
        return
    path = workdir / "metrics.jsonl"
    try:
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; move it away") from error
    if settings.tensorboard:
        _tensorboard()
    if settings.wandb:
        weights_and_biases.check(settings.wandb, workdir)


class MetricsFile:
    """Appends one JSON object a line; keys are `part/name`, see docs/training.md.

    Lines past `resume_step` come from a run that was cut off and are dropped: the updates they
    describe are done again. `written` is the last step that there was, 0 of a run that begins.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """Opens the file."""
        self.written = max((line["step"] for line in metrics.records(path)), default=0)
        metrics.drop_after(path, resume_step)
        self._name, self._file = path.name, io.FileIO(path, "a")
        self._before = b""  # what begins a new line where the last one was broken off

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step; numbers that are not finite are written as null.

        A disk that is full is no reason to end a run: the line is left out, which is said.
        """
        finite = {k: float(v) if math.isfinite(v) else None for k, v in scalars.items()}
        line = self._before + json.dumps({"step": step, **finite}).encode() + b"\n"
        try:
            whole, reason = self._file.write(line) == len(line), "it was cut off"
        except OSError as error:
            whole, reason = False, str(error.strerror)
        if not whole and not self._before:
            warn(f"{self._name} cannot be written ({reason}): it lacks lines from step {step} on")
        self._before = b"" if whole else b"\n"

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Events in a file of each start; TensorBoard drops those of steps that are done again.

    Written here: the library's SummaryWriter leaves that to a thread, which a full disk ends,
    whereupon the run would wait for it for ever.
    """

    def __init__(self, directory: Path, *, resume_step: int) -> None:
        """Opens a file."""
        self._events, self._scalar, open_file = _tensorboard()
        directory.mkdir(exist_ok=True)
        begin = f"{int(time.time())}.{socket.gethostname()}.{resume_step}"
        self._file = open_file(str(directory / f"events.out.tfevents.{begin}"))
        self._write(0, file_version="brain.Event:2")
        if resume_step:
            begins = self._events.SessionLog(status=self._events.SessionLog.START)
            self._write(resume_step + 1, session_log=begins)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step."""
        for name, value in scalars.items():
            self._write(step, summary=self._scalar(name, float(value)))
        self._file.flush()

    def _write(self, step: int, **what: Any) -> None:
        event = self._events.Event(step=step, wall_time=time.time(), **what)
        self._file.write(event.SerializeToString())

    def close(self, ending: Ending) -> None:
        """Closes the file."""
        self._file.close()


def _tensorboard() -> tuple[Any, Any, Any]:
    try:
        from tensorboardX import RecordWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar
    except ImportError as error:
        raise UserError(
            "log.tensorboard needs tensorboardX: pip install 'blindvalm_jax[tensorboard]'"
        ) from error
    return event_pb2, scalar, RecordWriter


def _warn(name: str, error: Exception, has: str) -> None:
    warn(f"{name} fails ({type(error).__name__}: {first_line(error)}): metrics.jsonl alone {has}")
