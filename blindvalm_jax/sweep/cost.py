"""What training will cost, of a run or of all runs of a sweep, from their settings alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_collections

from blindvalm_jax import config, files
from blindvalm_jax.costs import of_settings, tables
from blindvalm_jax.errors import UserError
from blindvalm_jax.sweep import grids, plans


def report(given: Any, *, mfu: float, to: str) -> None:
    """Prints the table of a run, or of a sweep's runs; to: also as JSON in this file.

    Raises:
      UserError: `given` is no config, settings do not fit, or the file cannot be written.
    """
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu is a share of the peak, above 0 and up to 1, got {mfu}")
    if plans.is_sweep(given):
        runs = plans.planned(given)
        found = {name: run.account for name, run in runs.items()}
        shares = {name: run.share for name, run in runs.items()}
        lines = tables.of_sweep(found, shares, mfu=mfu)
        if "grid" in given:
            lines += [f"note: {line}" for line in grids.thin(runs.values())]
        content = tables.sweep_as_json(found, shares, mfu=mfu)
    else:
        if not isinstance(given, ml_collections.ConfigDict):
            raise UserError("get_config() must return a ConfigDict: of a run, or of a sweep")
        account = of_settings.account(config.parse(given))
        lines, content = tables.of_run(account, mfu=mfu), tables.as_json(account, mfu=mfu)
    print("\n".join(lines))
    if to:
        try:
            files.write_json(Path(to), content)
        except OSError as error:
            raise UserError(f"--json={to} cannot be written: {error.strerror}") from error
