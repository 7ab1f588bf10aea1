"""Compares this implementation with the reference's golden cases.

    python -m blindvalm_jax.parity DIR [--only=GLOB] [--json=FILE]

Exit code 0: everything holds; 1: something differs, or our code crashes on it; 2: a case cannot be
read, or the command is wrong.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from blindvalm_jax import golden
from blindvalm_jax.command_line import print_error, run_main
from blindvalm_jax.errors import UserError
from blindvalm_jax.golden.case import Check, find, is_other, read

_ONLY = flags.DEFINE_string("only", "*", "Run the cases whose name matches this pattern.")
_JSON = flags.DEFINE_string("json", None, "Also write every comparison to this file.")


def main(argv: Sequence[str]) -> int:
    """Runs the cases of a directory, prints the table, returns the exit code."""
    if len(argv) != 2:
        raise UserError("usage: python -m blindvalm_jax.parity DIR [--only=GLOB] [--json=FILE]")
    out = None if _JSON.value is None else Path(_JSON.value)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"--json={out} must be a file in a directory that is there")
    paths = [path for path in find(Path(argv[1])) if fnmatch.fnmatch(path.stem, _ONLY.value)]
    others = [path for path in paths if is_other(path)]
    for path in others:
        print(f"skipped: {path.name} is no golden case (it has no kind)", flush=True)
    paths = [path for path in paths if path not in others]
    if not paths:
        raise UserError(f"no case in {argv[1]} matches --only={_ONLY.value}")
    checks: list[Check] = []
    unreadable: list[str] = []
    for path in paths:
        try:
            found = golden.run(read(path))
        except UserError as error:
            unreadable.append(str(error))
            print_error(str(error))
            continue
        checks.extend(found)
        print_table(found)
    differing = [check for check in checks if not check.holds]
    print(
        f"{len(paths)} cases, {len(checks)} comparisons: {len(differing)} differ, "
        f"{len(unreadable)} cases unreadable"
    )
    if out is not None:
        result = {"checks": [_row(check) for check in checks], "unreadable": unreadable}
        try:
            out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error}") from error
    if unreadable:
        return 2
    return 1 if differing else 0


def _row(check: Check) -> dict[str, Any]:
    """A comparison as JSON, which has no infinity: a difference that is no number is null."""
    difference = check.difference if math.isfinite(check.difference) else None
    return {**dataclasses.asdict(check), "difference": difference, "holds": check.holds}


def print_table(checks: Sequence[Check]) -> None:
    """One line per comparison; a segmentation case as one line, with the rows that differ."""
    if len(checks) > 60 and all(check.tolerance == 0 for check in checks):
        wrong = [check for check in checks if not check.holds]
        total = Check(checks[0].case, f"{len(checks)} rows exactly", float(len(wrong)), 0.0)
        checks = [*wrong, total]
    for check in checks:
        verdict = "ok" if check.holds else "DIFFERS"
        print(
            f"{check.case:30} {check.quantity:52} {check.difference:9.2e} "
            f"<= {check.tolerance:7.0e}  {verdict}",
            flush=True,
        )


if __name__ == "__main__":
    run_main(main, failure=2)
