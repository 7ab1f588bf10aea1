"""Trains what a config file says: GPT-2, VALM, BLIND-VALM or a control, or the CLIP they need.

    python -m blindvalm_jax.train --config=configs/text.py --workdir=runs/a [--config.a.b=value]

The same command again resumes. `--dry_run` stops after compiling, with the memory it needs. Exit
codes: 0 done, 1 error, 43 diverged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from blindvalm_jax import config, runs
from blindvalm_jax.errors import UserError, run_main
from blindvalm_jax.toyworld import supply
from blindvalm_jax.trainer import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Settings of the run.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile, print the memory needed, and stop.")


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
    settings, workdir = config.parse(_CONFIG.value), Path(_WORKDIR.value)
    if supply.wanted(settings):
        runs.claim(workdir)  # before parts are made in its data/
        settings = supply.complete(settings, workdir, train=train, dry_run=_DRY_RUN.value)
    return train(settings, workdir, dry_run=_DRY_RUN.value)


if __name__ == "__main__":
    run_main(main)
