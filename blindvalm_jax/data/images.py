"""Images with captions, from a folder or a TFDS dataset, by number.

A folder holds `captions.jsonl`, one object a line: {"image": "a/b.png", "caption": "..."}, or
"captions" with a list. Images have 8 bits a channel. TFDS datasets are read as ArrayRecord, without
TensorFlow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
import PIL.ImageOps

from blindvalm_jax import files
from blindvalm_jax.config import DataConfig
from blindvalm_jax.data import image_files
from blindvalm_jax.data.corpora import open_tfds
from blindvalm_jax.data.file_hashes import file_hashes, readable
from blindvalm_jax.data.replacing import DamagedRecord
from blindvalm_jax.data.workers import Progress
from blindvalm_jax.errors import UserError, first_line

CAPTIONS_FILE = "captions.jsonl"


class DamagedImage(DamagedRecord):
    """An image that is not there or cannot be decoded; id: its name within the source."""

    def __init__(self, message: str, *, id: str) -> None:
        """message: a `UserError`'s."""
        super().__init__(message)
        self.id = id


@dataclasses.dataclass(frozen=True)
class Captioned:
    """An image uint8 [H, W, 3] with its captions; id: its name within the source."""

    id: str
    image: np.ndarray
    captions: tuple[str, ...]


class ImageSource(Protocol):
    """Images with captions; `source[i]` is a `Captioned`."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, index: int) -> Captioned:
        """One of them, decoded."""

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of one of them."""

    def describe(self) -> dict[str, Any]:
        """What it holds, by contents and not by place; equal descriptions mean equal items."""


def fingerprint(source: ImageSource) -> str:
    """sha256 in hex over what a source holds."""
    return hashlib.sha256(json.dumps(source.describe(), sort_keys=True).encode()).hexdigest()


def check_captions(source: ImageSource, *, known: Path) -> None:
    """Reads all captions of a source, so that a wrong one is found before any is drawn.

    known: a file that keeps the fingerprints of sources whose captions were read: each once.

    Raises:
      UserError: the first caption that is blank or cannot be read.
    """
    own = fingerprint(source)
    try:
        kept = {str(name) for name in json.loads(known.read_bytes())}
    except (OSError, ValueError, TypeError):
        kept = set()
    if own in kept:
        return
    with Progress("read captions", total=len(source), unit="img") as progress:
        for index in range(len(source)):
            source.captions(index)
            progress.advance(1)
    with contextlib.suppress(OSError):  # a read-only cache only costs time
        known.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(known, sorted({*kept, own}))


