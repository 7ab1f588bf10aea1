"""Scaling laws: fits against planted laws and published points, budgets against brute force."""

from __future__ import annotations

import csv
import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize

from blindvalm_jax.errors import UserError
from blindvalm_jax.scaling import bootstrap, families, fits, isoflop, optima
from blindvalm_jax.scaling.points import Points

PARAMETERS = ("E", "A", "B", "alpha", "beta")
TRUTH = fits.Law(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37)
SIZES, LENGTHS = np.geomspace(5e7, 1.6e10, 9), np.geomspace(1e9, 3e11, 9)


def planted(
    law: fits.Law = TRUTH, *, noise: float = 0.0, seed: int = 0, cost: float = 6.0
) -> Points:
    """81 runs; noise: the deviation of log loss."""
    n, d = (x.ravel() for x in np.meshgrid(SIZES, LENGTHS))
    drawn = np.random.default_rng([seed, 7]).standard_normal(len(n))
    loss = np.asarray(law.loss(n, d)) * np.exp(noise * drawn)
    return Points.of(n=n, d=d, loss=loss, budget=cost * n * d)


def chinchilla(shared: Path) -> Points:
    """Epoch's points, without the five of highest loss, as Besiroglu et al. fitted them."""
    path = shared / "data" / "scaling" / "chinchilla_points_epoch.csv"
    if not path.is_file():
        pytest.skip(f"{path.name} is not beside the checkout")
    with path.open() as file:
        rows = sorted(csv.DictReader(file), key=lambda row: float(row["loss"]))[:-5]
    n, flops, loss = (
        np.array([float(row[name]) for row in rows])
        for name in ("Model Size", "Training FLOP", "loss")
    )
    return Points.of(n=n, d=flops / (6 * n), loss=loss)


@pytest.fixture(scope="module")
def noisy() -> bootstrap.Draws:
    points = planted(noise=0.003)
    return bootstrap.bootstrap(points, fits.fit(points), draws=100)


def test_the_gradient_is_that_of_finite_differences() -> None:
    problem = fits.Problem.of(planted(noise=0.003))
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 4, 81).astype(np.float64)
    # Residuals near the middle of the loss's square part, and all on its straight part.
    at_truth = problem.place(TRUTH)
    for place in (at_truth, at_truth + 0.3 * rng.standard_normal(5)):
        _, gradient = problem.value_and_gradient(place, weights)
        for axis in range(5):
            step = np.zeros(5)
            step[axis] = 1e-7
            upper, _ = problem.value_and_gradient(place + step, weights)
            lower, _ = problem.value_and_gradient(place - step, weights)
            assert gradient[axis] == pytest.approx((upper - lower) / 2e-7, rel=1e-4, abs=1e-3)


def test_the_objective_is_summed_huber_loss_of_log_losses() -> None:
    points = planted(noise=0.003)
    fit = fits.fit(points)
    residual = np.log(fit.loss(points.n, points.d)) - np.log(points.loss)
    small = np.abs(residual) <= 1e-3
    each = np.where(small, residual**2 / 2, 1e-3 * (np.abs(residual) - 0.5e-3))
    assert 0 < small.sum() < len(points)
    assert fit.objective == pytest.approx(each.sum(), rel=1e-9)


def test_losses_without_noise_give_the_law_back() -> None:
    found = fits.fit(planted())
    for name in PARAMETERS:
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=1e-4)
    assert found.warnings == ()
    assert (found.seen.n, found.seen.runs) == ((SIZES[0], SIZES[-1]), 81)


def test_no_other_start_ends_lower(noisy: bootstrap.Draws) -> None:
    problem = fits.Problem.of(planted(noise=0.003))
    rng = np.random.default_rng(1)
    ones = np.ones(81)
    for _ in range(30):
        start = np.array([*rng.uniform(-4, 1, 3), *rng.uniform(0.05, 2, 2)])
        other = optimize.minimize(
            problem.value_and_gradient, start, args=(ones,), jac=True, method="BFGS"
        )
        assert noisy.fit.objective <= other.fun * fits.HUBER_DELTA**2 * (1 + 1e-9)


def coverage(sets: int, *, draws: int, noise: float) -> dict[str, int]:
    """In how many data sets each planted parameter lies within its 95 % interval."""
    held = dict.fromkeys(PARAMETERS, 0)
    for seed in range(sets):
        points = planted(noise=noise, seed=seed)
        drawn = bootstrap.bootstrap(points, fits.fit(points), draws=draws, seed=seed)
        for name in PARAMETERS:
            low, high = drawn.interval(lambda law, name=name: getattr(law, name))  # type: ignore[misc]
            held[name] += low <= getattr(TRUTH, name) <= high
    return held


