"""Results of runs that nobody trained, drawn from laws that are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from blindvalm_jax.scaling.fits import Law
from blindvalm_jax.scaling.results import Result, Score

LAW = Law(E=2.5, A=60.0, B=300.0, alpha=0.35, beta=0.37)
BUDGETS = (1e12, 4e12, 1.6e13, 6.4e13)
TASK, QUESTIONS, CHANCE = "colors", 400, 0.1


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family that makes of a token what others make of `worth`, at `seconds` times their time."""

    worth: float = 1.0
    seconds: float = 1.0


def right(n: float, d: float) -> float:
    """The accuracy of a model, whatever its family."""
    return CHANCE + (1 - CHANCE) / (1 + (n / 1e5) ** -0.5 * (d / 1e7) ** -0.4 * np.e)


def drawn(
    family: str,
    kind: Kind | None = None,
    *,
    budgets: Sequence[float] = BUDGETS,
    noise: float = 0.002,
    shared: float = 0.0,
    trunks: bool = False,
    seed: int = 0,
) -> list[Result]:
    """Seven sizes over 16 times N for each budget; noise: the deviation of log loss.

    shared: of what all families' runs of a size have in common. trunks: runs of a size share one.
    """
    kind, rng = kind or Kind(), np.random.default_rng([seed, *family.encode()])
    common = shared * np.random.default_rng([seed, 7]).standard_normal(7)
    power = 1 / (LAW.alpha + LAW.beta)
    found = []
    for budget in budgets:
        centre = (LAW.alpha * LAW.A / (LAW.beta * LAW.B)) ** power
        centre *= (budget / 6) ** (LAW.beta * power)
        for size, share in enumerate(np.geomspace(1 / 4, 4, 7)):
            n = int(centre * share)
            d = int(budget / (6 * n))
            log_noise, log_time = rng.standard_normal(2)
            loss = LAW.loss(n, kind.worth * d) * np.exp(noise * log_noise + common[size])
            seconds = kind.seconds * (6 * n + 2e5) * d / 1e11 * np.exp(0.03 * log_time)
            accuracy = rng.binomial(QUESTIONS, right(n, d)) / QUESTIONS
            found.append(
                Result(
                    name=f"{family}-{size}-{budget:.0e}",
                    family=family,
                    size=f"{size + 2}x64",
                    budget=budget,
                    n=n,
                    tokens=d,
                    flops=6.0 * n * d,
                    seconds=float(seconds),
                    loss=float(loss),
                    scores={TASK: Score(accuracy, QUESTIONS, CHANCE)},
                    ended="done",
                    about="",
                    trunk=f"{family}-{size}" if trunks else "",
                    device="cpu",
                )
            )
    return found
