"""An image index on disk: vectors, a record of each image, and a manifest that ties them to CLIP.

    manifest.json        what is there and what made it; written last
    vectors-00000.npy    float16 or float32 [n, E], read through memory maps
    items-00000.jsonl    a line per vector: {"id": ...} and, where known, "caption"
    damaged-00000.jsonl  a line per image of the shard that was left out, {"id": ...}; only if any
    file_hashes.json     hashes of the images, so that a build that goes on need not read them again

`index_build.build` writes it, `faiss_engine` puts its own files beside these.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blindvalm_jax import files
from blindvalm_jax.data import output
from blindvalm_jax.data.memory_maps import MemoryMaps, StoredArray
from blindvalm_jax.data.output import FileRecord
from blindvalm_jax.errors import UserError

FORMAT = 1
FILE_NAME = "manifest.json"
KIND = output.Kind(marker=".blindvalm_index", maker="the index builder", content="image vectors")
DTYPES = ("float16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipHashes:
    """The two towers of an index: hashes of their parameters, and where they came from."""

    vision_sha256: str
    text_sha256: str
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Consecutive images: how many, the file of their vectors and that of their records.

    damaged: the file that names the images among them that could not be read, None if all could;
    `count` is without them.
    """

    count: int
    vectors: FileRecord
    items: FileRecord
    damaged: FileRecord | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexManifest:
    """All that is known of an index.

    key: hash of what was asked for and of every shard; equal keys mean equal vectors of the same
    images.
    images: fingerprint of the images. source: where they are from, in words. clip: the same of the
    towers. captions: whether the records hold them. damaged: images left out, not in `count`.
    """

    key: str
    count: int
    width: int
    dtype: str
    shard_size: int
    shards: tuple[Shard, ...]
    vision_sha256: str
    text_sha256: str
    clip: str
    images: str
    source: str
    captions: bool
    damaged: int = 0
    format: int = FORMAT

    def save(self, directory: Path, *, work: Path) -> None:
        """Writes the manifest; a directory that holds it is complete."""
        with files.replacing(directory / FILE_NAME, work=work) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def index_key(plan: Mapping[str, Any], shards: tuple[Shard, ...]) -> str:
    """The key of an index."""
    # Without what is None: an index that lacks no image has the key it always had.
    contents = [dataclasses.asdict(shard).items() for shard in shards]
    whole = [{name: value for name, value in items if value is not None} for items in contents]
    values = [dict(plan), whole]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_manifest(directory: Path) -> IndexManifest:
    """Reads the manifest of an index.

    Raises:
      UserError: there is none, it is of another version, or it is damaged.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        begun = (directory / KIND.marker).exists()
        raise UserError(
            f"{directory} holds no finished image index: "
            + ("build it again, it goes on where it stopped" if begun else "build one there")
        )
    values = files.read_object(path)
    if values.get("format") != FORMAT:
        raise UserError(
            f"{path} is of index format {values.get('format')!r}, this program reads {FORMAT}: "
            "build the index again"
        )
    try:
        found = IndexManifest(**{**values, "shards": tuple(map(_shard, values["shards"]))})
        if found.dtype not in DTYPES or sum(shard.count for shard in found.shards) != found.count:
            raise ValueError(f"{found.count} vectors of {found.dtype} do not fit its shards")
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}): delete {directory}, build it again"
        ) from error
    return found


def _shard(values: Any) -> Shard:
    return Shard(
        count=values["count"],
        vectors=FileRecord(**values["vectors"]),
        items=FileRecord(**values["items"]),
        damaged=FileRecord(**values["damaged"]) if values.get("damaged") else None,  # None: older
    )


class Vectors:
    """The vectors [M, E] of an index, read-only, through memory maps of its shards."""

    def __init__(self, directory: Path, manifest: IndexManifest) -> None:
        """Maps nothing yet."""
        self.shape = (manifest.count, manifest.width)
        self.dtype = np.dtype(manifest.dtype)
        self._shards = manifest.shards
        self._ends = list(itertools.accumulate(shard.count for shard in manifest.shards))
        arrays = [
            StoredArray(directory / shard.vectors.file, (shard.count, manifest.width), self.dtype)
            for shard in manifest.shards
        ]
        self._maps = MemoryMaps(arrays, remedy=f"delete {directory}, build it again")

    def __len__(self) -> int:
        """M."""
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Consecutive vectors in the dtype of the index."""
        first, last, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"a step of 1 is possible, got {step}")
        found = [np.zeros((0, self.shape[1]), self.dtype)]
        for number, (shard, end) in enumerate(zip(self._shards, self._ends, strict=True)):
            begin = end - shard.count
            if first < end and begin < last:
                found.append(self._maps[number][max(first - begin, 0) : last - begin])
        return found[1] if len(found) == 2 else np.concatenate(found)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The vectors of any indices [..], float32 [.., E].

        Raises:
          IndexError: an index below 0 or not below M.
        """
        flat = np.asarray(indices).reshape(-1)
        if flat.size and not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"vectors {flat.min()} ... {flat.max()} of {len(self)}")
        found = np.empty((flat.size, self.shape[1]), np.float32)
        numbers = np.searchsorted(self._ends, flat, side="right")
        for number in np.unique(numbers):
            here = numbers == number
            begin = self._ends[number] - self._shards[number].count
            found[here] = self._maps[int(number)][flat[here] - begin]
        return found.reshape(*np.shape(indices), self.shape[1])

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """All vectors in order, `size` at once: the first index of a block, and float32 [b, E]."""
        for first in range(0, len(self), size):
            yield first, self[first : first + size].astype(np.float32)


class ImageIndex:
    """A finished index: `manifest`, `vectors`, and the record of each image."""

    def __init__(self, directory: Path, manifest: IndexManifest) -> None:
        """Use `open`, which checks."""
        self.directory, self.manifest = directory, manifest
        self.vectors = Vectors(directory, manifest)

    @classmethod
    def open(cls, directory: str | Path) -> ImageIndex:
        """Opens an index whose files are there in the sizes that its manifest gives.

        Raises:
          UserError: no finished index, or a file is missing or of another size.
        """
        directory = Path(directory)
        manifest = load_manifest(directory)
        output.check_files(directory, _records(manifest))
        return cls(directory, manifest)

    def check_tower(self, text_sha256: str) -> None:
        """Refuses queries of a text tower that is not of the index's CLIP."""
        if text_sha256 != self.manifest.text_sha256:
            raise UserError(
                f"the index {self.directory} belongs to the text tower "
                f"{self.manifest.text_sha256} ({self.manifest.clip}), got {text_sha256}: use that "
                "CLIP's text tower or build an index with this one's image tower"
            )

    def verify(self) -> None:
        """Reads every file of the manifest and refuses another hash; see `faiss_engine.verify`."""
        output.check_files(self.directory, _records(self.manifest), content=True)

    def items(self, indices: np.ndarray) -> list[dict[str, str]]:
        """Records of images, for people: {"id": ...} and perhaps "caption"; one for each index."""
        wanted = [int(index) for index in np.reshape(indices, -1)]
        found: dict[int, dict[str, str]] = {}
        begin = 0
        for shard in self.manifest.shards:
            here = {index - begin for index in wanted if begin <= index < begin + shard.count}
            if here:
                with (self.directory / shard.items.file).open(encoding="utf-8") as lines:
                    for place, line in enumerate(lines):
                        if place in here:
                            found[begin + place] = json.loads(line)
            begin += shard.count
        return [found[index] for index in wanted]


def _records(manifest: IndexManifest) -> Iterator[FileRecord]:
    for shard in manifest.shards:
        yield shard.vectors
        yield shard.items
        if shard.damaged is not None:
            yield shard.damaged
