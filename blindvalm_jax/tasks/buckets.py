"""Sizes that many batches share, so that few programs are compiled for all of them."""

from __future__ import annotations

_HALVINGS = 3


def power_of_two(number: int) -> int:
    """The smallest that is not below a number."""
    return 1 << max(number - 1, 0).bit_length()


def rows_at_once(tokens: int, length: int, *, there: int, shards: int) -> int:
    """Rows of the batches of a bucket, a multiple of `shards`.

    They hold `tokens` tokens on each of `shards` devices, or half as many, a quarter or an eighth:
    the most with which no more than a quarter of the `there` rows are added to fill the last batch;
    where that cannot be, those with which the fewest are.
    """
    most = max(tokens // length, 1)
    sizes = [shards * max(most >> halvings, 1) for halvings in range(_HALVINGS + 1)]
    added = [-there % size for size in sizes]
    few = max(min(added), there // 4)
    return next(size for size, more in zip(sizes, added, strict=True) if more <= few)
