"""Images with captions from folders and TFDS: what is read, told apart, split, and refused."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from blindvalm_jax.config import DataConfig
from blindvalm_jax.data import images
from blindvalm_jax.errors import UserError
from tests import small_images

GRADIENT = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def folder_of(tmp_path: Path, content: str | bytes, *, image: bool = True) -> Path:
    """A folder with a.png, perhaps, and this captions.jsonl."""
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "captions.jsonl").write_bytes(data)
    if image:
        PIL.Image.fromarray(GRADIENT).save(tmp_path / "a.png")
    return tmp_path


def line(**fields: Any) -> str:
    return json.dumps({"image": "a.png", **fields}) + "\n"


def test_both_forms_of_captions_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    text = line(caption="ein Füßler") + "\n \n" + line(captions=["one", "two 漢字"])
    source = images.FolderImages(folder_of(tmp_path, b"\xef\xbb\xbf" + text.encode()))
    assert len(source) == 2
    assert [source[i].captions for i in (0, 1)] == [("ein Füßler",), ("one", "two 漢字")]
    assert [source.captions(i) for i in (0, 1)] == [("ein Füßler",), ("one", "two 漢字")]
    assert source[1].id == "a.png"
    np.testing.assert_array_equal(source[0].image, GRADIENT)


def test_images_may_lie_deeper(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    PIL.Image.fromarray(GRADIENT).save(tmp_path / "deep" / "b.png")
    source = images.FolderImages(folder_of(tmp_path, line(image="deep/b.png", caption="x")))
    np.testing.assert_array_equal(source[0].image, GRADIENT)


NO_FILES = ("", ".", "a.png/x.png", "n" * 256, "n/" * 3000, "a\0.png")
WRONG = r'captions.jsonl:{}: expected \{{"image": FILE, "caption": TEXT\}} or "captions"'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "captions.jsonl holds no caption"),
        (" \n\n", "captions.jsonl holds no caption"),
        (line(caption="x") + "{\n", "captions.jsonl:2: not valid JSON"),
        (b'{"image": "a.png", "caption": "\xff"}', "captions.jsonl:1: not valid JSON: .*utf-8"),
        ("[" * 100_000, "captions.jsonl:1: not valid JSON: .*recursion"),
        ("\n" + line(text="x"), WRONG.format(2)),
        ('["a.png", "x"]\n', WRONG.format(1)),
        ('{"caption": "x"}\n', WRONG.format(1)),
        (line(image=3, caption="x"), WRONG.format(1)),
        (line(caption=3), WRONG.format(1)),
        (line(caption=" "), WRONG.format(1)),
        (line(captions=[]), WRONG.format(1)),
        (line(captions=["x", None]), WRONG.format(1)),
        (line(captions=["x", "\ud800"]), WRONG.format(1)),
        (line(caption="x", captions=["y"]), WRONG.format(1)),
        (
            line(caption="x") + line(image="b.png", caption="x"),
            "jsonl:2: there is no image .*b.png",
        ),
        (line(image="\udcff.png", caption="x"), WRONG.format(1)),
        *((line(image=name, caption="x"), "jsonl:1: there is no image") for name in NO_FILES),
    ],
)
def test_wrong_lines_are_named_by_file_and_number(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        images.FolderImages(folder_of(tmp_path, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", ["images", "eval_images"])
def test_a_folder_without_captions_is_named_with_its_setting(tmp_path: Path, setting: str) -> None:
    whole = small_images.write_folder(tmp_path / "whole", small_images.noise(2), ["a", "b"])
    named: dict[str, Any] = {"images": str(whole), setting: str(tmp_path / "nowhere")}
    with pytest.raises(UserError, match=rf"nowhere/captions.jsonl is missing: .*data\.{setting} "):
        images.open_sources(DataConfig(**named))


def test_no_images_at_all() -> None:
    with pytest.raises(UserError, match=r"set data\.images or data\.tfds"):
        images.open_sources(DataConfig())


def png(image: PIL.Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def broken_files() -> dict[str, tuple[bytes, str]]:
    noisy = png(PIL.Image.fromarray(small_images.noise(1)[0]))
    deep = PIL.Image.fromarray(GRADIENT[..., 0].astype(np.uint16) * 300)
    exif = io.BytesIO()
    PIL.Image.fromarray(GRADIENT).save(exif, "WEBP", exif=b"Exif\0\0M?\0*\0\0\0\x08")
    return {
        "no image": (b"not an image", "cannot identify"),
        "empty": (b"", "cannot identify"),
        "cut short": (noisy[: len(noisy) // 2], "truncated"),
        "16 bits": (png(deep), "expected 8 bits a channel, got mode I;16"),
        "damaged exif": (exif.getvalue(), "not a TIFF"),
    }


@pytest.mark.parametrize("kind", broken_files())
def test_a_file_that_is_no_image_is_one_clear_line(tmp_path: Path, kind: str) -> None:
    source = images.FolderImages(folder_of(tmp_path, line(caption="x")))
    content, message = broken_files()[kind]
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=f"a.png cannot be read as an image: .*{message}") as error:
        source[0]
    assert "\n" not in str(error.value)


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    source = images.FolderImages(folder_of(tmp_path, line(caption="x")))
    grey = GRADIENT[..., 0]
    PIL.Image.fromarray(grey).save(tmp_path / "a.png")
    np.testing.assert_array_equal(source[0].image, np.repeat(grey[..., None], 3, axis=2))
    alpha = np.concatenate([GRADIENT, np.zeros((5, 7, 1), np.uint8)], axis=2)
    PIL.Image.fromarray(alpha).save(tmp_path / "a.png")
    np.testing.assert_array_equal(source[0].image, GRADIENT)


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, GRADIENT),
        (3, np.rot90(GRADIENT, 2)),
        (6, np.rot90(GRADIENT, -1)),
        (8, np.rot90(GRADIENT)),
        (2, GRADIENT[:, ::-1]),
    ],
)
def test_a_photograph_is_turned_as_its_exif_says(
    tmp_path: Path, orientation: int, turned: np.ndarray
) -> None:
    source = images.FolderImages(folder_of(tmp_path, line(caption="x")))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    PIL.Image.fromarray(GRADIENT).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(source[0].image, turned)


def test_resize_at_size_is_the_identity() -> None:
    image = small_images.noise(1)[0]
    assert images.resize(image, small_images.SIDE) is image


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (41, 41), (9, 30), (1, 7)])
def test_resize_keeps_the_middle_square(height: int, width: int) -> None:
    """Red where the middle square is, and blue beside it: nothing blue is left but at the edge."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 2] = 255
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image[top : top + side, left : left + side] = (255, 0, 0)
    found = images.resize(image, 20)
    assert found.shape == (20, 20, 3)
    assert found.dtype == np.uint8
    inner = found if height == width else found[3:-3, 3:-3]
    if side > 5:  # else the filter reaches from outside to the middle
        assert (inner[..., 0] > 250).all()
        assert (inner[..., 2] < 5).all()


