"""An image index: the same bytes however it was made, read back as written, tied to its CLIP."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindvalm_jax import indexing
from blindvalm_jax.data.images import DamagedImage, FolderImages
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import index
from blindvalm_jax.grounding.index import ImageIndex
from tests import dying, small_images, small_index

ROOT = Path(__file__).resolve().parents[1]


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a finished directory but the lock."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    found = {str(path.relative_to(directory)): path.read_bytes() for path in files}
    assert found.pop(".lock") == b""
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 50 pictures in 4 shards."""
    out = tmp_path_factory.mktemp("index") / "whole"
    small_index.build(out)
    return out


def expected_vectors(count: int) -> np.ndarray:
    pictures = small_index.Pictures(count)
    return small_index.encode(np.stack([pictures[i][1] for i in range(count)]))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_read_is_what_was_encoded(tmp_path: Path, dtype: str) -> None:
    made = small_index.build(tmp_path, dtype=dtype)
    opened = ImageIndex.open(tmp_path)
    assert opened.manifest == made
    assert [shard.count for shard in made.shards] == [16, 16, 16, 2]
    expected = expected_vectors(50).astype(dtype)
    vectors = opened.vectors
    assert vectors.shape == (50, small_index.WIDTH)
    for first, last in ((0, 50), (15, 17), (3, 3), (40, 99)):
        np.testing.assert_array_equal(vectors[first:last], expected[first:last])
        assert vectors[first:last].dtype == np.dtype(dtype)
    wanted = np.array([[49, 0, 16], [15, 49, 33]])
    np.testing.assert_array_equal(vectors.rows(wanted), expected[wanted].astype(np.float32))
    assert vectors.rows(wanted).dtype == np.float32
    joined = np.concatenate([block for _, block in vectors.blocks(7)])
    np.testing.assert_array_equal(joined, expected.astype(np.float32))
    assert [first for first, _ in vectors.blocks(20)] == [0, 20, 40]
    with pytest.raises(ValueError, match="read-only"):
        vectors[0:4][0, 0] = 1
    for wrong in (-1, 50):
        with pytest.raises(IndexError):
            vectors.rows(np.array([0, wrong]))
    opened.verify()


def test_a_neighbour_can_be_shown(whole: Path, tmp_path: Path) -> None:
    records = ImageIndex.open(whole).items(np.array([[49, 0], [17, 0]]))
    assert [record["id"] for record in records] == [f"picture-{i}" for i in (49, 0, 17, 0)]
    assert records[2]["caption"] == small_index.caption(17)
    small_index.build(tmp_path, caption=None)
    assert ImageIndex.open(tmp_path).items(np.array([5])) == [{"id": "picture-5"}]


@pytest.mark.parametrize("batch_size", [1, 5, 16, 64])
def test_the_batch_size_does_not_change_a_byte(
    whole: Path, tmp_path: Path, batch_size: int
) -> None:
    seen = set()

    def encode(images: np.ndarray) -> np.ndarray:
        seen.add(images.shape)
        return small_index.encode(images)

    small_index.build(tmp_path, batch_size=batch_size, encode=encode)
    assert content(tmp_path) == content(whole)
    assert seen == {(batch_size, small_index.SIDE, small_index.SIDE, 3)}, "more than one shape"


BUILD = """
from tests import small_index
small_index.build(Path(sys.argv[1]), encode=dying(small_index.encode))
"""


def test_a_build_killed_anywhere_goes_on_to_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    """Dies before its nth encoding, write, rename or removal."""
    moments = dying.moments(BUILD, tmp_path / "lived")
    stages = set()
    chosen = random.Random(0).sample(range(2, moments - 2), 5)
    # The last is before the clean-up, the one before it before the manifest appears.
    for left in (1, *chosen, moments - 2, moments - 1):
        out = tmp_path / f"killed{left}"
        dying.kill(left, BUILD, out)
        finished = (out / index.FILE_NAME).exists()
        shards = len(list(out.glob("vectors-*.npy")))
        stages.add("finished" if finished else "shards" if shards else "begun")
        small_index.build(out)
        assert content(out) == content(whole)
    assert stages == {"begun", "shards", "finished"}


