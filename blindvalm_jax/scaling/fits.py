"""L(N, D) = E + A N^-alpha + B D^-beta, fitted to the losses of runs.

The objective is that of Hoffmann et al. 2022 (arXiv 2203.15556, appendix D.3), Huber's loss on the
logarithm of the loss, summed over runs as Besiroglu et al. 2024 (arXiv 2404.10102) found it must
be: averaged, it is so small that an optimiser takes any point for the minimum.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize
from threadpoolctl import threadpool_limits

from blindvalm_jax.errors import UserError
from blindvalm_jax.scaling.points import Array, Numbers, Points

HUBER_DELTA = 1e-3
SIZES = 3  # of each of N and D: with two, A and alpha are one number
_RUNS = 6  # one more than there are parameters
_EXPONENTS = np.geomspace(0.05, 2.0, 18)
_STARTS = 4
_RANGE = (1e-3, 5.0)  # of an exponent
_TINY = 1e-6  # a term of the sum, as a share of the least loss, at the runs' geometric mean
_HUGE = 1e3
_NUMBERS = ("A", "B", "E", "alpha", "beta")  # of a place


@dataclasses.dataclass(frozen=True)
class Law:
    """The five numbers of the law, or five arrays `[draws]` of them."""

    E: Numbers
    A: Numbers
    B: Numbers
    alpha: Numbers
    beta: Numbers

    def loss(self, n: Numbers, d: Numbers) -> Numbers:
        """Nats a token of N parameters after D tokens."""
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    @property
    def n_exponent(self) -> Numbers:
        """N* grows as C to this power where C = k N D."""
        return self.beta / (self.alpha + self.beta)


@dataclasses.dataclass(frozen=True)
class Seen:
    """The least and the most of what the runs of a fit had; budget in `unit`."""

    n: tuple[float, float]
    d: tuple[float, float]
    budget: tuple[float, float]
    unit: str
    runs: int

    @classmethod
    def of(cls, points: Points) -> Seen:
        """Of these runs."""
        n, d, budget = (
            (float(np.min(x)), float(np.max(x))) for x in (points.n, points.d, points.budget)
        )
        return cls(n=n, d=d, budget=budget, unit=points.unit, runs=len(points))


@dataclasses.dataclass(frozen=True)
class Fit(Law):
    """A law and where it comes from.

    objective: summed Huber loss. at_ends: which of its numbers lie at an end of the range that is
    searched, so that these runs do not tell them. warnings: for the reader.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    objective: float
    seen: Seen
    at_ends: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """The objective of some runs, in logarithms from the runs' geometric means.

    So neither the units of N and D nor their sizes change what an optimiser sees. A place x is
    (log A', log B', log E, alpha, beta).
    """

    log_n: Array
    log_d: Array
    log_loss: Array
    centre: tuple[float, float]

    @classmethod
    def of(cls, points: Points) -> Problem:
        """Of these runs."""
        log_n, log_d = np.log(points.n), np.log(points.d)
        centre = float(np.mean(log_n)), float(np.mean(log_d))
        return cls(log_n - centre[0], log_d - centre[1], np.log(points.loss), centre)

    def value_and_gradient(self, x: Array, weights: Array) -> tuple[float, Array]:
        """The summed objective over delta squared, and its gradient `[5]`; weights: `[runs]`.

        The division keeps it far above the absolute tolerances of optimisers.
        """
        terms = np.exp(
            [x[0] - x[3] * self.log_n, x[1] - x[4] * self.log_d, np.full(self.log_n.shape, x[2])]
        )
        total = terms.sum(axis=0)
        residual = (np.log(total) - self.log_loss) / HUBER_DELTA
        slope = np.clip(residual, -1.0, 1.0)
        value = weights @ (slope * (residual - 0.5 * slope))
        shares = terms * (weights * slope / (HUBER_DELTA * total))
        a, b, e = shares.sum(axis=1)
        return float(value), np.array(
            [a, b, e, -(shares[0] @ self.log_n), -(shares[1] @ self.log_d)]
        )

    def minimum(self, start: Array, weights: Array) -> tuple[Array, float]:
        """The place and the objective that L-BFGS-B reaches from here."""
        least = float(np.min(self.log_loss))
        term = (least + np.log(_TINY), least + np.log(_HUGE))
        found = optimize.minimize(
            self.value_and_gradient,
            start,
            args=(weights,),
            jac=True,
            method="L-BFGS-B",
            bounds=[term, term, term, _RANGE, _RANGE],
            options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-6, "maxcor": 20},
        )
        return found.x, float(found.fun) * HUBER_DELTA**2

    def starts(self) -> list[Array]:
        """Variable projection: for each pair of exponents the best E, A and B; the best few."""
        loss = np.exp(self.log_loss)
        ones = np.ones_like(loss)
        size = len(_EXPONENTS)
        values, places = np.empty((size, size)), np.empty((size, size, 5))
        floor = np.exp(np.min(self.log_loss)) * _TINY
        for row, alpha in enumerate(_EXPONENTS):
            by_n = np.exp(-alpha * self.log_n) / loss
            for column, beta in enumerate(_EXPONENTS):
                by_d = np.exp(-beta * self.log_d) / loss
                best, _ = optimize.nnls(np.stack([by_n, by_d, 1 / loss], axis=1), ones)
                place = np.array([*np.log(np.maximum(best, floor)), alpha, beta])
                places[row, column] = place
                values[row, column], _ = self.value_and_gradient(place, ones)
        lowest = np.argwhere(values == ndimage.minimum_filter(values, 3, mode="nearest"))
        ranked = sorted((values[row, column], row, column) for row, column in lowest)
        return [places[row, column] for _, row, column in ranked[:_STARTS]]

    def at_ends(self, x: Array) -> NDArray[np.bool_]:
        """Which numbers of a place lie at an end of what is searched; x: `[5]` or `[draws, 5]`."""
        terms, exponents = x[..., :3] - float(np.min(self.log_loss)), x[..., 3:]
        return np.concatenate(
            [
                (terms < np.log(2 * _TINY)) | (terms > np.log(_HUGE / 2)),
                (exponents < 1.01 * _RANGE[0]) | (exponents > 0.99 * _RANGE[1]),
            ],
            axis=-1,
        )

    def law(self, x: Array) -> Law:
        """In the units of the runs; x: `[5]`, or `[draws, 5]`."""
        a, b, e, alpha, beta = x.T
        return Law(
            E=np.exp(e),
            A=np.exp(a + alpha * self.centre[0]),
            B=np.exp(b + beta * self.centre[1]),
            alpha=alpha,
            beta=beta,
        )

    def place(self, law: Law) -> Array:
        """The place `[5]` of a law."""
        return np.array(
            [
                np.log(law.A) - law.alpha * self.centre[0],
                np.log(law.B) - law.beta * self.centre[1],
                np.log(law.E),
                law.alpha,
                law.beta,
            ]
        )


