"""Errors, intervals and paired tests against closed forms, other implementations, and draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from blindvalm_jax.tasks import statistics


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (3, 7), (40, 109)])
def test_one_question_an_item_has_the_exact_interval(right: int, count: int) -> None:
    answers = np.arange(count) < right
    found = statistics.accuracy(answers, [str(n) for n in range(count)])
    exact = stats.binomtest(right, count).proportion_ci(0.95, "exact")
    assert (found.clusters, found.questions) == (count, count)
    assert (found.low, found.high) == pytest.approx(tuple(exact))
    assert statistics.exact_interval(right, count) == pytest.approx(tuple(exact))


def test_prompts_that_agree_are_no_more_evidence_than_one() -> None:
    once = np.random.default_rng(0).random(50) < 0.4
    items = [str(n) for n in range(50)]
    alone = statistics.accuracy(once, items)
    often = statistics.accuracy(np.tile(once, 9), items * 9)
    assert often.questions == 450
    assert often.stderr == pytest.approx(alone.stderr)
    # Korn's and Graubard's ratio of t quantiles is a little below 1 for 450 questions.
    assert (often.low, often.high) == pytest.approx((alone.low, alone.high), abs=0.01)
    as_if_alone = statistics.accuracy(np.tile(once, 9), [str(n) for n in range(450)])
    assert as_if_alone.stderr == pytest.approx(alone.stderr / 3, rel=0.02)


def test_the_clustered_error_is_that_of_the_means_of_equal_clusters() -> None:
    values = np.random.default_rng(1).random((20, 7))
    items = [str(n) for n in np.repeat(np.arange(20), 7)]
    error, count = statistics.clustered_error(values.ravel(), items)
    assert count == 20
    assert error == pytest.approx(np.std(values.mean(axis=1), ddof=1) / math.sqrt(20))
    order = np.random.default_rng(2).permutation(140)
    mixed, _ = statistics.clustered_error(values.ravel()[order], [items[n] for n in order])
    assert mixed == pytest.approx(error)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Items of different difficulty; 1,000 data sets: 0.95 within 4 standard errors, or more."""
    rng = np.random.default_rng(3)
    items = [str(n) for n in np.repeat(np.arange(60), 5)]
    held = 0
    for _ in range(1000):
        chance = np.repeat(rng.beta(2, 1, 60), 5)
        found = statistics.accuracy(rng.random(300) < chance, items)
        held += found.low <= 2 / 3 <= found.high
    assert held / 1000 > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 1000)


