"""Accounts as tables for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from blindvalm_jax import flops, markdown
from blindvalm_jax.costs.account import USEFUL, Account, Made

# Devices that hours are given for, by the beginning of their `device_kind`.
DEVICES = {
    "TPU v5e": "TPU v5 lite",
    "TPU v5p": "TPU v5",
    "TPU v6e": "TPU v6 lite",
    "H100": "NVIDIA H100",
    "H200": "NVIDIA H200",
}


def device_hours(model_flops: float, *, mfu: float) -> dict[str, float]:
    """Hours of one device of each kind for FLOPs that it computes, at this share of its peak."""
    return {
        name: model_flops / (mfu * flops.PEAK_TFLOPS[kind] * 1e12) / 3600
        for name, kind in DEVICES.items()
    }


def of_run(account: Account, *, mfu: float) -> list[str]:
    """The account part by part, its budget, what is done once, and hours of devices."""
    unit, training = account.unit, account.training
    rows = [
        (
            line.part,
            f"{line.parameters:,}",
            *(mega(x) for x in (line.forward, line.training, line.hardware)),
            f"{line.training / training:.1%}",
            f"{line.bytes / 2**20:,.1f}",
        )
        for line in account.lines()
    ]
    sums = account.lines()
    rows.append(
        (
            "all",
            f"{sum(line.parameters for line in sums):,}",
            mega(sum(line.forward for line in sums)),
            mega(training),
            mega(account.hardware),
            "100.0%",
            f"{sum(line.bytes for line in sums) / 2**20:,.1f}",
        )
    )
    head = ("part", "parameters", "forward", "training", "hardware", "share", "MiB held")
    return [
        f"MFLOPs a {unit}; training is what the budget counts, hardware what is computed "
        f"(a vocabulary of {account.vocabulary:,}):",
        *markdown.aligned(head, rows, numbers=6),
        *_facts(account),
        *_hours(account.device_budget, mfu=mfu),
    ]


def of_sweep(
    accounts: Mapping[str, Account], shares: Mapping[str, float], *, mfu: float
) -> list[str]:
    """A line a run and their sum; what is done once is named once, however many runs need it.

    shares: of each run, how much it trains itself and not its trunk: what the sum counts.
    """
    rows = [
        (
            name,
            f"{one.parameters:,}",
            mega(one.training),
            f"{one.units:.3e}",
            f"{one.budget:.3e}",
            f"{one.budget * shares[name]:.3e}",
        )
        for name, one in accounts.items()
    ]
    whole, computed = _sums(accounts, shares)
    rows.append(("all", "", "", "", f"{whole:.3e}", f"{computed:.3e}"))
    head = ("run", "trained parameters", "MFLOPs a unit", "units", "FLOPs", "without its trunk's")
    lines = markdown.aligned(head, rows, numbers=5)
    lines += [f"guessed: {guess}" for guess in _guesses(accounts.values())]
    once = done_once(accounts.values())
    names = names_of(once)
    lines += [_in_words(names[one], cost) for one, cost in once.items()]
    return [*lines, *_hours(_on_devices(accounts, shares), mfu=mfu)]


def sweep_as_json(
    accounts: Mapping[str, Account], shares: Mapping[str, float], *, mfu: float
) -> dict[str, Any]:
    """A sweep as JSON values: each run as `as_json`, and the sums."""
    budget, computed = _sums(accounts, shares)
    return {
        "runs": {name: as_json(one, mfu=mfu) for name, one in accounts.items()},
        "budget_flops": budget,
        "computed_flops": computed,
        "mfu": mfu,
        "device_hours": device_hours(_on_devices(accounts, shares), mfu=mfu),
    }


def _sums(accounts: Mapping[str, Account], shares: Mapping[str, float]) -> tuple[float, float]:
    """FLOPs of all runs, each as if it shared nothing; and what is computed for them."""
    whole = sum(one.budget for one in accounts.values())
    return whole, sum(one.budget * shares[name] for name, one in accounts.items())


def _on_devices(accounts: Mapping[str, Account], shares: Mapping[str, float]) -> float:
    return sum(one.device_budget * shares[name] for name, one in accounts.items())


def done_once(accounts: Iterable[Account]) -> dict[Made, float | None]:
    """What runs need once; of what they need more or less of, the most. None: nothing tells."""
    every: dict[Made, list[float | None]] = {}
    for account in accounts:
        for one, cost in account.once.items():
            every.setdefault(one, []).append(cost)
    return {
        one: max((cost for cost in costs if cost is not None), default=None)
        for one, costs in every.items()
    }


def names_of(once: Collection[Made]) -> dict[Made, str]:
    """How each is called: those that would be called the same with what they differ by."""
    names = {}
    for one in once:
        columns = zip(*(other.which for other in once if other.what == one.what), strict=True)
        apart = [len({*column}) > 1 for column in columns]
        parts = [part for part, told in zip(one.which, apart, strict=True) if told and part]
        names[one] = f"{one.what} ({', '.join(parts)})" if parts else one.what
    return names


def _guesses(accounts: Iterable[Account]) -> list[str]:
    return list(dict.fromkeys(guess for account in accounts for guess in account.guessed))


def _in_words(what: str, cost: float | None) -> str:
    counted = "not counted, nothing here tells it" if cost is None else f"{cost:.3e} FLOPs"
    return f"once, outside of the budget: {what}: {counted}"


def as_json(account: Account, *, mfu: float) -> dict[str, Any]:
    """The account as JSON values; FLOPs are of a unit, those of budget and once of all."""
    return {
        "unit": account.unit,
        "units": account.units,
        "vocabulary": account.vocabulary,
        "parameters": account.parameters,
        "flops_per_unit": {
            "training": account.training,
            "full_attention": account.full,
            "hardware": account.hardware,
            "padded_tower": account.padded,
        },
        "budget_flops": account.budget,
        "guessed": [*account.guessed],
        "once_flops": {one.what: cost for one, cost in account.once.items()},
        "bytes_read_by_a_query": account.read,
        "bytes_gathered_for_a_token": account.gathered,
        "parts": [dataclasses.asdict(line) for line in account.lines()],
        "mfu": mfu,
        "device_hours": device_hours(account.device_budget, mfu=mfu),
    }


def mega(count: float) -> str:
    """FLOPs in millions."""
    return f"{count / 1e6:,.2f}"


def _facts(account: Account) -> list[str]:
    unit = account.unit
    lines = [
        f"budget: {account.units:,} {unit}s x {mega(account.training)} MFLOPs = "
        f"{account.budget:.3e} FLOPs",
        f"with masked keys and padding of the vocabulary: {mega(account.full)} MFLOPs a {unit}",
    ]
    if account.padded is not None:
        lines.append(
            f"so with the tower's texts padded to its context, {USEFUL:.0%} of it in use: "
            f"{mega(account.padded)} MFLOPs a {unit}"
        )
    lines += [f"guessed: {guess}" for guess in account.guessed]
    if account.read is not None:
        shared = any(one.part == "search" for one in account.products)
        lines.append(
            f"a query reads {account.read / 1e6:,.2f} MB of the index"
            + (", which all queries of a batch share" if shared else "")
        )
    if account.gathered is not None:
        lines.append(f"vectors gathered for a token: {account.gathered / 1e3:,.2f} kB")
    return lines + [_in_words(one.what, cost) for one, cost in account.once.items()]


def _hours(model_flops: float, *, mfu: float) -> list[str]:
    hours = device_hours(model_flops, mfu=mfu)
    each = ", ".join(f"{name} {x:,.2f}" for name, x in hours.items())
    return [f"hours of one device at {mfu:.0%} of its dense bf16 peak: {each}"]
