"""In what two checkpoints differ: settings, and arrays by how much."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from blindvalm_jax import config
from blindvalm_jax.checkpoints import arrays, layout
from blindvalm_jax.trees import flatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """Arrays of one name that differ.

    entries: how many; largest and relative: the largest difference, and that over the larger of
    both values, among the finite ones; not_finite: entries that differ and are not both finite.
    """

    name: str
    entries: int
    of: int
    largest: float
    relative: float
    not_finite: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Differences:
    """What differs of two checkpoints; settings and others as [in the first, in the second].

    others: arrays of another shape or dtype; only: arrays that one of them has alone.
    """

    settings: dict[str, list[Any]]
    leaves: list[Leaf]
    others: dict[str, list[str]]
    only: list[list[str]]
    equal: int


def compare(first: Path, second: Path) -> Differences:
    """Compares two checkpoints.

    Raises:
      UserError: one cannot be read.
    """
    there = [arrays.shapes(path) for path in (first, second)]
    common = sorted(there[0].keys() & there[1].keys())
    described = {
        name: [f"{x.dtype}{list(x.shape)}" for x in (there[0][name], there[1][name])]
        for name in common
    }
    others = {name: texts for name, texts in described.items() if texts[0] != texts[1]}
    alike = [name for name in common if name not in others]
    leaves = []
    pairs = zip(arrays.read(first, alike), arrays.read(second, alike), strict=True)
    for (name, a), (_, b) in pairs:
        if (found := leaf(name, a, b)) is not None:
            leaves.append(found)
    return Differences(
        settings=_settings(first, second),
        leaves=leaves,
        others=others,
        only=[sorted(there[i].keys() - there[1 - i].keys()) for i in (0, 1)],
        equal=len(alike) - len(leaves),
    )


def _settings(first: Path, second: Path) -> dict[str, list[Any]]:
    """Settings that differ; of an older checkpoint, with the defaults of newer settings."""
    a, b = (
        {
            key.replace("/", "."): value
            for key, value in flatten(config.completed(layout.read_json(x, layout.CONFIG))).items()
        }
        for x in (first, second)
    )
    return {
        key: [a.get(key), b.get(key)]
        for key in sorted(a.keys() | b.keys())
        if _plain(a.get(key)) != _plain(b.get(key))
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def leaf(name: str, a: np.ndarray, b: np.ndarray) -> Leaf | None:
    """How two arrays of one shape differ; None: they are equal, NaN at the same places too."""
    x, y = (np.asarray(value).astype(np.float64) for value in (a, b))
    differs = ~((x == y) | (np.isnan(x) & np.isnan(y)))
    if not differs.any():
        return None
    finite = differs & np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    apart, size = np.abs(x - y), np.maximum(np.abs(x), np.abs(y))
    return Leaf(
        name=name,
        entries=int(differs.sum()),
        of=differs.size,
        largest=float(apart.max(initial=0.0)),
        relative=float((apart / size).max(initial=0.0)),
        not_finite=int(differs.sum() - finite.sum()),
    )


def report(found: Differences, first: str, second: str) -> str:
    """What `diff` prints."""
    lines = [f"setting {key}: {a!r} -> {b!r}" for key, (a, b) in found.settings.items()]
    lines += [f"array {name}: {a} -> {b}" for name, (a, b) in found.others.items()]
    for name, names in zip((first, second), found.only, strict=True):
        lines += [f"array {leaf}: only in {name}" for leaf in names]
    for leaf in found.leaves:
        odd = f", {leaf.not_finite:,} not finite" if leaf.not_finite else ""
        lines.append(
            f"array {leaf.name}: {leaf.entries:,} of {leaf.of:,} differ, by at most "
            f"{leaf.largest:.3g} (relative {leaf.relative:.3g}){odd}"
        )
    lines.append(
        f"{len(found.settings)} settings and "
        f"{len(found.leaves) + len(found.others) + sum(map(len, found.only))} arrays differ, "
        f"{found.equal} arrays are equal"
    )
    return "\n".join(lines)
