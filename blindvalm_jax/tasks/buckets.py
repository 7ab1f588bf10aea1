"""Sizes that many batches share, so that few programs are compiled for all of them."""

from __future__ import annotations

_HALVINGS = 3


def power_of_two(number: int) -> int:
    """The smallest that is not below a number."""
    return 1 << max(number - 1, 0).bit_length()


def rows_at_once(tokens: int, length: int, *, there: int, shards: int) -> int:
    """Rows of the batches of a bucket, a multiple of `shards`.

    They hold `tokens` tokens on each of `shards` devices; where no more than `there` rows are to be
    read, half as many or a quarter or an eighth do.
    """
    most = max(tokens // length, 1)
    sizes = {max(most >> halvings, 1) for halvings in range(_HALVINGS + 1)}
    return shards * min(size for size in sizes if size == most or size * shards >= there)
