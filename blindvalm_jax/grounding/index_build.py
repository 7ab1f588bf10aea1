"""Builds an image index: every image through CLIP's image tower, shard after shard, resumable.

A run killed at any point and started again ends with the same bytes; `manifest.json` comes last.
Batches are whole again after a restart, and what decides how the tower rounds must be the same.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from blindvalm_jax.data import output, workers
from blindvalm_jax.data.images import DamagedImage
from blindvalm_jax.data.output import FileRecord
from blindvalm_jax.data.workers import Progress
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import index
from blindvalm_jax.grounding.index import ClipHashes, IndexManifest, Shard

SHARD_SIZE = 1 << 18  # images; 400 MB of a width of 768 in float16, held in memory till written
HASHES_FILE = "file_hashes.json"  # in the directory of an index
Encode = Callable[[np.ndarray], np.ndarray]
_MOST_THREADS = 16
_BATCHES_AHEAD = 2


class Images(Protocol):
    """Images of one size. They are read by several threads, a little ahead of the encoder."""

    @property
    def fingerprint(self) -> str:
        """Tells these images, ids and captions from others, and outlives the process."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, place: int, /) -> tuple[str, np.ndarray]:
        """An id that leads back to the image, and the image: uint8 [H, W, 3].

        Raises:
          DamagedImage: it cannot be decoded, now or ever.
        """


def build(
    out: Path,
    images: Images,
    encode: Encode,
    *,
    clip: ClipHashes,
    source: str,
    batch_size: int = 64,
    shard_size: int = SHARD_SIZE,
    dtype: str = "float16",
    caption: Callable[[int], str] | None = None,
    skip_damaged: bool = False,
    rounding: Mapping[str, Any] | None = None,
) -> IndexManifest:
    """Writes the index of `images` to `out`, goes on with it, or keeps it if it is there already.

    encode: images uint8 [b, H, W, 3] -> float32 [b, E], always called with b = `batch_size`: the
    last batch of a shard is filled with black images, whose vectors are dropped. So the bytes do
    not depend on `batch_size` as far as the rows of `encode` do not depend on each other and on b.
    source: where the images are from, in words. caption: of the image at a place.
    skip_damaged: images that raise `DamagedImage` are left out, and named beside the shard; else
    the first ends the build. rounding: what decides how `encode` rounds, besides `batch_size`: a
    build of which a shard is finished goes on with the same only.

    Raises:
      UserError: `out` holds something else, or an index of other images, another tower or other
        settings; an image of another size; a vector that is not finite in `dtype`; no image, or
        none that can be read; images were left out there, and `skip_damaged` is not given.
    """
    _check(images, batch_size=batch_size, shard_size=shard_size, dtype=dtype)
    output.claim(out, [], kind=index.KIND)
    plan: dict[str, Any] = {
        "format": index.FORMAT,
        "count": len(images),
        "dtype": dtype,
        "shard_size": shard_size,
        "vision_sha256": clip.vision_sha256,
        "text_sha256": clip.text_sha256,
        "images": images.fingerprint,
        "captions": caption is not None,
    }
    if (out / index.FILE_NAME).exists():  # perhaps read-only
        return _finished(out, plan, skip_damaged=skip_damaged)
    with output.writing(out) as work:
        if (out / index.FILE_NAME).exists():  # by the process that this one waited for
            return _finished(out, plan, skip_damaged=skip_damaged)
        output.keep_plan(work, plan, {"batch_size": batch_size, **(rounding or {})})
        with Progress("embed images", total=len(images), unit="img") as progress:
            job = _Job(
                images=images,
                shape=_shape(images, skip_damaged=skip_damaged),
                encode=encode,
                batch_size=batch_size,
                dtype=np.dtype(dtype),
                caption=caption,
                skip_damaged=skip_damaged,
                progress=progress,
            )
            shards = tuple(_write_shards(out, work, job, shard_size))
        kept = sum(shard.count for shard in shards)
        values = {**plan, "count": kept, "damaged": len(images) - kept}
        done = IndexManifest(
            **values,
            key=index.index_key(plan, shards),
            width=_width(out, shards),
            shards=shards,
            clip=clip.source,
            source=source,
        )
        done.save(out, work=work)
        output.remove_work(work)
    return done


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    images: Images
    shape: tuple[int, ...]
    encode: Encode
    batch_size: int
    dtype: np.dtype[Any]
    caption: Callable[[int], str] | None
    skip_damaged: bool
    progress: Progress


@dataclasses.dataclass(frozen=True)
class _Picture:
    """An image that was read; None: it is damaged."""

    place: int
    id: str
    image: np.ndarray | None


def _check(images: Images, *, batch_size: int, shard_size: int, dtype: str) -> None:
    if dtype not in index.DTYPES:
        raise UserError(f"vectors are kept as {' or '.join(index.DTYPES)}, got {dtype!r}")
    if batch_size < 1 or shard_size < 1:
        raise UserError(
            f"batch_size {batch_size} and shard_size {shard_size} of an index must be 1 or more"
        )
    if not len(images):
        raise UserError("there are no images: an index needs at least one")


def _finished(out: Path, plan: dict[str, Any], *, skip_damaged: bool) -> IndexManifest:
    found = index.load_manifest(out)
    there = {**dataclasses.asdict(found), "count": found.count + found.damaged}
    output.check_same(plan, there, directory=out)
    for shard in found.shards:
        _check_damaged(out, shard.damaged, skip_damaged=skip_damaged)
    if (out / "work").is_dir():  # left by a run killed at its very end
        with output.writing(out) as work:
            output.remove_work(work)
    return found