def test_resize_interpolates_without_moving_the_picture() -> None:
    """A ramp stays a ramp; 64 to 16 pixels, so the value at x is that of 4 x + 1.5 before."""
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 3, (64, 64, 3))
    found = images.resize(np.ascontiguousarray(ramp), 16)[8, 2:-2, 0].astype(float)
    np.testing.assert_allclose(found, (4 * np.arange(2, 14) + 1.5) * 3, atol=1)  # of rounding


def test_held_out_images_are_a_fixed_share_and_no_training_images(tmp_path: Path) -> None:
    texts = [f"caption {number}" for number in range(20)]
    small_images.write_folder(tmp_path, small_images.noise(20), texts)
    data = DataConfig(images=str(tmp_path), eval_fraction=0.25)

    def split() -> list[list[str]]:
        return [
            [source[i].captions[0] for i in range(len(source))]
            for source in images.open_sources(data)
            if source is not None
        ]

    train, held = split()
    assert (len(train), len(held)) == (15, 5)
    assert sorted(train + held) == sorted(texts)
    assert split() == [train, held]
    assert sorted(held) != sorted(texts)[:5]
    source, held_out = images.open_sources(dataclasses.replace(data, eval_fraction=0.0))
    assert held_out is None
    assert len(source) == 20
    smallest = images.open_sources(dataclasses.replace(data, eval_fraction=1e-9))[1]
    assert smallest is not None
    assert len(smallest) == 1