def test_a_planted_law_lies_within_its_intervals() -> None:
    """Of 20 sets 0.95 would hold 19: under 16 has a chance of 0.003 for each parameter."""
    held = coverage(20, draws=100, noise=0.003)
    assert min(held.values()) >= 16, held


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.001, 0.003, 0.01])
def test_a_planted_law_lies_within_90_of_100_intervals(noise: float) -> None:
    held = coverage(100, draws=300, noise=noise)
    assert min(held.values()) >= 90, held


def test_the_published_fit_of_chinchilla_lies_within_our_intervals(shared: Path) -> None:
    points = chinchilla(shared)
    found = fits.fit(points)
    refit = {"E": 1.817, "A": 478, "B": 2143, "alpha": 0.347, "beta": 0.367}
    for name, value in refit.items():
        assert getattr(found, name) == pytest.approx(value, rel=2e-3)
    assert found.n_exponent == pytest.approx(0.514, abs=5e-4)
    drawn = bootstrap.bootstrap(points, found, draws=400)
    published = {"E": 1.817, "A": 482, "B": 2085, "alpha": 0.348, "beta": 0.366}
    for name, value in published.items():
        low, high = drawn.interval(lambda law, name=name: getattr(law, name))  # type: ignore[misc]
        assert low < value < high
    # An end of an interval of 400 draws has a deviation of about 0.003.
    assert drawn.interval(lambda law: law.n_exponent) == pytest.approx((0.481, 0.557), abs=0.012)


def test_neither_order_nor_units_change_a_fit() -> None:
    points = planted(noise=0.003)
    fit = fits.fit(points)
    drawn = bootstrap.bootstrap(points, fit, draws=5, seed=3)
    order = np.random.default_rng(2).permutation(81)
    mixed = Points.of(**{x: getattr(points, x)[order] for x in ("n", "d", "loss", "budget")})
    assert fits.fit(mixed) == fit
    again = bootstrap.bootstrap(mixed, fit, draws=5, seed=3)
    other = bootstrap.bootstrap(mixed, fit, draws=5, seed=4)
    assert np.array_equal(again.law.alpha, drawn.law.alpha)
    assert not np.array_equal(other.law.alpha, drawn.law.alpha)
    scaled = fits.fit(Points.of(n=points.n / 1e6, d=points.d / 1e9, loss=points.loss))
    # L-BFGS-B stops within about 1e-6 of the minimum.
    for name in ("E", "alpha", "beta"):
        assert getattr(scaled, name) == pytest.approx(getattr(fit, name), rel=1e-5)
    assert scaled.A * 1e6**fit.alpha == pytest.approx(fit.A, rel=1e-4)
    assert scaled.B * 1e9**fit.beta == pytest.approx(fit.B, rel=1e-4)


def test_an_interval_is_that_of_any_function(noisy: bootstrap.Draws) -> None:
    low, high = noisy.interval(lambda law: law.loss(1e9, 2e10))
    assert low < noisy.fit.loss(1e9, 2e10) < high
    wide = noisy.interval(lambda law: law.loss(1e12, 1e13))
    assert wide[1] - wide[0] > high - low
    assert bootstrap.interval(np.array([1.0, 2.0, math.inf]), level=0.5) == (1.0, math.inf)


def refused(function: object, message: str) -> None:
    """That a call ends in one line that says this."""
    with pytest.raises(UserError, match=message) as raised:
        function()  # type: ignore[operator]
    assert "\n" not in str(raised.value)