class FolderImages:
    """Images named by the captions.jsonl of a folder."""

    def __init__(
        self,
        folder: str | Path,
        *,
        setting: str = "data.images",
        digests: Path | None = None,
        may_miss: bool = False,
    ) -> None:
        """Reads the captions; setting: that names the folder; digests: keeps hashes of images.

        may_miss: an image that is not there is no error before it is asked for.

        Raises:
          UserError: a line is wrong (file and line), or an image is missing.
        """
        self._folder = Path(folder).expanduser()
        self._digests = digests
        path = self._folder / CAPTIONS_FILE
        if not path.is_file():
            raise UserError(f"{path} is missing: the folder that {setting} names needs it")
        with readable(path):
            lines = path.read_bytes().splitlines()
        numbered = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()]
        self._items = [image_files.item(f"{path}:{number}", line) for number, line in numbered]
        if not self._items:
            raise UserError(f"{path} holds no caption")
        for (number, _), (name, _) in zip(numbered, self._items, strict=True):
            if not may_miss and not image_files.is_there(self._folder / name):
                raise UserError(f"{path}:{number}: there is no image {self._folder / name}")

    def __len__(self) -> int:
        """Number of images."""
        return len(self._items)

    def __getitem__(self, index: int) -> Captioned:
        """One of them, decoded.

        Raises:
          DamagedImage: the file is no image, or is not there.
          UserError: the system cannot read it.
        """
        name, captions = self._items[index]
        path = self._folder / name
        try:
            # Opened here: PIL leaves a file open where reading its first bytes fails.
            with path.open("rb") as stream, PIL.Image.open(stream) as image:
                return Captioned(name, image_files.rgb(image), captions)
        except Exception as error:  # a damaged file makes its decoder raise what it likes
            message = f"{path} cannot be read as an image: {first_line(error)}"
            if image_files.is_of_the_system(error):
                raise UserError(message) from error
            raise DamagedImage(message, id=name) from error

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of one of them."""
        return self._items[index][1]

    def describe(self) -> dict[str, Any]:
        """Captions, and size and SHA-256 of every image, None of one that is not there."""
        return self._description

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        paths = [self._folder / name for name, _ in self._items]
        there = [path for path in paths if image_files.is_there(path)]
        hashes = dict(zip(there, file_hashes(there, known=self._digests), strict=True))
        images = [vars(hashes[path]) if path in hashes else None for path in paths]
        return {"captions": self._items, "images": images}


class TfdsImages:
    """A split of a TFDS dataset; fields may lie inside others: "captions/text"."""

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: str,
        *,
        image_field: str,
        caption_field: str,
        digests: Path | None = None,
    ) -> None:
        """Opens the dataset.

        Raises:
          UserError: it is neither prepared nor preparable here, or has no such split or field.
        """
        self._name, self._split, self._digests = name, split, digests
        self._fields = image_field, caption_field
        self._builder, self._examples = open_tfds(name, split, data_dir)
        with contextlib.suppress(DamagedImage):
            self[0]  # finds a wrong field before anything is computed
        self._undecoded = self._builder.as_data_source(
            split=split, decoders=_undecoded(image_field)
        )

    def __len__(self) -> int:
        """Number of images."""
        return len(self._examples)

    def __getitem__(self, index: int) -> Captioned:
        """One of them, decoded.

        Raises:
          DamagedImage: its record cannot be read, or its image cannot be decoded.
          UserError: it is no image with captions.
        """
        example = self._read(self._examples, index)
        image = np.asarray(self._field(example, self._fields[0], "data.image_field"))
        if image.ndim != 3 or image.dtype != np.uint8 or image.shape[2] not in (1, 3):
            raise UserError(
                f"TFDS {self._name}: field {self._fields[0]!r} must be uint8 [H, W, 3] or "
                f"[H, W, 1], got {image.dtype} {list(image.shape)}"
            )
        if image.shape[2] == 1:
            image = np.repeat(image, 3, axis=2)
        return Captioned(f"{self._split}:{index}", image, self._captions(example, index))

    def _read(self, examples: Any, index: int) -> Any:
        """An example; a `DamagedImage` that names its file where it cannot be read."""
        try:
            return examples[index]
        except Exception as error:  # a damaged file makes its reader raise what it likes
            where = f"{self._split}:{index} in {self._file(index)}"
            message = f"TFDS {self._name}, {where}, cannot be read: {first_line(error)}"
            if image_files.is_of_the_system(error):
                raise UserError(message) from error
            raise DamagedImage(message, id=f"{self._split}:{index}") from error

    def _file(self, index: int) -> str:
        """The file that holds an example."""
        for part in self._builder.info.splits[self._split].file_instructions:
            if index < part.take:
                return str(part.filename)
            index -= part.take
        raise IndexError(index)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of one of them; its image is not decoded."""
        return self._captions(self._read(self._undecoded, index), index)

    def describe(self) -> dict[str, Any]:
        """Name, split and fields, and size and SHA-256 of the files."""
        return self._description

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        info = self._builder.info
        paths = [Path(path) for path in info.splits[self._split].filepaths]
        hashes = file_hashes(paths, known=self._digests)
        return {
            "tfds": info.full_name,
            "split": self._split,
            "fields": self._fields,
            "files": [vars(found) for found in hashes],
        }

    def _captions(self, example: Any, index: int) -> tuple[str, ...]:
        value = self._field(example, self._fields[1], "data.caption_field")
        values = np.asarray(value, object).reshape(-1).tolist()
        if not values or not all(isinstance(x, str | bytes) and x.strip() for x in values):
            raise UserError(
                f"TFDS {self._name}, {self._split}:{index}: field {self._fields[1]!r} "
                f"(data.caption_field) must be text or a list of texts, got {values}; "
                "none may be blank"
            )
        try:
            return tuple(x.decode() if isinstance(x, bytes) else x for x in values)
        except UnicodeDecodeError as error:
            raise UserError(
                f"TFDS {self._name}, {self._split}:{index}: not UTF-8 at byte {error.start}"
            ) from error

    def _field(self, example: Any, path: str, setting: str) -> Any:
        """What a path of names leads to; a list of structures is a structure of lists."""
        value = example
        for part in path.split("/"):
            if isinstance(value, Sequence) and value and isinstance(value[0], dict):
                value = {key: [entry[key] for entry in value] for key in value[0]}
            if not isinstance(value, dict) or part not in value:
                has = ", ".join(sorted(value)) if isinstance(value, dict) else "no fields"
                raise UserError(
                    f"TFDS {self._name} has no field {path!r} ({setting}); {part!r} is looked for "
                    f"among: {has}"
                )
            value = value[part]
        return value


