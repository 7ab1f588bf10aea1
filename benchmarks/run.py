"""Runs a benchmark by name: `python -m benchmarks.run NAME [--json=FILE]`.

Each prints a table and, with --json, writes the numbers. Ratios are measured within one run, the
systems taking turns, so that they hold when the machine's speed drifts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import (
    evaluation,
    generate,
    loss_report,
    overhead,
    placement,
    search,
    step_ratio,
    valm_cost,
)
from blindvalm_jax.command_line import run_main
from blindvalm_jax.errors import UserError

_JSON = flags.DEFINE_string("json", None, "Also write the numbers to this file.")

BENCHMARKS: dict[str, Callable[[], dict[str, Any]]] = {
    "evaluation": evaluation.run,
    "generate": generate.run,
    "loss_report": loss_report.run,
    "overhead": overhead.run,
    "placement": placement.run,
    "search": search.run,
    "step_ratio": step_ratio.run,
    "valm_cost": valm_cost.run,
}


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark that the command line names."""
    if len(argv) != 2 or argv[1] not in BENCHMARKS:
        raise UserError(
            f"usage: python -m benchmarks.run NAME [--json=FILE]; names: {', '.join(BENCHMARKS)}"
        )
    out = None if _JSON.value is None else Path(_JSON.value)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"--json={out} must be a file in a directory that is there")
    result = BENCHMARKS[argv[1]]()
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