def test_runs_that_no_law_can_be_fitted_to_are_refused() -> None:
    p = planted()
    good = {"n": p.n, "d": p.d, "loss": p.loss}

    def fit(**changes: object) -> object:
        return fits.fit(Points.of(**{**good, **changes}))  # type: ignore[arg-type]

    nan = p.loss.copy()
    nan[4] = np.nan
    refused(lambda: fit(loss=nan), "loss of run 4 .* is nan")
    refused(lambda: fit(d=-p.d), "D of run 0 .* expected a finite number above 0")
    refused(lambda: fit(n=p.n[:-1]), "as many of each, got 80 of N, 81 of D, 81 of loss")
    refused(lambda: fit(n=p.n[:, None]), "got an array of 2 axes")
    refused(lambda: fit(n=["large", "small"]), "N: expected a list of numbers")
    refused(lambda: fit(n=np.full(81, 1e8)), r"3 different N or more, got 1 \(1e\+08\)")
    refused(lambda: fit(d=np.full(81, 1e9)), "3 different D or more, got 1")
    refused(lambda: fit(n=p.n[:5], d=p.d[:5], loss=p.loss[:5]), "6 runs or more, got 5")
    refused(lambda: fit(d=20 * p.n), "cannot tell what N does")
    refused(lambda: Points.of(**good, unit="seconds"), "what each run cost in seconds")  # type: ignore[arg-type]
    refused(lambda: bootstrap.bootstrap(p, fits.fit(p), draws=0), "1 draw or more")


def test_draws_of_few_runs_tell_the_parameters_apart() -> None:
    n, d = np.array([1e8] * 4 + [1e9, 1e10]), np.array([1e9, 1e10, 1e11] * 2)
    points = Points.of(n=n, d=d, loss=TRUTH.loss(n, d))
    for counts in bootstrap.resamples(points, draws=50, seed=0):
        taken = counts > 0
        assert counts.sum() == 6
        assert taken.sum() >= 5
        assert len(set(points.n[taken])) == len(set(points.d[taken])) == 3


def test_a_term_that_runs_do_not_show_is_said() -> None:
    points = planted(dataclasses.replace(TRUTH, A=1e-9))
    flat = fits.fit(points)
    assert any("A is 0" in text for text in flat.warnings)
    assert "A" in flat.at_ends
    assert bootstrap.bootstrap(points, flat, draws=20).at_ends == 1


def test_draws_of_a_law_that_runs_show_end_inside_what_is_searched(noisy: bootstrap.Draws) -> None:
    assert noisy.at_ends == 0
    assert noisy.fit.at_ends == ()


def test_families_of_one_design_are_compared_draw_by_draw(noisy: bootstrap.Draws) -> None:
    one = dataclasses.replace(family("one", noisy), design=("a", "b"))
    same = families.compare(one, dataclasses.replace(one, name="two"), budget=1e21)
    assert same.paired
    assert (same.difference.low, same.difference.high) == (0, 0)
    for other in (
        dataclasses.replace(one, design=("a", "c")),
        dataclasses.replace(one, design=()),
        dataclasses.replace(one, draws=dataclasses.replace(noisy, seed=1)),
    ):
        apart = families.compare(one, other, budget=1e21)
        assert not apart.paired
        assert apart.difference.low < 0 < apart.difference.high


def test_both_families_are_of_sizes_that_were_trained(noisy: bootstrap.Draws) -> None:
    fit, cost = noisy.fit, optima.per_parameter()
    best = float(optima.best(fit, 1e21, cost=cost, seen=fit.seen).n)
    small = dataclasses.replace(fit.seen, n=(best / 30, best / 3))
    held = family("held", dataclasses.replace(noisy, fit=dataclasses.replace(fit, seen=small)))
    free = families.compare(family("one", noisy), held, budget=1e21)
    assert free.difference.value == pytest.approx(0, abs=1e-9)
    found = families.compare(family("one", noisy), held, budget=1e21, trained=True)
    at_end = float(fit.loss(best / 3, 1e21 / (6 * best / 3)))
    assert found.losses[1].value == pytest.approx(at_end, rel=1e-9)
    assert found.difference.value > 0
    assert found.multiplier.value > 1


@pytest.mark.parametrize("offset", [0.0, 3e9])
def test_the_best_size_is_that_of_brute_force(noisy: bootstrap.Draws, offset: float) -> None:
    """offset: what a token costs at any size, as with a frozen tower."""
    fit, budget = noisy.fit, 1e21
    found = optima.best(fit, budget, cost=lambda n: 6 * n + offset, seen=fit.seen)
    n = np.geomspace(1e7, 1e12, 500_001)
    losses = np.asarray(fit.loss(n, budget / (6 * n + offset)))
    assert found.n == pytest.approx(n[np.argmin(losses)], rel=1e-3)
    assert losses.min() * (1 - 1e-9) <= found.loss <= losses.min()
    assert found.d * (6 * found.n + offset) == pytest.approx(budget)
    if not offset:
        ratio = fit.alpha * fit.A / (fit.beta * fit.B)
        closed = ratio ** (1 / (fit.alpha + fit.beta)) * (budget / 6) ** fit.n_exponent
        assert found.n == pytest.approx(closed, rel=1e-6)
    of_draws = optima.best(noisy.law, budget, cost=lambda n: 6 * n + offset, seen=fit.seen)
    first = fits.Law(**{name: float(getattr(noisy.law, name)[0]) for name in PARAMETERS})
    alone = optima.best(first, budget, cost=lambda n: 6 * n + offset, seen=fit.seen)
    assert np.shape(of_draws.n) == (100,)
    assert np.asarray(of_draws.n)[0] == pytest.approx(alone.n, rel=1e-6)


