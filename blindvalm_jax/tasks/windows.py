"""Long texts in windows that overlap: every token is scored once, behind enough of its context."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks.asked import Windows
from blindvalm_jax.tasks.scoring import Row, Scorer


def resolve(given: Windows, scorer: Scorer) -> Windows:
    """Windows as asked for, else of the model's training length, half a window apart.

    Raises:
      UserError: a window is longer than the model's positions, or a stride than its window.
    """
    window = given.window or scorer.trained_length
    if scorer.longest and window > scorer.longest:
        raise UserError(f"--window={window} exceeds the model's {scorer.longest} positions")
    stride = given.stride or max(window // 2, 1)
    if stride > window:
        raise UserError(f"--stride={stride} exceeds --window={window}: tokens would be left out")
    return Windows(window, stride)


def cut(tokens: np.ndarray, *, front: int, windows: Windows) -> list[Row]:
    """Rows that score every token of a document once.

    front: the token that stands before the first and is not scored. A row reads `window` tokens;
    rows start `stride` apart, and each scores what the one before did not reach: behind at least
    window - stride tokens of context, or behind the whole beginning.
    """
    stream = np.append(np.int32(front), tokens).astype(np.int32)
    rows, scored = [], 0
    for first in range(0, len(tokens), windows.stride):
        last = min(first + windows.window, len(tokens))
        wanted = stream[scored + 1 : last + 1]
        rows.append(Row(stream[first:last], np.arange(scored, last) - first, wanted[:, None]))
        scored = last
        if last == len(tokens):
            break
    return rows


def nats(scorer: Scorer, rows: Sequence[Sequence[Row]], *, title: str) -> np.ndarray:
    """float64 [n]: -log p summed over all wanted tokens of all rows of each document."""
    flat = [row for own in rows for row in own]
    owner = np.repeat(np.arange(len(rows)), [len(own) for own in rows])
    sums = [
        -np.sum(values, dtype=np.float64) for values in scorer.log_probabilities(flat, title=title)
    ]
    return np.bincount(owner, weights=sums, minlength=len(rows))
