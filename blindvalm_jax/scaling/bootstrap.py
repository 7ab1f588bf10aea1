"""How sure a fit is: the same fit to runs drawn again with replacement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from blindvalm_jax.errors import UserError
from blindvalm_jax.scaling import fits
from blindvalm_jax.scaling.points import Array, Numbers, Points

DRAWS = 1000
LEVEL = 0.95
_DIFFERENT = 5  # runs in a draw: as many as there are parameters
_TRIES = 100  # for each draw, on average


@dataclasses.dataclass(frozen=True)
class Draws:
    """The fit, and the law of each draw as one law of arrays `[draws]`."""

    fit: fits.Fit
    law: fits.Law
    seed: int

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
    if draws < 1:
        raise UserError(f"expected 1 draw or more, got {draws}")
    problem = fits.Problem.of(points)
    start = problem.place(fit)
    rng = np.random.default_rng(seed)
    places = np.empty((draws, len(start)))
    done = 0
    with fits.one_thread():
        for _ in range(_TRIES * draws):
            counts = rng.multinomial(len(points), np.full(len(points), 1 / len(points)))
            if not _tells(points, counts > 0):
                continue
            places[done], _ = problem.minimum(start, counts.astype(np.float64))
            done += 1
            if done == draws:
                return Draws(fit=fit, law=problem.law(places), seed=seed)
    raise UserError(
        f"{len(points)} runs are too few to draw from: hardly a draw has {_DIFFERENT} different"
        " ones of 3 N and 3 D; add runs"
    )


def interval(values: Array, *, level: float = LEVEL) -> tuple[float, float]:
    """The middle `level` of values; some may be infinite, so none are interpolated."""
    if not 0 < level < 1:
        raise UserError(f"expected a level between 0 and 1, got {level:g}")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


def _tells(points: Points, taken: np.ndarray) -> bool:
    if taken.sum() < _DIFFERENT:
        return False
    return all(len(np.unique(values[taken])) >= fits.SIZES for values in (points.n, points.d))
