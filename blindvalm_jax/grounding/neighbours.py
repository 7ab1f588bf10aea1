"""Neighbours found ahead of time: for every token of a split's windows the ids of its K images.

    manifest.json           what they are neighbours of; written last
    neighbours-00000.npy    uint32 [n, T, K], read through memory maps

A run that reads them searches nothing; the ids lead to vectors in the image index.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blindvalm_jax import files
from blindvalm_jax.data import output, pipeline
from blindvalm_jax.data.memory_maps import MemoryMaps, StoredArray
from blindvalm_jax.data.output import FileRecord
from blindvalm_jax.data.windows import Windows
from blindvalm_jax.data.workers import Progress
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding.index import ImageIndex
from blindvalm_jax.grounding.retrieval import Engine

FORMAT = 1
FILE_NAME = "manifest.json"
KIND = output.Kind(marker=".blindvalm_neighbours", maker="neighbours.write", content="neighbours")
WINDOWS_PER_SHARD = 4096  # 32 MiB of 512 tokens and 4 neighbours
Features = Callable[[pipeline.Batch], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeighboursManifest:
    """All that is known of a directory of neighbours.

    windows_key, split, windows, length: the windows, how many, and T. index_key: of the image
    index. text_sha256, readout, dtype: the tower that made the queries, how it was read, and what
    it computed in. neighbours: K. engine: settings of the search.
    """

    windows_key: str
    split: str
    windows: int
    length: int
    index_key: str
    text_sha256: str
    readout: str
    dtype: str
    neighbours: int
    engine: dict[str, Any]
    windows_per_shard: int
    shards: tuple[FileRecord, ...]
    format: int = FORMAT

    @property
    def key(self) -> str:
        """Tells these ids from others."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()


def write(
    out: Path,
    windows: Windows,
    index: ImageIndex,
    features: Features,
    engine: Engine,
    *,
    text_sha256: str,
    readout: str,
    dtype: str = "float32",
    batch_size: int = 16,
    windows_per_shard: int = WINDOWS_PER_SHARD,
    rounding: Mapping[str, Any] | None = None,
) -> NeighboursManifest:
    """Writes the neighbours of all windows to `out`, goes on with them, or keeps finished ones.

    features: rows as `pipeline.eval_batches` yields them, `batch_size` of them in the order of the
    windows -> queries float32 [b, T, E]; the last batch of a shard is filled with its last row.
    text_sha256, readout, dtype: the tower behind `features`, how it is read, what it computes in.
    rounding: what decides how `features` rounds, besides `batch_size`: a run of which a shard is
    finished goes on with the same only.

    Raises:
      UserError: the tower is not the index's; the engine searches another index; `out` holds
        something else or neighbours of something else.
    """
    index.check_tower(text_sha256)
    if engine.settings["index"] != index.manifest.key:
        raise UserError(
            f"the engine searches the index {engine.settings['index']!r}, expected "
            f"{index.manifest.key!r} of {index.directory}"
        )
    if batch_size < 1 or windows_per_shard < 1:
        raise UserError(
            f"batch_size {batch_size} and windows_per_shard {windows_per_shard} must be 1 or more"
        )
    plan: dict[str, Any] = {
        **_of_windows(windows),
        "index_key": index.manifest.key,
        "text_sha256": text_sha256,
        "readout": readout,
        "dtype": dtype,
        "neighbours": engine.neighbours,
        "engine": dict(engine.settings),
        "windows_per_shard": windows_per_shard,
        "format": FORMAT,
    }
    output.claim(out, [], kind=KIND)
    if (out / FILE_NAME).exists():  # perhaps read-only
        return _finished(out, plan)
    with output.writing(out) as work:
        if (out / FILE_NAME).exists():  # by the process that this one waited for
            return _finished(out, plan)
        output.keep_plan(work, plan, {"batch_size": batch_size, **(rounding or {})})
        with Progress("find neighbours", total=len(windows), unit="win") as progress:
            job = _Job(windows, features, engine, batch_size, progress)
            shards = tuple(_write_shards(out, work, job, windows_per_shard))
        done = NeighboursManifest(**plan, shards=shards)
        with files.replacing(out / FILE_NAME, work=work) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(done), indent=1) + "\n")
        output.remove_work(work)
    return done


