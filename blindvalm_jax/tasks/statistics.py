"""How sure an accuracy is: clustered errors, exact intervals, paired comparisons.

Prompts about one item are no independent evidence, nor are pairs that share an object. Every error
here is of items, or of the objects of pairs, as draws from all that could have been asked about,
and takes the templates as given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

# What clusters are of, as results.json says it.
BY_ITEM, BY_OBJECT = "item", "objects of pairs"
_LARGEST_POWER = 700.0  # e to it is a float
_DRAWS = 20_000
_EXACT_ITEMS = 14  # up to this many all signs are tried: 16,384 of them


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over questions.

    stderr: clustered, nan with a single item. low, high: of the 95 % interval. clusters, questions:
    how many.
    """

    mean: float
    stderr: float
    low: float
    high: float
    clusters: int
    questions: int


# The two objects that each question compares; None of questions that compare none.
Objects = Sequence[tuple[str, str]] | None


def accuracy(right: np.ndarray, items: Sequence[str], *, objects: Objects = None) -> Estimate:
    """Share of questions that are right, bool [n], each about the item of its place.

    The interval is Clopper's and Pearson's exact one for as many questions as `_as_many` says.
    objects: as `spread` has them.
    """
    values = np.asarray(right, float)
    mean, found = float(values.mean()), spread(values, items, objects=objects)
    size = _as_many(mean, found, len(values))
    low, high = exact_interval(mean * size, size)
    return Estimate(mean, found.error, low, high, found.clusters, len(values))


def _as_many(mean: float, found: Spread, questions: int) -> float:
    """How many independent questions a share is worth.

    As many as have the same error (Korn & Graubard 1998): for one question an item all of them. An
    error below that of independent questions is no more evidence: right and wrong answers cancel
    within items, as where one that is always the same is right in every second question. The
    number then falls with the error again, to that of clusters, which it is of all right or wrong.

    Near 0 and 1 the error is of few clusters, and small just where the mean is far out. So it is
    taken with two halves of a cluster more, one all right and one all wrong (as Agresti & Min 2005
    add to proportions), where the number is above that of clusters.
    """
    count = found.independent
    if not 0 < mean < 1 or count < 2:
        return float(count)
    wider = (stats.t.ppf(0.975, questions - 1) / stats.t.ppf(0.975, count - 1)) ** 2
    squares = count * (count - 1) * found.error**2  # of as many equal clusters, about their mean
    effect = squares / count**2 * questions / (mean * (1 - mean))
    known = questions / effect if effect >= 1 else max(questions * effect, count / wider)
    middle = (count * mean + 0.5) / (count + 1)
    squares += count * (mean - middle) ** 2 + 0.5 * ((1 - middle) ** 2 + middle**2)
    further = middle * (1 - middle) * (count + 1) ** 2 / squares - 1
    return float(wider * min(known, questions, further if known > count else known))


def exact_interval(right: float, count: float) -> tuple[float, float]:
    """Clopper's and Pearson's 95 % interval of a share; numbers need not be whole."""
    low = 0.0 if right <= 0 else float(stats.beta.ppf(0.025, right, count - right + 1))
    high = 1.0 if right >= count else float(stats.beta.ppf(0.975, right + 1, count - right))
    return low, high


@dataclasses.dataclass(frozen=True)
class Spread:
    """error: of a mean. clusters: items, or objects. independent: the fewer of these and of pairs.

    Tests and intervals have one degree of freedom less than there are independent clusters.
    """

    error: float
    clusters: int
    independent: int


def spread(values: np.ndarray, items: Sequence[str], *, objects: Objects = None) -> Spread:
    """The clustered standard error of the mean of values [n], nan with a single item.

    Without objects questions about different items are independent (Liang & Zeger 1986). With
    them items are pairs, and questions are independent if they share no object (`dyadic_error`).
    """
    error, count = clustered_error(values, items)
    if objects is None:
        return Spread(error, count, count)
    # The dyadic variance may fall below that of pairs, or of 0, by chance.
    dyadic, known = dyadic_error(values, items, objects)
    return Spread(error if count < 2 else max(error, dyadic), known, min(count, known))


