"""Accuracy of a task as a function of N and D, and how sure an accuracy is.

accuracy = chance + (1 - chance) sigmoid(a + b log N + c log D), at the highest posterior of a
binomial likelihood. Runs differ by more than the chance of their questions, and the response is not
quite of this shape: intervals come from runs drawn again and from how far runs are from it, not
from that likelihood.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, special, stats

from blindvalm_jax.errors import UserError
from blindvalm_jax.scaling.fits import one_thread
from blindvalm_jax.scaling.points import Array, Numbers
from blindvalm_jax.scaling.results import Result, Score

# Deviation of the normal prior, of mean 0, of a (at the runs' mean log N and log D) and of b and c
# (a deviation of log N or log D): it keeps them finite where all runs guess, or all know.
PRIOR = 5.0
_RUNS = 6
_PARAMETERS = 3
_SLOPES = ((0.0, 0.0), (1.0, 1.0), (-1.0, -1.0))  # starts: with a floor there may be two maxima
_Z = float(stats.norm.ppf(0.975))


@dataclasses.dataclass(frozen=True)
class Response:
    """The response of a family to size and length in a task.

    coefficients: a, b, c `[3]`, with log N and log D less `centre`, over `scale`; drawn:
    `[draws, 3]`. off: of each draw, how far one of its runs is from the response, and what other
    questions would change, over the root of p (1 - p) + 1 / questions, `[draws]`. deviance:
    residual, over runs less 3; about 1 where runs differ by the chance of questions alone. rms,
    by_chance: of accuracies less the response, and what chance alone gives.
    """

    coefficients: Array
    drawn: Array
    off: Array
    centre: Array
    scale: Array
    chance: float
    questions: float
    runs: int
    deviance: float
    rms: float
    by_chance: float

    def at(self, n: float, d: float) -> float:
        """The accuracy of a model of N parameters after D tokens."""
        return float(self._of(self.coefficients[None], n, d)[0])

    def of_draws(self, n: Numbers, d: Numbers) -> Array:
        """The same of each draw, at one N and D or at those of each draw: `[draws]`."""
        return self._of(self.drawn, n, d)

    def of_runs(self, n: Numbers, d: Numbers) -> Array:
        """What a run would have, `[draws]`: that of each draw, as far off as one of the runs is."""
        p = self.of_draws(n, d)
        return np.clip(p + self.off * _spread(p, self.questions), 0.0, 1.0)

    def _of(self, coefficients: Array, n: Numbers, d: Numbers) -> Array:
        x = (np.stack(np.broadcast_arrays(np.log(n), np.log(d)), axis=-1) - self.centre) / (
            self.scale
        )
        eta = coefficients[:, 0] + (coefficients[:, 1:] * x).sum(axis=-1)
        return np.asarray(self.chance + (1 - self.chance) * special.expit(eta))


def respond(runs: Sequence[Result], task: str, counts: Array, *, seed: int = 0) -> Response:
    """The response of these runs; counts: `[draws, runs]`, how often drawn.

    With a seed the same of these is taken to be off in families whose runs were drawn alike, and
    other answers are drawn.

    Raises:
      UserError: they are too few, or were not all asked the same.
    """
    scores = [run.scores[task] for run in runs if task in run.scores]
    if len(scores) < len(runs):
        raise UserError(f"{len(runs) - len(scores)} of its {len(runs)} runs have no accuracy")
    if len(runs) < _RUNS:
        raise UserError(f"a response needs {_RUNS} runs, got {len(runs)}")
    if len({round(score.chance, 9) for score in scores}) > 1:
        raise UserError("its runs were asked different questions: chance is not the same in all")
    logs = np.log([[run.n, run.tokens] for run in runs])
    centre, scale = logs.mean(axis=0), logs.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    problem = _Problem(
        x=np.column_stack([np.ones(len(runs)), (logs - centre) / scale]),
        right=np.array([score.accuracy * score.questions for score in scores]),
        questions=np.array([float(score.questions) for score in scores]),
        chance=scores[0].chance,
    )
    ones = np.ones(len(runs))
    with one_thread():
        found = [problem.minimum(start, ones) for start in problem.starts()]
        best, _ = min(found, key=lambda pair: pair[1])
        drawn = [problem.minimum(best, counts[draw])[0] for draw in range(len(counts))]
    p = problem.accuracy(best)
    residuals = np.array([score.accuracy for score in scores]) - p
    questions, freedom = float(problem.questions.mean()), len(runs) - _PARAMETERS
    standard = residuals / _spread(p, questions) * math.sqrt(len(runs) / freedom)
    return Response(
        coefficients=best,
        drawn=np.array(drawn),
        off=_picked(standard, counts, seed)
        + _answers(runs[0].family, task, len(counts), seed) / math.sqrt(questions),
        centre=centre,
        scale=scale,
        chance=problem.chance,
        questions=questions,
        runs=len(runs),
        deviance=problem.deviance(p) / freedom,
        rms=float(np.sqrt(np.mean(residuals**2))),
        by_chance=float(np.sqrt(np.mean(p * (1 - p) / problem.questions))),
    )


def _spread(p: Array, questions: float) -> Array:
    """What a deviation goes with; never 0, as a response that says all or nothing may be wrong."""
    return np.asarray(np.sqrt(p * (1 - p) + 1 / questions))


def _picked(residuals: Array, counts: Array, seed: int) -> Array:
    """Of each draw the residual of one of the runs that it drew: `[draws]`."""
    at = np.random.default_rng((seed, 0, 1)).random((len(counts), 1))
    upto = np.cumsum(counts, axis=1)
    place = (upto <= at * upto[:, -1:]).sum(axis=1)
    return np.asarray(residuals[np.minimum(place, len(residuals) - 1)])


def _answers(family: str, task: str, draws: int, seed: int) -> Array:
    """Standard normal: what other questions of the kind would have changed, `[draws]`."""
    return np.random.default_rng((seed, *family.encode(), 0, *task.encode())).standard_normal(draws)


def wilson(score: Score) -> tuple[float, float]:
    """The 95 % interval of an accuracy, by Wilson's score."""
    p, count = score.accuracy, score.questions
    share = _Z**2 / count
    middle = p + share / 2
    half = math.sqrt(p * (1 - p) * share + share**2 / 4)
    return max(0.0, (middle - half) / (1 + share)), min(1.0, (middle + half) / (1 + share))


