"""Hyper-parameters of a run by the rules of its sweep: powers of its size, and caps.

Tuning each size apart, badly for some, bends a law more than a rule that is a little off for all
(Porian et al. 2024, arXiv 2406.19146): so a sweep states one rule and its numbers.
"""

from __future__ import annotations

import dataclasses
import math

from blindvalm_jax.config_fields import field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """How learning rate, batch and warm-up follow from N, the trained parameters of a run."""

    reference: float = field(1e6, "N at which a run has the two values below", low=1.0, high=1e15)
    learning_rate: float = field(1e-3, "peak learning rate there", low=0.0)
    learning_rate_exponent: float = field(0.0, "it grows as N to this", low=-2.0, high=2.0)
    batch_size: float = field(8.0, "rows of an update there", low=1.0)
    batch_exponent: float = field(0.0, "they grow as N to this", low=-2.0, high=2.0)
    batch_multiple: int = field(1, "rows are this times a power of 2", low=1)
    warmup_tokens: float = field(1.0, "of warm-up for each parameter, at most", low=0.0)
    warmup_share: float = field(0.1, "of a run's updates, at most", low=0.0, high=1.0)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What the rules say at a size."""

    learning_rate: float
    batch_size: int


def chosen(rules: Rules, n: float) -> Chosen:
    """The learning rate and the rows of an update at N = n; rows to the nearest power of 2."""
    times = n / rules.reference
    rows = rules.batch_size * times**rules.batch_exponent / rules.batch_multiple
    return Chosen(
        learning_rate=float(f"{rules.learning_rate * times**rules.learning_rate_exponent:.3g}"),
        batch_size=rules.batch_multiple * 2 ** max(0, round(math.log2(rows))),
    )


def warmup(rules: Rules, *, n: float, updates: int, tokens: int) -> int:
    """Updates of warm-up of a run of N = n; tokens: of an update.

    At most N tokens: a longer one leaves small models no time (Porian et al. 2024, section 4.2).
    """
    return int(min(rules.warmup_tokens * n / tokens, rules.warmup_share * updates))
