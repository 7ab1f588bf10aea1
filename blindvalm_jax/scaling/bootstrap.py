"""How sure a fit is: the same fit to runs drawn again with replacement, by groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from blindvalm_jax.errors import UserError
from blindvalm_jax.scaling import fits
from blindvalm_jax.scaling.points import Array, Numbers, Points

DRAWS = 1000
LEVEL = 0.95
_DIFFERENT = 5  # runs in a draw: as many as there are parameters
_GROUPS = 5  # of fewer, most draws that will do are the runs themselves, and intervals are nothing


@dataclasses.dataclass(frozen=True)
class Draws:
    """The fit, and the law of each draw as one law of arrays `[draws]`.

    at_ends: the share of draws that have a number at an end of the range that is searched.
    """

    fit: fits.Fit
    law: fits.Law
    seed: int
    at_ends: float

    def __len__(self) -> int:
        """How many draws."""
        return len(np.atleast_1d(self.law.E))

    def interval(
        self, what: Callable[[fits.Law], Numbers], *, level: float = LEVEL
    ) -> tuple[float, float]:
        """Percentiles of a function of a law: it is given the arrays, and returns one value each.

        `draws.interval(lambda law: law.loss(1e9, 2e10))`.
        """
        return interval(np.broadcast_to(what(self.law), (len(self),)), level=level)


def bootstrap(points: Points, fit: fits.Fit, *, draws: int = DRAWS, seed: int = 0) -> Draws:
    """Fits the law to `draws` resamples, each from where `fit` ended; the same for a seed.

    Resamples that cannot tell the five parameters apart are drawn again.
    """
    problem = fits.Problem.of(points)
    start = problem.place(fit)
    places = np.empty((draws, len(start)))
    with fits.one_thread():
        others = problem.starts()
        for draw, counts in enumerate(resamples(points, draws=draws, seed=seed)):
            places[draw], least = problem.minimum(start, counts)
            if problem.at_ends(places[draw]).any():  # perhaps only because it began where it did
                found = [(places[draw], least), *(problem.minimum(x, counts) for x in others)]
                places[draw], _ = min(found, key=lambda pair: pair[1])
    ends = float(problem.at_ends(places).any(axis=1).mean())
    return Draws(fit=fit, law=problem.law(places), seed=seed, at_ends=ends)


def interval(values: Array, *, level: float = LEVEL) -> tuple[float, float]:
    """The middle `level` of values; some may be infinite, so none are interpolated."""
    if not 0 < level < 1:
        raise UserError(f"expected a level between 0 and 1, got {level:g}")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


def resamples(points: Points, *, draws: int, seed: int) -> Array:
    """How often each run is drawn, `[draws, runs]`: such that a law can be fitted to those drawn.

    Each draw has random numbers of its own: runs that stand in the same groups, of whatever family,
    are drawn alike.
    """
    if draws < 1:
        raise UserError(f"expected 1 draw or more, got {draws}")

    def enough(taken: NDArray[np.bool_]) -> bool:
        different = [len(np.unique(values[taken])) for values in (points.n, points.d)]
        return int(taken.sum()) >= _DIFFERENT and min(different) >= fits.SIZES

    streams = (np.random.default_rng((seed, draw)) for draw in range(draws))
    return np.array([drawn(points.groups, rng, enough) for rng in streams])


def drawn(
    groups: NDArray[np.int64],
    rng: np.random.Generator,
    enough: Callable[[NDArray[np.bool_]], bool],
) -> Array:
    """How often each run is drawn, `[runs]`, with all of its group; enough: whether these will do.

    groups: of each run, from 0. Raises a `UserError` with so few that they tell of no interval.
    """
    count = int(groups.max()) + 1
    if count < _GROUPS:
        raise UserError(
            f"intervals need {_GROUPS} independent groups of runs (trunks, or sizes that were"
            f" timed) or more, got {count}"
        )
    while True:  # of six runs, the fewest that a fit takes, one draw in four or more will do
        counts = rng.multinomial(count, np.full(count, 1 / count))[groups]
        if enough(counts > 0):
            return counts.astype(np.float64)
