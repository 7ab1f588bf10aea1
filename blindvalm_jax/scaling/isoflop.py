"""Approach 2 of Hoffmann et al. 2022, as a check of a fit: a parabola for each budget.

A parabola in log N is not the shape of the law: its minimum is off where sizes are narrow, few, or
lie unevenly about it. The warnings say so; nothing is left out for them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from blindvalm_jax.scaling.points import Array, Points

SIZES = 7
SPAN = 16.0
_OFF_CENTRE = 1.5  # the longer side of the sizes about a minimum over the shorter, in log N
_UNEVEN = 2.0  # the widest step between sizes over the narrowest, in log N
_SAME_BUDGET = 0.05


@dataclasses.dataclass(frozen=True)
class Parabola:
    """One budget: the mean cost of its runs, and the minimum (nan where there is none)."""

    budget: float
    n: float
    loss: float
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """A parabola for each budget, and N* = factor C^exponent through their minima.

    The exponent is nan with fewer than two minima. warnings: of all of them.
    """

    parabolas: tuple[Parabola, ...]
    exponent: float
    factor: float
    warnings: tuple[str, ...]


def isoflop(points: Points, *, same_budget: float = _SAME_BUDGET) -> IsoFlop:
    """Parabolas of runs grouped by what they cost; same_budget: how far from the least, a share."""
    parabolas = tuple(_parabola(group, points.unit) for group in _groups(points, same_budget))
    warnings = [text for parabola in parabolas for text in parabola.warnings]
    found = [x for x in parabolas if np.isfinite(x.n)]
    exponent = factor = float("nan")
    if len(found) < 2:
        warnings.append(f"{len(found)} budgets have a minimum: an exponent needs 2 or more")
    else:
        x, y = (np.log([getattr(p, name) for p in found]) for name in ("budget", "n"))
        exponent, offset = (float(v) for v in np.polyfit(x, y, 1))
        factor = float(np.exp(offset))
    return IsoFlop(parabolas=parabolas, exponent=exponent, factor=factor, warnings=tuple(warnings))


def _groups(points: Points, same_budget: float) -> list[tuple[Array, Array, Array]]:
    """(N, loss, budget) of each budget, from the least."""
    order = np.argsort(points.budget, kind="stable")
    starts = [0]
    for place, at in enumerate(order):
        if points.budget[at] > (1 + same_budget) * points.budget[order[starts[-1]]]:
            starts.append(place)
    return [
        (points.n[part], points.loss[part], points.budget[part])
        for part in np.split(order, starts[1:])
    ]


def _parabola(group: tuple[Array, Array, Array], unit: str) -> Parabola:
    n, loss, budgets = group
    budget = float(np.exp(np.mean(np.log(budgets))))
    sizes = np.unique(n)
    name = f"{budget:.3g} {unit}"
    if len(sizes) < 3:
        text = f"{name}: a parabola needs 3 different N or more, got {len(sizes)}"
        return Parabola(budget=budget, n=float("nan"), loss=float("nan"), warnings=(text,))
    x = np.log(n)
    middle = x.mean()
    square, slope, level = np.polyfit(x - middle, loss, 2)
    texts = []
    if len(sizes) < SIZES:
        texts.append(f"{len(sizes)} sizes, fewer than {SIZES}")
    if (span := sizes[-1] / sizes[0]) < SPAN * (1 - 1e-9):
        texts.append(f"sizes span {span:.3g} times, less than {SPAN:g}")
    steps = np.diff(np.log(sizes))
    if steps.max() > _UNEVEN * steps.min():
        texts.append("sizes lie unevenly")
    if square <= 0:
        texts.append("the losses have no minimum")
        at = lowest = float("nan")
    else:
        place = middle - slope / (2 * square)
        at, lowest = float(np.exp(place)), float(level - slope**2 / (4 * square))
        texts.extend(_off(place, np.log(sizes)))
    return Parabola(
        budget=budget, n=at, loss=lowest, warnings=tuple(f"{name}: {text}" for text in texts)
    )


def _off(place: float, sizes: Array) -> list[str]:
    """What is wrong with where a minimum lies among log N of the sizes."""
    at = f"the minimum, N = {np.exp(place):.3g},"
    if not sizes[0] <= place <= sizes[-1]:
        return [f"{at} lies outside the sizes"]
    if not sizes[1] <= place <= sizes[-2]:
        return [f"{at} lies at the edge of the sizes"]
    left, right = place - sizes[0], sizes[-1] - place
    if max(left, right) > _OFF_CENTRE * min(left, right):
        return [f"{at} is off the centre of the sizes"]
    return []
