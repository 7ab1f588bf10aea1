"""How a report says numbers and names."""

from __future__ import annotations

import math

from blindvalm_jax.scaling.families import Estimate, Multiplier
from blindvalm_jax.scaling.results import FLOPS

_LABELS = {
    "gpt2": "GPT-2",
    "blind": "BLIND-VALM",
    "eos": "BLIND-VALM (eos)",
    "valm": "VALM",
    "valm_eos": "VALM (eos)",
    "random_tower": "random tower",
    "random_tower_eos": "random tower (eos)",
    "shuffled": "shuffled",
    "shuffled_eos": "shuffled (eos)",
}
_STEPS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
NOTHING = "–"


def label(family: str) -> str:
    """The name of a family for readers."""
    return _LABELS.get(family, family)


def count(value: float) -> str:
    """Parameters or tokens: 1.23M."""
    if not math.isfinite(value) or value >= 1e16 or value < 1e-3:
        return f"{value:.2g}"
    for step, letter in _STEPS:
        if value >= 0.9995 * step:
            return f"{value / step:.3g}{letter}" if value < 999.5 * step else f"{value:.2g}"
    return f"{value:.3g}"


def counts(estimate: Estimate) -> str:
    """1.23M [1.11M, 1.31M]."""
    ends = f"[{count(estimate.low)}, {count(estimate.high)}]"
    return f"{count(estimate.value)} {ends}"


def budget(value: float, unit: str) -> str:
    """1.23e+15, or 1,234 seconds; without the unit."""
    if unit == FLOPS:
        return f"{value:.3g}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def nats(estimate: Estimate, *, signed: bool = False) -> str:
    """2.9134 [2.9070, 2.9201]; signed: of a difference, with its sign."""
    form = "+.4f" if signed else ".4f"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def percent(estimate: Estimate, *, signed: bool = False) -> str:
    """43.1 [41.0, 45.2], of a share; signed: of a difference, with its sign."""
    values = (estimate.value, estimate.low, estimate.high)
    # A 0 that was rounded has no sign of its own.
    value, low, high = (f"{round(100 * x, 1) + 0.0:{'+.1f' if signed else '.1f'}}" for x in values)
    return f"{value} [{low}, {high}]"


def times(multiplier: Multiplier) -> str:
    """2.13 [1.9, 2.4] times; of one that is not known from above (below) its other end alone."""
    if math.isinf(multiplier.low):
        return "more than any number of times"
    low, high = multiplier.trusted
    from_above, from_below = multiplier.high < high, multiplier.low > low
    if from_below and not from_above:
        return f"at least {multiplier.low:.3g} times"
    if from_above and not from_below:
        return f"at most {multiplier.high:.3g} times"
    return f"{multiplier} times"