def test_the_best_size_is_among_those_asked_for(noisy: bootstrap.Draws) -> None:
    fit, cost = noisy.fit, optima.per_parameter()
    free = float(optima.best(fit, 1e21, cost=cost, seen=fit.seen).n)
    for ends, expected in (
        ((free / 9, free * 9), free),
        ((free / 9, free / 3), free / 3),
        ((free * 3, free * 9), free * 3),
    ):
        found = optima.best(fit, 1e21, cost=cost, seen=fit.seen, within=ends)
        assert found.n == pytest.approx(expected, rel=1e-6)
        assert found.d == pytest.approx(1e21 / (6 * expected), rel=1e-6)
        back = optima.needed(fit, found.loss, cost=cost, within=ends)
        assert back == pytest.approx(1e21, rel=1e-6)
        of_draws = optima.best(noisy.law, 1e21, cost=cost, seen=fit.seen, within=ends)
        assert np.all((of_draws.n >= ends[0] * (1 - 1e-9)) & (of_draws.n <= ends[1] * (1 + 1e-9)))


def test_what_is_needed_is_the_other_side_of_what_is_best(noisy: bootstrap.Draws) -> None:
    fit = noisy.fit

    def cost(n: np.ndarray) -> np.ndarray:
        return 6 * n + 1e9

    found = optima.best(fit, 1e21, cost=cost, seen=fit.seen)
    assert optima.needed(fit, found.loss, cost=cost) == pytest.approx(1e21, rel=1e-9)
    at_size = optima.needed(fit, fit.loss(1e9, 1e10), cost=cost, n=1e9)
    assert at_size == pytest.approx(1e10 * 7e9)
    assert math.isinf(float(optima.needed(fit, fit.E, cost=cost)))
    assert math.isinf(float(optima.needed(fit, 0.9 * fit.E, cost=cost)))


def test_costs_of_runs_are_a_line_through_them() -> None:
    n = np.array([1e8, 1e9, 1e10, 1e8])
    d = np.array([1e9, 1e9, 1e9, 4e9])
    points = Points.of(n=n, d=d, loss=n / n, budget=(6 * n + 1e9) * d, unit="seconds")
    cost = optima.as_run(points)
    assert cost(n) == pytest.approx(6 * n + 1e9)
    assert cost(np.array(1e8)) < cost(np.array(3e8)) < cost(np.array(1e9))
    assert cost(np.array(1e11)) == pytest.approx(61e9**2 / 7e9)


def test_a_budget_far_beyond_those_seen_is_refused(noisy: bootstrap.Draws) -> None:
    seen, cost = noisy.fit.seen, optima.per_parameter()
    low, high = seen.budget

    def best(budget: float, extrapolate: bool = False) -> optima.Optimum:
        return optima.best(noisy.fit, budget, cost=cost, seen=seen, extrapolate=extrapolate)

    assert best(9.9 * high).loss < best(high).loss < best(low / 9.9).loss
    refused(lambda: best(100 * high), "a budget in FLOPs: .* is 2.0 decades beyond .* extrapolate")
    refused(lambda: best(low / 20), "1.3 decades beyond")
    refused(lambda: best(0.0), "above 0, got 0")
    assert best(100 * high, extrapolate=True).loss < best(high).loss
    one_size = dataclasses.replace(seen, n=(1e6, 1.1e6))
    refused(
        lambda: optima.best(noisy.fit, high, cost=cost, seen=one_size),
        "the best N of .* decades beyond",
    )


def iso(offsets: np.ndarray, *, drift: float = 0.0) -> Points:
    """Four budgets of sizes at these shares of N*, times this power of the budget."""
    parts = []
    for budget in (1e18, 1e19, 1e20, 1e21):
        ratio = (TRUTH.alpha * TRUTH.A / (TRUTH.beta * TRUTH.B)) ** (1 / (TRUTH.alpha + TRUTH.beta))
        centre = ratio * (budget / 6) ** TRUTH.n_exponent * (budget / 1e18) ** drift
        n = centre * offsets
        parts.append((n, budget / (6 * n)))
    n, d = (np.concatenate(x) for x in zip(*parts, strict=True))
    return Points.of(n=n, d=d, loss=TRUTH.loss(n, d))


