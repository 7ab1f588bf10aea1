"""Compares this implementation with the reference's golden cases.

    python -m blindvalm_jax.parity DIR [--only=GLOB] [--json=FILE]

Exit code 0: everything holds; 1: something differs; 2: a case cannot be read.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from blindvalm_jax import golden
from blindvalm_jax.errors import UserError, run_main
from blindvalm_jax.golden.case import Check, find, read

_ONLY = flags.DEFINE_string("only", "*", "Run the cases whose name matches this pattern.")
_JSON = flags.DEFINE_string("json", None, "Also write every comparison to this file.")


def main(argv: Sequence[str]) -> int:
    """Runs the cases of a directory, prints the table, returns the exit code."""
    if len(argv) != 2:
        raise UserError("usage: python -m blindvalm_jax.parity DIR [--only=GLOB] [--json=FILE]")
    try:
        paths = find(Path(argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    paths = [path for path in paths if fnmatch.fnmatch(path.stem, _ONLY.value)]
    if not paths:
        print(f"error: no case in {argv[1]} matches --only={_ONLY.value}", file=sys.stderr)
        return 2
    checks: list[Check] = []
    unreadable: list[str] = []
    for path in paths:
        try:
            found = golden.run(read(path))
        except UserError as error:
            unreadable.append(str(error))
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        checks.extend(found)
        print_table(found)
    differing = [check for check in checks if not check.holds]
    print(
        f"{len(paths)} cases, {len(checks)} comparisons: {len(differing)} differ, "
        f"{len(unreadable)} cases unreadable"
    )
    if _JSON.value:
        rows = [{**dataclasses.asdict(check), "holds": check.holds} for check in checks]
        result = {"checks": rows, "unreadable": unreadable}
        Path(_JSON.value).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if unreadable:
        return 2
    return 1 if differing else 0


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
    run_main(main)
