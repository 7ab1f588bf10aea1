"""What happened to the runs of a sweep: manifest.jsonl, to which lines are only ever added."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from blindvalm_jax import config
from blindvalm_jax.config import Config
from blindvalm_jax.errors import UserError
from blindvalm_jax.trees import flatten

# How an attempt ends; a `started` without one was cut off.
ENDS = ("done", "diverged", "failed", "preempted")


@dataclasses.dataclass(frozen=True)
class State:
    """What the manifest says of a run.

    ended: how the last attempt that ended did, "" if none has; cut: attempts in a row since then
    that never ended, each of which found no newer checkpoint than the one before; began: the step
    from which the last of them went on, None where it does not say; about: what was said at the
    end; step, loss, scores: of its last update, once it is done (`outcome.of`).
    """

    ended: str = ""
    cut: int = 0
    about: str = ""
    began: int | None = None
    step: int | None = None
    loss: float | None = None
    scores: Mapping[str, float | None] = dataclasses.field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether there is still something to train."""
        return self.ended in ("", "preempted")

    def cut_at(self, newest: int | None) -> int:
        """`cut`, or 0 where the newest checkpoint is now of a later step than `began`."""
        known = self.began is not None and newest is not None
        return 0 if known and newest > self.began else self.cut  # type: ignore[operator]


class Manifest:
    """The manifest of a sweep's directory."""

    def __init__(self, directory: Path) -> None:
        """Makes the directory."""
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "manifest.jsonl"
        self._lock = FileLock(directory / ".manifest.lock")

    def plan(self, runs: Mapping[str, Config]) -> None:
        """Adds the runs that are not there yet, with the settings that are not the defaults.

        Raises:
          UserError: a run is there with other settings.
        """
        with self._lock:
            there = {line["run"]: line for line in self.lines() if line["event"] == "planned"}
            new = {}
            for name, settings in runs.items():
                chosen = _chosen(settings)
                if name not in there:
                    new[name] = chosen
                    continue
                before = _now_complete(there[name]["settings"])
                now = _now_complete(chosen)
                changed = sorted(k for k in before.keys() | now.keys() if before[k] != now[k])
                if changed:
                    differences = "; ".join(f"{k}: {before[k]!r} -> {now[k]!r}" for k in changed)
                    raise UserError(
                        f"{self._path} has the run {name} with other settings: {differences}. "
                        "Give the same sweep to go on, or another --workdir"
                    )
            for name, chosen in new.items():
                self._append({"run": name, "event": "planned", "settings": chosen})

    def add(self, run: str, event: str, **about: Any) -> None:
        """Adds a line."""
        with self._lock:
            self._append({"run": run, "event": event, **about})

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines, in the order they were written; a dying machine leaves half a line last.

        Raises:
          UserError: a line is not one of a manifest.
        """
        if not self._path.exists():
            return []
        found = []
        whole = self._path.read_bytes().rpartition(b"\n")[0].decode()
        for number, text in enumerate(whole.splitlines(), start=1):
            try:
                line = json.loads(text)
                line["run"], line["event"]  # what every line has
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self._path}, line {number}, is no line of a manifest: {text[:80]!r}; "
                    "take it out to go on"
                ) from error
            found.append(line)
        return found

    def states(self) -> dict[str, State]:
        """What became of every run, in the order they were planned."""
        states: dict[str, State] = {}
        for line in self.lines():
            state, event = states.get(line["run"], State()), line["event"]
            if event == "started":
                began = line.get("step")
                state = dataclasses.replace(state, cut=state.cut_at(began) + 1, began=began)
            elif event in ENDS:
                state = _ended(event, line)
            elif event == "reopened":
                state = State()
            states[line["run"]] = state
        return states

    def contents(self) -> dict[str, dict[str, Any]]:
        """What it says of each run but for times, processes and attempts, in the order planned.

        The same sweep ends with the same, to the last bit of a loss, however often workers were
        killed on the way.
        """
        planned = {
            line["run"]: line["settings"] for line in self.lines() if line["event"] == "planned"
        }
        return {
            name: {
                "settings": planned[name],
                **{"ended": state.ended, "about": state.about},
                **{"step": state.step, "loss": state.loss, "scores": dict(state.scores)},
            }
            for name, state in self.states().items()
        }

    def _append(self, line: Mapping[str, Any]) -> None:
        """Adds a line behind the last whole one."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        with self._path.open("ab+") as stream:
            size = stream.seek(0, os.SEEK_END)
            if size and not _ends_line(stream, size):
                content = self._path.read_bytes()
                stream.truncate(content.rfind(b"\n") + 1)
            stream.write((json.dumps({"time": at, **line}) + "\n").encode())
            stream.flush()
            os.fsync(stream.fileno())


def _ended(event: str, line: Mapping[str, Any]) -> State:
    known = {name: line[name] for name in ("about", "step", "loss", "scores") if name in line}
    return State(event, **known)


def _ends_line(stream: Any, size: int) -> bool:
    stream.seek(size - 1)
    return bool(stream.read(1) == b"\n")


def _chosen(settings: Config) -> dict[str, Any]:
    """The settings that are not the defaults, by dotted name, as JSON gives them back."""
    default = _plain(config.parse(config.default()))
    return {name: value for name, value in _plain(settings).items() if value != default[name]}


def _now_complete(chosen: Mapping[str, Any]) -> dict[str, Any]:
    return _plain(config.parse(config.default())) | dict(chosen)


def _plain(settings: Config) -> dict[str, Any]:
    values = json.loads(json.dumps(dataclasses.asdict(settings)))
    return {name.replace("/", "."): value for name, value in flatten(values).items()}