class Part:
    """Some images of a source."""

    def __init__(self, source: ImageSource, numbers: np.ndarray) -> None:
        """numbers: int [n], which."""
        self._source, self._numbers = source, numbers

    def __len__(self) -> int:
        """Number of images."""
        return len(self._numbers)

    def __getitem__(self, index: int) -> Captioned:
        """One of them, decoded."""
        return self._source[int(self._numbers[index])]

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of one of them."""
        return self._source.captions(int(self._numbers[index]))

    def describe(self) -> dict[str, Any]:
        """The source, and which of it."""
        chosen = hashlib.sha256(np.ascontiguousarray(self._numbers, "<i8").tobytes())
        return {**self._source.describe(), "part": chosen.hexdigest()}


def open_source(
    data: DataConfig, *, digests: Path | None = None, may_miss: bool = False
) -> ImageSource:
    """All images that settings name, none held out; digests, may_miss: see `FolderImages`.

    Raises:
      UserError: there are none, or they cannot be read.
    """
    if data.images:
        return FolderImages(data.images, digests=digests, may_miss=may_miss)
    if data.tfds:
        return _open_tfds(data, data.tfds_split, digests)
    raise UserError("there are no images: set data.images or data.tfds")


def open_sources(
    data: DataConfig, *, digests: Path | None = None
) -> tuple[ImageSource, ImageSource | None]:
    """Images to learn from and held-out ones, as settings name them (None: none held out).

    Raises:
      UserError: there are none, or they cannot be read.
    """
    may_miss = data.on_corrupt == "skip"
    source = open_source(data, digests=digests, may_miss=may_miss)
    if data.eval_images:
        return source, FolderImages(
            data.eval_images, setting="data.eval_images", digests=digests, may_miss=may_miss
        )
    if data.tfds_eval_split:
        return source, _open_tfds(data, data.tfds_eval_split, digests)
    if not data.eval_fraction:
        return source, None
    if len(source) < 2:
        raise UserError("one image cannot be split in two: name held-out ones (data.eval_images)")
    order = np.random.default_rng(0).permutation(len(source))
    held = min(max(1, round(len(source) * data.eval_fraction)), len(source) - 1)
    return Part(source, np.sort(order[held:])), Part(source, np.sort(order[:held]))


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """The middle square of an image at size x size: CLIP's resize (bicubic) and crop; uint8."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    short = min(height, width)
    new = (size * width // short, size * height // short)
    scaled = PIL.Image.fromarray(image).resize(new, PIL.Image.Resampling.BICUBIC)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    return np.asarray(scaled.crop((left, top, left + size, top + size)))


def _open_tfds(data: DataConfig, split: str, digests: Path | None) -> TfdsImages:
    return TfdsImages(
        data.tfds,
        split,
        data.tfds_dir,
        image_field=data.image_field,
        caption_field=data.caption_field,
        digests=digests,
    )


def _undecoded(field: str) -> Any:
    """Decoders of TFDS, by feature, that leave the bytes of an image as they are."""
    import tensorflow_datasets as tfds  # here: it takes seconds, and most runs read files

    decoders: Any = tfds.decode.SkipDecoding()
    for part in reversed(field.split("/")):
        decoders = {part: decoders}
    return decoders
