"""Pages of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return ["", *lines, ""]


def aligned(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int) -> list[str]:
    """The lines of a table for a console too; numbers: of so many columns at the end."""
    cells = [list(head), *(list(row) for row in rows)]
    width = [max(len(row[column]) for row in cells) for column in range(len(head))]
    words = len(head) - numbers
    padded = [
        [
            x.ljust(w) if i < words else x.rjust(w)
            for i, (x, w) in enumerate(zip(row, width, strict=True))
        ]
        for row in cells
    ]
    rule = ["-" * w if i < words else f"{'-' * (w - 1)}:" for i, w in enumerate(width)]
    return ["", *(f"| {' | '.join(row)} |" for row in (padded[0], rule, *padded[1:])), ""]