@dataclasses.dataclass(frozen=True)
class _Problem:
    """The negative log posterior; x: `[runs, 3]`, right and questions: `[runs]`."""

    x: Array
    right: Array
    questions: Array
    chance: float

    def value_and_gradient(self, theta: Array, weights: Array) -> tuple[float, Array]:
        eta = self.x @ theta
        share = special.expit(eta)
        p = self.chance + (1 - self.chance) * share
        wrong = self.questions - self.right
        floor = math.log(self.chance) if self.chance > 0 else -math.inf
        above = math.log1p(-self.chance)
        log_p = np.logaddexp(floor, above + special.log_expit(eta))
        log_q = above + special.log_expit(-eta)
        value = -float(weights @ (self.right * log_p + wrong * log_q))
        slope = weights * (wrong * share - self.right * (1 - self.chance) * share * (1 - share) / p)
        prior = theta / PRIOR**2
        return value + float(theta @ prior) / 2, self.x.T @ slope + prior

    def minimum(self, start: Array, weights: Array) -> tuple[Array, float]:
        found = optimize.minimize(
            self.value_and_gradient, start, args=(weights,), jac=True, method="L-BFGS-B"
        )
        return found.x, float(found.fun)

    def starts(self) -> list[Array]:
        mean = float(self.right.sum() / self.questions.sum())
        lifted = np.clip((mean - self.chance) / (1 - self.chance), 0.02, 0.98)
        return [np.array([special.logit(lifted), *slopes]) for slopes in _SLOPES]

    def accuracy(self, theta: Array) -> Array:
        return np.asarray(self.chance + (1 - self.chance) * special.expit(self.x @ theta))

    def deviance(self, p: Array) -> float:
        right, wrong = self.right, self.questions - self.right
        of_right = special.xlogy(right, right / (self.questions * p))
        of_wrong = special.xlogy(wrong, wrong / (self.questions * (1 - p)))
        return float(2 * (of_right + of_wrong).sum())
