"""Pairs of images and captions: a batch is a pure function of (seed, step)."""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindvalm_jax.data import images, pairs, pipeline
from blindvalm_jax.data.images import Captioned
from blindvalm_jax.data.pipeline import Batch
from blindvalm_jax.errors import UserError
from tests import small_images, small_text

COUNT, CAPTIONS, CONTEXT = 13, 4, 12
TOKENIZER = small_text.small_bpe()
END = TOKENIZER.eos_id


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> images.FolderImages:
    """13 images with 4 captions each, which begin with the numbers of both."""
    captions = [[f"{i} {c}" for c in range(CAPTIONS)] for i in range(COUNT)]
    folder = tmp_path_factory.mktemp("images")
    return images.FolderImages(
        small_images.write_folder(folder, small_images.noise(COUNT), captions)
    )


def reader(size: int = small_images.SIDE) -> pairs.Reader:
    return pairs.Reader(TOKENIZER, size, CONTEXT, END)


def take(
    source: images.ImageSource,
    count: int,
    *,
    batch_size: int = 4,
    seed: int = 0,
    start: int = 0,
    index: int = 0,
    processes: int = 1,
) -> list[Batch]:
    with pairs.batches(
        source,
        reader(),
        batch_size=batch_size,
        seed=seed,
        start_step=start,
        process_index=index,
        process_count=processes,
    ) as batches:
        return list(itertools.islice(batches, count))


def assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def texts(batch: Batch) -> list[str]:
    rows = zip(batch["tokens"], batch["length"], strict=True)
    return [TOKENIZER.decode(tokens[:length].tolist()) for tokens, length in rows]


def numbers(batch: Batch) -> list[int]:
    """Which image each row is of, by its caption."""
    return [int(text.split()[0]) for text in texts(batch)]


def test_a_batch_has_the_promised_arrays_and_each_image_its_own_caption(
    source: images.FolderImages,
) -> None:
    (batch,) = take(source, 1)
    expected: dict[str, tuple[tuple[int, ...], Any]] = {
        "images": ((4, small_images.SIDE, small_images.SIDE, 3), np.uint8),
        "tokens": ((4, CONTEXT - 1), np.int32),
        "length": ((4,), np.int32),
    }
    assert batch.keys() == expected.keys()
    for name, (shape, dtype) in expected.items():
        assert batch[name].shape == shape
        assert batch[name].dtype == dtype
    for image, number in zip(batch["images"], numbers(batch), strict=True):
        np.testing.assert_array_equal(image, source[number].image)
    for tokens, length in zip(batch["tokens"], batch["length"], strict=True):
        assert (tokens[length:] == END).all()
        assert (tokens[:length] != END).all()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batch(source: images.FolderImages, processes: int) -> None:
    whole = take(source, 10)
    parts = [take(source, 10, index=i, processes=processes) for i in range(processes)]
    joined = [
        {name: np.concatenate([part[step][name] for part in parts]) for name in whole[step]}
        for step in range(10)
    ]
    assert_equal(joined, whole)


@pytest.mark.parametrize("start", [1, 5, 11])
def test_a_later_start_goes_on_exactly(source: images.FolderImages, start: int) -> None:
    """Captions that were drawn at random included, also past the first epoch."""
    assert_equal(take(source, 4, start=start), take(source, start + 4)[start:])


def test_epochs_cover_all_images_in_orders_of_their_own_and_draw_captions_anew(
    source: images.FolderImages,
) -> None:
    epochs = take(source, 6, batch_size=COUNT)
    for batch in epochs:
        assert sorted(numbers(batch)) == list(range(COUNT))
    assert len({tuple(numbers(batch)) for batch in epochs}) == 6
    drawn = [dict(text.split() for text in texts(batch)) for batch in epochs]
    for one, other in itertools.pairwise(drawn):
        assert one != other
    # 78 draws of 4 captions; fewer than 5 of one would come once in 100,000 seeds.
    counts = np.bincount([int(c) for epoch in drawn for c in epoch.values()], minlength=CAPTIONS)
    assert counts.min() >= 5
    (other_seed,) = take(source, 1, batch_size=COUNT, seed=1)
    assert texts(other_seed) != texts(epochs[0])


