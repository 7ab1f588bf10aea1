"""The sentences that an analysis supports, by rules: see docs/scaling_experiments.md.

Two families are told apart where the 95 % interval of their difference leaves out 0. All is said of
the largest budget at which families are compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blindvalm_jax.scaling.analysis import Analysis, AtBudget, compared
from blindvalm_jax.scaling.families import Comparison, Estimate, estimate
from blindvalm_jax.scaling.family_fits import UNITS
from blindvalm_jax.scaling.results import FLOPS, Result
from blindvalm_jax.scaling.wording import budget, label, nats, percent, times

_SPENT = 0.9  # of a budget, by a run that tells of it
_SIDED = 6  # runs of a budget that all lie on one side of the law: by chance in one case of 32
_DEVIANCE = 2.0  # for each degree of freedom; all runs answer the same questions, so 1 is much


def sign(difference: Estimate) -> int:
    """-1 or 1 where the interval lies on that side of 0; 0: it does not."""
    return int(difference.low > 0) - int(difference.high < 0)


def supported(analysis: Analysis) -> list[str]:
    """What the data support, on each budget; why nothing can be said where that is so."""
    if len(analysis.families) < 2:
        have = ", ".join(map(label, analysis.families)) or "no family"
        return [f"No two families can be compared by their laws: {have} has one."]
    found = []
    for unit in UNITS:
        last = compared(analysis.at[unit])
        if last is None:
            found.append(f"Nothing can be said at equal {unit}: {why_not(analysis, unit)}.")
            continue
        found += [_loss(analysis, last), *_lowest(analysis.first[unit], last)]
        found += [
            f"{_where(last)}: nothing can be said of {label(name)}: {why}."
            for name, why in last.without.items()
        ]
        found += [text for task in analysis.tasks() if (text := _accuracy(analysis, last, task))]
    return found


def why_not(analysis: Analysis, unit: str) -> str:
    """Why no families are compared at equal budgets of this kind."""
    if unit in analysis.silent:
        return analysis.silent[unit]
    if not analysis.families:
        return "no family has a law"
    seen = analysis.seen(unit)
    if not seen:
        return "no family says what its runs cost"
    return "; ".join(f"{label(name)}: {why}" for name, why in seen[-1].without.items()) or "no law"


def _loss(analysis: Analysis, at: AtBudget) -> str:
    """How each family stands to the reference, in one sentence, and what to doubt of it."""
    parts, doubts = [], {}
    reference = label(analysis.reference or "")
    for name, versus in at.versus.items():
        difference = versus.comparison.difference
        told = f"{nats(difference, signed=True)} nats a token"
        if sign(difference):
            word = "lower" if sign(difference) < 0 else "higher"
            needs = f"needs {times(versus.comparison.multiplier)} the {at.unit} for its loss"
            parts.append(f"{label(name)} has a {word} loss than {reference} ({told}; {needs})")
        else:
            parts.append(f"{label(name)} and {reference} cannot be told apart in loss ({told})")
        doubts.update(dict.fromkeys(_missed(analysis, versus.comparison)))
        doubts.update(dict.fromkeys(_contradicted(at, versus.comparison)))
    for name in at.reached:
        doubts.update(dict.fromkeys(_doubts(analysis, at, name)))
    return f"{_where(at)}: {'; '.join(parts)}." + (f" But {'; '.join(doubts)}." if doubts else "")


def _missed(analysis: Analysis, comparison: Comparison) -> list[str]:
    """That a law is further from its runs than a difference that is told."""
    first, second = (analysis.families[name] for name in comparison.names)
    if comparison.paired:  # what both laws miss alike is in no difference
        missed = float(np.sqrt(np.mean((second.residuals - first.residuals) ** 2)))
        what = f"differences between like runs of {label(first.name)} and {label(second.name)}"
    else:
        worst = max(first, second, key=lambda fit: fit.rms)
        missed, what = worst.rms, f"runs of {label(worst.name)}"
    if not sign(comparison.difference) or missed <= abs(comparison.difference.value):
        return []
    return [f"laws miss the {what} by more, {missed:.4f} (rms)"]


def _contradicted(at: AtBudget, comparison: Comparison) -> list[str]:
    """That the best runs of two families do not differ as their laws are told to."""
    told = sign(comparison.difference)
    first, second = (_best_run(at, name) for name in comparison.names)
    if not told or first is None or second is None:
        return []
    if told * (second.held_out - first.held_out) > 0:
        return []
    names = " and ".join(map(label, comparison.names))
    return [
        f"the best runs of {names} say otherwise, {first.held_out:.4f} and {second.held_out:.4f}"
    ]


def _best_run(at: AtBudget, name: str) -> Result | None:
    """The run of lowest loss that cost no more than the budget, if it cost nearly that."""
    run = at.runs.get(name)
    spent = run is not None and (run.cost(at.unit) or 0.0) >= _SPENT * at.budget
    return run if spent else None


def _doubts(analysis: Analysis, at: AtBudget, name: str) -> list[str]:
    """What speaks against the loss of a family at a budget."""
    texts, reached, fit = [], at.reached[name], analysis.families[name]
    if ends := fit.draws.fit.at_ends:
        texts.append(f"runs of {label(name)} do not tell {', '.join(ends)} of its law")
    if reached.notes:
        texts.append(f"of {label(name)} {', '.join(reached.notes)}")
    if at.unit == FLOPS and any(run.budget == at.budget for run in fit.runs):
        _, above, below = fit.missed(at.budget)
        if max(above, below) >= _SIDED and not min(above, below):
            side = "below" if above else "above"
            texts.append(f"the law lies {side} all runs of {label(name)} at this budget")
    if (run := _best_run(at, name)) is not None:
        low, high = reached.loss.low - 2 * fit.rms, reached.loss.high + 2 * fit.rms
        if not low <= run.held_out <= high:
            texts.append(
                f"the best run of {label(name)} has a loss of {run.held_out:.4f}, its law "
                f"{nats(reached.loss)}"
            )
    return texts


def _lowest(comparisons: Sequence[Comparison], at: AtBudget) -> list[str]:
    """Which of more than two families has the lowest loss, and from which it is told apart."""
    if len(comparisons) < 2:
        return []
    lowest = label(comparisons[0].names[0])
    apart = [label(one.names[1]) for one in comparisons if sign(one.difference) > 0]
    level = [label(one.names[1]) for one in comparisons if sign(one.difference) <= 0]
    text = f"{_where(at)}: the lowest loss of all is that of {lowest}"
    if not level:
        return [f"{text}, told apart from each other family."]
    told = f"told apart from {', '.join(apart)}, " if apart else ""
    return [f"{text}, {told}not told apart from {', '.join(level)}."]


def _accuracy(analysis: Analysis, at: AtBudget, task: str) -> str:
    """How the accuracy of each family stands to that of the reference; "" where none is known."""
    reference = label(analysis.reference or "")
    parts: list[str] = []
    doubts: dict[str, None] = {}
    for name, versus in at.versus.items():
        if task not in versus.accuracy:
            continue
        for one in versus.comparison.names:
            doubts |= dict.fromkeys(_doubts_of_response(analysis, at, one, task))
        difference = versus.accuracy[task]
        told = f"{percent(difference, signed=True)} points from run to run"
        if sign(difference):
            word = "higher" if sign(difference) > 0 else "lower"
            parts.append(f"{label(name)} has a {word} accuracy than {reference} ({told})")
        else:
            parts.append(f"{label(name)} and {reference} cannot be told apart in accuracy ({told})")
    if not parts:
        return ""
    but = f" But {'; '.join(doubts)}." if doubts else ""
    return f"{_where(at)}, task {task}: {'; '.join(parts)}.{but}"


def _doubts_of_response(analysis: Analysis, at: AtBudget, name: str, task: str) -> list[str]:
    """That runs are far from their response, or the best of the budget is none of its runs."""
    texts, response = [], analysis.families[name].responses[task]
    if response.deviance > _DEVIANCE:
        texts.append(
            f"runs of {label(name)} lie {100 * response.rms:.1f} points (rms) from their response"
        )
    run = at.runs.get(name)
    if run is None or task not in run.scores:
        return texts
    of_run = estimate(response.at(run.n, run.tokens), response.of_runs(run.n, run.tokens))
    accuracy = run.scores[task].accuracy
    if of_run.low <= accuracy <= of_run.high:
        return texts
    return [
        *texts,
        f"{run.name}, the {label(name)} of lowest loss that costs no more, has "
        f"{100 * accuracy:.1f} %, where its response says {percent(of_run)}",
    ]


def _where(at: AtBudget) -> str:
    return f"At {budget(at.budget, at.unit)} {at.unit}"
