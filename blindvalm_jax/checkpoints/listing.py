"""What checkpoints a run has, and why each is kept."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from blindvalm_jax import config, files
from blindvalm_jax.checkpoints import layout, quarantine, retention
from blindvalm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One checkpoint.

    saved: local time, "" where it does not say; size: bytes; fault: what is seen to be wrong
    without reading its arrays; kept: why it is.
    """

    step: int
    saved: str
    size: int
    digests: bool
    loss: float | None
    kept: list[str]
    fault: str | None


def rows(run: Path) -> list[Row]:
    """The checkpoints of a run, ascending."""
    steps = layout.steps(run)
    paths = {step: layout.directory(run) / str(step) for step in steps}
    losses = {step: retention.loss(path) for step, path in paths.items()}
    known = {step: loss for step, loss in losses.items() if loss is not None}
    kept = retention.reasons(steps, known, _config(run))
    return [
        Row(
            step=step,
            saved=_saved(path),
            size=sum(x.stat().st_size for x in path.rglob("*") if x.is_file()),
            digests=(path / layout.DIGESTS).is_dir(),
            loss=losses[step],
            kept=kept[step],
            fault=layout.fault(path),
        )
        for step, path in paths.items()
    ]


def table(run: Path) -> str:
    """What `ls` prints: the checkpoints, what is in quarantine, what was never finished."""
    head = ("step", "saved", "MiB", "digests", "eval loss", "kept")
    lines = [
        (
            str(row.step),
            row.saved or "?",
            f"{row.size / 2**20:,.1f}",
            "yes" if row.digests else "no",
            "-" if row.loss is None else f"{row.loss:.4f}",
            f"BAD: {row.fault}" if row.fault else ", ".join(row.kept) or "no longer",
        )
        for row in rows(run)
    ]
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head) - 1)]
    text = [
        "  ".join((*(x.rjust(n) for x, n in zip(line[:-1], widths, strict=True)), line[-1]))
        for line in (head, *lines)
    ]
    text += [f"in quarantine: {name}: {why}" for name, why in quarantine.moved(run).items()]
    text += [f"never finished: {path.name}" for path in layout.unfinished(run)]
    return "\n".join(text)


def _config(run: Path) -> config.CheckpointConfig:
    """The settings of the run; the defaults where it has none."""
    path = run / "config.json"
    if not path.exists():
        return config.CheckpointConfig()
    return config.from_dict(files.read_object(path)).checkpoint


def _saved(checkpoint: Path) -> str:
    try:
        nanoseconds = layout.committed(checkpoint)
    except UserError:
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(nanoseconds / 1e9))