class Neighbours:
    """Finished neighbours: `neighbours[i]` is uint32 [T, K], best first, of window i."""

    def __init__(self, directory: Path, manifest: NeighboursManifest) -> None:
        """Use `open`, which checks."""
        self.directory, self.manifest = directory, manifest
        each = manifest.windows_per_shard
        arrays = [
            StoredArray(
                directory / shard.file,
                (min(each, manifest.windows - first), manifest.length, manifest.neighbours),
                np.dtype(np.uint32),
            )
            for shard, first in zip(manifest.shards, range(0, manifest.windows, each), strict=True)
        ]
        self._maps = MemoryMaps(arrays, remedy=f"delete {directory}, write it again")

    @classmethod
    def open(cls, directory: str | Path) -> Neighbours:
        """Opens a directory whose files are there in the sizes that its manifest gives.

        Raises:
          UserError: nothing finished is there, or a file is missing or of another size.
        """
        directory = Path(directory)
        manifest = _load(directory)
        output.check_files(directory, manifest.shards)
        return cls(directory, manifest)

    def check(
        self,
        *,
        windows: Windows,
        index: ImageIndex,
        text_sha256: str,
        readout: str,
        neighbours: int,
    ) -> None:
        """Refuses neighbours of other windows, index, tower or readout, or another number of them.

        Raises:
          UserError: the first thing that differs.
        """
        wanted = {
            **_of_windows(windows),
            "index_key": index.manifest.key,
            "text_sha256": text_sha256,
            "readout": readout,
            "neighbours": neighbours,
        }
        output.check_same(wanted, dataclasses.asdict(self.manifest), directory=self.directory)

    def __len__(self) -> int:
        """Windows."""
        return self.manifest.windows

    def __getitem__(self, window: int) -> np.ndarray:
        """The neighbours of a window, uint32 [T, K].

        Raises:
          UserError: its file is damaged.
        """
        window = int(window)
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} of {len(self)}")
        number, place = divmod(window, self.manifest.windows_per_shard)
        return np.asarray(self._maps[number][place])


@dataclasses.dataclass(frozen=True)
class _Job:
    windows: Windows
    features: Features
    engine: Engine
    batch_size: int
    progress: Progress


def _of_windows(windows: Windows) -> dict[str, Any]:
    return {
        "windows_key": windows.manifest.key,
        "split": _split_name(windows),
        "windows": len(windows),
        "length": windows.manifest.sequence_length,
    }


def _split_name(windows: Windows) -> str:
    return next(name for name, split in windows.manifest.splits.items() if split is windows.split)


def _load(directory: Path) -> NeighboursManifest:
    path = directory / FILE_NAME
    hint = "write them again" if (directory / KIND.marker).exists() else "write them first"
    values = files.read_object(path, hint=f"no finished neighbours there, {hint}")
    if values.get("format") != FORMAT:
        raise UserError(
            f"{path} is of format {values.get('format')!r}, this program reads {FORMAT}: write "
            "the neighbours again"
        )
    try:
        shards = tuple(FileRecord(**shard) for shard in values["shards"])
        found = NeighboursManifest(**{**values, "shards": shards})
        if len(shards) != -(-found.windows // found.windows_per_shard):
            raise ValueError(f"{len(shards)} shards of {found.windows} windows")
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}): delete {directory}, write it again"
        ) from error
    return found


def _finished(out: Path, plan: Mapping[str, Any]) -> NeighboursManifest:
    found = _load(out)
    output.check_same(plan, dataclasses.asdict(found), directory=out)
    if (out / "work").is_dir():  # left by a run killed at its very end
        with output.writing(out) as work:
            output.remove_work(work)
    return found


def _write_shards(out: Path, work: Path, job: _Job, size: int) -> Iterator[FileRecord]:
    for number, first in enumerate(range(0, len(job.windows), size)):
        last = min(first + size, len(job.windows))
        path = out / f"neighbours-{number:05d}.npy"
        record = output.find_file(path, work)
        if record is None:
            found = np.concatenate(list(_search(job, first, last)))
            record = output.write_file(path, work, output.npy(found))
        else:
            job.progress.advance(last - first)
        yield record


def _search(job: _Job, first: int, last: int) -> Iterator[np.ndarray]:
    """Ids uint32 [b, T, K] of windows first ... last - 1, batch after batch."""
    length = job.windows.manifest.sequence_length
    for begin in range(first, last, job.batch_size):
        places = np.minimum(np.arange(begin, begin + job.batch_size), last - 1)
        rows = [pipeline.window_row(job.windows[int(place)], tower=True) for place in places]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        queries = np.asarray(job.features(batch), np.float32)
        if queries.ndim != 3 or queries.shape[:2] != (job.batch_size, length):
            raise UserError(
                f"features of shape {queries.shape}, expected ({job.batch_size}, {length}, E)"
            )
        flat = queries.reshape(-1, queries.shape[-1])
        index = job.engine.search(flat, vectors=False).index_QK
        real = min(job.batch_size, last - begin)
        job.progress.advance(real)
        yield np.asarray(index, np.uint32).reshape(job.batch_size, length, -1)[:real]
