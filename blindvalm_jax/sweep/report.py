"""The report on a sweep, from its directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from blindvalm_jax.costs import tables
from blindvalm_jax.scaling import analysis
from blindvalm_jax.scaling import report as page
from blindvalm_jax.scaling.bootstrap import DRAWS
from blindvalm_jax.scaling.results import Once
from blindvalm_jax.scaling.sentences import supported
from blindvalm_jax.sweep import collected
from blindvalm_jax.sweep.grids import Planned


def write(workdir: Path, runs: Mapping[str, Planned], *, out: Path, draws: int = DRAWS) -> None:
    """Writes the report, and prints what the data support.

    Raises:
      UserError: there is no sweep, a file of a run cannot be read, or `out` not be written.
    """
    results = collected.read(workdir, runs)
    found = analysis.analyse(results, draws=draws)
    notes = collected.notes(workdir, results)
    notes += collected.costs_otherwise(workdir, runs, results)
    page.write(found, out, once=once(runs), notes=notes)
    print("\n".join(supported(found)))
    for left_out in (found.left_out, found.unfitted):
        for why, names in page.grouped(left_out).items():
            print(f"left out: {names}: {why}")
    print(out / "report.md")


def once(runs: Mapping[str, Planned]) -> list[Once]:
    """What is done once, and for which families; of runs that need more or less of it, the most."""
    largest = max(plan.budget for plan in runs.values())
    found = tables.done_once(plan.account for plan in runs.values())
    names = tables.names_of(found)
    return [
        Once(
            names[one],
            tuple(dict.fromkeys(x.family for x in runs.values() if one in x.account.once)),
            flops,
            None if flops is None else flops / largest,
        )
        for one, flops in found.items()
    ]
