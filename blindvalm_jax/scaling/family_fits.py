"""All that is fitted to the runs of one family: its law, what a token costs it, its accuracies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from blindvalm_jax.errors import UserError
from blindvalm_jax.scaling import accuracy, bootstrap, fits, isoflop, optima, timing
from blindvalm_jax.scaling.bootstrap import Draws
from blindvalm_jax.scaling.families import Estimate, Family, estimate
from blindvalm_jax.scaling.points import Array, Points
from blindvalm_jax.scaling.results import FLOPS, SECONDS, Result, tasks_of

UNITS = (FLOPS, SECONDS)


@dataclasses.dataclass(frozen=True)
class FamilyFit:
    """A family's law and responses, from the same runs drawn again for both.

    runs: usable, in the order of the columns of counts `[draws, runs]`, how often each was drawn.
    costs: by unit what `families.compare` takes; without: why there is none, by unit, and by task
    why there is no response.
    """

    name: str
    runs: tuple[Result, ...]
    draws: Draws
    counts: Array
    costs: Mapping[str, Family]
    responses: Mapping[str, accuracy.Response]
    without: Mapping[str, str]
    parabolas: isoflop.IsoFlop

    @property
    def residuals(self) -> Array:
        """Loss of each run less that of the law, in nats a token: `[runs]`."""
        law = self.draws.fit
        n, d = (np.array([getattr(run, x) for run in self.runs], float) for x in ("n", "tokens"))
        return np.array([run.held_out for run in self.runs]) - np.asarray(law.loss(n, d))

    @property
    def rms(self) -> float:
        """Root of the mean square of the residuals."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    @property
    def worst(self) -> tuple[Result, float]:
        """The run that is furthest from the law, and its residual."""
        residuals = self.residuals
        place = int(np.argmax(np.abs(residuals)))
        return self.runs[place], float(residuals[place])

    def missed(self, budget: float) -> tuple[float, int, int]:
        """Of the runs of a budget: the mean residual, and how many lie above the law and below."""
        residuals = self.residuals[[run.budget == budget for run in self.runs]]
        return float(residuals.mean()), int((residuals > 0).sum()), int((residuals < 0).sum())

    def off(self, unit: str) -> float:
        """How far runs are from what a token costs at their size, as a share (rms)."""
        points = _points(self.runs, unit)
        apart = np.log(points.budget / points.d / self.costs[unit].cost(points.n))
        return float(np.sqrt(np.mean(apart**2)))

    def exponent(self, unit: str) -> Estimate:
        """How N* grows with the budget, from the least to the largest seen, at what tokens cost.

        Raises:
          UserError: the best N lies too far from those seen.
        """
        family = self.costs[unit]
        seen = family.draws.fit.seen
        ends = [best(family, budget) for budget in seen.budget]
        decades = math.log(seen.budget[1] / seen.budget[0])
        value, drawn = (
            (np.log(high.n) - np.log(low.n)) / decades for low, high in zip(*ends, strict=True)
        )
        return estimate(value, drawn)


def best(
    family: Family, budget: float, *, trained: bool = False
) -> tuple[optima.Optimum, optima.Optimum]:
    """The optimum of the fit at a budget, and those of the draws; trained: of N so large and small.

    Raises:
      UserError: it lies over one decade beyond what the fit has seen.
    """
    seen = family.draws.fit.seen
    within = seen.n if trained else None
    of_fit = optima.best(family.draws.fit, budget, cost=family.cost, seen=seen, within=within)
    return of_fit, optima.best(
        family.draws.law, budget, cost=family.cost_of_draws, seen=seen, within=within
    )


def fit_family(
    name: str, runs: Sequence[Result], *, draws: int = bootstrap.DRAWS, seed: int = 0
) -> FamilyFit:
    """Fits everything to the usable runs of a family.

    Raises:
      UserError: they are too few, or too alike, for a law.
    """
    # In the order of `Points`, so that what is drawn again is the same run everywhere.
    ordered = sorted(runs, key=lambda run: (run.n, run.tokens, run.held_out, run.flops, run.name))
    points = _points(ordered, FLOPS)
    law = bootstrap.bootstrap(points, fits.fit(points), draws=draws, seed=seed)
    counts = bootstrap.resamples(points, draws=draws, seed=seed)
    design = tuple(
        (run.size, run.budget, int(group))
        for run, group in zip(ordered, points.groups, strict=True)
    )
    costs, responses, without = {}, {}, {}
    for unit in UNITS:
        try:
            costs[unit] = dataclasses.replace(_family(name, law, ordered, unit), design=design)
        except UserError as error:
            without[unit] = str(error)
    for task in tasks_of(ordered):
        try:
            responses[task] = accuracy.respond(ordered, task, counts, seed=seed)
        except UserError as error:
            without[task] = str(error)
    return FamilyFit(
        name=name,
        runs=tuple(ordered),
        draws=law,
        counts=counts,
        costs=costs,
        responses=responses,
        without=without,
        parabolas=isoflop.isoflop(points),
    )


def _family(name: str, law: Draws, runs: Sequence[Result], unit: str) -> Family:
    """The law with what a token cost in this unit; a law knows no cost, so it is the same."""
    if not any(run.cost(unit) is not None for run in runs):
        raise UserError(f"none of its runs says what it cost in {unit}")
    points = _points(runs, unit)
    fit = dataclasses.replace(law.fit, seen=fits.Seen.of(points))
    law = dataclasses.replace(law, fit=fit)
    if unit == FLOPS:
        return Family(name, law, optima.as_run(points))
    # Drawn apart from those of the law, and of other families.
    drawn = timing.drawn(points, draws=len(law), seed=(law.seed, *name.encode()))
    return Family(name, law, timing.smooth(points), drawn)


def _points(runs: Sequence[Result], unit: str) -> Points:
    """Of the runs of which the cost is known."""
    known = [(run, cost) for run in runs if (cost := run.cost(unit)) is not None]
    return Points.of(
        n=[run.n for run, _ in known],
        d=[run.tokens for run, _ in known],
        loss=[run.held_out for run, _ in known],
        budget=[cost for _, cost in known],
        unit=unit,
        groups=[run.trunk or run.name for run, _ in known],
    )
