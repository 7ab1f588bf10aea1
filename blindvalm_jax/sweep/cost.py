"""What training will cost, of a run or of all runs of a sweep, from their settings alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_collections

from blindvalm_jax import config, files
from blindvalm_jax.costs import of_settings, tables
from blindvalm_jax.costs.account import Account
from blindvalm_jax.errors import UserError


def report(given: Any, runs: dict[str, config.Config] | None, *, mfu: float, to: str) -> None:
    """Prints the table of a run, or of a sweep's `runs`; to: also as JSON in this file.

    Raises:
      UserError: `given` is no config, settings do not fit, or the file cannot be written.
    """
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu is a share of the peak, above 0 and up to 1, got {mfu}")
    if runs is None:
        if not isinstance(given, ml_collections.ConfigDict):
            raise UserError("get_config() must return a ConfigDict: of a run, or a sweep's `runs`")
        account = of_settings.account(config.parse(given))
        lines, content = tables.of_run(account, mfu=mfu), tables.as_json(account, mfu=mfu)
    else:
        found = {name: _of(name, settings) for name, settings in runs.items()}
        lines = tables.of_sweep(found, mfu=mfu)
        each = {name: tables.as_json(one, mfu=mfu) for name, one in found.items()}
        total = sum(one.budget for one in found.values())
        content = {"runs": each, "budget_flops": total, "mfu": mfu}
        computed = sum(one.device_budget for one in found.values())
        content["device_hours"] = tables.device_hours(computed, mfu=mfu)
    print("\n".join(lines))
    if to:
        try:
            files.write_json(Path(to), content)
        except OSError as error:
            raise UserError(f"--json={to} cannot be written: {error.strerror}") from error


def _of(name: str, settings: config.Config) -> Account:
    try:
        return of_settings.account(settings)
    except UserError as error:
        raise UserError(f"run {name}: {error}") from error