def test_one_image_is_not_split(tmp_path: Path) -> None:
    small_images.write_folder(tmp_path, small_images.noise(1), ["one"])
    with pytest.raises(UserError, match=r"one image cannot be split.*data\.eval_images"):
        images.open_sources(DataConfig(images=str(tmp_path), eval_fraction=0.5))


def test_a_folder_of_its_own_is_held_out_whole(tmp_path: Path) -> None:
    for name, count in (("train", 6), ("eval", 3)):
        small_images.write_folder(tmp_path / name, small_images.noise(count), ["x"] * count)
    data = DataConfig(images=str(tmp_path / "train"), eval_images=str(tmp_path / "eval"))
    source, held_out = images.open_sources(data)
    assert held_out is not None
    assert (len(source), len(held_out)) == (6, 3)


def test_fingerprints_tell_contents_and_not_places(tmp_path: Path) -> None:
    made = small_images.write_folder(tmp_path / "a", small_images.noise(4), ["a", "b", "c", "d"])
    kept = tmp_path / "hashes.json"

    def fingerprint(folder: Path) -> str:
        found = images.fingerprint(images.FolderImages(folder, digests=kept))
        assert found == images.fingerprint(images.FolderImages(folder))
        return found

    first = fingerprint(made)
    shutil.copytree(made, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == first
    small_images.write_folder(made, small_images.noise(4, seed=1), ["a", "b", "c", "d"])
    for file in made.glob("*.png"):  # in case the clock stood still
        os.utime(file, ns=(0, 0))
    pixels = fingerprint(made)
    small_images.write_folder(tmp_path / "copy", small_images.noise(4), ["a", "b", "c", "e"])
    assert len({first, pixels, fingerprint(tmp_path / "copy")}) == 3
    source, held_out = images.open_sources(DataConfig(images=str(made), eval_fraction=0.25))
    assert held_out is not None
    assert len({pixels, images.fingerprint(source), images.fingerprint(held_out)}) == 3


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Four pictures: captions in a list, in a sequence of structures, as one text; a label."""

    VERSION = tfds.core.Version("1.0.0")
    SEED = 0

    def _info(self) -> Any:
        features = {
            "image": tfds.features.Image(shape=(8, 10, 3)),
            "mask": tfds.features.Image(shape=(8, 10, 1)),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "notes": tfds.features.Sequence(
                {"text": tfds.features.Text(), "stars": tfds.features.Scalar(np.int32)}
            ),
            "title": tfds.features.Text(),
            "label": tfds.features.Scalar(np.int32),
            "mostly": tfds.features.Sequence(tfds.features.Text()),
            "spaces": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), description="tiny"
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(4), "test": self._generate_examples(2)}

    def _generate_examples(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(count):
            picture = picture_of(index, self.SEED)
            yield (
                index,
                {
                    "image": PIL.Image.fromarray(picture),
                    "mask": PIL.Image.fromarray(picture[..., 0]),
                    "captions": [f"{index} eins", f"{index} zwö"],
                    "notes": [{"text": f"{index} {word}", "stars": 3} for word in ("gut", "süß")],
                    "title": f"{index} der Titel",
                    "label": index,
                    "mostly": ["x"] * (index % 2),
                    "spaces": " " if index == 2 else "x",
                },
            )


def picture_of(index: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, index])
    return rng.integers(0, 256, (8, 10, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tfds")
    TinyPictures(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


def pictures(tfds_dir: Path, **changes: str) -> images.TfdsImages:
    given: dict[str, Any] = {"name": "tiny_pictures", "split": "train", "data_dir": str(tfds_dir)}
    given |= {"image_field": "image", "caption_field": "captions"}
    return images.TfdsImages(**{**given, **changes})


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("captions", ("{} eins", "{} zwö")),
        ("notes/text", ("{} gut", "{} süß")),
        ("title", ("{} der Titel",)),
    ],
)
def test_tfds_captions_from_lists_structures_and_single_texts(
    tfds_dir: Path, field: str, expected: tuple[str, ...]
) -> None:
    source = pictures(tfds_dir, caption_field=field)
    assert len(source) == 4
    found = {}
    for index in range(4):
        item = source[index]
        assert item.captions == source.captions(index)
        number = int(item.captions[0].split()[0])
        assert item.captions == tuple(text.format(number) for text in expected)
        np.testing.assert_array_equal(item.image, picture_of(number))
        found[item.id] = number
    assert sorted(found.values()) == [0, 1, 2, 3]
    assert sorted(found) == [f"train:{index}" for index in range(4)]


def test_tfds_grey_images_get_three_channels(tfds_dir: Path) -> None:
    item = pictures(tfds_dir, image_field="mask")[0]
    grey = picture_of(int(item.captions[0].split()[0]))[..., :1]
    np.testing.assert_array_equal(item.image, np.repeat(grey, 3, axis=2))


def test_tfds_split_is_held_out(tfds_dir: Path) -> None:
    data = DataConfig(tfds="tiny_pictures", tfds_dir=str(tfds_dir), tfds_eval_split="test")
    source, held_out = images.open_sources(data)
    assert held_out is not None
    assert (len(source), len(held_out)) == (4, 2)
    assert images.fingerprint(source) != images.fingerprint(held_out)


def test_tfds_fingerprints_tell_contents_and_not_places(
    tfds_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = images.fingerprint(pictures(tfds_dir))
    shutil.copytree(tfds_dir, tmp_path / "copy")
    assert images.fingerprint(pictures(tmp_path / "copy")) == first
    monkeypatch.setattr(TinyPictures, "SEED", 1)
    TinyPictures(data_dir=tmp_path / "other", file_format="array_record").download_and_prepare()
    other = images.fingerprint(pictures(tmp_path / "other"))
    half = images.fingerprint(pictures(tfds_dir, split="train[:2]"))
    field = images.fingerprint(pictures(tfds_dir, caption_field="title"))
    assert len({first, other, half, field}) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_field": "picture"}, r"no field 'picture' \(data\.image_field\).*among: captions"),
        ({"image_field": "label"}, "field 'label' must be uint8"),
        ({"caption_field": "caption"}, r"no field 'caption' \(data\.caption_field\)"),
        ({"caption_field": "notes/body"}, r"'notes/body'.*'body' is looked for among: stars, text"),
        ({"caption_field": "title/x"}, "'x' is looked for among: no fields"),
        ({"caption_field": "label"}, "'label'.*must be text or a list of texts, got"),
        ({"caption_field": "notes/stars"}, "'notes/stars'.*must be text or a list of texts, got"),
        ({"split": "validation"}, "split 'validation'"),
        ({"split": "train[:0]"}, r"split 'train\[:0\]': Paths sequence"),
        ({"name": "no_such_pictures"}, "'no_such_pictures' cannot be opened"),
    ],
)
def test_tfds_mistakes_are_one_clear_line(
    tfds_dir: Path, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        pictures(tfds_dir, **changes)
    assert "\n" not in str(error.value)


def test_a_damaged_tfds_record_names_its_file_and_number(tfds_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tfds_dir, tmp_path / "copy")
    (path,) = (tmp_path / "copy").rglob("*train*.array_record*")
    path.write_bytes(bytes(path.stat().st_size))
    source = pictures(tmp_path / "copy", split="train[1:]")
    for read in (source.__getitem__, source.captions):
        with pytest.raises(
            images.DamagedImage, match=rf"train\[1:\]:2 in {path}, cannot be read: "
        ) as error:
            read(2)
        assert "\n" not in str(error.value)


def test_tfds_images_without_a_caption_are_named(tfds_dir: Path) -> None:
    def read() -> None:
        source = pictures(tfds_dir, caption_field="mostly")  # the first example may have one
        for index in range(4):
            source.captions(index)

    with pytest.raises(UserError, match=r"train:\d: field 'mostly' .*got \[\]"):
        read()


class Counted(images.TfdsImages):
    """A source that counts how often captions were read."""

    reads = 0

    def captions(self, index: int) -> tuple[str, ...]:
        self.reads += 1
        return super().captions(index)


def test_captions_are_read_through_once(tfds_dir: Path, tmp_path: Path) -> None:
    """Of each source: another field, or a part, is another one; a damaged record costs time."""
    known = tmp_path / "cache" / "known.json"
    opened: dict[str, Any] = {"name": "tiny_pictures", "split": "train", "data_dir": str(tfds_dir)}

    def reads(field: str = "captions", *, part: bool = False) -> int:
        source = Counted(**opened, image_field="image", caption_field=field)
        images.check_captions(
            images.Part(source, np.array([1, 2])) if part else source, known=known
        )
        return source.reads

    assert [reads(), reads(), reads("title"), reads(part=True)] == [4, 0, 4, 2]
    assert [reads(), reads("title"), reads(part=True)] == [0, 0, 0]
    known.write_text("{")
    assert [reads(), reads()] == [4, 0]


def test_a_blank_caption_is_found_before_it_is_drawn(tfds_dir: Path, tmp_path: Path) -> None:
    known = tmp_path / "known.json"
    source = pictures(tfds_dir, caption_field="spaces")
    with pytest.raises(
        UserError, match=r"train:\d: field 'spaces' .*must be text.*; none may be blank"
    ) as e:
        images.check_captions(source, known=known)
    assert "\n" not in str(e.value)
    assert not known.exists()


@pytest.mark.parametrize(
    ("height", "width", "size", "scaled"),
    [
        (480, 640, 224, (224, 298)),
        (641, 427, 224, (336, 224)),
        (100, 333, 32, (32, 106)),
        (57, 57, 32, (32, 32)),
        (31, 20, 64, (99, 64)),
        (16, 16, 16, (16, 16)),
    ],
)
def test_resize_scales_and_cuts_as_clip_does(
    height: int, width: int, size: int, scaled: tuple[int, int]
) -> None:
    """Bicubic; the longer side is rounded down, and so is the place of the middle square.

    The scaled sizes are those of transformers' CLIPImageProcessorPil, whose pixels are the same.
    """
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    whole = PIL.Image.fromarray(image).resize(scaled[::-1], PIL.Image.Resampling.BICUBIC)
    top, left = ((side - size) // 2 for side in scaled)
    want = np.asarray(whole)[top : top + size, left : left + size]
    np.testing.assert_array_equal(images.resize(image, size), want)


def test_a_damaged_image_is_told_from_a_system_that_cannot_read(tmp_path: Path) -> None:
    """/proc/self/mem gives an error for its first byte, whoever reads it."""
    folder = small_images.write_folder(tmp_path, small_images.noise(4), ["a", "b", "c", "d"])
    whole = images.fingerprint(images.FolderImages(folder))
    (folder / "001.png").write_bytes(b"no image")
    (folder / "002.png").unlink()
    with pytest.raises(UserError, match=r"captions.jsonl:3: there is no image .*002.png"):
        images.FolderImages(folder)
    source = images.FolderImages(folder, may_miss=True)
    described = source.describe()["images"]
    assert [entry is None for entry in described] == [False, False, True, False]
    assert images.fingerprint(source) != whole
    for place in (1, 2):
        with pytest.raises(images.DamagedImage, match=f"00{place}.png cannot be read") as caught:
            source[place]
        assert caught.value.id == f"00{place}.png"
    (folder / "003.png").unlink()
    (folder / "003.png").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match="003.png cannot be read") as failed:
        source[3]
    assert not isinstance(failed.value, images.DamagedImage)


@pytest.mark.parametrize("name", [*NO_FILES, "loop"])
def test_a_name_that_leads_to_no_file_is_a_damaged_image(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    folder = folder_of(tmp_path, line(caption="x") + line(image=name, caption="y"))
    with pytest.raises(UserError, match="jsonl:2: there is no image"):
        images.FolderImages(folder)
    source = images.FolderImages(folder, may_miss=True)
    assert [entry is None for entry in source.describe()["images"]] == [False, True]
    with pytest.raises(images.DamagedImage, match="cannot be read as an image") as caught:
        source[1]
    assert caught.value.id == name
