"""Batches are a pure function of (seed, step), however many processes and threads read them."""

from __future__ import annotations

import itertools
import pickle
import threading
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from blindvalm_jax.data import packing, pipeline
from blindvalm_jax.data.windows import Windows
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import text
from tests import small_text

LENGTH = 16


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows in both modes: `shared` and `aligned`."""
    path = tmp_path_factory.mktemp("windows")
    source = small_text.write_text(path / "a.txt", small_text.documents(40, longest=60))
    clip = small_text.small_clip()
    for name, tower in (("shared", None), ("aligned", clip)):
        made = packing.Recipe(
            source=source,
            tokenizer=small_text.small_bpe(),
            tower_tokenizer=tower,
            sequence_length=LENGTH,
            eval_fraction=0.1,
            windows_per_shard=50,
        )
        packing.prepare(made, path / name, workers=1)
    return path


@pytest.fixture
def windows(directory: Path) -> Windows:
    return Windows(directory / "aligned", "train")


def take(
    windows: Windows,
    count: int,
    *,
    batch_size: int = 8,
    seed: int = 0,
    start: int = 0,
    index: int = 0,
    processes: int = 1,
    threads: int = 2,
    ahead: int = 4,
) -> list[pipeline.Batch]:
    with pipeline.batches(
        windows,
        batch_size=batch_size,
        seed=seed,
        start_step=start,
        process_index=index,
        process_count=processes,
        threads=threads,
        batches_ahead=ahead,
    ) as batches:
        return list(itertools.islice(batches, count))


def assert_equal(found: list[pipeline.Batch], expected: list[pipeline.Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_a_batch_has_the_promised_arrays(directory: Path) -> None:
    for mode, width in (("shared", LENGTH), ("aligned", None)):
        windows = Windows(directory / mode, "train")
        size = width or windows.manifest.tower_length or 0
        (batch,) = take(windows, 1)
        expected: dict[str, tuple[tuple[int, ...], Any]] = {
            "tokens": ((8, LENGTH), np.int32),
            "targets": ((8, LENGTH), np.int32),
            "weights": ((8, LENGTH), np.float32),
            "tower_tokens": ((8, size), np.int32),
            "tower_starts": ((8, size), np.bool_),
        }
        if mode == "aligned":
            expected["tower_index"] = ((8, LENGTH), np.int32)
        assert batch.keys() == expected.keys()
        for name, (shape, dtype) in expected.items():
            assert batch[name].shape == shape
            assert batch[name].dtype == dtype
    with pipeline.batches(windows, batch_size=8, seed=0, tower=False) as batches:
        assert next(batches).keys() == {"tokens", "targets", "weights"}


def test_targets_are_the_next_tokens_and_padding_weighs_nothing(windows: Windows) -> None:
    last = windows[len(windows) - 1]
    assert 1 < last["count"] < LENGTH + 1, "the last window must have some padding"
    epoch = -(-len(windows) // 8)
    weight = 0.0
    seen = set()
    for batch in take(windows, epoch):
        np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
        weight += batch["weights"].sum()
        seen |= {row.tobytes() for row in batch["tokens"]}
    rows = {windows[i]["tokens"][:-1].tobytes() for i in range(len(windows))}
    assert seen == rows
    (batch,) = take(windows, 1, batch_size=len(windows))
    assert batch["weights"].sum() == windows.split.tokens - 1


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batch(windows: Windows, processes: int) -> None:
    whole = take(windows, 30)
    parts = [take(windows, 30, index=i, processes=processes) for i in range(processes)]
    joined = [
        {name: np.concatenate([part[step][name] for part in parts]) for name in whole[step]}
        for step in range(30)
    ]
    assert_equal(joined, whole)


@pytest.mark.parametrize(("threads", "ahead"), [(0, 0), (1, 1), (8, 32)])
def test_prefetching_changes_nothing(windows: Windows, threads: int, ahead: int) -> None:
    assert_equal(take(windows, 25, threads=threads, ahead=ahead), take(windows, 25))


@pytest.mark.parametrize("start", [1, 7, 23])
def test_a_later_start_goes_on_exactly(windows: Windows, start: int) -> None:
    assert_equal(take(windows, 6, start=start), take(windows, start + 6)[start:])


def test_seeds_and_epochs_have_orders_of_their_own(windows: Windows) -> None:
    size = len(windows)
    first, second = take(windows, 2, batch_size=size)
    assert not np.array_equal(first["tokens"], second["tokens"])
    for batch in (first, second):
        assert len({row.tobytes() for row in batch["tokens"]}) == len(
            {windows[i]["tokens"][:-1].tobytes() for i in range(size)}
        )
    (other,) = take(windows, 1, batch_size=size, seed=1)
    assert not np.array_equal(first["tokens"], other["tokens"])


def test_fewer_windows_than_a_batch_repeat_within_it(directory: Path) -> None:
    windows = Windows(directory / "shared", "eval")
    size = 3 * len(windows)
    (batch,) = take(windows, 1, batch_size=size)
    rows, counts = np.unique(batch["tokens"], axis=0, return_counts=True)
    assert len(rows) == len(windows)
    assert (counts == 3).all()


def test_a_batch_that_does_not_divide_is_refused(windows: Windows) -> None:
    with pytest.raises(UserError, match="6 is not a multiple of the 4 processes"):
        pipeline.batches(windows, batch_size=6, seed=0, process_count=4)
    with pytest.raises(UserError, match="6 rows is not a multiple of the 4 processes"):
        next(pipeline.eval_batches(windows, batch_size=6, process_count=4))


def test_closing_ends_the_threads_and_waiting_is_counted(windows: Windows) -> None:
    before = set(threading.enumerate())
    batches = pipeline.batches(windows, batch_size=8, seed=0)
    assert batches.seconds_waited == 0
    next(batches)
    assert batches.seconds_waited > 0
    assert set(threading.enumerate()) - before
    batches.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=30)
    assert not {thread for thread in threading.enumerate() if thread not in before}


def test_windows_travel_to_other_processes(windows: Windows) -> None:
    used = windows[0]
    copy = pickle.loads(pickle.dumps(windows))
    assert len(copy) == len(windows)
    assert copy[0].keys() == used.keys()
    np.testing.assert_array_equal(copy[0]["tokens"], used["tokens"])


def test_windows_end_where_they_end(windows: Windows) -> None:
    for index in (-1, len(windows)):
        with pytest.raises(IndexError, match="of "):
            windows[index]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("limit", [0, 5, 8, 10_000])
def test_evaluation_sees_each_window_once(windows: Windows, limit: int, processes: int) -> None:
    total = min(limit or len(windows), len(windows))
    order = pipeline.eval_order(len(windows), limit)
    assert len(set(order.tolist())) == len(order) == total
    found: list[np.ndarray] = []
    weight = 0.0
    parts = [
        pipeline.eval_batches(
            windows, batch_size=8, limit=limit, process_index=index, process_count=processes
        )
        for index in range(processes)
    ]
    for batches in zip(*parts, strict=True):
        found += list(np.concatenate([batch["tokens"] for batch in batches]))
        for batch in batches:
            weight += batch["weights"].sum()
            assert batch["weights"].shape == (8 // processes, LENGTH)
    assert len(found) == -(-total // 8) * 8
    for place, index in enumerate(order):
        np.testing.assert_array_equal(found[place], windows[index]["tokens"][:-1])
    assert weight == sum(int(windows[i]["count"]) - 1 for i in order)


@pytest.mark.parametrize(("size", "limit"), [(1000, 100), (1000, 0), (37, 20), (3, 1), (1, 5)])
def test_evaluation_is_spread_over_the_split_and_shuffled(size: int, limit: int) -> None:
    order = pipeline.eval_order(size, limit)
    total = min(limit or size, size)
    gaps = np.diff(np.append(np.sort(order), size))
    assert np.sort(order)[0] == 0
    assert gaps.min() >= size // total
    assert gaps.max() <= -(-size // total)
    if total > 50:
        # A random order of n has one or so of n - 1 neighbours that follow each other.
        step = np.abs(np.diff(np.argsort(np.argsort(order))))
        assert (step == 1).sum() < 10


def test_a_damaged_window_is_one_clear_line(windows: Windows, directory: Path) -> None:
    path = directory / "aligned" / windows.split.shards[0].file
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    try:
        with pytest.raises(UserError, match="is damaged at window"):
            take(Windows(directory / "aligned", "train"), len(windows) // 8)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("limit", [9, 10, 16, 17])
def test_shuffled_evaluation_gives_no_window_its_own_features(windows: Windows, limit: int) -> None:
    """Also where the last batch holds one real window and is filled up."""
    for batch in pipeline.eval_batches(windows, batch_size=8, limit=limit):
        rows_BT1E = batch["tower_tokens"][..., None, None]
        given = np.asarray(text.shuffled(jnp.asarray(rows_BT1E)))[..., 0, 0]
        real = batch["weights"].any(axis=1)
        assert (given != batch["tower_tokens"]).any(axis=1)[real].all()