def test_a_build_killed_again_and_again_ends_with_the_same_bytes(
    whole: Path, tmp_path: Path
) -> None:
    code = """
import sys
from pathlib import Path
from tests import small_index
def encode(images):
    print("batch", flush=True)
    return small_index.encode(images)
small_index.build(Path(sys.argv[1]), encode=encode)
"""
    batches = random.Random(1)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "out")],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with process:
            assert process.stdout is not None
            for _ in range(batches.randint(1, 3)):
                process.stdout.readline()
            process.kill()
    small_index.build(tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)


def test_finished_shards_are_not_encoded_again(whole: Path, tmp_path: Path) -> None:
    calls = []

    def encode(images: np.ndarray) -> np.ndarray:
        calls.append(len(images))
        if len(calls) == 6:
            raise RuntimeError("no more power")
        return small_index.encode(images)

    with pytest.raises(RuntimeError, match="no more power"):
        small_index.build(tmp_path, encode=encode)
    assert not (tmp_path / index.FILE_NAME).exists()
    with pytest.raises(UserError, match="no finished image index: build it again, it goes on"):
        ImageIndex.open(tmp_path)
    small_index.build(tmp_path, encode=encode)
    # 7 batches in all; the fifth was finished, but not its shard, so it is done again.
    assert len(calls) == 6 + 3
    assert content(tmp_path) == content(whole)
    small_index.build(tmp_path, encode=encode)
    assert len(calls) == 9, "a finished index was built again"


@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
def test_another_build_in_the_same_directory_is_refused(tmp_path: Path, finished: bool) -> None:
    def broken(images: np.ndarray) -> np.ndarray:
        raise RuntimeError("stop")

    if finished:
        small_index.build(tmp_path)
    else:
        with pytest.raises(RuntimeError):
            small_index.build(tmp_path, encode=broken)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    clip = small_index.CLIP
    changes: dict[str, dict[str, Any]] = {
        "vision_sha256": {"clip": dataclasses.replace(clip, vision_sha256="w" * 64)},
        "text_sha256": {"clip": dataclasses.replace(clip, text_sha256="w" * 64)},
        "images": {"images": small_index.Pictures(50, fingerprint="others")},
        "count": {"images": small_index.Pictures(51)},
        "dtype": {"dtype": "float32"},
        "shard_size": {"shard_size": 17},
        "captions": {"caption": None},
    }
    for field, change in changes.items():
        with pytest.raises(UserError, match=f"was made with {field} .*, expected .*delete it"):
            small_index.build(tmp_path, **change)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_a_begun_build_goes_on_with_what_rounds_alike(whole: Path, tmp_path: Path) -> None:
    """Once a shard is finished; before that nothing is mixed. A finished index is kept."""
    here = {"devices": 8, "device_kind": "cpu"}

    def dies_after(batches: int) -> Any:
        left = iter(range(batches))

        def encode(images: np.ndarray) -> np.ndarray:
            if next(left, None) is None:
                raise RuntimeError("no more power")
            return small_index.encode(images)

        return encode

    for batches, batch_size in ((1, 4), (3, 8)):
        with pytest.raises(RuntimeError):
            small_index.build(
                tmp_path, encode=dies_after(batches), batch_size=batch_size, rounding=here
            )
    assert len(list(tmp_path.glob("vectors-*.npy"))) == 1
    for changes, message in (
        ({"batch_size": 4, "rounding": here}, "made with batch_size 8, expected 4: choose"),
        ({"rounding": {**here, "devices": 1}}, "made with devices 8, expected 1: choose"),
        ({"rounding": {**here, "device_kind": "gpu"}}, "made with device_kind 'cpu', expected"),
    ):
        with pytest.raises(UserError, match=message):
            small_index.build(tmp_path, **changes)
    small_index.build(tmp_path, rounding=here)
    assert content(tmp_path) == content(whole)
    small_index.build(tmp_path, batch_size=2, encode=dies_after(0))


class Broken(small_index.Pictures):
    """Pictures of which those at some places are damaged."""

    places: tuple[int, ...] = (0, 5, 17, 18, 48, 49)

    def __getitem__(self, place: int) -> tuple[str, np.ndarray]:
        name, image = super().__getitem__(place)
        if place in self.places:
            raise DamagedImage(f"{name} is damaged", id=name)
        return name, image


