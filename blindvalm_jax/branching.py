"""Runs that go on from a checkpoint of another one, with a schedule of their own from there on.

Several lengths share a trunk at a constant learning rate; each branch leaves it where its cooldown
begins (Hagele et al. 2024, arXiv 2405.18392).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from blindvalm_jax import changes, files, runs
from blindvalm_jax.checkpoints import layout, quarantine
from blindvalm_jax.config import Config
from blindvalm_jax.console import say
from blindvalm_jax.errors import UserError


class Place(NamedTuple):
    """A checkpoint of a run: what `train.branch_from` names."""

    run: str
    step: int

    @classmethod
    def named(cls, name: str) -> Place:
        """RUN@STEP.

        Raises:
          UserError: it is not of that form.
        """
        run, _, step = name.rpartition("@")
        if not run or not step.isdecimal():
            raise UserError(
                f"train.branch_from={name}: expected RUN@STEP, the directory of a run and the "
                "updates done in one of its checkpoints"
            )
        return cls(run, int(step))


def begin(
    settings: Config, workdir: Path, *, dry_run: bool = False, allowed: Sequence[str] = ()
) -> None:
    """Makes a new run's directory that of a run which has come as far as the trunk at that step.

    From there on it is resumed as any other: on the same data, with the same tower and settings,
    but for the length and what a resumed run may change. A run that has begun stays as it is.
    dry_run: nothing is written. allowed: settings or sections that may differ besides.

    Raises:
      UserError: there is no such checkpoint, or settings differ that change what was done.
    """
    if not settings.train.branch_from or layout.steps(workdir):
        return
    quarantine.check_not_lost(workdir)
    place = Place.named(settings.train.branch_from)
    trunk = Path(place.run).expanduser()
    checkpoint = layout.directory(trunk) / str(place.step)
    if (fault := layout.fault(checkpoint)) is not None:
        there = ", ".join(map(str, layout.steps(trunk))) or "none"
        raise UserError(
            f"train.branch_from={settings.train.branch_from}: {checkpoint}: {fault}; checkpoints "
            f"there: {there}"
        )
    if place.step >= settings.train.steps:
        raise UserError(
            f"train.branch_from={settings.train.branch_from} has done {place.step} updates; "
            f"train.steps is {settings.train.steps}: nothing is left to train"
        )
    record = runs.record_of(trunk)
    record["config_as_given"]["train"]["branch_from"] = settings.train.branch_from
    told = changes.check(record, settings, updates=place.step, of=trunk, allowed=allowed)
    if dry_run:
        return
    say(f"branches from {trunk} at step {place.step}" + "".join(f"; {line}" for line in told))
    runs.claim(workdir)
    try:
        if (trunk / "tower").is_dir():
            shutil.copytree(trunk / "tower", workdir / "tower", dirs_exist_ok=True)
        if (trunk / "config.json").exists():  # what was chosen for it, which stays
            shutil.copy(trunk / "config.json", workdir)
        files.write_json(workdir / "run.json", {**record, "starts": []})
        partial = layout.directory(workdir) / f"{place.step}.orbax-checkpoint-tmp-branch"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(checkpoint, partial)
        os.rename(partial, layout.directory(workdir) / str(place.step))
    except OSError as error:  # among them shutil.Error: the trunk keeps it no longer, say
        raise UserError(
            f"{checkpoint} cannot be copied to {workdir}: {error.strerror or error}"
        ) from error
