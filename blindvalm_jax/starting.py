"""From settings to a finished run, with the parts of the toy world made where settings ask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blindvalm_jax import branching, distributed, ownership, process_layout, runs, sinks
from blindvalm_jax.checkpoints import layout
from blindvalm_jax.config import Config
from blindvalm_jax.errors import UserError
from blindvalm_jax.stores import inputs
from blindvalm_jax.stores.settings import brought
from blindvalm_jax.survival import preemption
from blindvalm_jax.toyworld import supply
from blindvalm_jax.trainer import train


def start(
    settings: Config, workdir: Path, *, dry_run: bool = False, allow_changed: Sequence[str] = ()
) -> int:
    """Trains in `workdir`, see `trainer.train`, with all that settings name on this machine.

    Before, what is named `toyworld` is made, and inputs that lie in a store are brought.

    Raises:
      UserError: as `trainer.train`; several processes cannot do what settings ask for.
      Preempted: SIGTERM ended it, and what was done is saved.
    """
    _check_processes(settings)
    with (
        preemption.noticed(),
        runs.held(workdir),  # before parts are made in its data/
        inputs.released(),
    ):
        if supply.wanted(settings):
            if not dry_run:  # rather than after hours
                sinks.check(settings.log, workdir)
            settings = supply.complete(settings, workdir, train=train, dry_run=dry_run)
        branch = distributed.all_or_none if ownership.apart() else distributed.first_then_others
        branch(lambda: branching.begin(settings, workdir, dry_run=dry_run, allowed=allow_changed))
        kept = _read_no_more(workdir, settings)
        settings = distributed.first_then_others(lambda: brought(settings, but=kept))
        return train(settings, workdir, dry_run=dry_run, allow_changed=allow_changed)


def _check_processes(settings: Config) -> None:
    """Refuses what a run of one process alone does, before anything is brought or prepared."""
    if process_layout.count() == 1:
        return
    if supply.wanted(settings):
        raise UserError(
            "what `toyworld` names is made by a run of one process: begin without "
            "--distributed, or give the paths of tokenizer, tower and index"
        )
    if settings.eval.tasks:
        raise UserError(
            f"eval.tasks={settings.eval.tasks}: tasks are asked by runs of one process: leave them "
            "out"
        )
    if settings.train.objective == "language" and settings.grounding.search == "faiss":
        raise UserError(
            "grounding.search=faiss searches on one host: with several processes take exact, or "
            "prepared"
        )


def _read_no_more(workdir: Path, settings: Config) -> list[str]:
    """Inputs of which a run that has begun reads nothing: it keeps its tower."""
    if not layout.steps(workdir) or not (workdir / "run.json").exists():
        return []
    same = runs.given_before(workdir)["grounding"]["tower"] == settings.grounding.tower
    return ["train.init_from", *(["grounding.tower", "grounding.tokenizer"] if same else [])]
