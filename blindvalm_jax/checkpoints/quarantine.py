"""Bad checkpoints are moved aside, never deleted; and the record that a run has saved at all."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from blindvalm_jax import files
from blindvalm_jax.checkpoints import layout
from blindvalm_jax.errors import UserError

DIRECTORY, RECORD, REASON = "quarantine", "saved.json", "reason.txt"


def move(run: Path, step: int, reason: str) -> Path:
    """Moves a checkpoint to RUN/quarantine with the reason beside its items; returns where to.

    Raises:
      UserError: it cannot be moved.
    """
    aside, checkpoint = run / DIRECTORY, layout.directory(run) / str(step)
    names = (str(step), *(f"{step}.{count}" for count in range(2, 1000)))
    try:
        aside.mkdir(exist_ok=True)
        place = next(aside / name for name in names if not (aside / name).exists())
        os.rename(checkpoint, place)
    except OSError as error:
        raise UserError(f"{checkpoint} cannot be moved to {aside}: {error.strerror}") from error
    # The reason is said on the console too; a full disk must not stop a run that can go on.
    with contextlib.suppress(OSError):
        (place / REASON).write_text(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {reason}\n")
    return place


def moved(run: Path) -> dict[str, str]:
    """The reason for each checkpoint in quarantine, by the name of its directory."""
    aside = run / DIRECTORY
    if not aside.is_dir():
        return {}
    found = {}
    for place in sorted(aside.iterdir()):
        reason = place / REASON
        found[place.name] = reason.read_text().strip() if reason.is_file() else "no reason noted"
    return found


def record(run: Path, step: int) -> None:
    """Notes that a checkpoint was saved, outside of the directory that could be lost."""
    content = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    files.write_json(run / RECORD, content)


def check_not_lost(run: Path) -> None:
    """Refuses to start a run afresh whose checkpoints are gone.

    Raises:
      UserError: naming what shows that it had some.
    """
    signs = []
    if (run / RECORD).exists():
        signs.append(f"{RECORD} tells of step {files.read_object(run / RECORD).get('step')}")
    signs += [f"{DIRECTORY}/{name}: {reason}" for name, reason in moved(run).items()]
    if (run / "run.json").exists():  # a run of before `RECORD`
        starts = files.read_object(run / "run.json").get("starts", [])
        resumed = [start["step"] for start in starts if start.get("step")]
        if resumed and not signs:
            signs.append(f"run.json tells of step {resumed[-1]}")
    if signs:
        raise UserError(
            f"{run} has no checkpoint any more, but had ({'; '.join(signs)}): it is not started "
            f"from the beginning. Bring one back to {layout.directory(run)}, or take another "
            "--workdir"
        )
