"""The best size and length for a budget, whatever a token costs at a size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from blindvalm_jax.errors import UserError
from blindvalm_jax.scaling.fits import Law, Seen
from blindvalm_jax.scaling.points import FLOPS_PER_PARAMETER_AND_TOKEN, Array, Numbers, Points

# Of N parameters `[...]`: what training on a token costs `[...]`, in the unit of the budgets.
Cost = Callable[[Array], Array]

DECADES = 1.0  # beyond the budgets seen that a fit is trusted
_SIDE = 6 * math.log(10)  # searched on each side of what would be best if C were k N D
_GRID = 129
_ZOOMS = 4  # each narrows what is searched 64 times, in the end to a share of 1e-8 of N


@dataclasses.dataclass(frozen=True)
class Optimum:
    """N* and D* of a budget and their loss; for a law of arrays all but the budget are arrays."""

    budget: float
    n: Numbers
    d: Numbers
    loss: Numbers


def per_parameter(cost: float = FLOPS_PER_PARAMETER_AND_TOKEN) -> Cost:
    """C = k N D: a token costs k for each parameter."""
    return lambda n: cost * n


def as_run(points: Points) -> Cost:
    """What a token cost in these runs at their sizes: a straight line in logarithms between them.

    Beyond the sizes seen the last slope goes on. Raises a `UserError` with fewer than two sizes.
    """
    sizes = np.unique(points.n)
    if len(sizes) < 2:
        raise UserError(f"expected runs of 2 different N or more, got {len(sizes)}")
    per_token = np.log(points.budget / points.d)
    costs = np.array([per_token[points.n == size].mean() for size in sizes])
    x = np.log(sizes)
    slopes = np.diff(costs) / np.diff(x)

    def cost(n: Array) -> Array:
        at = np.log(n)
        piece = np.clip(np.searchsorted(x, at) - 1, 0, len(slopes) - 1)
        return np.exp(costs[piece] + slopes[piece] * (at - x[piece]))

    return cost


def best(
    law: Law,
    budget: float,
    *,
    cost: Cost,
    seen: Seen,
    within: tuple[float, float] | None = None,
    extrapolate: bool = False,
) -> Optimum:
    """The N and D of least loss with D cost(N) = budget; within: of N between these alone.

    Raises a `UserError` where the budget lies over one decade beyond the budgets seen, or the best
    N of a fit beyond the sizes seen, unless `extrapolate`.
    """
    refuse(f"a budget in {seen.unit}", budget, seen.budget, extrapolate=extrapolate)
    rows = _rows(law)
    middle = np.array(math.sqrt(seen.n[0] * seen.n[1]))
    products = budget / (cost(middle) / middle)  # N D

    def loss(log_n: Array) -> Array:
        n = np.exp(log_n)
        return np.asarray(rows.loss(n, budget / cost(n)))

    ratio = np.log(rows.alpha * rows.A) - np.log(rows.beta * rows.B)
    guess = (ratio + rows.beta * np.log(products)) / (rows.alpha + rows.beta)
    n = _like(law, np.exp(_lowest(loss, guess, within)))
    if isinstance(n, float):
        refuse(f"the best N of {budget:.3g} {seen.unit}", n, seen.n, extrapolate=extrapolate)
    d = budget / cost(np.asarray(n))
    return Optimum(budget=budget, n=n, d=_like(law, d), loss=law.loss(n, d))


def needed(
    law: Law,
    loss: Numbers,
    *,
    cost: Cost,
    n: float | None = None,
    within: tuple[float, float] | None = None,
) -> Numbers:
    """The least budget that reaches a loss, at the best N or at this one; infinite below a floor.

    within: the best N between these alone. loss: one, or one for each draw of the law's. Nothing is
    refused: the caller knows how far what comes back lies beyond what the law has seen.
    """
    rows = _rows(law)
    target = np.reshape(np.asarray(loss, np.float64), (-1, 1))

    def log_budget(log_n: Array) -> Array:
        size = np.exp(log_n)
        rest = target - rows.E - rows.A * size**-rows.alpha
        with np.errstate(divide="ignore", invalid="ignore"):
            log_d = (np.log(rows.B) - np.log(rest)) / rows.beta
        return np.where(rest > 0, log_d + np.log(cost(size)), np.inf)

    if n is not None:
        least = log_budget(np.full((1, 1), math.log(n)))
    else:
        above = np.maximum(target - rows.E, np.finfo(np.float64).tiny)
        share = above * rows.beta / (rows.alpha + rows.beta)
        guess = (np.log(rows.A) - np.log(share)) / rows.alpha
        least = log_budget(_lowest(log_budget, guess, within))
    with np.errstate(over="ignore"):
        return _like(law, np.exp(least))


def refuse(what: str, value: float, seen: tuple[float, float], *, extrapolate: bool) -> None:
    """Raises a `UserError` over one decade beyond what was seen, unless `extrapolate`.

    what: names the value, with its unit, in front of the number.
    """
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{what}: expected a finite number above 0, got {value:g}")
    decades = max(math.log10(seen[0] / value), math.log10(value / seen[1]))
    if decades > DECADES and not extrapolate:
        raise UserError(
            f"{what}: {value:.3g} is {decades:.1f} decades beyond what the fit has seen"
            f" ({seen[0]:.3g} to {seen[1]:.3g}), and {DECADES:g} is the most: stay within, or allow"
            " it with extrapolate"
        )


def _lowest(
    value: Callable[[Array], Array], guess: Array, within: tuple[float, float] | None
) -> Array:
    """Where along log N each row is lowest, `[rows, 1]`; guess: near it; within: ends of N."""
    steps = np.linspace(-1.0, 1.0, _GRID)
    ends = (-300.0, 300.0) if within is None else np.log(within)
    centre, side = np.clip(guess, *ends), _SIDE
    with np.errstate(over="ignore"):
        for _ in range(1 + _ZOOMS):
            log_n = centre + side * steps
            log_n = log_n if within is None else np.clip(log_n, *ends)
            at = np.argmin(value(log_n), axis=1)[:, None]
            centre = np.take_along_axis(log_n, at, axis=1)
            side *= steps[1] - steps[0]
    return centre


def _rows(law: Law) -> Law:
    """Each number as `[draws, 1]`, to go with a row of sizes."""
    return Law(*(np.reshape(getattr(law, x), (-1, 1)) for x in ("E", "A", "B", "alpha", "beta")))


def _like(law: Law, values: Array) -> Numbers:
    """A float for a law of numbers, and `[draws]` for one of arrays."""
    return float(values.item()) if np.ndim(law.E) == 0 else values.reshape(-1)
