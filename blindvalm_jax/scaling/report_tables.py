"""The tables of a report on families at equal budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from blindvalm_jax.errors import UserError
from blindvalm_jax.scaling.accuracy import wilson
from blindvalm_jax.scaling.analysis import Analysis, AtBudget, compared
from blindvalm_jax.scaling.document import Block, Items, Table, Text
from blindvalm_jax.scaling.families import Estimate
from blindvalm_jax.scaling.family_fits import UNITS, FamilyFit
from blindvalm_jax.scaling.fits import Law
from blindvalm_jax.scaling.points import Numbers
from blindvalm_jax.scaling.results import FLOPS, SECONDS, Once, Score
from blindvalm_jax.scaling.sentences import sign, why_not
from blindvalm_jax.scaling.wording import NOTHING, budget, count, counts, label, nats, percent

T = TypeVar("T")
_MOST = 8  # budgets in a table's head
_LAW = ("E", "A", "B", "alpha", "beta", "n_exponent")


def verdicts(analysis: Analysis) -> list[Block]:
    """At the largest budget compared, every family against the reference: loss and accuracies."""
    blocks: list[Block] = []
    base = label(analysis.reference or "")
    for unit in UNITS:
        at = compared(analysis.at[unit])
        if at is None:
            continue
        asked = {task for reached in at.reached.values() for task in reached.accuracy}
        tasks, rows = sorted(asked), []
        for name, reached in at.reached.items():
            versus = at.versus.get(name)
            row = [label(name), nats(reached.loss)]
            row.append(NOTHING if versus is None else _told(versus.comparison.difference))
            for task in tasks:
                found = reached.accuracy.get(task)
                apart = versus.accuracy.get(task) if versus else None
                text = _or(found, percent)
                row.append(text if apart is None else f"{text}, {_told(apart)}")
            rows.append(row)
        head = [f"at {budget(at.budget, unit)} {unit}", "loss", f"than {base}"]
        blocks.append(Table([*head, *(f"{task}, % (than {base})" for task in tasks)], rows))
    return blocks


def losses(analysis: Analysis, unit: str) -> list[Block]:
    """Loss of each family at each budget, against the reference."""
    seen = analysis.seen(unit)
    if not any(at.reached for at in seen):
        return [Text(f"Nothing to compare: {why_not(analysis, unit)}.")]
    base = label(analysis.reference or "")
    head = [unit, "family", "loss", f"less {base}", f"times the {unit} of {base}"]
    rows, lines = [], []
    unlike: dict[str, None] = {}
    for at in seen:
        for name, reached in at.reached.items():
            row = [budget(at.budget, unit), label(name), nats(reached.loss)]
            versus = at.versus.get(name)
            if versus is None:
                rows.append([*row, NOTHING, NOTHING])
                continue
            found = versus.comparison
            rows.append([*row, nats(found.difference, signed=True), str(found.multiplier)])
            if not found.paired:
                unlike[name] = None
        lines += [f"{budget(at.budget, unit)} {unit}: {x}" for x in _refused(at)]
    about = f"Multiplier: how many times the budget a family needs for the loss of {base}. "
    about += "A > or < says that it lies over a decade beyond the budgets seen; infinite, that "
    about += "no size which the family has trained ever has that loss."
    lines += [
        f"{label(name)} is compared as if its runs and those of {base} had nothing in common: they "
        "are not of the same sizes, budgets and trunks"
        for name in unlike
    ]
    return [Table(head, rows), Text(about), *([Items(lines)] if lines else [])]


def accuracies(analysis: Analysis, task: str, unit: str) -> list[Block]:
    """Accuracy of the compute-optimal models at each budget, against the reference."""
    base = label(analysis.reference or "")
    rows = []
    for at in analysis.seen(unit):
        for name, reached in at.reached.items():
            if task not in reached.accuracy:
                continue
            versus = at.versus.get(name)
            apart = versus.accuracy.get(task) if versus else None
            told = NOTHING if apart is None else percent(apart, signed=True)
            row = [budget(at.budget, unit), label(name), percent(reached.accuracy[task])]
            rows.append([*row, told])
    if not rows:
        why = analysis.silent.get(unit, "no family has a response there")
        return [Text(f"Nothing at equal {unit}: {why}.")]
    head = [unit, "family", "accuracy of a run, %", f"less {base}, points"]
    return [Table(head, rows)]


def responses(analysis: Analysis, task: str) -> list[Block]:
    """How well the response describes the runs."""
    rows, lines = [], []
    for name, fit in analysis.families.items():
        if task in fit.without:
            lines.append(f"{label(name)}: {fit.without[task]}")
        if task not in fit.responses:
            continue
        found = fit.responses[task]
        rms, chance = (f"{100 * x:.2f}" for x in (found.rms, found.by_chance))
        row = [label(name), f"{found.runs}", f"{found.deviance:.2f}", rms, chance]
        rows.append([*row, f"{100 * found.chance:.1f}"])
    blocks: list[Block] = []
    if rows:
        head = ["family", "runs", "deviance / freedom", "off by (rms), points"]
        head += ["by questions alone, points", "chance, %"]
        about = "How far runs are from the response accuracy = chance + (1 - chance) sigmoid(a + b "
        about += "log N + c log D). All runs answer the same questions, so that a deviance below 1 "
        about += "is to be expected; far above it, the response is not of this shape."
        blocks += [Text(about), Table(head, rows)]
    return [*blocks, *([Items(lines)] if lines else [])]


def best_runs(analysis: Analysis) -> list[Block]:
    """The run of lowest loss within each budget: no law, no response."""
    tasks = analysis.tasks()
    about = "Of each family the run of lowest loss that cost no more than the budget (2 % are let "
    about += "pass), and its accuracies with the 95 % interval of its questions (Wilson's), in %."
    blocks: list[Block] = [Text(about)]
    for unit in UNITS:
        rows = [
            [
                *(budget(at.budget, unit), label(name), run.name, f"{run.held_out:.4f}"),
                *(_score(run.scores.get(task)) for task in tasks),
            ]
            for at in analysis.seen(unit)
            for name, run in at.runs.items()
        ]
        if rows:
            blocks.append(Table([unit, "family", "run", "loss", *tasks], rows))
        else:
            blocks.append(Text(f"Nothing at equal {unit}: {why_not(analysis, unit)}."))
    return blocks


def optima(analysis: Analysis, unit: str) -> list[Block]:
    """Best size and length at each budget, and a decade beyond."""
    rows = [
        [
            f"{budget(at.budget, unit)}{' (a decade beyond)' if at.beyond else ''}",
            *(label(name), counts(reached.n), counts(reached.d), nats(reached.loss)),
            "; ".join(reached.notes),
        ]
        for at in analysis.at[unit]
        for name, reached in at.reached.items()
    ]
    lines = [f"a decade beyond: {x}" for at in analysis.at[unit] if at.beyond for x in _refused(at)]
    if not rows:
        return [Text(f"Nothing is known at equal {unit}.")]
    head = [unit, "family", "N* (parameters)", "D* (tokens)", "loss", ""]
    return [Table(head, rows), *([Items(lines)] if lines else [])]


def laws(analysis: Analysis) -> list[Block]:
    """The five numbers of each law, and how far the runs are from it."""
    if not analysis.families:
        return [Text("No family has one.")]
    rows, off, lines = [], [], []
    for name, fit in analysis.families.items():
        drawn = fit.draws
        told = (NOTHING if _untold(fit, x) else _interval(fit, x) for x in _LAW)
        rows.append([label(name), f"{len(fit.runs)}", *told])
        run, residual = fit.worst
        row = [label(name), f"{fit.rms:.4f}", f"{residual:+.4f}", run.name]
        timed = f"{100 * fit.off(SECONDS):.1f} %" if SECONDS in fit.costs else NOTHING
        off.append([*row, f"{len(drawn)}", timed])
        lines += [f"{label(name)}: {text}" for text in drawn.fit.warnings]
        if drawn.at_ends:
            lines.append(
                f"{label(name)}: in {100 * drawn.at_ends:.0f} % of draws a number of the law lies "
                "at an end of the range that is searched"
            )
    head = ["family", "runs", "E", "A", "B", "alpha", "beta", "N* exponent, C = k N D"]
    return [
        Text("L(N, D) = E + A N^-alpha + B D^-beta, in nats a token."),
        Table(head, rows),
        Text(
            "Loss less that of the law, in nats a token. A difference between families that is "
            "smaller stands on their laws missing their runs alike."
        ),
        Table(
            ["family", "rms", "worst", "its run", "draws", "seconds of a token, off by (rms)"], off
        ),
        *_missed(analysis),
        *([Items(lines)] if lines else []),
    ]


def parabolas(analysis: Analysis) -> list[Block]:
    """Approach 2 beside the exponent of the law."""
    rows, lines = [], []
    for name, fit in analysis.families.items():
        found = fit.parabolas
        parabola = NOTHING if math.isnan(found.exponent) else f"{found.exponent:.3f}"
        along = NOTHING
        try:
            if not _untold(fit, "n_exponent"):
                along = str(fit.exponent(FLOPS))
        except UserError as error:
            lines.append(f"{label(name)}: {error}")
        minima = "; ".join(
            f"{count(one.n)} at {budget(one.budget, FLOPS)}"
            for one in found.parabolas
            if math.isfinite(one.n)
        )
        rows.append([label(name), parabola, along, minima or NOTHING])
        lines += [f"{label(name)}: {text}" for text in found.warnings]
    if not rows:
        return [Text("No family has a law to check.")]
    head = ["family", "N* exponent, parabolas", "by the law, over these budgets", "minima (N)"]
    return [Table(head, rows), *([Items(lines)] if lines else [])]


def once(costs: Sequence[Once]) -> list[Block]:
    """What is done once, outside of the budgets."""
    if not costs:
        return [Text("Nothing that these runs need is done once outside of their budgets.")]
    about = "In no budget above: it is shared by all runs of the families that need it."
    if any(one.flops is None for one in costs):
        about += " Of what has a dash nothing here tells what it took."
    rows = [
        [one.what, ", ".join(map(label, one.families)), *(_or(x, "{:.3g}".format) for x in cost)]
        for one in costs
        for cost in [(one.flops, one.share)]
    ]
    head = ["what", "families", FLOPS, "times the largest budget"]
    return [Text(about), Table(head, rows)]


def runs(analysis: Analysis) -> list[Block]:
    """Every run, as results.csv has it."""
    tasks = analysis.tasks()
    head = ["run", "family", "size", "N", "tokens", FLOPS, SECONDS, "loss", *tasks, "ended"]
    rows = [
        [
            *(run.name, label(run.family), run.size, count(run.n), count(run.tokens)),
            *(budget(run.flops, FLOPS), _or(run.seconds, lambda x: budget(x, SECONDS))),
            _or(run.loss, lambda x: f"{x:.4f}"),
            *(
                _or(run.scores.get(task), lambda score: f"{100 * score.accuracy:.1f}")
                for task in tasks
            ),
            run.ended or "unfinished",
        ]
        for run in analysis.results
    ]
    return [Table(head, rows)]


def _interval(fit: FamilyFit, what: str) -> str:
    def value(law: Law) -> Numbers:
        found: Numbers = getattr(law, what)
        return found

    return str(Estimate(float(value(fit.draws.fit)), *fit.draws.interval(value)))


def _told(difference: Estimate) -> str:
    """Which way an estimate lies from the reference's."""
    return {-1: "lower", 0: "not told apart", 1: "higher"}[sign(difference)]