def test_damaged_pictures_end_the_build_or_are_left_out(tmp_path: Path) -> None:
    """The last shard has none that can be read."""

    class Late(Broken):
        places = Broken.places[1:]

    with pytest.raises(UserError, match="picture-5 is damaged"):
        small_index.build(tmp_path / "a", images=Late(50))
    made = small_index.build(tmp_path / "a", images=Late(50), skip_damaged=True)
    assert made.count == 45, "a build that stopped at one does not go on without it"
    made = small_index.build(tmp_path / "b", images=Broken(50), skip_damaged=True)
    assert (made.count, made.damaged) == (44, 6)
    assert [shard.count for shard in made.shards] == [14, 14, 16, 0]
    opened = ImageIndex.open(tmp_path / "b")
    opened.verify()
    there = [place for place in range(50) if place not in Broken.places]
    expected = expected_vectors(50)[there].astype("float16")
    np.testing.assert_array_equal(opened.vectors[:], expected)
    np.testing.assert_array_equal(opened.vectors.rows(np.arange(44)), expected.astype(np.float32))
    records = opened.items(np.arange(44))
    assert [record["id"] for record in records] == [f"picture-{place}" for place in there]
    assert [record["caption"] for record in records] == [small_index.caption(x) for x in there]
    lost = [(tmp_path / "b" / f"damaged-0000{n}.jsonl") for n in range(4)]
    assert [path.exists() for path in lost] == [True, True, False, True]
    lines = [line for n in (0, 1, 3) for line in lost[n].read_text().splitlines()]
    names = [json.loads(line)["id"] for line in lines]
    assert names == [f"picture-{place}" for place in Broken.places]
    with pytest.raises(UserError, match=r"damaged-00000.jsonl names damaged images .*skip_damaged"):
        small_index.build(tmp_path / "b", images=Broken(50))
    assert small_index.build(tmp_path / "b", images=Broken(50), skip_damaged=True) == made

    class Empty(Broken):
        places = tuple(range(50))

    with pytest.raises(UserError, match="none of the 50 images can be read"):
        small_index.build(tmp_path / "c", images=Empty(50), skip_damaged=True)


def test_leaving_out_where_none_is_damaged_changes_nothing(whole: Path, tmp_path: Path) -> None:
    small_index.build(tmp_path, skip_damaged=True)
    assert content(tmp_path) == content(whole)


def test_records_of_a_folder_that_lead_to_no_file_are_left_out(tmp_path: Path) -> None:
    folder = small_images.write_folder(tmp_path / "in", small_images.noise(3), ["a", "b", "c"])
    wrong = ["", "000.png/x.png", "n" * 256, "a\0.png"]
    lines = "".join(json.dumps({"image": name, "caption": "x"}) + "\n" for name in wrong)
    path = folder / "captions.jsonl"
    path.write_text(lines + path.read_text())
    source = indexing.TowerImages(FolderImages(folder, may_miss=True), small_index.SIDE)
    values: dict[str, Any] = {"images": source, "caption": source.caption}
    made = small_index.build(tmp_path / "out", skip_damaged=True, **values)
    assert (made.count, made.damaged) == (3, 4)
    lost = (tmp_path / "out" / "damaged-00000.jsonl").read_text().splitlines()
    assert [json.loads(record)["id"] for record in lost] == wrong


BROKEN = """
from tests import small_index, test_index
images = test_index.Broken(50)
encode = dying(small_index.encode)
small_index.build(Path(sys.argv[1]), images=images, skip_damaged=True, encode=encode)
"""


def test_a_build_that_leaves_out_and_is_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    moments = dying.moments(BROKEN, tmp_path / "lived")
    for left in random.Random(2).sample(range(2, moments - 2), 3):
        out = tmp_path / f"killed{left}"
        dying.kill(left, BROKEN, out)
        small_index.build(out, images=Broken(50), skip_damaged=True)
        assert content(out) == content(tmp_path / "lived")


