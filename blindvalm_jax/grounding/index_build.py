"""Builds an image index: every image through CLIP's image tower, shard after shard, resumable.

A run killed at any point and started again ends with the same bytes; `manifest.json` comes last.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from blindvalm_jax.data import output
from blindvalm_jax.data.workers import Progress
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import index
from blindvalm_jax.grounding.index import ClipHashes, IndexManifest, Shard

SHARD_SIZE = 1 << 18  # images; 400 MB of a width of 768 in float16, held in memory till written
Encode = Callable[[np.ndarray], np.ndarray]


class Images(Protocol):
    """Images of one size. They are read in order, from another thread than the caller's."""

    @property
    def fingerprint(self) -> str:
        """Tells these images, ids and captions from others, and outlives the process."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, place: int, /) -> tuple[str, np.ndarray]:
        """An id that leads back to the image, and the image: uint8 [H, W, 3]."""


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
) -> IndexManifest:
    """Writes the index of `images` to `out`, goes on with it, or keeps it if it is there already.

    encode: images uint8 [b, H, W, 3] -> float32 [b, E], always called with b = `batch_size`: the
    last batch of a shard is filled with black images, whose vectors are dropped. So the bytes do
    not depend on `batch_size` as far as the rows of `encode` do not depend on each other and on b.
    source: where the images are from, in words. caption: of the image at a place.

    Raises:
      UserError: `out` holds something else, or an index of other images, another tower or other
        settings; an image of another size; a vector that is not finite in `dtype`.
    """
    _check(images, batch_size=batch_size, shard_size=shard_size, dtype=dtype)
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
    output.claim(out, [], kind=index.KIND)
    if (out / index.FILE_NAME).exists():  # perhaps read-only
        return _finished(out, plan)
    with output.writing(out) as work:
        if (out / index.FILE_NAME).exists():  # by the process that this one waited for
            return _finished(out, plan)
        output.keep_plan(work, plan)
        with Progress("embed images", total=len(images), unit="img") as progress:
            shape = np.shape(images[0][1])
            job = _Job(images, shape, encode, batch_size, np.dtype(dtype), caption, progress)
            shards = tuple(_write_shards(out, work, job, shard_size))
        done = IndexManifest(
            **plan,
            key=index.index_key(plan, shards),
            width=_width(out, shards),
            shards=shards,
            clip=clip.source,
            source=source,
        )
        done.save(out, work=work)
        output.remove_work(work)
    return done


@dataclasses.dataclass(frozen=True)
class _Job:
    images: Images
    shape: tuple[int, ...]
    encode: Encode
    batch_size: int
    dtype: np.dtype[Any]
    caption: Callable[[int], str] | None
    progress: Progress


def _check(images: Images, *, batch_size: int, shard_size: int, dtype: str) -> None:
    if dtype not in index.DTYPES:
        raise UserError(f"vectors are kept as {' or '.join(index.DTYPES)}, got {dtype!r}")
    if batch_size < 1 or shard_size < 1:
        raise UserError(
            f"batch_size {batch_size} and shard_size {shard_size} of an index must be 1 or more"
        )
    if not len(images):
        raise UserError("there are no images: an index needs at least one")


def _finished(out: Path, plan: dict[str, Any]) -> IndexManifest:
    found = index.load_manifest(out)
    output.check_same(plan, dataclasses.asdict(found), directory=out)
    if (out / "work").is_dir():  # left by a run killed at its very end
        with output.writing(out) as work:
            output.remove_work(work)
    return found


def _write_shards(out: Path, work: Path, job: _Job, shard_size: int) -> Iterator[Shard]:
    for number, first in enumerate(range(0, len(job.images), shard_size)):
        last = min(first + shard_size, len(job.images))
        paths = out / f"vectors-{number:05d}.npy", out / f"items-{number:05d}.jsonl"
        vectors, items = (output.find_file(path, work) for path in paths)
        if vectors is None or items is None:
            rows, lines = _embed(job, first, last)
            items = output.write_file(paths[1], work, lines)
            vectors = output.write_file(paths[0], work, output.npy(rows))
        else:
            job.progress.advance(last - first)
        yield Shard(count=last - first, vectors=vectors, items=items)


def _embed(job: _Job, first: int, last: int) -> tuple[np.ndarray, bytes]:
    """Vectors of images first ... last - 1, and the lines of their records."""
    rows: list[np.ndarray] = []
    lines: list[str] = []
    for ids, batch in _batches(job, first, last):
        found = np.asarray(job.encode(batch))
        if found.ndim != 2 or len(found) != job.batch_size:
            raise UserError(
                f"the image tower gave {found.shape} for {job.batch_size} images, expected "
                f"({job.batch_size}, E)"
            )
        with np.errstate(over="ignore"):
            kept = found[: len(ids)].astype(job.dtype)
        wrong = np.flatnonzero(~np.isfinite(kept).all(axis=1))
        if wrong.size:
            raise UserError(
                f"the vector of image {ids[wrong[0]]} is not finite in {job.dtype}: check the "
                "image tower, or keep vectors as float32"
            )
        rows.append(kept)
        for name in ids:
            record = {"id": name}
            if job.caption is not None:
                record["caption"] = job.caption(first + len(lines))
            lines.append(json.dumps(record, ensure_ascii=False))
        job.progress.advance(len(ids))
    return np.concatenate(rows), "".join(f"{line}\n" for line in lines).encode()


def _batches(job: _Job, first: int, last: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """Ids and full batches; the next one is read while the caller works on one."""
    begins = range(first, last, job.batch_size)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_read, job, first, last)
        for begin in begins:
            found = waiting.result()
            if begin != begins[-1]:
                waiting = pool.submit(_read, job, begin + job.batch_size, last)
            yield found


def _read(job: _Job, first: int, last: int) -> tuple[list[str], np.ndarray]:
    ids: list[str] = []
    batch = np.zeros((job.batch_size, *job.shape), np.uint8)
    for place in range(first, min(first + job.batch_size, last)):
        name, image = job.images[place]
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.shape != job.shape or image.shape[2:] != (3,):
            raise UserError(
                f"image {name} is {image.dtype} {image.shape}, expected uint8 [H, W, 3] and the "
                f"size of the first image, {job.shape[:2]}"
            )
        ids.append(name)
        batch[len(ids) - 1] = image
    return ids, batch


def _width(out: Path, shards: tuple[Shard, ...]) -> int:
    widths = {np.load(out / shard.vectors.file, mmap_mode="r").shape[1] for shard in shards}
    if len(widths) > 1:
        raise UserError(
            f"{out} holds vectors of widths {sorted(widths)}: the image tower changed; delete it "
            "and build it again"
        )
    return int(widths.pop())
