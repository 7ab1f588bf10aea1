"""What a token costs where runs were timed: a smooth line, as timings are no exact numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from blindvalm_jax.errors import UserError
from blindvalm_jax.scaling import bootstrap
from blindvalm_jax.scaling.points import Array, Points

_DEGREE = 2


@dataclasses.dataclass(frozen=True)
class Smooth:
    """An `optima.Cost`: a parabola in log N of the logarithm of a token's cost.

    Beyond the sizes seen the last slope goes on. coefficients: `[3]`, highest power first, of log N
    less `middle`; or `[3, draws]`, then N is that of each draw `[draws]`, sizes for each draw
    `[draws, sizes]`, or one for all, for which costs come as `[draws, 1]`.
    """

    coefficients: Array
    middle: float
    ends: tuple[float, float]

    def __call__(self, n: Array) -> Array:
        """What training on a token costs a model of N parameters."""
        at = np.log(n)
        c = self.coefficients
        square, slope, level = c[:, :, None] if c.ndim == 2 and np.ndim(at) != 1 else c
        inside = np.clip(at, *self.ends) - self.middle
        beyond = at - self.middle - inside
        on = (square * inside + slope) * inside + level
        return np.exp(on + (2 * square * inside + slope) * beyond)


def smooth(points: Points) -> Smooth:
    """Through the timings of all runs; a straight line with two sizes.

    A line through each size (`optima.as_run`) would take the size that was timed luckiest for the
    best one. Raises a `UserError` with one size.
    """
    sizes = len(np.unique(points.n))
    if sizes < 2:
        raise UserError(f"expected runs of 2 different N or more, got {sizes}")
    return _through(points, np.ones((1, len(points))), one=True)


def drawn(points: Points, *, draws: int, seed: tuple[int, ...]) -> Smooth:
    """The same through timings drawn again with replacement, each time.

    Runs whose tokens cost the same were timed together: they are one timing.
    """
    per_token = np.round(np.log(points.budget / points.d), 9)
    _, timing = np.unique(np.stack([points.n, per_token]), axis=1, return_inverse=True)
    rng, needed = np.random.default_rng(seed), min(_DEGREE + 1, len(np.unique(points.n)))

    def enough(taken: NDArray[np.bool_]) -> bool:
        return len(np.unique(points.n[taken])) >= needed

    counts = np.array([bootstrap.drawn(timing, rng, enough) for _ in range(draws)])
    return _through(points, counts, one=False)


def _through(points: Points, counts: Array, *, one: bool) -> Smooth:
    log_n, log_cost = np.log(points.n), np.log(points.budget / points.d)
    middle, degree = float(log_n.mean()), min(_DEGREE, len(np.unique(points.n)) - 1)
    found = np.zeros((_DEGREE + 1, len(counts)))
    for place, weights in enumerate(counts):
        found[_DEGREE - degree :, place] = np.polyfit(
            log_n - middle, log_cost, degree, w=np.sqrt(weights)
        )
    return Smooth(found[:, 0] if one else found, middle, (float(log_n.min()), float(log_n.max())))
