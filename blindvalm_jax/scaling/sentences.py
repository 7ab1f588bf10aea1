"""The sentences that an analysis supports, by rules: see docs/scaling_experiments.md.

Two families are told apart where the 95 % interval of their difference leaves out 0. All is said of
the largest budget that all families with a law have seen.
"""

from __future__ import annotations

from collections.abc import Sequence

from blindvalm_jax.scaling.analysis import Analysis, AtBudget
from blindvalm_jax.scaling.families import Comparison, Estimate
from blindvalm_jax.scaling.family_fits import UNITS
from blindvalm_jax.scaling.wording import budget, label, nats, percent


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
        seen = [one for one in analysis.seen(unit) if one.versus]
        if not seen:
            found.append(f"Nothing can be said at equal {unit}: {_why(analysis, unit)}.")
            continue
        last = seen[-1]
        found += [_loss(analysis, last), *_lowest(analysis.first[unit], last)]
        found += [text for task in analysis.tasks() if (text := _accuracy(analysis, last, task))]
    return found


def _why(analysis: Analysis, unit: str) -> str:
    seen = analysis.seen(unit)
    if not seen:
        return "no budget was seen by all families"
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
            needs = f"needs {versus.comparison.multiplier} times the {at.unit} for its loss"
            parts.append(f"{label(name)} has a {word} loss than {reference} ({told}; {needs})")
        else:
            parts.append(f"{label(name)} and {reference} cannot be told apart in loss ({told})")
        doubts.update(dict.fromkeys(_doubts(analysis, at, versus.comparison)))
    return f"{_where(at)}: {'; '.join(parts)}." + (f" But {'; '.join(doubts)}." if doubts else "")


def _doubts(analysis: Analysis, at: AtBudget, comparison: Comparison) -> list[str]:
    """What speaks against taking a difference at its word."""
    texts = []
    apart = abs(comparison.difference.value)
    missed = {name: analysis.families[name].rms for name in comparison.names}
    worst = max(missed, key=lambda name: missed[name])
    if sign(comparison.difference) and missed[worst] > apart:
        texts.append(
            f"the law misses the runs of {label(worst)} by more, {missed[worst]:.4f} (rms)"
        )
    for name in comparison.names:
        if outside := at.reached[name].outside:
            texts.append(f"the best {label(name)} is unlike any trained: {', '.join(outside)}")
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
    told = f"told apart from {', '.join(apart)} and" if apart else "but"
    return [f"{text}, {told} not from {', '.join(level)}."]


def _accuracy(analysis: Analysis, at: AtBudget, task: str) -> str:
    """How the accuracy of each family stands to that of the reference; "" where none is known."""
    reference = label(analysis.reference or "")
    parts = []
    for name, versus in at.versus.items():
        if task not in versus.accuracy:
            continue
        difference = versus.accuracy[task]
        told = f"{percent(difference, signed=True)} points"
        if sign(difference):
            word = "higher" if sign(difference) > 0 else "lower"
            parts.append(f"{label(name)} has a {word} accuracy than {reference} ({told})")
        else:
            parts.append(f"{label(name)} and {reference} cannot be told apart in accuracy ({told})")
    return f"{_where(at)}, task {task}: {'; '.join(parts)}." if parts else ""


def _where(at: AtBudget) -> str:
    return f"At {budget(at.budget, at.unit)} {at.unit}"