def fit(points: Points) -> Fit:
    """The law of these runs; a `UserError` where they cannot tell its five numbers apart."""
    refuse(points)
    problem = Problem.of(points)
    ones = np.ones(len(points))
    with one_thread():
        found = [problem.minimum(start, ones) for start in problem.starts()]
    x, objective = min(found, key=lambda pair: pair[1])
    law = problem.law(x)
    ends = tuple(name for name, at in zip(_NUMBERS, problem.at_ends(x), strict=True) if at)
    least = float(np.min(problem.log_loss))
    return Fit(
        **{name: float(value) for name, value in vars(law).items()},
        objective=objective,
        seen=Seen.of(points),
        at_ends=ends,
        warnings=tuple(_warning(name, law, x[_NUMBERS.index(name)] < least) for name in ends),
    )


def one_thread() -> threadpool_limits:
    """A context in which BLAS has one thread.

    SciPy's L-BFGS-B solves tiny systems with it, thousands of times: more threads wait for each
    other ten times as long as that takes.
    """
    return threadpool_limits(limits=1, user_api="blas")


def refuse(points: Points) -> None:
    """Raises a `UserError` where no such law can be fitted to these runs."""
    if len(points) < _RUNS:
        raise UserError(
            f"a fit needs {_RUNS} runs or more, got {len(points)}: it has five parameters"
        )
    for name, values in (("N", points.n), ("D", points.d)):
        sizes = np.unique(values)
        if len(sizes) < SIZES:
            listed = ", ".join(f"{size:g}" for size in sizes)
            raise UserError(
                f"a fit needs {SIZES} different {name} or more, got {len(sizes)} ({listed}):"
                f" add runs of another {name}"
            )
    if np.corrcoef(np.log(points.n), np.log(points.d))[0, 1] > 1 - 1e-6:
        raise UserError(
            "D is one power of N in all runs, so a fit cannot tell what N does from what D does:"
            " add runs of the same N with another D"
        )


def _warning(name: str, law: Law, least: bool) -> str:
    """least: the number is at the lower of its ends."""
    if name in ("A", "B", "E") and least:
        return f"{name} is 0: these runs show nothing of its term"
    return f"{name} is {getattr(law, name):.3g}, an end of the range that is searched"