def _check_damaged(out: Path, damaged: FileRecord | None, *, skip_damaged: bool) -> None:
    if damaged is not None and not skip_damaged:
        raise UserError(
            f"{out / damaged.file} names damaged images that were left out: allow that "
            "(--skip_damaged), or mend them and build the index in another directory"
        )


def _shape(images: Images, *, skip_damaged: bool) -> tuple[int, ...]:
    """The shape of the first image that can be read."""
    for place in range(len(images)):
        try:
            return np.shape(images[place][1])
        except DamagedImage:
            if not skip_damaged:
                raise
    raise UserError(f"none of the {len(images)} images can be read: an index needs at least one")


def _write_shards(out: Path, work: Path, job: _Job, shard_size: int) -> Iterator[Shard]:
    for number, first in enumerate(range(0, len(job.images), shard_size)):
        last = min(first + shard_size, len(job.images))
        names = f"vectors-{number:05d}.npy", f"items-{number:05d}.jsonl"
        lost = out / f"damaged-{number:05d}.jsonl"
        vectors, items = (output.find_file(out / name, work) for name in names)
        damaged = output.find_file(lost, work)
        whole = damaged is not None or _rows(out, vectors) == last - first
        if vectors is None or items is None or not whole:
            rows, lines, left_out = _embed(job, first, last)
            lost.unlink(missing_ok=True)
            damaged = output.write_file(lost, work, left_out) if left_out else None
            items = output.write_file(out / names[1], work, lines)
            vectors = output.write_file(out / names[0], work, output.npy(rows))
        else:
            job.progress.advance(last - first)
        _check_damaged(out, damaged, skip_damaged=job.skip_damaged)
        yield Shard(count=_rows(out, vectors), vectors=vectors, items=items, damaged=damaged)


def _rows(out: Path, vectors: FileRecord | None) -> int:
    """How many vectors a file holds."""
    return 0 if vectors is None else len(np.load(out / vectors.file, mmap_mode="r"))


def _embed(job: _Job, first: int, last: int) -> tuple[np.ndarray, bytes, bytes]:
    """Of images first ... last - 1: vectors, the lines of their records, those of damaged ones."""
    rows: list[np.ndarray] = []
    records: list[dict[str, str]] = []
    damaged: list[dict[str, str]] = []
    read = _read_ahead(job, first, last)
    while pictures := list(itertools.islice(read, job.batch_size)):
        good = [picture for picture in pictures if picture.image is not None]
        rows.append(_encode(job, good))
        for picture in good:
            record = {"id": picture.id}
            if job.caption is not None:
                record["caption"] = job.caption(picture.place)
            records.append(record)
        damaged += [{"id": picture.id} for picture in pictures if picture.image is None]
        job.progress.advance(len(pictures))
    return np.concatenate(rows), _lines(records), _lines(damaged)


def _lines(records: list[dict[str, str]]) -> bytes:
    return "".join(f"{json.dumps(x, ensure_ascii=False)}\n" for x in records).encode()


def _encode(job: _Job, pictures: list[_Picture]) -> np.ndarray:
    """The vectors [n, E] of at most a batch, in the dtype they are kept in."""
    batch = np.zeros((job.batch_size, *job.shape), np.uint8)
    for row, picture in enumerate(pictures):
        batch[row] = np.asarray(picture.image)
    found = np.asarray(job.encode(batch))
    if found.ndim != 2 or len(found) != job.batch_size:
        raise UserError(
            f"the image tower gave {found.shape} for {job.batch_size} images, expected "
            f"({job.batch_size}, E)"
        )
    with np.errstate(over="ignore"):
        kept = found[: len(pictures)].astype(job.dtype)
    wrong = np.flatnonzero(~np.isfinite(kept).all(axis=1))
    if wrong.size:
        raise UserError(
            f"the vector of image {pictures[wrong[0]].id} is not finite in {job.dtype}: check the "
            "image tower, or keep vectors as float32"
        )
    return kept


def _read_ahead(job: _Job, first: int, last: int) -> Iterator[_Picture]:
    """Images in order, read by a few threads, at most two batches ahead of the caller."""
    most = _BATCHES_AHEAD * job.batch_size
    waiting: collections.deque[concurrent.futures.Future[_Picture]] = collections.deque()
    threads = min(max(workers.usable_cores(), 2), _MOST_THREADS)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            for place in range(first, last):
                waiting.append(pool.submit(_read, job, place))
                if len(waiting) > most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _read(job: _Job, place: int) -> _Picture:
    try:
        name, image = job.images[place]
    except DamagedImage as error:
        if not job.skip_damaged:
            raise
        print(f"left out: {error}", file=sys.stderr, flush=True)
        return _Picture(place, error.id, None)
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.shape != job.shape or image.shape[2:] != (3,):
        raise UserError(
            f"image {name} is {image.dtype} {image.shape}, expected uint8 [H, W, 3] and the "
            f"size of the first image, {job.shape[:2]}"
        )
    return _Picture(place, name, image)


def _width(out: Path, shards: tuple[Shard, ...]) -> int:
    widths = {np.load(out / shard.vectors.file, mmap_mode="r").shape[1] for shard in shards}
    if len(widths) > 1:
        raise UserError(
            f"{out} holds vectors of widths {sorted(widths)}: the image tower changed; delete it "
            "and build it again"
        )
    return int(widths.pop())
