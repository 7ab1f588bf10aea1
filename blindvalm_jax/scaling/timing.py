"""What a token costs where runs were timed: a smooth line, as timings are no exact numbers."""

from __future__ import annotations

import numpy as np

from blindvalm_jax.errors import UserError
from blindvalm_jax.scaling.optima import Cost
from blindvalm_jax.scaling.points import Array, Points

_DEGREE = 2


def smooth(points: Points) -> Cost:
    """A parabola in logarithms through the cost of a token of all runs; a line with two sizes.

    A line through each size (`optima.as_run`) would take the size that was timed luckiest for the
    best one. Beyond the sizes seen the last slope goes on. Raises a `UserError` with one size.
    """
    log_n = np.log(points.n)
    ends, sizes = (log_n.min(), log_n.max()), len(np.unique(points.n))
    if sizes < 2:
        raise UserError(f"expected runs of 2 different N or more, got {sizes}")
    middle = float(log_n.mean())
    found = np.polyfit(log_n - middle, np.log(points.budget / points.d), min(_DEGREE, sizes - 1))
    slope = np.polyder(found)

    def cost(n: Array) -> Array:
        at = np.log(n)
        inside = np.clip(at, *ends)
        value = np.polyval(found, inside - middle)
        return np.exp(value + np.polyval(slope, inside - middle) * (at - inside))

    return cost


def off(points: Points, cost: Cost) -> float:
    """Root of the mean square of how far runs are from it, as a share."""
    apart = np.log(points.budget / points.d / cost(points.n))
    return float(np.sqrt(np.mean(apart**2)))