def test_long_captions_are_cut_and_keep_their_end_token() -> None:
    text = "the cat sat on the mat and on another mat in the house of somebody"
    ids = TOKENIZER.encode(text)
    assert len(ids) > CONTEXT
    row = reader()(Captioned("x", small_images.noise(1)[0], (text,)), text)
    assert row["length"] == CONTEXT - 2
    assert row["tokens"].tolist() == [*ids[: CONTEXT - 2], END]


def test_images_of_other_sizes_are_resized() -> None:
    image = small_images.noise(1, side=21)[0]
    row = reader(size=8)(Captioned("x", image, ("y",)), "y")
    np.testing.assert_array_equal(row["images"], images.resize(image, 8))


def test_a_batch_that_does_not_divide_is_refused(source: images.FolderImages) -> None:
    with pytest.raises(UserError, match=r"train\.batch_size 6 is not a multiple of the 4 proc"):
        take(source, 1, batch_size=6, processes=4)


def test_a_broken_image_is_one_clear_line(tmp_path: Path) -> None:
    small_images.write_folder(tmp_path, small_images.noise(4), ["x"] * 4)
    (tmp_path / "002.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"002\.png cannot be read as an image"):
        take(images.FolderImages(tmp_path), 1)


def test_kept_images_give_the_same_batches_and_are_read_once(
    source: images.FolderImages,
) -> None:
    kept = pairs.keep(source, small_images.SIDE)
    assert isinstance(kept, pairs.Kept)
    assert_equal(take(kept, 12), take(source, 12))
    assert kept[3] is kept[3]
    assert images.fingerprint(kept) == images.fingerprint(source)
    assert kept.captions(3) == source.captions(3)
    small = pairs.keep(source, 8)[3].image
    np.testing.assert_array_equal(small, images.resize(source[3].image, 8))
    assert pairs.keep(source, 100_000) is source


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("limit", [0, 3, 8, 100])
def test_evaluation_sees_each_image_once_with_its_first_caption(
    source: images.FolderImages, limit: int, processes: int
) -> None:
    found: list[int] = []
    parts = [
        pairs.eval_batches(
            source,
            reader(),
            batch_size=4,
            limit=limit,
            process_index=index,
            process_count=processes,
        )
        for index in range(processes)
    ]
    for of_processes in zip(*parts, strict=True):
        rows, counts = zip(*of_processes, strict=True)
        assert len(set(counts)) == 1  # of the global batch
        whole = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
        assert len(whole["images"]) == 4
        assert all(text.split()[1] == "0" for text in texts(whole))
        found += numbers(whole)[: counts[0]]
    assert found == pipeline.eval_order(COUNT, limit).tolist()
    assert len(set(found)) == len(found) == min(limit or COUNT, COUNT)


class Watched:
    """Images of 21 pixels: how often each was decoded, and how many at once were held."""

    def __init__(self) -> None:
        self.decoded: list[int] = []
        self.most_held = 0
        self._images: list[weakref.ref[np.ndarray]] = []

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Captioned:
        image = small_images.noise(1, side=21, seed=index)[0]
        self.decoded.append(index)
        self._images.append(weakref.ref(image))
        self.most_held = max(self.most_held, sum(held() is not None for held in self._images))
        return Captioned(str(index), image, self.captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return (f"{index} 0",)

    def describe(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(("batch_size", "limit"), [(64, 5), (64, 0), (10, 0), (4, 9)])
def test_evaluation_decodes_each_image_once_and_holds_its_row_alone(
    batch_size: int, limit: int
) -> None:
    """Also where a batch is larger than all images, so that most of it is filled up."""
    watched = Watched()
    found = list(pairs.eval_batches(watched, reader(size=8), batch_size=batch_size, limit=limit))
    assert watched.decoded == pipeline.eval_order(COUNT, limit).tolist()
    assert watched.most_held <= 2, "one that is read, and the one before"
    for batch, count in found:
        counted = [numbers(batch)[place % count] for place in range(batch_size)]
        assert numbers(batch) == counted
        for image, number in zip(batch["images"], counted, strict=True):
            np.testing.assert_array_equal(image, images.resize(watched[number].image, 8))