def test_pictures_are_read_in_order_by_several_threads_and_not_far_ahead(
    whole: Path, tmp_path: Path
) -> None:
    """Reading waits until two do it at once; at most two batches wait for the encoder."""
    began: list[int] = []
    meeting = threading.Barrier(2)

    class Slow(small_index.Pictures):
        def __getitem__(self, place: int) -> tuple[str, np.ndarray]:
            began.append(place)
            if place in (2, 3):
                meeting.wait(60)
            return super().__getitem__(place)

    seen = []

    def encode(images: np.ndarray) -> np.ndarray:
        seen.append(max(began))
        return small_index.encode(images)

    small_index.build(tmp_path, images=Slow(50), encode=encode)
    assert content(tmp_path) == content(whole)
    ends = [8, 16, 24, 32, 40, 48, 50]
    assert all(place < end + 2 * 8 for place, end in zip(seen, ends, strict=True))


def test_the_key_tells_indexes_apart(whole: Path, tmp_path: Path) -> None:
    """Not where it lies or how it was made, but what is in it."""
    same = small_index.build(tmp_path / "same", batch_size=3)
    assert same.key == ImageIndex.open(whole).manifest.key
    other = small_index.build(tmp_path / "other", encode=lambda x: 1 - small_index.encode(x))
    assert other.key != same.key


def test_only_the_tower_of_the_same_clip_may_ask(whole: Path) -> None:
    opened = ImageIndex.open(whole)
    opened.check_tower(small_index.CLIP.text_sha256)
    with pytest.raises(UserError, match=f"{'t' * 64}.*got {'x' * 64}"):
        opened.check_tower("x" * 64)


def test_wrong_images_and_vectors_are_named(tmp_path: Path) -> None:
    class Mixed(small_index.Pictures):
        def __getitem__(self, place: int) -> tuple[str, np.ndarray]:
            name, image = super().__getitem__(place)
            return name, image[:3] if place == 20 else image

    for batch_size in (8, 1):  # the second goes on in the same directory: no shard is finished
        with pytest.raises(UserError, match=r"picture-20 is uint8 \(3, 4, 3\), .*\(4, 4\)"):
            small_index.build(
                tmp_path / "a", images=Mixed(50), batch_size=batch_size, shard_size=50
            )

    def large(images: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(images))[:, None] == 1, 1e5, small_index.encode(images))

    with pytest.raises(UserError, match="image picture-1 is not finite in float16"):
        small_index.build(tmp_path / "b", encode=large)
    small_index.build(tmp_path / "b32", encode=large, dtype="float32")
    with pytest.raises(UserError, match=r"gave \(1, 16\) for 8 images"):
        small_index.build(tmp_path / "c", encode=lambda x: small_index.encode(x)[:1])
    with pytest.raises(UserError, match="there are no images"):
        small_index.build(tmp_path / "d", count=0)
    with pytest.raises(UserError, match="float16 or float32, got 'int8'"):
        small_index.build(tmp_path / "d", dtype="int8")
    assert not (tmp_path / "d").exists()


def test_a_directory_of_others_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "vectors-00000.npy").write_text("mine")
    with pytest.raises(UserError, match="not empty and was not made by the index builder"):
        small_index.build(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_damage_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished image index: build one there"):
        ImageIndex.open(tmp_path)
    small_index.build(tmp_path)
    path = tmp_path / "vectors-00001.npy"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(UserError, match=r"vectors-00001.npy has \d+ bytes, the manifest says"):
        ImageIndex.open(tmp_path)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match="vectors-00001.npy has sha256"):
        ImageIndex.open(tmp_path).verify()
    path.write_bytes(b"x" * len(good))
    with pytest.raises(UserError, match="vectors-00001.npy is damaged"):
        ImageIndex.open(tmp_path).vectors.rows(np.array([20]))
    path.unlink()
    with pytest.raises(UserError, match="vectors-00001.npy is missing"):
        ImageIndex.open(tmp_path)
    path.write_bytes(good)
    manifest = tmp_path / index.FILE_NAME
    values = json.loads(manifest.read_bytes())
    for change, message in (
        ({"format": 2}, "format 2, this program reads 1"),
        ({"count": 51}, "damaged .*51 vectors"),
        ({"shards": [1]}, "damaged"),
        ({"unknown": 1}, "damaged"),
    ):
        manifest.write_text(json.dumps(values | change))
        with pytest.raises(UserError, match=message):
            ImageIndex.open(tmp_path)
