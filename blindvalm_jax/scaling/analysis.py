"""Families of runs at equal budget, in model FLOPs and in device-seconds: all a report says.

Nothing is made up: what the runs do not tell has a line that says why.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from blindvalm_jax.errors import UserError
from blindvalm_jax.scaling import bootstrap, families
from blindvalm_jax.scaling.families import Comparison, Estimate, estimate
from blindvalm_jax.scaling.family_fits import UNITS, FamilyFit, best, fit_family
from blindvalm_jax.scaling.fits import Seen
from blindvalm_jax.scaling.points import Array
from blindvalm_jax.scaling.results import FLOPS, SECONDS, Result, left_out, tasks_of, usable

FAMILIES = (
    *("gpt2", "blind", "eos", "valm", "valm_eos"),
    *("random_tower", "random_tower_eos", "shuffled", "shuffled_eos"),
)
_WITHIN = 1.02  # of a budget: runs of its group cost within 1 % of it
_SAME = 1.05  # budgets of two groups that are one
_SPACED = 4  # budgets, where the runs have none in common
_MOST = 8  # budgets that are compared: runs that were planned one by one have one each
_TRACK = 16  # budgets of a curve in a figure
_BEYOND = 10 * (1 - 1e-9)
_AT_ENDS = 0.025  # of draws that do not tell all numbers: ends of intervals are theirs


@dataclasses.dataclass(frozen=True)
class Reached:
    """The compute-optimal model of a family at a budget, no larger or smaller than any trained.

    accuracy: by task, of a run with this N and D, with that of each draw. notes: that N* is the
    least or largest trained, or where D* lies that no run had.
    """

    budget: float
    loss: Estimate
    n: Estimate
    d: Estimate
    accuracy: Mapping[str, Estimate]
    drawn: Mapping[str, Array] = dataclasses.field(repr=False)
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Versus:
    """A family against the reference: see `families.compare`; accuracy: less the reference's."""

    comparison: Comparison
    accuracy: Mapping[str, Estimate]


