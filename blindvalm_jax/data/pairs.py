"""Batches of images with captions, as a pure function of (seed, step)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from blindvalm_jax.data import images
from blindvalm_jax.data.images import Captioned, ImageSource
from blindvalm_jax.data.pipeline import Batch, Batches, block_iterator, eval_order
from blindvalm_jax.data.replacing import Source
from blindvalm_jax.data.tokenizers import Tokenizer

KEPT_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Reader:
    """Turns an image with captions into a row: image uint8 [S, S, 3], tokens int32 [C - 1], length.

    tokens: a caption's own ids, cut to C - 2, and the end token right behind them at `length`; what
    follows is the end token too. size: S, context: C, end_id: the tower's end token.
    """

    tokenizer: Tokenizer
    size: int
    context: int
    end_id: int

    def __call__(self, item: Captioned, caption: str) -> Batch:
        """The row of an image and one of its captions."""
        ids = self.tokenizer.encode(caption)[: self.context - 2]
        tokens = np.full(self.context - 1, self.end_id, np.int32)
        tokens[: len(ids)] = ids
        return {
            "images": images.resize(item.image, self.size),
            "tokens": tokens,
            "length": np.asarray(len(ids), np.int32),
        }


class Kept:
    """A source that decodes each image once: it is kept in memory at a tower's size."""

    def __init__(self, source: ImageSource, size: int) -> None:
        """size: pixels of a side."""
        self._source, self._size = source, size
        self._items: dict[int, Captioned] = {}

    def __len__(self) -> int:
        """Number of images."""
        return len(self._source)

    def __getitem__(self, index: int) -> Captioned:
        """One of them, resized."""
        item = self._items.get(index)
        if item is None:
            read = self._source[index]
            item = dataclasses.replace(read, image=images.resize(read.image, self._size))
            self._items[index] = item
        return item

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of one of them."""
        return self._source.captions(index)

    def describe(self) -> dict[str, Any]:
        """The source's."""
        return self._source.describe()


def keep(source: ImageSource, size: int) -> ImageSource:
    """The source, its images kept in memory if all of them take at most 1 GiB at this size."""
    return Kept(source, size) if len(source) * size * size * 3 <= KEPT_BYTES else source


class _Draw(grain.transforms.RandomMap):
    """A row with one of the captions, drawn anew each time the image comes."""

    def __init__(self, read: Reader) -> None:
        self._read = read

    def random_map(self, element: Captioned, rng: np.random.Generator) -> Batch:
        """The row of an image."""
        return self._read(element, element.captions[rng.integers(len(element.captions))])


def batches(
    source: Source,
    read: Reader,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Shuffled batches from `start_step` on, for ever; every epoch has an order of its own.

    source: of `Captioned`.
    Rows: images uint8 [b, S, S, 3], tokens int32 [b, C - 1], length int32 [b].

    Raises:
      UserError: `batch_size` is not a multiple of `process_count`.
    """
    rows = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(_Draw(read))
    return block_iterator(
        rows,
        batch_size=batch_size,
        start_step=start_step,
        process_index=process_index,
        process_count=process_count,
    )


def eval_batches(
    source: Source,
    read: Reader,
    *,
    batch_size: int,
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[Batch, int]]:
    """`limit` images (0: all) once each with their first caption, and how many of a batch count.

    The last batch is filled up with its own images again; what fills it does not count.
    """
    chosen = eval_order(len(source), limit)
    block = batch_size // process_count
    for first in range(0, len(chosen), batch_size):
        count = min(batch_size, len(chosen) - first)
        places = first + (process_index * block + np.arange(block)) % count
        yield _rows(source, read, chosen[places].tolist()), count


def _rows(source: Source, read: Reader, numbers: list[int]) -> Batch:
    """The rows of some images with their first captions.

    One that comes again is not decoded again, and none is held longer than its row takes.
    """
    rows: dict[int, Batch] = {}
    for number in numbers:
        if number not in rows:
            item = source[number]
            rows[number] = read(item, item.captions[0])
    return {name: np.stack([rows[x][name] for x in numbers]) for name in rows[numbers[0]]}