def clustered_error(values: np.ndarray, items: Sequence[str]) -> tuple[float, int]:
    """Standard error of the mean of values [n] clustered by item, and how many items there are."""
    _, place = np.unique(np.asarray(items), return_inverse=True)
    sums = np.bincount(place, weights=np.asarray(values, float))
    return ratio_error(sums, np.bincount(place)), len(sums)


def dyadic_error(
    values: np.ndarray, pairs: Sequence[str], objects: Sequence[tuple[str, str]]
) -> tuple[float, int]:
    """Standard error of the mean of values [n], and how many objects N they compare.

    Questions are independent if their pairs share no object (Fafchamps & Gubert 2007; Aronow,
    Samii & Assenova 2015): the variance is N / (N - 1) (sum_o r_o^2 - sum_p r_p^2) / n^2, 0 where
    that is negative. r_p sums the residuals of questions about pair p, and r_o those about pairs
    that hold object o, over the share 1 - n_o / n of questions that do not: r_o / n is how far the
    mean moves without the object. Undivided, as residuals of a mean that the object has drawn to
    itself, they are too small (Bell & McCaffrey 2002); of 25 objects it matters.
    """
    rest = np.asarray(values, float) - np.mean(values)
    _, pair = np.unique(np.asarray(pairs), return_inverse=True)
    names, held = np.unique(np.asarray(objects), return_inverse=True)
    by_object = np.bincount(held.ravel(), weights=np.repeat(rest, 2))
    others = 1 - np.bincount(held.ravel()) / len(rest)
    # An object in every pair cannot be left out, and its residuals sum to 0.
    by_object = np.divide(by_object, others, out=np.zeros(len(names)), where=others > 0)
    square = float(np.sum(by_object**2) - np.sum(np.bincount(pair, weights=rest) ** 2))
    count = len(names)
    return float(np.sqrt(max(square, 0.0) * count / (count - 1)) / len(rest)), count


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
    """exp of the mean nats of tokens; stderr: delta method; low, high: of the 95 % interval.

    None where it is no float, and all but the mean of one document.
    """

    mean: float | None
    stderr: float | None
    low: float | None
    high: float | None


def perplexity(nats: np.ndarray, tokens: np.ndarray) -> Perplexity:
    """Of sums of nats and counts of tokens by document [n]; 95 % interval of t on the log scale."""
    mean = float(np.sum(nats) / np.sum(tokens))
    middle = power(mean)
    if len(nats) < 2:
        return Perplexity(middle, None, None, None)
    error = ratio_error(nats, tokens)
    half = float(stats.t.ppf(0.975, len(nats) - 1) * error)
    stderr = None if middle is None else middle * error
    return Perplexity(middle, stderr, power(mean - half), power(mean + half))


def power(nats: float) -> float | None:
    """e to it, None where that is no float."""
    return math.exp(nats) if nats < _LARGEST_POWER else None


@dataclasses.dataclass(frozen=True)
class Paired:
    """One model less another on the same questions: the mean difference, its error, a p-value.

    low, high: of the 95 % interval, nan with a single item.
    """

    difference: float
    stderr: float
    low: float
    high: float
    p: float
    clusters: int