def test_centred_parabolas_give_the_exponent() -> None:
    found = isoflop.isoflop(iso(np.geomspace(1 / 4, 4, 7)))
    assert found.warnings == ()
    assert found.exponent == pytest.approx(TRUTH.n_exponent, abs=1e-9)
    assert [x.budget for x in found.parabolas] == pytest.approx([1e18, 1e19, 1e20, 1e21])
    # A parabola is not the shape of the law: its minimum is near the law's, and not there.
    assert found.factor * 1e21**found.exponent == pytest.approx(
        optima.best(TRUTH, 1e21, cost=optima.per_parameter(), seen=fits.Seen.of(iso(np.ones(3)))).n,
        rel=0.02,
    )


def test_the_minimum_of_a_parabola_is_its_own() -> None:
    n = np.geomspace(1e8, 2e9, 7)
    loss = 3.0 + 0.05 * np.log(n / 3e8) ** 2
    (found,) = isoflop.isoflop(Points.of(n=n, d=1e18 / n, loss=loss)).parabolas
    assert found.n == pytest.approx(3e8)
    assert found.loss == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("offsets", "drift", "expected"),
    [
        (np.geomspace(1 / 4, 4, 7), 0.1, "is off the centre"),
        (np.geomspace(1.5, 24, 7), 0.0, "lies outside the sizes"),
        (np.geomspace(0.9, 16, 9), 0.0, "lies at the edge"),
        (np.geomspace(1 / 4, 4, 6), 0.0, "6 sizes, fewer than 7"),
        (np.geomspace(1 / 3, 3, 7), 0.0, "sizes span 9 times, less than 16"),
        (np.array([1 / 4, 1 / 3.6, 1 / 3.2, 1 / 3, 1 / 2.5, 1, 4]), 0.0, "sizes lie unevenly"),
    ],
)
def test_parabolas_that_mislead_are_warned_of(
    offsets: np.ndarray, drift: float, expected: str
) -> None:
    found = isoflop.isoflop(iso(offsets, drift=drift))
    assert any(expected in text for text in found.warnings), found.warnings
    assert math.isfinite(found.exponent)
    if drift:
        assert found.exponent != pytest.approx(TRUTH.n_exponent, abs=1e-3)


def test_losses_without_a_minimum_and_too_few_sizes() -> None:
    n = np.array([1e8, 2e8, 4e8])
    found = isoflop.isoflop(Points.of(n=n, d=1e18 / n, loss=[3.0, 3.1, 3.0]))
    assert any("have no minimum" in text for text in found.warnings)
    assert math.isnan(found.exponent)
    few = isoflop.isoflop(Points.of(n=n[:2], d=1e18 / n[:2], loss=[3.0, 3.1]))
    assert "3 different N or more, got 2" in few.warnings[0]
    assert math.isnan(few.parabolas[0].n)


def family(name: str, draws: bootstrap.Draws, cost: float = 6.0) -> families.Family:
    return families.Family(name=name, draws=draws, cost=optima.per_parameter(cost))


@pytest.mark.parametrize("n", [None, 1e9])
def test_a_family_needs_its_own_budget_and_at_twice_the_cost_twice_it(
    noisy: bootstrap.Draws, n: float | None
) -> None:
    one = family("one", noisy)
    same = families.compare(one, one, budget=1e21, n=n)
    assert same.multiplier.value == pytest.approx(1, rel=1e-9)
    assert same.multiplier.low < 1 < same.multiplier.high
    assert same.difference.value == 0
    assert same.difference.low < 0 < same.difference.high
    twice = families.compare(one, family("two", noisy, 12.0), budget=1e21, n=n)
    assert twice.multiplier.value == pytest.approx(2, rel=1e-9)
    assert twice.multiplier.low < 2 < twice.multiplier.high
    assert twice.difference.value > 0
    assert str(twice.multiplier).startswith("2 [")


