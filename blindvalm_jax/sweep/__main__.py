r"""Trains many runs with any number of workers that share a directory.

    python -m blindvalm_jax.sweep run --config=configs/sweeps/NAME.py --workdir=DIR
    python -m blindvalm_jax.sweep status --workdir=DIR
    python -m blindvalm_jax.sweep report --config=configs/sweeps/NAME.py --workdir=DIR [--out=DIR]
    python -m blindvalm_jax.sweep launch --config=SWEEP.py --workdir=DIR --scheduler=slurm
        [--workers=N] [-- FLAGS OF THE SCHEDULER'S SCRIPT]
    python -m blindvalm_jax.sweep cost --config=CONFIG.py [--mfu=0.4] [--json=FILE]

A sweep's config returns a ConfigDict whose `runs` holds the settings of each run by its name, or a
grid of families, sizes and budgets (sweep/grids.py). run: a worker; start as many as there are
devices for, on any machines that see DIR. Each takes a run that nobody has and trains it in
DIR/runs/NAME; when a worker dies, or is silent for --lease_seconds, another goes on with its run.
--index=I trains the Ith run alone, as a task of a job array. The same command goes on where workers
stopped. --retry opens failed and diverged runs again. What runs make of data lies in DIR/data,
unless data.cache says where. DIR/manifest.jsonl keeps what happened. cost: FLOPs, parameters and
bytes of a sweep's runs, or of any training config by part, before there is data (docs/costs.md).

report: what the runs that are done say of their families at equal budget, in model FLOPs and in
device-seconds (docs/scaling_experiments.md), in DIR/report or --out.

launch: prints the commands that train the sweep with a scheduler of launch/ (slurm, gke, tpu_vm,
sky, local), N workers at once, and runs none.

Exit codes: 0 all done, 1 error, or a run failed or diverged, 42 preempted and saved, 134 this
worker stood still for so long that another may have its run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from blindvalm_jax.command_line import run_main
from blindvalm_jax.errors import UserError
from blindvalm_jax.sweep import cost, launching, plans, status, worker
from blindvalm_jax.sweep.manifest import Manifest

_CONFIG = config_flags.DEFINE_config_file("config", None, "The sweep.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the sweep.")
_INDEX = flags.DEFINE_integer("index", -1, "run: the only run to train, 0 being the first")
_RETRY = flags.DEFINE_bool("retry", False, "run: failed and diverged runs again")
_LEASE = flags.DEFINE_float(
    "lease_seconds", 120.0, "run: how long a silent worker keeps its run", lower_bound=1.0
)
_SCHEDULER = flags.DEFINE_enum(
    "scheduler", None, launching.SCHEDULERS, "launch: what starts the workers"
)
_WORKERS = flags.DEFINE_integer(
    "workers", None, "launch: how many at once; else 1, of slurm as many as there are runs"
)
_OUT = flags.DEFINE_string("out", "", "report: where to write it, in place of DIR/report")
_MFU = flags.DEFINE_float("mfu", 0.4, "cost: share of the peak that device-hours are given for")
_JSON = flags.DEFINE_string("json", "", "cost: also as JSON in this file")


def main(argv: Sequence[str]) -> int:
    """Does what the command line says; returns the exit code."""
    if argv[1:2] == ["launch"]:
        return _launch(argv[2:])
    if len(argv) != 2 or argv[1] not in ("run", "status", "report", "cost"):
        got = " ".join(argv[1:]) or "nothing"
        raise UserError(f"expected run, status, report, launch or cost, got {got}")
    if argv[1] == "cost":
        return _cost()
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is needed")
    workdir = Path(_WORKDIR.value)
    if argv[1] == "status":
        return _status(workdir)
    if argv[1] == "report":
        return _report(workdir)
    return _run(workdir)


def _run(workdir: Path) -> int:
    runs = plans.settings_of(_given("--config=configs/sweeps/NAME.py is needed"))
    if _INDEX.value >= len(runs) or _INDEX.value < -1:
        raise UserError(f"--index={_INDEX.value}: the sweep has runs 0 to {len(runs) - 1}")
    try:
        manifest = Manifest(workdir)
        changed = manifest.plan(runs)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error.strerror}") from error
    if changed:
        print("\n".join(changed), flush=True)
    only = list(runs) if _INDEX.value < 0 else [list(runs)[_INDEX.value]]
    if _RETRY.value:
        for name in only:
            if manifest.states()[name].ended in ("failed", "diverged"):
                manifest.add(name, "reopened")
    return worker.work(workdir, runs, lease_seconds=_LEASE.value, only=only)


def _status(workdir: Path) -> int:
    try:
        print("\n".join(status.lines(workdir)))
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be read: {error.strerror}") from error
    return 0


def _launch(given: Sequence[str]) -> int:
    """given: flags of the scheduler's script, behind --."""
    runs = plans.settings_of(_given("--config=configs/sweeps/NAME.py is needed"))
    scheduler = _SCHEDULER.value
    if not _WORKDIR.value or scheduler is None:
        raise UserError("launch needs --workdir=DIR and --scheduler=NAME")
    if _INDEX.value != -1:
        raise UserError(f"--index={_INDEX.value}: launch is for all runs, leave it out")
    lines = launching.commands(
        runs,
        scheduler=scheduler,
        workers=_WORKERS.value,
        worker=launching.flags_of_worker(sys.argv[1:], without=("scheduler", "workers")),
        given=given,
    )
    print("\n".join(lines))
    return 0


def _report(workdir: Path) -> int:
    # Matplotlib, which workers need not have loaded.
    from blindvalm_jax.sweep import report

    runs = plans.planned(_given("--config=configs/sweeps/NAME.py is needed"))
    report.write(workdir, runs, out=Path(_OUT.value or workdir / "report"))
    return 0


def _cost() -> int:
    given = _given("--config=CONFIG.py is needed: a sweep's, or any that is trained with")
    cost.report(given, mfu=_MFU.value, to=_JSON.value)
    return 0


def _given(needed: str) -> Any:
    """What the config file returns; needed: what is said where none is named."""
    if not flags.FLAGS["config"].present:
        raise UserError(needed)
    file = Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0])
    if not file.is_file():
        raise UserError(f"there is no config file {file}")
    return _CONFIG.value


if __name__ == "__main__":
    run_main(main, takes_addresses=["argument"])
