"""Families of runs at equal budget, in model FLOPs and in device-seconds: all a report says.

Nothing is made up: what the runs do not tell has a line that says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from blindvalm_jax.errors import UserError
from blindvalm_jax.scaling import bootstrap, families
from blindvalm_jax.scaling.families import Comparison, Estimate, estimate
from blindvalm_jax.scaling.family_fits import UNITS, FamilyFit, best, fit_family
from blindvalm_jax.scaling.points import Array
from blindvalm_jax.scaling.results import FLOPS, Result, left_out, usable

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


@dataclasses.dataclass(frozen=True)
class Reached:
    """The compute-optimal model of a family at a budget.

    accuracy: by task, with that of each draw. outside: where N* or D* lies that no run had.
    """

    budget: float
    loss: Estimate
    n: Estimate
    d: Estimate
    accuracy: Mapping[str, Estimate]
    drawn: Mapping[str, Array] = dataclasses.field(repr=False)
    outside: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Versus:
    """A family against the reference: see `families.compare`; accuracy: less the reference's."""

    comparison: Comparison
    accuracy: Mapping[str, Estimate]


@dataclasses.dataclass(frozen=True)
class AtBudget:
    """All families at one budget.

    without: why a family has nothing here. runs: of each family, fitted or not, the run of lowest
    loss that cost no more. beyond: no family has seen so much.
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

    unfitted: why a family has no law. reference: what others are compared with; None: nothing is.
    at: by unit the budgets all fitted families have seen, the least first, and one beyond. first:
    by unit, at the largest of them, the family of lowest loss against each other one. tracks: of
    each family along the budgets it has seen itself.
    """

    results: tuple[Result, ...]
    left_out: Mapping[str, str]
    families: Mapping[str, FamilyFit]
    unfitted: Mapping[str, str]
    reference: str | None
    at: Mapping[str, tuple[AtBudget, ...]]
    first: Mapping[str, tuple[Comparison, ...]]
    tracks: Mapping[str, Mapping[str, tuple[Reached, ...]]]

    def seen(self, unit: str) -> tuple[AtBudget, ...]:
        """The budgets that all have seen."""
        return tuple(one for one in self.at[unit] if not one.beyond)

    def tasks(self) -> list[str]:
        """Tasks that any usable run was asked, sorted."""
        return sorted({task for run in usable(self.results) for task in run.scores})


def analyse(results: Iterable[Result], *, draws: int = bootstrap.DRAWS, seed: int = 0) -> Analysis:
    """Fits and compares all families.

    Raises:
      UserError: there are no results.
    """
    given = tuple(results)
    if not given:
        raise UserError("a report needs runs, and there are none")
    of_family: dict[str, list[Result]] = {name: [] for name in names_of(given)}
    for run in usable(given):
        of_family[run.family].append(run)
    fitted, unfitted = {}, {}
    for name, runs in of_family.items():
        try:
            fitted[name] = fit_family(name, runs, draws=draws, seed=seed)
        except UserError as error:
            unfitted[name] = str(error)
    reference = next(iter(fitted), None)
    at = {}
    for unit in UNITS:
        common = _common({name: fit.runs for name, fit in fitted.items()} or of_family, unit)
        at[unit] = tuple(_at(budget, unit, fitted, reference, of_family) for budget in common)
        if common and fitted:
            at[unit] += tuple(_beyond(fitted, unit))
    return Analysis(
        results=given,
        left_out=left_out(given),
        families=fitted,
        unfitted=unfitted,
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
    """Budgets that all families have seen: in FLOPs those that runs were planned for."""
    costs = [
        [cost for run in runs if (cost := run.cost(unit)) is not None]
        for runs in of_family.values()
    ]
    costs = [one for one in costs if one]
    if not costs:
        return []
    low, high = max(map(min, costs)), min(map(max, costs))
    if unit == FLOPS:
        planned = sorted({run.budget for runs in of_family.values() for run in runs})
        groups: list[float] = []
        for budget in planned:
            if not groups or budget > _SAME * groups[-1]:
                groups.append(budget)
        found = [budget for budget in groups if low / _WITHIN <= budget <= high * _WITHIN]
        if 0 < len(found) <= _MOST:
            return found
    if low > high:
        return []
    return sorted({float(f"{budget:.3g}") for budget in np.geomspace(low, high, _SPACED)})


def _at(
    budget: float,
    unit: str,
    fitted: Mapping[str, FamilyFit],
    reference: str | None,
    of_family: Mapping[str, Sequence[Result]],
) -> AtBudget:
    reached, versus, without = {}, {}, {}
    for name, fit in fitted.items():
        try:
            reached[name] = _reached(fit, unit, budget)
            if reference in reached and name != reference:
                versus[name] = _versus(fitted[reference], fit, reached, unit)
        except UserError as error:
            without[name] = str(error)
    runs = {name: run for name, all_ in of_family.items() if (run := _lowest(all_, unit, budget))}
    return AtBudget(unit, budget, reached, versus, without, runs)


def _reached(fit: FamilyFit, unit: str, budget: float) -> Reached:
    if unit not in fit.costs:
        raise UserError(fit.without[unit])
    found, drawn = best(fit.costs[unit], budget)
    seen = fit.costs[unit].draws.fit.seen
    n, d = float(found.n), float(found.d)
    accuracies = {task: one.of_draws(drawn.n, drawn.d) for task, one in fit.responses.items()}
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
        outside=tuple(
            f"{name} {'below' if value < ends[0] else 'above'} those of its runs"
            for name, value, ends in (("N*", n, seen.n), ("D*", d, seen.d))
            if not ends[0] <= value <= ends[1]
        ),
    )


def _versus(
    first: FamilyFit, second: FamilyFit, reached: Mapping[str, Reached], unit: str
) -> Versus:
    a, b = reached[first.name], reached[second.name]
    # As in `families.compare`: shifted, draws of two families have nothing in common.
    differences = {
        task: estimate(
            b.accuracy[task].value - a.accuracy[task].value,
            np.roll(b.drawn[task], 1) - a.drawn[task],
        )
        for task in a.accuracy
        if task in b.accuracy
    }
    comparison = families.compare(first.costs[unit], second.costs[unit], budget=a.budget)
    return Versus(comparison, differences)


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
    found = _at(_BEYOND * min(most), unit, fitted, None, {})
    return [dataclasses.replace(found, beyond=True)]


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
            fitted[lowest].costs[last.unit], fitted[name].costs[last.unit], budget=last.budget
        )
        for name in last.reached
        if name != lowest
    )


def _tracks(fitted: Mapping[str, FamilyFit], unit: str) -> dict[str, tuple[Reached, ...]]:
    found = {}
    for name, fit in fitted.items():
        if unit not in fit.costs:
            continue
        low, high = fit.costs[unit].draws.fit.seen.budget
        places = []
        for budget in np.geomspace(low, high, _TRACK):
            try:
                places.append(_reached(fit, unit, float(budget)))
            except UserError:  # the budgets of the tables say why
                continue
        if places:
            found[name] = tuple(places)
    return found