def paired(
    mine: np.ndarray,
    base: np.ndarray,
    items: Sequence[str],
    *,
    objects: Objects = None,
    seed: int = 0,
) -> Paired:
    """Compares values [n] of two models, each from 0 to 1, question by question.

    The interval is that of `difference_interval`. p: of a permutation test that swaps the models'
    answers to all questions about an item; exact up to 14 items that differ, with 20,000 draws
    beyond. For one question an item it is McNemar's. Answers about pairs that share objects cannot
    be swapped one by one: with objects, as `spread` has them, p is that of t.
    """
    gaps = np.asarray(mine, float) - np.asarray(base, float)
    mean, found = float(gaps.mean()), spread(gaps, items, objects=objects)
    if objects is None:
        _, place = np.unique(np.asarray(items), return_inverse=True)
        p = _sign_flips(np.bincount(place, weights=gaps), seed)
    else:
        p = _t_test(mean, found)
    return Paired(mean, found.error, *difference_interval(mean, found), p, found.clusters)


def paired_ratio(
    mine: np.ndarray, base: np.ndarray, counts: np.ndarray, *, seed: int = 0
) -> Paired:
    """Compares the means over all values of two models, given sums by item [n] and their counts.

    Items with more values weigh more: the error is that of a ratio of two sums, and the interval
    that of t with one degree of freedom less than there are items. p: as of `paired`.
    """
    gaps = np.asarray(mine, float) - np.asarray(base, float)
    mean, items = float(np.sum(gaps) / np.sum(counts)), len(gaps)
    error = ratio_error(gaps, counts)
    half = float(stats.t.ppf(0.975, max(items - 1, 1)) * error)
    return Paired(mean, error, mean - half, mean + half, _sign_flips(gaps, seed), items)


def difference_interval(mean: float, found: Spread) -> tuple[float, float]:
    """The adjusted 95 % Wald interval of a mean of differences from -1 to 1; nan of one cluster.

    Two further items, one that differs wholly each way, join the k that there are (Bonett & Price
    2012, Journal of Educational and Behavioral Statistics 37(4), 479-488): of all k + 2 the mean is
    k mean / (k + 2). Without them few items that differ make the interval too narrow, and none a
    point. Of one question an item it is theirs, but for t of k - 1 degrees of freedom in place of
    the normal quantile. Items of several questions, and pairs, come in by their clustered error:
    they are k independent clusters, and a further item weighs as much as one of these, since one
    that was not seen may differ in all its questions.
    """
    count = found.independent
    if count < 2:
        return math.nan, math.nan
    squares = count * (count - 1) * found.error**2  # of k equal items, about their mean
    square = squares + 2 + 2 * count * mean**2 / (count + 2)
    middle = count * mean / (count + 2)
    half = float(stats.t.ppf(0.975, count - 1)) * math.sqrt(square) / (count + 2)
    return max(middle - half, -1.0), min(middle + half, 1.0)


def _t_test(mean: float, found: Spread) -> float:
    """p of a mean, no less than that of all signs of as many independent clusters."""
    if mean == 0 or np.isnan(found.error):
        return 1.0
    least = 2.0 ** (1 - found.independent)
    if found.error == 0:
        return least
    return max(float(2 * stats.t.sf(abs(mean) / found.error, found.independent - 1)), least)


def _sign_flips(sums: np.ndarray, seed: int) -> float:
    """Share of all signs, or of drawn ones and those seen, whose sum is as far from 0."""
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    # Sums of the same numbers in another order are as far.
    seen = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()
    if len(sums) <= _EXACT_ITEMS:
        places = np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1
        return float(np.mean(np.abs((1 - 2 * places) @ sums) >= seen))
    sizes, counts = np.unique(np.abs(sums), return_counts=True)
    often = counts > 1
    rng = np.random.default_rng(seed)
    as_far = 0
    for _ in range(_DRAWS // 1000):
        # Of as many items of one size only the number of those that turn matters.
        turned = rng.binomial(counts[often], 0.5, (1000, int(often.sum())))
        signs = 1 - 2 * rng.integers(0, 2, (1000, int((~often).sum())), np.int8)
        totals = (counts[often] - 2 * turned) @ sizes[often] + signs @ sizes[~often]
        as_far += int(np.sum(np.abs(totals) >= seen))
    return (as_far + 1) / (_DRAWS + 1)
