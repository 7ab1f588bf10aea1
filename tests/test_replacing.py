"""Damaged and missing records: named where they are not wanted, else replaced, counted and told."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindvalm_jax import config, events, trainer
from blindvalm_jax.data import images, packing, pipeline
from blindvalm_jax.data.replacing import DamagedRecord, Replacing
from blindvalm_jax.data.windows import Windows
from blindvalm_jax.errors import UserError
from tests import small_images, small_models, small_text, test_contrastive_training, test_guard
from tests.test_train import read_metrics

SHARD, LENGTH = 16, 16


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


def prepare(directory: Path) -> Path:
    """Windows in several shards of 16."""
    directory.mkdir()
    source = small_text.write_text(directory / "a.txt", small_text.documents(40, longest=60))
    recipe = packing.Recipe(
        source=source,
        tokenizer=small_text.small_bpe(),
        sequence_length=LENGTH,
        windows_per_shard=SHARD,
    )
    packing.prepare(recipe, directory / "out", workers=1)
    return directory / "out"


def flip(directory: Path, *, shard: int, place: int) -> Path:
    """Flips a bit of one window, in its file; returns the file."""
    windows = Windows(directory, "train")
    path = directory / windows.split.shards[shard].file
    row = windows[shard * SHARD + place]["tokens"].astype(np.uint16).tobytes()
    whole = path.read_bytes()
    at = whole.index(row)
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    return path


def test_another_record_stands_for_a_damaged_one_on_any_number_of_processes(
    tmp_path: Path,
) -> None:
    """A flipped bit in one shard, another shard gone: sound windows are what they were."""
    directory = prepare(tmp_path / "data")
    sound = Windows(directory, "train")
    before = [sound[index] for index in range(len(sound))]
    flipped = flip(directory, shard=1, place=3)
    gone = directory / Windows(directory, "train").split.shards[2].file
    gone.unlink()
    with pytest.raises(UserError, match=f"{gone} is missing"):
        Windows(directory, "train")
    damaged: list[str] = []
    found = Replacing(Windows(directory, "train", may_miss=True), damaged)
    assert len(found) == len(before)
    bad = {SHARD + 3, *range(2 * SHARD, 3 * SHARD)}
    rows = {window["tokens"].tobytes() for i, window in enumerate(before) if i not in bad}
    stand_ins = set()
    for index, window in enumerate(before):
        if index not in bad:
            np.testing.assert_array_equal(found[index]["tokens"], window["tokens"])
        else:
            stand_ins.add(found[index]["tokens"].tobytes())
    assert stand_ins <= rows
    assert len(stand_ins) > 8  # no record stands for all of a file
    assert len(damaged) == len(bad)
    assert sum(f"{flipped} is damaged at window 3 of it" in line for line in damaged) == 1
    assert sum(str(gone) in line for line in damaged) == SHARD

    def batches(index: int, processes: int, start: int = 0) -> list[pipeline.Batch]:
        fresh = Replacing(Windows(directory, "train", may_miss=True), [])
        with pipeline.batches(
            fresh,
            batch_size=8,
            seed=3,
            start_step=start,
            process_index=index,
            process_count=processes,
        ) as endless:
            return list(itertools.islice(endless, 10 - start))

    whole = batches(0, 1)
    halves = [batches(index, 2) for index in range(2)]
    for step, batch in enumerate(whole):
        joined = np.concatenate([half[step]["tokens"] for half in halves])
        np.testing.assert_array_equal(joined, batch["tokens"])
    for step, batch in enumerate(batches(0, 1, start=6), start=6):
        np.testing.assert_array_equal(batch["tokens"], whole[step]["tokens"])


def test_a_source_with_nothing_sound_says_so() -> None:
    class Nothing:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> int:
            raise DamagedRecord(f"file.x is damaged at window {index}")

    with pytest.raises(UserError, match=r"drawn for record 1 are all damaged; one: file\.x is"):
        Replacing(Nothing(), [])[1]


def test_another_error_is_not_taken_for_damage() -> None:
    class Unreadable:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> int:
            raise UserError("too many open files")

    with pytest.raises(UserError, match="too many open files"):
        Replacing(Unreadable(), [])[0]


def test_training_ends_at_a_damaged_window_or_goes_on_with_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = prepare(tmp_path / "data")
    last = len(Windows(directory, "train").split.shards) - 1
    values: dict[str, Any] = {
        "data__files": "",
        "data__windows": str(directory),
        "data__sequence_length": LENGTH,
        "tokenizer__kind": Windows(directory, "train").manifest.tokenizer.kind,
        "train__batch_size": 16,
        "train__steps": len(Windows(directory, "train")) // 16 + 1,  # every window is read
        "checkpoint__every_steps": 100,
    }
    path = flip(directory, shard=1, place=3)
    failing = test_guard.small(tmp_path, **values)
    with pytest.raises(UserError, match=f"{path} is damaged at window 3 of it"):
        trainer.train(failing, tmp_path / "run")
    (directory / Windows(directory, "train").split.shards[last].file).unlink()
    lost = Windows(directory, "train", may_miss=True).split.shards[last].windows
    capsys.readouterr()
    skipping = test_guard.small(tmp_path, **values, data__on_corrupt="skip")
    assert trainer.train(skipping, tmp_path / "run") == 0
    metrics = read_metrics(tmp_path / "run")
    steps = values["train__steps"]
    assert sorted(metrics["train/loss"]) == list(range(1, steps + 1))
    assert metrics["data/replaced_records"][steps] == 1 + lost
    output = capsys.readouterr().out
    assert f"note: {path} is damaged at window 3 of it" in output
    assert output.count("another is read in its place") == min(1 + lost, 10)
    told = [e for e in events.read(tmp_path / "run") if e["event"] == "replaced"]
    assert [e["count"] for e in told] == list(range(1, 2 + lost))
    assert sum(str(path) in e["record"] for e in told) == 1


def test_an_image_that_cannot_be_decoded_is_named_or_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One damaged, one gone; held-out ones too are replaced, by held-out ones."""
    folder = small_images.write_toyworld(tmp_path / "world", count=40)
    source = images.FolderImages(folder)
    names = [source[index].id for index in range(len(source))]
    (folder / names[3]).write_bytes((folder / names[3]).read_bytes()[:20])

    def values(**changes: Any) -> config.Config:
        few = {"train__steps": 3, "eval__every_steps": 3, "checkpoint__every_steps": 3}
        return config.parse(test_contrastive_training.settings(folder, **few, **changes))

    with pytest.raises(UserError, match=f"{names[3]} cannot be read as an image"):
        trainer.train(values(), tmp_path / "run")
    (folder / names[7]).unlink()
    with pytest.raises(UserError, match=f"there is no image {folder / names[7]}"):
        trainer.train(values(), tmp_path / "other")
    capsys.readouterr()
    assert trainer.train(values(data__on_corrupt="skip"), tmp_path / "skipping") == 0
    told = [e["record"] for e in events.read(tmp_path / "skipping") if e["event"] == "replaced"]
    assert sum(names[3] in line for line in told) == 1
    assert sum(names[7] in line for line in told) == 1
    assert "another is read in its place" in capsys.readouterr().out
