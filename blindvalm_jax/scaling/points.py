"""What a fit is made from: runs of one family, each a size, a length, a loss and what it cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from blindvalm_jax.errors import UserError

Array = NDArray[np.float64]
Numbers = float | Array  # one, or one for each draw of a bootstrap
FLOPS_PER_PARAMETER_AND_TOKEN = 6.0


@dataclasses.dataclass(frozen=True)
class Points:
    """Runs in an order of their own, whatever order they came in; see `of`.

    n: parameters; d: tokens; loss: nats a token; budget: what a run cost, in `unit`; groups: runs
    of one number hang together, as those that share a trunk do. All `[runs]`.
    """

    n: Array
    d: Array
    loss: Array
    budget: Array
    groups: NDArray[np.int64]
    unit: str

    @classmethod
    def of(
        cls,
        *,
        n: ArrayLike,
        d: ArrayLike,
        loss: ArrayLike,
        budget: ArrayLike | None = None,
        unit: str = "FLOPs",
        groups: Sequence[str] | None = None,
    ) -> Self:
        """Checks and sorts them.

        Without a budget a run cost 6 N D FLOPs; without groups all are independent.
        Raises a `UserError` unless all are lists of one length, of finite numbers above 0.
        """
        if budget is None and unit != "FLOPs":
            raise UserError(f"expected what each run cost in {unit}, got none; pass budget")
        given = {"N": n, "D": d, "loss": loss} | ({} if budget is None else {"budget": budget})
        columns = {name: _column(name, values) for name, values in given.items()}
        sizes = {name: len(values) for name, values in columns.items()}
        if groups is not None:
            sizes["groups"] = len(groups)
        if len({*sizes.values()}) > 1:
            counts = ", ".join(f"{size} of {name}" for name, size in sizes.items())
            raise UserError(f"expected as many of each, got {counts}")
        n, d, loss = columns["N"], columns["D"], columns["loss"]
        cost = columns.get("budget", FLOPS_PER_PARAMETER_AND_TOKEN * n * d)
        order = np.lexsort((cost, loss, d, n))
        names = [groups[place] for place in order] if groups is not None else range(len(order))
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return cls(
            n=n[order],
            d=d[order],
            loss=loss[order],
            budget=cost[order],
            groups=np.array([numbers[name] for name in names], np.int64),
            unit=unit,
        )

    def __len__(self) -> int:
        """How many runs."""
        return len(self.n)


def _column(name: str, values: ArrayLike) -> Array:
    try:
        column = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{name}: expected a list of numbers, got {_short(values)}") from None
    if column.ndim != 1:
        raise UserError(f"{name}: expected a list of numbers, got an array of {column.ndim} axes")
    wrong = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
    if wrong.size:
        at = int(wrong[0])
        raise UserError(
            f"{name} of run {at} (from 0) is {column[at]:g}; expected a finite number above 0:"
            " leave the run out"
        )
    return column


def _short(values: object) -> str:
    text = repr(list(values) if isinstance(values, Sequence) else values).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."
