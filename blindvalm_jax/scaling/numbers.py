"""All numbers of an analysis as JSON holds them."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

from blindvalm_jax.scaling import results, sentences
from blindvalm_jax.scaling.accuracy import Response, wilson
from blindvalm_jax.scaling.analysis import Analysis, AtBudget, Reached
from blindvalm_jax.scaling.families import Comparison, Estimate
from blindvalm_jax.scaling.family_fits import FamilyFit
from blindvalm_jax.scaling.results import Once


def of(analysis: Analysis, *, once: Sequence[Once], notes: Sequence[str]) -> dict[str, Any]:
    """Everything that the report says; a number that is infinite is the text "infinite"."""
    return {
        "supported": sentences.supported(analysis),
        "notes": list(notes),
        "reference": analysis.reference,
        "left_out": dict(analysis.left_out),
        "unfitted": dict(analysis.unfitted),
        "silent": dict(analysis.silent),
        "laws": {name: _law(fit) for name, fit in analysis.families.items()},
        "at": {unit: [_at(one) for one in at] for unit, at in analysis.at.items()},
        "lowest": {
            unit: [_comparison(one) for one in found] for unit, found in analysis.first.items()
        },
        "tracks": {
            unit: {name: [_reached(one) for one in track] for name, track in tracks.items()}
            for unit, tracks in analysis.tracks.items()
        },
        "once": [dataclasses.asdict(one) for one in once],
        "runs": [results.as_json(run) for run in analysis.results],
    }


def _law(fit: FamilyFit) -> dict[str, Any]:
    law, draws = fit.draws.fit, fit.draws
    names = ("E", "A", "B", "alpha", "beta", "n_exponent")
    run, worst = fit.worst
    return {
        **{
            name: _estimate(
                Estimate(getattr(law, name), *draws.interval(operator.attrgetter(name)))
            )
            for name in names
        },
        "runs": len(fit.runs),
        "draws": len(draws),
        "at_ends": {"law": list(law.at_ends), "share_of_draws": draws.at_ends},
        "warnings": list(law.warnings),
        "residual_rms": fit.rms,
        "residual_worst": {"run": run.name, "nats": worst},
        "cost_off_rms": {unit: fit.off(unit) for unit in fit.costs},
        "parabolas": {
            "exponent": _number(fit.parabolas.exponent),
            "minima": [
                {k: _number(v) for k, v in vars(one).items() if k != "warnings"}
                for one in fit.parabolas.parabolas
            ],
            "warnings": list(fit.parabolas.warnings),
        },
        "responses": {task: _response(one) for task, one in fit.responses.items()},
        "without": dict(fit.without),
    }


def _response(found: Response) -> dict[str, Any]:
    arrays = ("coefficients", "centre", "scale")
    numbers = ("chance", "runs", "deviance", "rms", "by_chance")
    return {name: getattr(found, name).tolist() for name in arrays} | {
        name: getattr(found, name) for name in numbers
    }


def _at(at: AtBudget) -> dict[str, Any]:
    return {
        "budget": at.budget,
        "beyond": at.beyond,
        "reached": {name: _reached(one) for name, one in at.reached.items()},
        "versus": {
            name: {
                "comparison": _comparison(one.comparison),
                "accuracy": {task: _estimate(x) for task, x in one.accuracy.items()},
            }
            for name, one in at.versus.items()
        },
        "without": dict(at.without),
        "best_runs": {
            name: {
                "run": run.name,
                "loss": run.loss,
                "accuracy": {
                    task: {"value": score.accuracy, "wilson": list(wilson(score))}
                    for task, score in run.scores.items()
                },
            }
            for name, run in at.runs.items()
        },
    }


def _reached(found: Reached) -> dict[str, Any]:
    return {
        "budget": found.budget,
        **{name: _estimate(getattr(found, name)) for name in ("loss", "n", "d")},
        "accuracy": {task: _estimate(one) for task, one in found.accuracy.items()},
        "notes": list(found.notes),
    }


def _comparison(found: Comparison) -> dict[str, Any]:
    return {
        "names": list(found.names),
        "budget": found.budget,
        "paired": found.paired,
        "losses": [_estimate(one) for one in found.losses],
        "difference": _estimate(found.difference),
        "multiplier": _estimate(found.multiplier)
        | {"text": str(found.multiplier), "never": found.multiplier.never},
    }


def _estimate(found: Estimate) -> dict[str, Any]:
    return {
        field.name: _number(float(getattr(found, field.name)))
        for field in dataclasses.fields(Estimate)
    }


def _number(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else "infinite"
