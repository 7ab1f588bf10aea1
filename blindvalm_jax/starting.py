"""From settings to a finished run, with the parts of the toy world made where settings ask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax

from blindvalm_jax import runs
from blindvalm_jax.config import Config
from blindvalm_jax.errors import UserError
from blindvalm_jax.survival import preemption
from blindvalm_jax.toyworld import supply
from blindvalm_jax.trainer import train


def start(
    settings: Config, workdir: Path, *, dry_run: bool = False, allow_changed: Sequence[str] = ()
) -> int:
    """Trains in `workdir`, see `trainer.train`; makes what is named `toyworld` before.

    Raises:
      UserError: as `trainer.train`; several processes cannot make what is named `toyworld`.
      Preempted: SIGTERM ended it, and what was done is saved.
    """
    with preemption.noticed(), runs.held(workdir):  # before parts are made in its data/
        if supply.wanted(settings):
            if jax.process_count() > 1:
                raise UserError(
                    "what `toyworld` names is made by a run of one process: begin without "
                    "--distributed, or give the paths of tokenizer, tower and index"
                )
            settings = supply.complete(settings, workdir, train=train, dry_run=dry_run)
        return train(settings, workdir, dry_run=dry_run, allow_changed=allow_changed)
