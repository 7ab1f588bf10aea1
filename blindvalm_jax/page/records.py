"""What stands in the directories of runs: metrics, events, settings, read for the page."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blindvalm_jax import config, events, files, metrics
from blindvalm_jax.errors import UserError
from blindvalm_jax.trees import flatten

_OF_A_RUN = {"starts", "parameters", "devices", "config_as_given"}  # a record may lack some


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its directory tells it.

    name: what the page calls it; record: run.json; settings: config.json, flat, by dotted name;
    lines: of metrics.jsonl, by ascending step; events: of events.jsonl, in the order they happened.
    """

    name: str
    record: Mapping[str, Any]
    settings: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]

    @property
    def unit(self) -> str:
        """What its speed is counted in: "tokens", or "pairs" of a contrastive run."""
        return "pairs" if "flops_per_pair" in self.record else "tokens"

    def series(self, metric: str) -> list[tuple[Mapping[str, Any], float | None]]:
        """Lines that hold a metric, with its value; None where it was not finite."""
        return [(line, line[metric]) for line in self.lines if metric in line]

    def last(self, metric: str) -> float | None:
        """Its newest value, if it was ever written."""
        found = [value for _, value in self.series(metric) if value is not None]
        return found[-1] if found else None

    @property
    def step(self) -> int:
        """Updates done, as far as they were reported."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def units_per_row(self) -> int:
        """Tokens or pairs of a row of a batch."""
        return 1 if self.unit == "pairs" else int(self.settings["data.sequence_length"])

    @property
    def flops_per_unit(self) -> float | None:
        """Model FLOPs of a token or pair, forward and backward; None: the record lacks them."""
        found = self.record.get(f"flops_per_{self.unit[:-1]}")
        return None if found is None else float(found["total"])


def read(directories: Sequence[Path]) -> list[Run]:
    """Reads runs; their names are what tells their paths apart.

    Raises:
      UserError: a directory is no run's or cannot be read, or is named twice.
    """
    paths = [directory.resolve() for directory in directories]
    twice = sorted({str(path) for path in paths if paths.count(path) > 1})
    if twice:
        raise UserError(f"named twice: {', '.join(twice)}")
    return [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _read(path: Path, name: str) -> Run:
    hint = "name directories that train wrote"
    record = files.read_object(path / "run.json", hint=hint)
    if not _OF_A_RUN & record.keys():
        raise UserError(f"{path / 'run.json'} is no record of a run: {hint}")
    settings = config.completed(files.read_object(path / "config.json", hint=hint))
    try:
        lines = metrics.records(path / "metrics.jsonl")
        happened = events.read(path)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
    flat = {key.replace("/", "."): value for key, value in flatten(settings).items()}
    lines.sort(key=lambda line: line["step"])
    return Run(name, record, flat, lines, happened)


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path that no other has, at least one."""
    shared = len(Path(os.path.commonpath(paths)).parts)
    shared = min(shared, *(len(path.parts) - 1 for path in paths))  # one may lie within another
    return ["/".join(path.parts[shared:]) for path in paths]