def test_one_answer_more_moves_an_interval_little() -> None:
    """From an answer that is always the same, right in every second question, to drawn ones."""
    items = [str(n // 8) for n in range(800)]
    right = np.arange(800) % 2 == 0
    ends = []
    for place in (None, *np.random.default_rng(10).permutation(800)[:400]):
        if place is not None:
            right[place] ^= True
        found = statistics.accuracy(right, items)
        ends.append((found.low, found.high))
    # As many as there are items, whose answers cancel; then more and more of the questions.
    assert ends[0] == pytest.approx(statistics.exact_interval(50, 100))
    assert ends[1] == pytest.approx(ends[0], abs=1 / 800)
    assert np.max(np.abs(np.diff(ends, axis=0))) < 0.01
    widths = np.diff(ends, axis=1)
    assert np.max(widths) == widths[0] > 1.8 * widths[-1]


def test_one_item_says_nothing_of_its_error() -> None:
    found = statistics.accuracy(np.array([True, False, True]), ["a"] * 3)
    assert math.isnan(found.stderr)
    assert found.clusters == 1
    assert found.low < 0.05
    assert found.high > 0.95


@pytest.mark.parametrize("count", [12, 40])
def test_of_one_question_an_item_the_paired_test_is_mcnemars(count: int) -> None:
    mine = np.zeros(60, bool)
    base = np.zeros(60, bool)
    mine[: count // 4] = True
    base[count // 4 : count] = True
    found = statistics.paired(mine, base, [str(n) for n in range(60)])
    expected = stats.binomtest(count // 4, count).pvalue
    # 20,000 draws beyond 14 items: 4 standard errors.
    error = 0.0 if count <= 14 else 4 * math.sqrt(expected / 20_000) + 1e-4
    assert found.p == pytest.approx(expected, abs=max(error, 1e-12))
    assert found.difference == pytest.approx((count // 4 - (count - count // 4)) / 60)


def test_the_paired_test_takes_an_item_as_one() -> None:
    """Ten prompts that all turn are one observation."""
    base = np.zeros(30, bool)
    mine = np.arange(30) < 10
    items = [str(n // 10) for n in range(30)]
    assert statistics.paired(mine, base, items).p == 1.0
    assert statistics.paired(mine, base, [str(n) for n in range(30)]).p < 0.01
    assert statistics.paired(mine, mine, items).p == 1.0


def bonett_price(
    only_mine: int, only_base: int, count: int, *, quantile: float
) -> tuple[float, float]:
    """Their interval of paired proportions, in their own terms."""
    mine, base = (only_mine + 1) / (count + 2), (only_base + 1) / (count + 2)
    half = quantile * math.sqrt((mine + base - (mine - base) ** 2) / (count + 2))
    return max(mine - base - half, -1), min(mine - base + half, 1)


@pytest.mark.parametrize("often", [1, 9])
@pytest.mark.parametrize(
    ("only_mine", "only_base", "count"), [(0, 0, 109), (4, 0, 109), (9, 17, 52), (4, 0, 4)]
)
def test_the_interval_of_a_difference_is_bonetts_and_prices(
    only_mine: int, only_base: int, count: int, often: int
) -> None:
    """But for the quantile; prompts that agree are one, and so is a pair that shares no object."""
    place = np.repeat(np.arange(count), often)
    mine, base = place < only_mine, (place >= only_mine) & (place < only_mine + only_base)
    items = [f"{n}" for n in place]
    found = statistics.paired(mine, base, items)
    expected = bonett_price(only_mine, only_base, count, quantile=stats.t.ppf(0.975, count - 1))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.low <= found.difference <= found.high
    turned = statistics.paired(base, mine, items)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    if only_mine + only_base == 0:
        apart = [(item, f"not {item}") for item in items]
        alike = statistics.paired(mine, base, items, objects=apart)
        assert (alike.low, alike.high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("only_mine", "only_base"), [(0.003, 0.0), (0.01, 0.0), (0.04, 0.02), (0.2, 0.15)]
)
@pytest.mark.parametrize("count", [20, 109])
def test_intervals_of_differences_hold_the_truth(
    only_mine: float, only_base: float, count: int
) -> None:
    """1,500 data sets of three prompts about an item that agree, all or in part.

    0.95 within 4 standard errors, or more. Those of t alone hold it in 0.06 to 0.95.
    """
    rng = np.random.default_rng(12)
    items = [str(n) for n in np.repeat(np.arange(count), 3)]
    chance = [only_mine, only_base, 1 - only_mine - only_base]
    held = {"all": 0, "in part": 0}
    for way in held:
        for _ in range(750):
            drawn = rng.choice(3, (2, count, 3), p=chance)
            alike = np.repeat(drawn[0, :, :1], 3, axis=1)
            said = (
                alike if way == "all" else np.where(rng.random((count, 3)) < 0.7, alike, drawn[1])
            )
            gaps = (1.0 * (said == 0) - 1.0 * (said == 1)).ravel()
            low, high = statistics.difference_interval(gaps.mean(), statistics.spread(gaps, items))
            held[way] += low <= only_mine - only_base <= high
    assert min(held.values()) / 750 > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 750)


def test_items_of_many_values_weigh_more() -> None:
    """Of as many values each they are those of the paired comparison of their means."""
    rng = np.random.default_rng(11)
    mine, base = rng.random((2, 20)) * 1e6
    counts = np.full(20, 50.0)
    found = statistics.paired_ratio(mine, base, counts)
    means = statistics.paired(mine / 50, base / 50, [f"{n:02}" for n in range(20)])
    assert found.p == means.p
    assert (found.difference, found.stderr) == pytest.approx((means.difference, means.stderr))
    # Nats have no bounds, and their interval no further items.
    of_t = stats.ttest_1samp((mine - base) / 50, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((of_t.low, of_t.high))
    counts[:10] = 150
    found = statistics.paired_ratio(mine, base, counts)
    assert found.difference == pytest.approx(np.sum(mine - base) / 2000)
    assert found.stderr == pytest.approx(statistics.ratio_error(mine - base, counts))


def test_swapped_answers_of_one_size_are_drawn_as_one() -> None:
    """All 65,536 signs of 16 items, some as large as others; 20,000 draws: 4 standard errors."""
    sums = np.array([1.0, -1, 1, 1, 2, 2, -2, 0.3, 0.7, 1.1, -1.1, 4, 1, -1, 2.5, 0.1])
    signs = 1 - 2 * (np.arange(2**16)[:, None] >> np.arange(16) & 1)
    expected = np.mean(np.abs(signs @ sums) >= abs(sums.sum()) - 1e-12)
    found = statistics.paired_ratio(sums, np.zeros(16), np.ones(16)).p
    assert found == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 20_000))


def test_without_a_difference_small_p_values_are_rare() -> None:
    """400 pairs of models that differ by luck: 5 % below 0.05, within 4 standard errors."""
    rng = np.random.default_rng(4)
    items = [str(n) for n in np.repeat(np.arange(12), 3)]
    below = 0
    for _ in range(400):
        chance = np.repeat(rng.random(12), 3)
        mine, base = rng.random((2, 36)) < chance
        below += statistics.paired(mine, base, items).p < 0.05
    assert below / 400 < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 400)


def pairs_of(count: int, *, kept: float = 1.0) -> list[tuple[str, str]]:
    """Pairs of objects, all of them or a share that is drawn."""
    rng = np.random.default_rng(5)
    every = [(f"{a}", f"{b}") for a in range(count) for b in range(a + 1, count)]
    return [pair for pair in every if rng.random() < kept]


def test_the_error_of_pairs_is_of_objects_left_out_one_by_one() -> None:
    """Questions about a third of the pairs of 9 objects, some in clusters of several."""
    rng = np.random.default_rng(6)
    pairs = [pair for pair in pairs_of(9, kept=0.4) for _ in range(rng.integers(1, 5))]
    values, items = rng.random(len(pairs)), [" ".join(pair) for pair in pairs]
    error, count = statistics.dyadic_error(values, items, pairs)
    names = sorted({name for pair in pairs for name in pair})
    assert count == len(names) == 9
    square = 0.0
    for name in names:
        rest = [value for value, pair in zip(values, pairs, strict=True) if name not in pair]
        square += float(len(values) * (values.mean() - np.mean(rest))) ** 2
    for item in set(items):
        own = [value for value, other in zip(values, items, strict=True) if other == item]
        square -= float(np.sum(own - values.mean())) ** 2
    assert error == pytest.approx(math.sqrt(square * 9 / 8) / len(values))
    alone, _ = statistics.clustered_error(values, items)
    assert statistics.spread(values, items, objects=pairs).error == max(error, alone)


def test_pairs_without_a_common_object_are_items() -> None:
    """One of them says nothing; of several the objects are no more evidence than the pairs."""
    right = np.repeat(np.random.default_rng(7).random(40) < 0.4, 2)
    pairs = [(f"{n // 2}", f"other {n // 2}") for n in range(80)]
    items = [" ".join(pair) for pair in pairs]
    found = statistics.accuracy(right, items, objects=pairs)
    alone = statistics.accuracy(right, items)
    # Factors of 80 objects, each in 1 of 40 pairs, over that of 40 items.
    more = math.sqrt(80 / 79 * (2 / (1 - 1 / 40) ** 2 - 1) / (40 / 39))
    assert found.stderr / alone.stderr == pytest.approx(more)
    assert found.low < alone.low < alone.high < found.high
    assert found.high - found.low == pytest.approx(more * (alone.high - alone.low), rel=0.01)
    assert (found.clusters, alone.clusters) == (80, 40)
    one = statistics.paired(right[:2], ~right[:2], items[:2], objects=pairs[:2])
    assert math.isnan(one.stderr)
    assert one.p == 1.0
    every = np.ones(4, bool)
    assert statistics.paired(every, ~every, items[:4], objects=pairs[:4]).p == 0.5


def test_intervals_of_pairs_that_share_objects_hold_the_truth() -> None:
    """Objects differ in how well they are known; 500 data sets: 0.95 within 4 standard errors.

    With clusters of pairs, as if these were drawn one by one, they hold it in less than half.
    """
    rng = np.random.default_rng(8)
    pairs = pairs_of(30)
    first, second = np.array(pairs, int).T
    items = [" ".join(pair) for pair in pairs]
    truth = float(stats.norm.sf(1 / math.sqrt(3)))
    held = {"objects": 0, "pairs": 0}
    for _ in range(500):
        known = rng.standard_normal(30)
        right = known[first] + known[second] + rng.standard_normal(len(pairs)) > 1
        found = statistics.accuracy(right, items, objects=pairs)
        held["objects"] += found.low <= truth <= found.high
        found = statistics.accuracy(right, items)
        held["pairs"] += found.low <= truth <= found.high
    assert held["objects"] / 500 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 500))
    assert held["pairs"] / 500 < 0.5


@pytest.mark.parametrize(("of_pairs", "truth"), [(True, 0.98), (False, 0.93)])
def test_intervals_of_shares_near_one_hold_the_truth(of_pairs: bool, truth: float) -> None:
    """Few clusters tell of what is wrong; 500 data sets: 0.95 within 4 standard errors, or more.

    239 pairs of 25 objects, or 20 items, each asked six times. With as many questions as have the
    error alone 0.87 and 0.90 held it: those with little that is wrong seem to be sure.
    """
    rng = np.random.default_rng(14)
    pairs = pairs_of(25, kept=0.8) if of_pairs else [(f"{n}", f"not {n}") for n in range(20)]
    first, second = np.unique(np.array(pairs), return_inverse=True)[1].reshape(-1, 2).T
    asked = [pair for pair in pairs for _ in range(6)]
    items = [" ".join(pair) for pair in asked]
    spread = 1.5 if of_pairs else 2.1
    enough = stats.norm.isf(truth) * math.sqrt(2 * spread**2 + 1)
    held = 0
    for _ in range(500):
        known = spread * rng.standard_normal(first.max() + second.max() + 1)
        noise = rng.standard_normal((6, len(pairs)))
        right = (known[first] + known[second] + noise > enough).T.ravel()
        found = statistics.accuracy(right, items, objects=asked if of_pairs else None)
        held += found.low <= truth <= found.high
    assert held / 500 > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 500)


def test_intervals_of_differences_of_pairs_hold_the_truth() -> None:
    """One model alone is right where the objects of a pair are hard enough: 2 % of 239 pairs.

    500 data sets: 0.95 within 4 standard errors, or more. Those of t alone hold it in 0.77.
    """
    rng = np.random.default_rng(13)
    pairs = pairs_of(25, kept=0.8)
    first, second = np.array(pairs, int).T
    items = [" ".join(pair) for pair in pairs]
    hard, base = stats.norm.isf(0.02) * math.sqrt(3), np.zeros(len(pairs))
    held = 0
    for _ in range(500):
        known = rng.standard_normal(25)
        mine = known[first] + known[second] + rng.standard_normal(len(pairs)) > hard
        found = statistics.paired(mine, base, items, objects=pairs)
        held += found.low <= 0.02 <= found.high
    assert held / 500 > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 500)


def test_models_that_order_objects_alike_rarely_differ() -> None:
    """Two models see an order with noise, drawn once for an object: 5 % of p below 0.05.

    Within 4 standard errors of 400 draws. Swapping the answers to pair after pair finds
    differences in every fifth, and more, of 100.
    """
    rng = np.random.default_rng(9)
    pairs = pairs_of(25, kept=0.8)
    first, second = np.array(pairs, int).T
    items = [" ".join(pair) for pair in pairs]
    below = {"objects": 0, "pairs": 0}
    for draw in range(400):
        seen = np.arange(25) + 10 * rng.standard_normal((2, 25))
        mine, base = seen[:, first] < seen[:, second]
        below["objects"] += statistics.paired(mine, base, items, objects=pairs).p < 0.05
        if draw < 100:
            below["pairs"] += statistics.paired(mine, base, items).p < 0.05
    assert below["objects"] / 400 < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 400)
    assert below["pairs"] / 100 > 0.2
