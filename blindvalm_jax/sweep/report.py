"""The report on a sweep, from its directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from blindvalm_jax.scaling import analysis
from blindvalm_jax.scaling import report as page
from blindvalm_jax.scaling.bootstrap import DRAWS
from blindvalm_jax.scaling.sentences import supported
from blindvalm_jax.scaling.wording import label
from blindvalm_jax.sweep import collected
from blindvalm_jax.sweep.grids import Planned


def write(workdir: Path, runs: Mapping[str, Planned], *, out: Path, draws: int = DRAWS) -> None:
    """Writes the report, and prints what the data support.

    Raises:
      UserError: there is no sweep, a file of a run cannot be read, or `out` not be written.
    """
    results = collected.read(workdir, runs)
    found = analysis.analyse(results, draws=draws)
    page.write(found, out, once=once(runs), notes=collected.notes(workdir, results))
    print("\n".join(supported(found)))
    for name, why in {**found.left_out, **found.unfitted}.items():
        print(f"left out: {name}: {why}")
    print(out / "report.md")


def once(runs: Mapping[str, Planned]) -> dict[str, float]:
    """FLOPs of what is done once for each family, by what it is: the most of its runs."""
    costs: dict[str, float] = {}
    for plan in runs.values():
        for what, flops in plan.account.once.items():
            key = f"{label(plan.family)}: {what}"
            costs[key] = max(flops, costs.get(key, 0.0))
    return costs