def _untold(fit: FamilyFit, number: str) -> bool:
    """Whether it, or another number of its term, is at an end of what is searched."""
    with_it = {"A": "alpha", "alpha": "A", "B": "beta", "beta": "B"}
    ends = fit.draws.fit.at_ends
    if number == "n_exponent":
        return any(x != "E" for x in ends)
    return number in ends or with_it.get(number) in ends


def _missed(analysis: Analysis) -> list[Block]:
    """Residuals by budget, where there are few budgets."""
    budgets = sorted({run.budget for fit in analysis.families.values() for run in fit.runs})
    if len(budgets) > _MOST:
        return []
    rows = []
    for name, fit in analysis.families.items():
        row = [label(name)]
        for one in budgets:
            if not any(run.budget == one for run in fit.runs):
                row.append(NOTHING)
                continue
            mean, above, below = fit.missed(one)
            row.append(f"{mean:+.4f} ({above} of {above + below})")
        rows.append(row)
    about = "Mean of the runs of a budget less the law, in nats a token, and how many of them lie "
    about += "above it: where all of many do, or none, the law is off there."
    head = ["family", *(budget(one, FLOPS) for one in budgets)]
    return [Text(about), Table(head, rows)]


def _score(score: Score | None) -> str:
    if score is None:
        return NOTHING
    return percent(Estimate(score.accuracy, *wilson(score)))


def _refused(at: AtBudget) -> list[str]:
    return [f"{label(name)}: {why}" for name, why in at.without.items()]


def _or(value: T | None, form: Callable[[T], str]) -> str:
    return NOTHING if value is None else form(value)