def test_a_loss_below_the_others_floor_is_never_reached(noisy: bootstrap.Draws) -> None:
    points = planted(dataclasses.replace(TRUTH, E=2.6), noise=0.003, seed=5)
    worse = family("worse", bootstrap.bootstrap(points, fits.fit(points), draws=100))
    found = families.compare(family("one", noisy), worse, budget=1e22)
    assert (found.multiplier.value, found.multiplier.high) == (math.inf, math.inf)
    assert found.multiplier.never == 1
    assert str(found.multiplier) == "infinite [infinite, infinite]"
    other_way = families.compare(worse, family("one", noisy), budget=1e22).multiplier
    assert 0 < other_way.low < other_way.value < other_way.high < 0.1


def test_a_multiplier_is_not_trusted_beyond_a_decade(noisy: bootstrap.Draws) -> None:
    one, high = family("one", noisy), noisy.fit.seen.budget[1]
    dear = family("dear", noisy, 6 * 200.0)
    found = families.compare(one, dear, budget=high / 10)
    assert found.multiplier.value == pytest.approx(100)
    assert str(found.multiplier) == ">100 [>100, >100]"
    free = families.compare(one, dear, budget=high / 10, extrapolate=True)
    assert free.multiplier.value == pytest.approx(200)
    refused(lambda: families.compare(one, dear, budget=20 * high), "one, a budget in FLOPs")
    refused(lambda: families.compare(one, dear, budget=high, n=1e15), "one, N: .* decades beyond")


def test_families_of_other_units_or_draws_are_refused(noisy: bootstrap.Draws) -> None:
    one = family("one", noisy)
    points = planted()
    points = dataclasses.replace(points, unit="seconds")
    timed = family("timed", bootstrap.bootstrap(points, fits.fit(points), draws=3))
    refused(lambda: families.compare(one, timed, budget=1e21), "over FLOPs and timed over seconds")
    few = dataclasses.replace(timed.draws, fit=noisy.fit)
    refused(lambda: families.compare(one, family("few", few), budget=1e21), "got 100 and 3")


def test_fits_need_no_jax() -> None:
    code = (
        "import sys; from blindvalm_jax.scaling import families, isoflop;"
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_runs_of_a_group_are_drawn_together_whatever_their_order() -> None:
    n = np.repeat([1e5, 2e5, 4e5, 8e5, 16e5], 3)
    d = np.tile([1e7, 2e7, 4e7], 5)
    loss = 2.0 + 1e2 * n**-0.4 + 1e3 * d**-0.4
    names = [f"trunk {size:g}" for size in n]
    order = np.random.default_rng(0).permutation(len(n))
    points = Points.of(
        n=n[order], d=d[order], loss=loss[order], groups=[names[place] for place in order]
    )
    assert len(np.unique(points.groups)) == 5
    for size in np.unique(n):
        assert len(np.unique(points.groups[points.n == size])) == 1
    drawn = bootstrap.resamples(points, draws=50, seed=1)
    for counts in drawn:
        for group in range(5):
            assert len(np.unique(counts[points.groups == group])) == 1
        assert counts.sum() == len(n)
    assert len({tuple(counts) for counts in drawn}) > 5
    again = dataclasses.replace(points, n=2 * points.n)  # of another family
    assert np.array_equal(bootstrap.resamples(again, draws=50, seed=1), drawn)
    assert not np.array_equal(bootstrap.resamples(points, draws=50, seed=2), drawn)
    few = dataclasses.replace(points, groups=np.minimum(points.groups, 3))
    refused(lambda: bootstrap.resamples(few, draws=1, seed=0), "need 5 independent groups .* got 4")
    with pytest.raises(UserError, match="15 of N, 15 of D, 15 of loss, 3 of groups"):
        Points.of(n=n, d=d, loss=loss, groups=["a", "b", "c"])


def test_what_a_trunk_has_in_common_widens_intervals() -> None:
    rng = np.random.default_rng(0)
    n = np.repeat(np.geomspace(1e5, 1.6e6, 7), 4)
    d = np.tile(np.geomspace(1e7, 3e8, 4), 7)
    common = np.repeat(rng.normal(0, 0.01, 7), 4)
    loss = (1.8 + 1e2 * n**-0.35 + 1e3 * d**-0.37) * np.exp(common)
    names = [f"{size:g}" for size in n]
    widths = []
    for groups in (None, names):
        points = Points.of(n=n, d=d, loss=loss, groups=groups)
        low, high = bootstrap.bootstrap(points, fits.fit(points), draws=100).interval(
            lambda law: law.loss(4e5, 1e8)
        )
        widths.append(high - low)
    assert widths[1] > 1.3 * widths[0]