@dataclasses.dataclass(frozen=True)
class AtBudget:
    """All families at one budget.

    without: why a family has nothing here. runs: of each family, fitted or not, the run of lowest
    loss that cost no more. beyond: some family has seen no more than a tenth, and sizes are any.
    """

    unit: str
    budget: float
    reached: Mapping[str, Reached]
    versus: Mapping[str, Versus]
    without: Mapping[str, str]
    runs: Mapping[str, Result]
    beyond: bool = False


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What the results of a sweep say; families by name in one order everywhere.

    unfitted: why a family has no law. silent: why there is nothing at all in a unit. reference:
    what others are compared with; None: nothing is. at: by unit the budgets that the reference and
    others have seen, the least first, and one a decade beyond what all have seen. first:
    by unit, at the largest of them, the family of lowest loss against each other one. tracks: of
    each family along the budgets it has seen itself.
    """

    results: tuple[Result, ...]
    left_out: Mapping[str, str]
    families: Mapping[str, FamilyFit]
    unfitted: Mapping[str, str]
    silent: Mapping[str, str]
    reference: str | None
    at: Mapping[str, tuple[AtBudget, ...]]
    first: Mapping[str, tuple[Comparison, ...]]
    tracks: Mapping[str, Mapping[str, tuple[Reached, ...]]]

    def seen(self, unit: str) -> tuple[AtBudget, ...]:
        """The budgets at which families are compared."""
        return tuple(one for one in self.at[unit] if not one.beyond)

    def tasks(self) -> list[str]:
        """Tasks that any usable run was asked, sorted."""
        return tasks_of(usable(self.results))


def analyse(results: Iterable[Result], *, draws: int = bootstrap.DRAWS, seed: int = 0) -> Analysis:
    """Fits and compares all families.

    Raises:
      UserError: there are no results.
    """
    given = tuple(results)
    if not given:
        raise UserError("a report needs runs, and there are none")
    silent: dict[str, str] = {}
    kinds = sorted({run.device for run in usable(given) if run.device})
    if len(kinds) > 1:
        silent[SECONDS] = f"its runs, or others', were timed on {', '.join(kinds)}"
    of_family: dict[str, list[Result]] = {name: [] for name in names_of(given)}
    for run in usable(given):
        counted = dataclasses.replace(run, seconds=None) if SECONDS in silent else run
        of_family[run.family].append(counted)
    fitted, unfitted = {}, {}
    for name, runs in of_family.items():
        try:
            fit = fit_family(name, runs, draws=draws, seed=seed)
        except UserError as error:
            unfitted[name] = str(error)
            continue
        fitted[name] = dataclasses.replace(fit, without={**fit.without, **silent})
    reference = next(iter(fitted), None)
    at = {}
    for unit in UNITS:
        with_cost = {name: fit.runs for name, fit in fitted.items() if unit in fit.costs}
        budgets = _common(with_cost if fitted else of_family, unit)
        at[unit] = tuple(_at(budget, unit, fitted, reference, of_family) for budget in budgets)
        if budgets and fitted:
            at[unit] += tuple(_beyond(fitted, unit))
    return Analysis(
        results=given,
        left_out=left_out(given),
        families=fitted,
        unfitted=unfitted,
        silent=silent,
        reference=reference,
        at=at,
        first={unit: _first(fitted, at[unit]) for unit in UNITS},
        tracks={unit: _tracks(fitted, unit) for unit in UNITS},
    )


def names_of(results: Iterable[Result]) -> list[str]:
    """The families of these runs, those that are known first."""
    there = dict.fromkeys(run.family for run in results)
    known = [name for name in FAMILIES if name in there]
    return known + [name for name in there if name not in FAMILIES]


def _common(of_family: Mapping[str, Sequence[Result]], unit: str) -> list[float]:
    """Budgets that the first family and another have seen: in FLOPs those planned for.

    Of seconds those that all have seen, if there are any.
    """
    ranges = {name: ends for name, runs in of_family.items() if (ends := _range(runs, unit))}
    if not ranges:
        return []
    first, *others = ranges.values()
    sharing = [ends for ends in others if _overlap([first, ends])]
    if not sharing:
        sharing = [first]
    if unit == FLOPS:
        groups: list[float] = []
        for budget in sorted({run.budget for name in ranges for run in of_family[name]}):
            if not groups or budget > _SAME * groups[-1]:
                groups.append(budget)
        found = [
            budget
            for budget in groups
            if _seen(budget, first) and any(_seen(budget, ends) for ends in sharing)
        ]
        if 0 < len(found) <= _MOST:
            return found
    ends = _overlap([first, *sharing]) or _overlap(
        [first, (min(low for low, _ in sharing), max(high for _, high in sharing))]
    )
    low, high = ends or first
    return sorted({float(f"{budget:.3g}") for budget in np.geomspace(low, high, _SPACED)})


def _range(runs: Sequence[Result], unit: str) -> tuple[float, float] | None:
    """What the cheapest and the dearest cost."""
    costs = [cost for run in runs if (cost := run.cost(unit)) is not None]
    return (min(costs), max(costs)) if costs else None


def _overlap(ranges: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    low, high = max(low for low, _ in ranges), min(high for _, high in ranges)
    return (min(low, high), max(low, high)) if low <= high * _WITHIN else None


def _seen(budget: float, ends: tuple[float, float]) -> bool:
    return ends[0] / _WITHIN <= budget <= ends[1] * _WITHIN


def _at(
    budget: float,
    unit: str,
    fitted: Mapping[str, FamilyFit],
    reference: str | None,
    of_family: Mapping[str, Sequence[Result]],
    *,
    beyond: bool = False,
) -> AtBudget:
    reached, versus, without = {}, {}, {}
    for name, fit in fitted.items():
        try:
            reached[name] = _reached(fit, unit, budget, trained=not beyond)
            if reference in reached and name != reference:
                versus[name] = _versus(fitted[reference], fit, reached, unit)
        except UserError as error:
            without[name] = str(error)
    runs = {name: run for name, all_ in of_family.items() if (run := _lowest(all_, unit, budget))}
    return AtBudget(unit, budget, reached, versus, without, runs, beyond)


def _reached(fit: FamilyFit, unit: str, budget: float, *, trained: bool = True) -> Reached:
    if unit not in fit.costs:
        raise UserError(fit.without[unit])
    low, high = fit.costs[unit].draws.fit.seen.budget
    if trained and not _seen(budget, (low, high)):
        raise UserError(f"its runs cost {low:.3g} to {high:.3g} {unit}")
    if not trained and (fit.draws.fit.at_ends or fit.draws.at_ends > _AT_ENDS):
        raise UserError(
            "its law goes no further than its runs, as they do not tell all its numbers"
        )
    found, drawn = best(fit.costs[unit], budget, trained=trained)
    n, d = float(found.n), float(found.d)
    accuracies = {task: one.of_runs(drawn.n, drawn.d) for task, one in fit.responses.items()}
    return Reached(
        budget=budget,
        loss=estimate(found.loss, drawn.loss),
        n=estimate(n, drawn.n),
        d=estimate(d, drawn.d),
        accuracy={
            task: estimate(fit.responses[task].at(n, d), of_draws)
            for task, of_draws in accuracies.items()
        },
        drawn=accuracies,
        notes=tuple(_notes(fit.costs[unit].draws.fit.seen, estimate(n, drawn.n), d)),
    )


def _notes(seen: Seen, n: Estimate, d: float) -> Iterator[str]:
    """Where the best size and length lie beside those trained."""
    for which, end, of_draws in (
        ("least", seen.n[0], n.low),
        ("largest", seen.n[1], n.high),
    ):
        if math.isclose(n.value, end, rel_tol=1e-6):
            yield f"the {which} N trained is the best"
        elif math.isclose(of_draws, end, rel_tol=1e-6):
            yield f"the {which} N trained may be the best"
    for value, (low, high), letter in ((n.value, seen.n, "N"), (d, seen.d, "D")):
        if not low / _WITHIN <= value <= high * _WITHIN:
            yield f"{letter}* {'below' if value < low else 'above'} those trained"


def _versus(
    first: FamilyFit, second: FamilyFit, reached: Mapping[str, Reached], unit: str
) -> Versus:
    a, b = reached[first.name], reached[second.name]
    both = first.costs[unit], second.costs[unit]
    differences = {
        task: estimate(
            b.accuracy[task].value - a.accuracy[task].value,
            families.beside(*both, b.drawn[task]) - a.drawn[task],
        )
        for task in a.accuracy
        if task in b.accuracy
    }
    return Versus(families.compare(*both, budget=a.budget, trained=True), differences)


def _lowest(runs: Sequence[Result], unit: str, budget: float) -> Result | None:
    """The run of lowest loss that cost no more than a budget."""
    within = [
        run for run in runs if (cost := run.cost(unit)) is not None and cost <= _WITHIN * budget
    ]
    return min(within, key=lambda run: (run.held_out, run.name), default=None)


def _beyond(fitted: Mapping[str, FamilyFit], unit: str) -> list[AtBudget]:
    """One decade beyond what each family has seen."""
    most = [
        fit.costs[unit].draws.fit.seen.budget[1] for fit in fitted.values() if unit in fit.costs
    ]
    if not most:
        return []
    return [_at(_BEYOND * min(most), unit, fitted, None, {}, beyond=True)]


def compared(at: Sequence[AtBudget]) -> AtBudget | None:
    """The largest budget seen at which families are set against the reference; None: at none."""
    seen = [one for one in at if one.versus and not one.beyond]
    return seen[-1] if seen else None


def _first(fitted: Mapping[str, FamilyFit], at: Sequence[AtBudget]) -> tuple[Comparison, ...]:
    """The family of lowest loss at the largest budget seen, against the others that are there."""
    last = compared(at)
    if last is None:
        return ()
    lowest = min(last.reached, key=lambda name: last.reached[name].loss.value)
    return tuple(
        families.compare(
            fitted[lowest].costs[last.unit],
            fitted[name].costs[last.unit],
            budget=last.budget,
            trained=True,
        )
        for name in last.reached
        if name != lowest
    )


def _tracks(fitted: Mapping[str, FamilyFit], unit: str) -> dict[str, tuple[Reached, ...]]:
    found = {}
    for name, fit in fitted.items():
        if unit not in fit.costs:
            continue
        budgets = np.geomspace(*fit.costs[unit].draws.fit.seen.budget, _TRACK)
        found[name] = tuple(_reached(fit, unit, float(budget)) for budget in budgets)
    return found
