"""How sure an accuracy is: errors clustered by item, exact intervals, paired comparisons.

Prompts about one item are no independent evidence. Every error here is of items, as draws from all
that could have been asked about, and takes the templates as given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

_DRAWS = 20_000
_EXACT_ITEMS = 14  # up to this many all signs are tried: 16,384 of them


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over questions.

    stderr: clustered by item (Liang & Zeger 1986), nan with a single item. low, high: of the 95 %
    interval. items, questions: how many.
    """

    mean: float
    stderr: float
    low: float
    high: float
    items: int
    questions: int


def accuracy(right: np.ndarray, items: Sequence[str]) -> Estimate:
    """Share of questions that are right, bool [n], each about the item of its place.

    The interval is Clopper's and Pearson's exact one for as many independent questions as have
    the same error (Korn & Graubard 1998): for one question an item it is that of n questions.
    """
    values = np.asarray(right, float)
    mean, (stderr, count) = float(values.mean()), clustered_error(values, items)
    size = float(len(values))
    if 0 < mean < 1 and count > 1 and stderr > 0:
        spread = stats.t.ppf(0.975, len(values) - 1) / stats.t.ppf(0.975, count - 1)
        alike = mean * (1 - mean) / (stderr**2 * (count - 1) / count)
        size = min(size, alike * spread**2)
    elif count < len(values):  # all right, or all wrong: as many as there are items
        size = float(count)
    low, high = exact_interval(mean * size, size)
    return Estimate(mean, stderr, low, high, count, len(values))


def exact_interval(right: float, count: float) -> tuple[float, float]:
    """Clopper's and Pearson's 95 % interval of a share; numbers need not be whole."""
    low = 0.0 if right <= 0 else float(stats.beta.ppf(0.025, right, count - right + 1))
    high = 1.0 if right >= count else float(stats.beta.ppf(0.975, right + 1, count - right))
    return low, high


def clustered_error(values: np.ndarray, items: Sequence[str]) -> tuple[float, int]:
    """Standard error of the mean of values [n] clustered by item, and how many items there are."""
    _, place = np.unique(np.asarray(items), return_inverse=True)
    sums = np.bincount(place, weights=np.asarray(values, float))
    return ratio_error(sums, np.bincount(place)), len(sums)


def ratio_error(sums: np.ndarray, counts: np.ndarray) -> float:
    """Standard error of the mean over all values, given their sums and counts by item [n].

    That of a ratio of two sums, clustered by item; nan with a single item.
    """
    items = len(sums)
    if items < 2:
        return float("nan")
    rest = sums - counts * (np.sum(sums) / np.sum(counts))
    return float(np.sqrt(np.sum(rest**2) * items / (items - 1)) / np.sum(counts))


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """exp of the mean nats of tokens; stderr (delta method), low, high: nan of one document."""

    mean: float
    stderr: float
    low: float
    high: float


def perplexity(nats: np.ndarray, tokens: np.ndarray) -> Perplexity:
    """Of sums of nats and counts of tokens by document [n]; 95 % interval of t on the log scale."""
    mean, error = float(np.sum(nats) / np.sum(tokens)), ratio_error(nats, tokens)
    half = float(stats.t.ppf(0.975, max(len(nats) - 1, 1)) * error)
    low, middle, high = np.exp([mean - half, mean, mean + half]).tolist()
    return Perplexity(middle, middle * error, low, high)


@dataclasses.dataclass(frozen=True)
class Paired:
    """One model less another on the same questions: the mean difference, its error, a p-value."""

    difference: float
    stderr: float
    low: float
    high: float
    p: float
    items: int


def paired(mine: np.ndarray, base: np.ndarray, items: Sequence[str], *, seed: int = 0) -> Paired:
    """Compares values [n] of two models, question by question.

    p: of a permutation test that swaps the models' answers to all questions about an item; exact
    up to 14 items that differ, with 20,000 draws beyond. For one question an item it is McNemar's.
    """
    gaps = np.asarray(mine, float) - np.asarray(base, float)
    stderr, count = clustered_error(gaps, items)
    mean = float(gaps.mean())
    half = float(stats.t.ppf(0.975, max(count - 1, 1)) * stderr)
    _, place = np.unique(np.asarray(items), return_inverse=True)
    sums = np.bincount(place, weights=gaps)
    p = _sign_flips(sums[sums != 0], seed)
    return Paired(mean, stderr, mean - half, mean + half, p, count)


def _sign_flips(sums: np.ndarray, seed: int) -> float:
    """Share of all signs, or of drawn ones and those seen, whose sum is as far from 0."""
    if not len(sums):
        return 1.0
    seen = abs(sums.sum()) - 1e-9  # sums of the same numbers in another order are as far
    if len(sums) <= _EXACT_ITEMS:
        places = np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1
        return float(np.mean(np.abs((1 - 2 * places) @ sums) >= seen))
    rng = np.random.default_rng(seed)
    as_far = 0
    for _ in range(_DRAWS // 1000):
        signs = 1 - 2 * rng.integers(0, 2, (1000, len(sums)), np.int8)
        as_far += int(np.sum(np.abs(signs @ sums) >= seen))
    return (as_far + 1) / (_DRAWS + 1)
