"""Trains what a config file says: GPT-2, VALM, BLIND-VALM or a control, or the CLIP they need.

    python -m blindvalm_jax.train --config=configs/text.py --workdir=runs/a [--config.a.b=value]

The same command again resumes. `--dry_run` stops after compiling and says where every tensor lies,
what memory a step needs and what devices send each other; with `--simulated_devices=N` and
`--simulated_processes=P` for a topology that is not here (docs/scaling_up.md). Exit codes
(docs/reliability.md):

    0   done                                    42  stopped by SIGTERM, saved: run it again
    1   an error, said in one line on stderr    43  diverged
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from blindvalm_jax import addresses, config, distributed, planning, process_layout, remote
from blindvalm_jax.command_line import run_main
from blindvalm_jax.errors import UserError
from blindvalm_jax.starting import start
from blindvalm_jax.survival import preemption

_JOIN_SECONDS = 600  # machines of a pod do not begin at once
_CONFIG = config_flags.DEFINE_config_file("config", None, "Settings of the run.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, or gs://, s3://.")
_DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    "",
    "Several processes: auto (TPU pod, GKE, SLURM, MPI), or HOST:PORT of the first.",
)
_PROCESSES = flags.DEFINE_integer("processes", None, "How many, beside HOST:PORT.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process", None, "Which one this is, from 0 on.", lower_bound=0)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 100, "A process silent for so long is taken for dead.", lower_bound=1
)
_ALLOW_CHANGED = flags.DEFINE_list(
    "allow_changed", [], "Settings or sections that may differ from those of the run to resume."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile, print what is needed where, and stop.")
_SIMULATED = flags.DEFINE_integer(
    "simulated_devices", None, "With --dry_run: so many devices, simulated on the CPU."
)
_SIMULATED_PROCESSES = flags.DEFINE_integer(
    "simulated_processes",
    1,
    "Of how many processes the simulated devices would be: what those refuse is refused.",
    lower_bound=1,
)


def main(argv: Sequence[str]) -> int:
    """Reads the command line and trains; returns the exit code."""
    if len(argv) > 1:
        raise UserError(
            f"unexpected argument {argv[1]!r}; settings are --config.section.name=value"
        )
    if not flags.FLAGS["config"].present or not _WORKDIR.value:
        raise UserError("--config=FILE.py and --workdir=DIR are needed")
    file = Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0])
    if not file.is_file():
        raise UserError(f"there is no config file {file}; configs/ holds some to start from")
    if not isinstance(_CONFIG.value, ml_collections.ConfigDict):
        raise UserError(f"get_config() of {file} must return an ml_collections.ConfigDict")
    if _DRY_RUN.value and addresses.is_address(_WORKDIR.value):
        raise UserError(
            f"--dry_run trains nothing, and --workdir={_WORKDIR.value} would be brought and sent: "
            "give a path"
        )
    settings = config.parse(_CONFIG.value)
    with (
        _simulated(),
        distributed.joined(
            _DISTRIBUTED.value,
            processes=_PROCESSES.value,
            process=_PROCESS.value,
            heartbeat_seconds=_HEARTBEAT.value,
            wait_seconds=_JOIN_SECONDS,
        ),
        preemption.noticed(),  # also while the run is sent to where it is kept
        _directory(_WORKDIR.value) as workdir,
    ):
        dry_run, allowed = _DRY_RUN.value, _ALLOW_CHANGED.value
        return start(settings, workdir, dry_run=dry_run, allow_changed=allowed)


def _simulated() -> contextlib.AbstractContextManager[None]:
    """The devices and processes that a dry run plans for, where flags name some."""
    devices, processes = _SIMULATED.value, _SIMULATED_PROCESSES.value
    if devices is None:
        if processes > 1:
            raise UserError("--simulated_processes goes with --simulated_devices: say how many")
        return contextlib.nullcontext()
    if _DISTRIBUTED.value:
        raise UserError(
            "--simulated_devices plans for processes that are not here: leave --distributed out, "
            "and say how many with --simulated_processes"
        )
    planning.simulate(devices, dry_run=_DRY_RUN.value)
    return process_layout.simulated(processes, devices=devices)


def _directory(place: str) -> contextlib.AbstractContextManager[Path]:
    """Where the run is worked on: at its path, or here for one kept in an object store."""
    if addresses.is_address(place):
        return remote.kept(place)
    return contextlib.nullcontext(Path(place))


if __name__ == "__main__":
    run_main(main, takes_addresses=["workdir"])
