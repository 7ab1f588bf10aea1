"""Two families of models at equal budget, each by its own fit and its own cost of a token."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from blindvalm_jax.errors import UserError
from blindvalm_jax.scaling import optima
from blindvalm_jax.scaling.bootstrap import Draws, interval
from blindvalm_jax.scaling.fits import Law
from blindvalm_jax.scaling.points import Array, Numbers


@dataclasses.dataclass(frozen=True)
class Family:
    """A family's draws (with its fit), and what a token costs it in the unit of its budgets.

    drawn_cost: of each draw (see `timing.Smooth`), where costs are not known exactly. design: what
    was trained, in the order of the points; families of one design were drawn alike, run by run.
    """

    name: str
    draws: Draws
    cost: optima.Cost
    drawn_cost: optima.Cost | None = None
    design: tuple[object, ...] = ()

    @property
    def cost_of_draws(self) -> optima.Cost:
        """The cost that goes with the laws of the draws."""
        return self.drawn_cost or self.cost


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The value of the fit, and the 95 % interval of the draws."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """`2.913 [2.907, 2.920]`."""
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclasses.dataclass(frozen=True)
class Multiplier(Estimate):
    """How many times the budget; infinite where no size that is looked at ever has the loss.

    trusted: a finite one is cut to it, as budgets beyond are more than a decade from any seen.
    never: the share of draws in which it is infinite.
    """

    trusted: tuple[float, float]
    never: float

    def __str__(self) -> str:
        """`2.13 [1.9, 2.4]`, with `>` or `<` where a value was cut, and `infinite`."""
        return f"{self._text(self.value)} [{self._text(self.low)}, {self._text(self.high)}]"

    def _text(self, value: float) -> str:
        if math.isinf(value):
            return "infinite"
        sign = "<" if value <= self.trusted[0] else ">" if value >= self.trusted[1] else ""
        return f"{sign}{value:.3g}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two families at one budget: each at its own best N, or both at `n`.

    difference: nats a token, the second's less the first's. multiplier: how many times the budget
    the second needs for the loss that the first has. paired: draw by draw, as the runs of both were
    drawn alike.
    """

    names: tuple[str, str]
    budget: float
    unit: str
    n: float | None
    losses: tuple[Estimate, Estimate]
    difference: Estimate
    multiplier: Multiplier
    paired: bool


def compare(
    first: Family,
    second: Family,
    *,
    budget: float,
    n: float | None = None,
    trained: bool = False,
    extrapolate: bool = False,
) -> Comparison:
    """At a budget in the unit of both fits; n: at this N, not at the best of each.

    trained: the best N of each between the least and the largest that it has trained. Draws of
    families of one design are set against each other one by one, so that what a size or a length
    does to both is in no difference; those of others as if their runs had nothing in common. Raises
    a `UserError` over one decade beyond what either has seen, unless `extrapolate`.
    """
    _refuse_unlike(first, second)
    for family in (first, second):
        seen = family.draws.fit.seen
        what = f"{family.name}, a budget in {seen.unit}"
        optima.refuse(what, budget, seen.budget, extrapolate=extrapolate)
        if n is not None:
            optima.refuse(f"{family.name}, N", n, seen.n, extrapolate=extrapolate)

    def within(family: Family) -> tuple[float, float] | None:
        return family.draws.fit.seen.n if trained else None

    def loss(family: Family, law: Law, cost: optima.Cost) -> Numbers:
        if n is not None:
            each = cost(np.array(n))
            return law.loss(n, budget / (each.reshape(-1) if each.ndim else float(each)))
        return optima.best(
            law,
            budget,
            cost=cost,
            seen=family.draws.fit.seen,
            within=within(family),
            extrapolate=extrapolate,
        ).loss

    fits = first.draws.fit, second.draws.fit
    values_of_draws = vars(second.draws.law).items()
    laws = first.draws.law, Law(**{k: beside(first, second, v) for k, v in values_of_draws})
    values = loss(first, fits[0], first.cost), loss(second, fits[1], second.cost)
    costs = first.cost_of_draws, second.cost_of_draws
    drawn = loss(first, laws[0], costs[0]), loss(second, laws[1], costs[1])
    budgets = fits[1].seen.budget
    decade = 10**optima.DECADES
    trusted = (0.0, math.inf)
    if not extrapolate:
        trusted = (budgets[0] / decade / budget, budgets[1] * decade / budget)

    def times(law: Law, reached: Numbers, cost: optima.Cost) -> Array:
        found = optima.needed(law, reached, cost=cost, n=n, within=within(second))
        return _cut(found / budget, trusted)

    drawn_times = times(laws[1], drawn[0], costs[1])
    low, high = interval(drawn_times)
    return Comparison(
        names=(first.name, second.name),
        budget=budget,
        unit=fits[0].seen.unit,
        n=n,
        losses=(estimate(values[0], drawn[0]), estimate(values[1], drawn[1])),
        difference=estimate(values[1] - values[0], drawn[1] - drawn[0]),
        multiplier=Multiplier(
            value=float(times(fits[1], values[0], second.cost)),
            low=low,
            high=high,
            trusted=trusted,
            never=float(np.mean(np.isinf(drawn_times))),
        ),
        paired=paired(first, second),
    )


def paired(first: Family, second: Family) -> bool:
    """Whether the same runs were drawn of both in each draw."""
    alike = bool(first.design) and first.design == second.design
    return alike and first.draws.seed == second.draws.seed


def beside(first: Family, second: Family, drawn: Array) -> Array:
    """What the second's draws say, `[draws]`, in an order to be set against the first's.

    Bootstraps with one seed draw like places of both: where these are not like runs, the draws are
    shifted by one, so that they have nothing in common.
    """
    return drawn if paired(first, second) else np.roll(drawn, 1)


def estimate(value: Numbers, drawn: Numbers) -> Estimate:
    """The value of a fit with the interval of what its draws say."""
    low, high = interval(np.asarray(drawn))
    return Estimate(value=float(value), low=low, high=high)


def _cut(times: Numbers, trusted: tuple[float, float]) -> np.ndarray:
    return np.where(np.isinf(times), times, np.clip(times, *trusted))


def _refuse_unlike(first: Family, second: Family) -> None:
    units = first.draws.fit.seen.unit, second.draws.fit.seen.unit
    if units[0] != units[1]:
        raise UserError(
            f"{first.name} is fitted over {units[0]} and {second.name} over {units[1]}:"
            " fit both over one"
        )
    if len(first.draws) != len(second.draws):
        raise UserError(
            f"expected as many draws of {first.name} as of {second.name}, got"
            f" {len(first.draws)} and {len(second.draws)}"
        )
