"""Runs of a sweep that go on from a checkpoint of another one of it: run:NAME@STEP."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from blindvalm_jax.branching import Place
from blindvalm_jax.checkpoints import layout
from blindvalm_jax.config import Config
from blindvalm_jax.errors import UserError

_PREFIX = "run:"  # of a name that is that of a run of the sweep


def of(settings: Config) -> Place | None:
    """The run of the sweep that this one branches from, and at which step; None: from none.

    Raises:
      UserError: what is named has no step.
    """
    named = settings.train.branch_from
    if not named.startswith(_PREFIX):
        return None
    return Place.named(named.removeprefix(_PREFIX))


def name(run: str, step: int) -> str:
    """What `train.branch_from` is for a branch of a run of the sweep."""
    return f"{_PREFIX}{run}@{step}"


def check(runs: Mapping[str, Config]) -> None:
    """Refuses branches that could never begin, before anything is trained.

    Raises:
      UserError: there is no such trunk in the sweep, it does not keep a checkpoint of the step, the
        branch is no longer than that, or runs branch from each other.
    """
    for run, settings in runs.items():
        trunk = of(settings)
        if trunk is None:
            continue
        if trunk.run not in runs:
            raise UserError(f"run {run} branches from {trunk.run}, which is no run of the sweep")
        of_trunk = runs[trunk.run]
        kept = of_trunk.checkpoint
        last = of_trunk.train.steps
        kept_there = trunk.step in (last, *kept.keep_steps) or (
            kept.keep_every and trunk.step % kept.keep_every == 0
        )
        if not 0 < trunk.step <= last or not kept_there:
            raise UserError(
                f"run {run} branches from {trunk.run} at step {trunk.step}, of which that keeps "
                f"no checkpoint: it has {last} steps, checkpoint.keep_every={kept.keep_every} and "
                f"checkpoint.keep_steps={kept.keep_steps}"
            )
        if settings.train.steps <= trunk.step:
            raise UserError(
                f"run {run} branches at step {trunk.step} of {trunk.run}, and has "
                f"train.steps={settings.train.steps}: there is nothing left to train"
            )
    levels(runs)


def ready(settings: Config, runs: Path) -> bool:
    """Whether a run can begin: it branches from none, or its trunk has come so far."""
    trunk = of(settings)
    if trunk is None:
        return True
    return layout.fault(layout.directory(runs / trunk.run) / str(trunk.step)) is None


def placed(settings: Config, runs: Path) -> Config:
    """Settings that name the directory of the trunk."""
    trunk = of(settings)
    if trunk is None:
        return settings
    place = f"{(runs / trunk.run).absolute()}@{trunk.step}"
    return dataclasses.replace(
        settings, train=dataclasses.replace(settings.train, branch_from=place)
    )


def levels(runs: Mapping[str, Config]) -> dict[str, int]:
    """How many runs each one has before it: its trunk, the trunk of that, and so on.

    Raises:
      UserError: runs branch from each other.
    """

    def before(name: str) -> int:
        above: list[str] = []
        while (trunk := of(runs[name])) is not None:
            if name in above:
                raise UserError(f"runs branch from each other: {', '.join(sorted(above))}")
            above.append(name)
            name = trunk.run
        return len(above)

    return {name: before(name) for name in runs}
