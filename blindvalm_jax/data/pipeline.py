"""Batches as a pure function of (seed, step): the iterator's state is one integer.

The global batch of a step is the same for any number of processes and any prefetching; process p
of n reads the pth of n blocks of its rows, as `jax.make_array_from_process_local_data` joins them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol

import grain
import numpy as np
from grain import experimental

from blindvalm_jax.errors import UserError

Batch = dict[str, np.ndarray]
_THREADS = 4
_BATCHES_AHEAD = 8


class WindowSource(Protocol):
    """Windows by number: `data.windows.Windows`, perhaps with "features" float [T, K, E] beside."""

    def __len__(self) -> int:
        """Number of windows."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One window."""


class Batches(Iterator[Batch]):
    """Endless batches; `seconds_waited` is how long `next` has waited in all. Close it when done.

    Batch (b rows of this process): tokens int32 [b,T], targets int32 [b,T], weights float32 [b,T]
    (1 where the target is a real token); with the tower also tower_tokens int32 [b,S],
    tower_starts bool [b,S], and in the aligned mode tower_index int32 [b,T]; features [b,T,K,E]
    where they were found ahead of time.
    """

    def __init__(self, iterator: grain.DatasetIterator) -> None:
        """Wraps a Grain iterator of batches."""
        self._iterator = iterator
        self.seconds_waited = 0.0

    def __next__(self) -> Batch:
        """The next batch."""
        begin = time.perf_counter()
        batch = next(self._iterator)
        self.seconds_waited += time.perf_counter() - begin
        return batch

    def close(self) -> None:
        """Stops the threads that read ahead."""
        self._iterator.close()

    def __enter__(self) -> Batches:
        """Itself; closed on the way out."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes."""
        self.close()


def batches(
    windows: WindowSource,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    tower: bool = True,
    threads: int = _THREADS,
    batches_ahead: int = _BATCHES_AHEAD,
) -> Batches:
    """Shuffled batches from `start_step` on, for ever; every epoch has an order of its own.

    `batch_size` counts rows over all processes. With fewer windows than that a batch holds some of
    them more than once.

    Raises:
      UserError: `batch_size` is not a multiple of `process_count`.
    """
    rows = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    return block_iterator(
        rows.map(functools.partial(window_row, tower=tower)),
        batch_size=batch_size,
        start_step=start_step,
        process_index=process_index,
        process_count=process_count,
        threads=threads,
        batches_ahead=batches_ahead,
    )


def block_iterator(
    rows: grain.MapDataset,
    *,
    batch_size: int,
    start_step: int,
    process_index: int,
    process_count: int,
    threads: int = _THREADS,
    batches_ahead: int = _BATCHES_AHEAD,
) -> Batches:
    """Batches of an endless dataset of rows, those of this process, read ahead in threads.

    Raises:
      UserError: `batch_size` is not a multiple of `process_count`.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"train.batch_size {batch_size} is not a multiple of the {process_count} processes"
        )
    # Blocks of all processes, in order; only those of this process are ever read.
    blocks = rows.batch(batch_size // process_count, drop_remainder=True)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=batches_ahead)
    iterator = iter(blocks[process_index::process_count].to_iter_dataset(options))
    experimental.set_next_index(iterator, start_step)
    return Batches(iterator)


def eval_batches(
    windows: WindowSource,
    *,
    batch_size: int,
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    tower: bool = True,
) -> Iterator[Batch]:
    """`limit` windows (0: all) once each, as `batches` makes them.

    They are spaced evenly over the split and come in a fixed shuffled order, so that neighbouring
    rows of a batch are not neighbouring text; neither depends on the batch size. The last batch is
    filled with windows from the beginning, of weight 0.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch of {batch_size} rows is not a multiple of the {process_count} processes"
        )
    chosen = eval_order(len(windows), limit)
    block = batch_size // process_count
    for first in range(process_index * block, _rounded_up(len(chosen), batch_size), batch_size):
        rows = []
        for place in range(first, first + block):
            row = window_row(windows[int(chosen[place % len(chosen)])], tower=tower)
            if place >= len(chosen):
                row["weights"] = np.zeros_like(row["weights"])
            rows.append(row)
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def eval_order(windows: int, limit: int) -> np.ndarray:
    """int [min(limit, windows)], limit 0: all: the windows an evaluation uses, in its order."""
    total = min(limit, windows) if limit else windows
    spaced = np.arange(total) * windows // total
    return np.random.default_rng(0).permutation(spaced)


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def window_row(window: dict[str, np.ndarray], *, tower: bool) -> Batch:
    """A window as a row of a batch (see `Batches`), with or without what the tower reads."""
    tokens = window["tokens"]
    real = np.arange(1, len(tokens)) < window["count"]
    row = {"tokens": tokens[:-1], "targets": tokens[1:], "weights": real.astype(np.float32)}
    if tower:
        row |= {name: values for name, values in window.items() if name.startswith("tower_")}
    if "features" in window:
        row["features"] = window["features"]
    return row
