"""What happened to the runs of a sweep: manifest.jsonl, to which lines are only ever added."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blindvalm_jax import changes, config, files
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
        if self.began is None or newest is None or newest <= self.began:
            return self.cut
        return 0


class Manifest:
    """The manifest of a sweep's directory."""

    def __init__(self, directory: Path) -> None:
        """Makes the directory."""
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "manifest.jsonl"
        self._lock = directory / ".manifest.lock"

    def plan(self, runs: Mapping[str, Config]) -> list[str]:
        """Adds the runs that are not there yet, with the settings that are not the defaults.

        Of runs that are there and not done, settings of how they are computed
        (`changes.OF_COMPUTING`) may be others from now on. Returns a line for each of these, and of
        how many runs.

        Raises:
          UserError: a run is there with settings that make it another run.
        """
        with files.locked(self._lock):
            changed = self.check(runs, free=changes.OF_COMPUTING)
            for name, state in self.states().items():
                if state.ended == "done":
                    changed.pop(name, None)
            there = self._planned()
            for name, settings in runs.items():
                if name not in there or name in changed:
                    self._append({"run": name, "event": "planned", "settings": _chosen(settings)})
        said = collections.Counter(line for lines in changed.values() for line in lines)
        return [f"another setting from now on, in {n} runs: {line}" for line, n in said.items()]

    def check(self, runs: Mapping[str, Config], *, free: Sequence[str]) -> dict[str, list[str]]:
        """Of the runs that were planned with other settings, a line for each of these.

        free: settings and sections that may differ.

        Raises:
          UserError: others do.
        """
        planned, found = self._planned(), {}
        for name in (name for name in runs if name in planned):
            before, now = _complete(planned[name]), _complete(_chosen(runs[name]))
            differ = [k for k in before | now if before.get(k) != now.get(k)]
            lines = {k: f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in differ}
            if refused := [line for k, line in lines.items() if not changes.named(k, free)]:
                raise UserError(
                    f"{self._path} has the run {name} with other settings: {'; '.join(refused)}. "
                    "Give the same sweep, or another --workdir"
                )
            if lines:
                found[name] = [*lines.values()]
        return found

    def add(self, run: str, event: str, **about: Any) -> None:
        """Adds a line."""
        with files.locked(self._lock):
            self._append({"run": run, "event": event, **about})

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines, in the order they were written; a dying machine leaves half a line last.

        Raises:
          UserError: a line is not one of a manifest.
        """
        if not self._path.exists():
            return []
        found = []
        for number, text in enumerate(self._path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                found.append(_line(text))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self._path}, line {number}, is no line of a manifest: "
                    f"{text[:80].decode(errors='backslashreplace')!r}; take it out to go on"
                ) from error
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
        planned = self._planned()
        return {
            name: {
                "settings": planned[name],
                **{"ended": state.ended, "about": state.about},
                **{"step": state.step, "loss": state.loss, "scores": dict(state.scores)},
            }
            for name, state in self.states().items()
        }

    def _planned(self) -> dict[str, dict[str, Any]]:
        """The settings of each run, as they are by now."""
        return {
            line["run"]: line["settings"] for line in self.lines() if line["event"] == "planned"
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


def _line(text: bytes) -> dict[str, Any]:
    """A line; raises `ValueError`, `KeyError` or `TypeError` where it lacks what all such have."""
    line: dict[str, Any] = json.loads(text)
    kinds = {"run": str, "event": str} | ({"settings": dict} if line["event"] == "planned" else {})
    for name, kind in kinds.items():
        if not isinstance(line[name], kind):
            raise TypeError(f"{name} is {line[name]!r}")
    return line


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


def _complete(chosen: Mapping[str, Any]) -> dict[str, Any]:
    return _plain(config.parse(config.default())) | dict(chosen)


def _plain(settings: Config) -> dict[str, Any]:
    values = json.loads(json.dumps(dataclasses.asdict(settings)))
    return {name.replace("/", "."): value for name, value in flatten(values).items()}
