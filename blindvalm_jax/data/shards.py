"""Shards: windows cut from the units of a split and written as ArrayRecord files.

The stream of a split is its units one after the other; positions in it are global. Shards depend
only on the stream, never on how it was cut into units or on who writes them.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from blindvalm_jax import files
from blindvalm_jax.data import manifest
from blindvalm_jax.data.manifest import Shard
from blindvalm_jax.data.units import Encoding, Unit
from blindvalm_jax.grounding import segments

# One record a group: any window is read alone. Ids hardly compress, so they are stored plainly.
WRITER_OPTIONS = "group_size:1,uncompressed"
TOWER_LENGTH_MULTIPLE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """A unit and the stream positions of its first token and first tower token."""

    unit: Unit
    begin: int
    tower_begin: int

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.begin + self.unit.tokens

    @property
    def tower_end(self) -> int:
        """Position after its last tower token."""
        return self.tower_begin + self.unit.tower_tokens


@dataclasses.dataclass(frozen=True)
class Stream:
    """Consecutive units of a split."""

    parts: tuple[Placed, ...]

    @classmethod
    def of(cls, units: Sequence[Unit]) -> Stream:
        """The whole stream of a split."""
        parts = []
        begin = tower_begin = 0
        for unit in units:
            parts.append(Placed(unit=unit, begin=begin, tower_begin=tower_begin))
            begin += unit.tokens
            tower_begin += unit.tower_tokens
        return cls(tuple(parts))

    @property
    def tokens(self) -> int:
        """Position after the last token."""
        return self.parts[-1].end if self.parts else 0

    @property
    def tower_tokens(self) -> int:
        """Position after the last tower token."""
        return self.parts[-1].tower_end if self.parts else 0

    def around(self, first: int, last: int) -> Stream:
        """The units that hold tokens first ... last - 1."""
        low = bisect.bisect_right(self.parts, first, key=lambda part: part.end)
        high = bisect.bisect_left(self.parts, last, key=lambda part: part.begin)
        return Stream(self.parts[low:high])

    def tokens_between(self, first: int, last: int) -> np.ndarray:
        """Ids of tokens first ... last - 1, as far as there are."""
        return self._read("tokens", [part.begin for part in self.parts], first, last)

    def seen_between(self, first: int, last: int) -> np.ndarray:
        """For tokens first ... last - 1: how many tower tokens of the stream each may look at."""
        return self._read("seen", [part.begin for part in self.parts], first, last)

    def tower_between(self, first: int, last: int) -> np.ndarray:
        """Ids of tower tokens first ... last - 1."""
        return self._read("tower", [part.tower_begin for part in self.parts], first, last)

    def _read(self, name: str, begins: list[int], first: int, last: int) -> np.ndarray:
        found = [np.zeros(0, np.int64)]
        for part, begin in zip(self.parts, begins, strict=True):
            if first < last and begin < last:
                with np.load(part.unit.path) as arrays:
                    values = arrays[name][max(first - begin, 0) : last - begin].astype(np.int64)
                found.append(values + part.tower_begin if name == "seen" else values)
        return np.concatenate(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardJob:
    """Windows first ... last - 1 of a stream, to be written as `path`."""

    path: Path
    work: Path
    stream: Stream
    first: int
    last: int
    tower_length: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """A finished shard and its segments: how many, in how many tokens, how many full ones."""

    shard: Shard
    segments: int
    segment_tokens: int
    full_segments: int


def count_windows(tokens: int, sequence_length: int) -> int:
    """Windows that make every token but the first a target exactly once."""
    return max(0, -(-(tokens - 1) // sequence_length))


def tower_length(streams: Sequence[Stream], sequence_length: int) -> int:
    """Tower tokens of the fullest window of all streams, rounded up to a multiple of 64."""
    most = 1
    for stream in streams:
        before = 0
        for seen in _seen_at_window_ends(stream, sequence_length):
            most = max(most, seen - before)
            before = seen
    return -(-most // TOWER_LENGTH_MULTIPLE) * TOWER_LENGTH_MULTIPLE


def pack(encoding: Encoding, job: ShardJob) -> Packed:
    """Writes a shard unless it is complete; runs in a worker process."""
    record = job.work / f"{job.path.parent.name}-{job.path.name}.json"
    found = _packed_before(record, job.path)
    if found is not None:
        return found
    records, counts = _windows(encoding, job)
    with files.replacing(job.path, work=job.work) as partial:
        _write(records, partial)
        with partial.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        shard = Shard(
            file=f"{job.path.parent.name}/{job.path.name}",
            windows=len(records),
            bytes=partial.stat().st_size,
            sha256=digest,
        )
        packed = Packed(shard=shard, **counts)
        with files.replacing(record) as partial_record:
            partial_record.write_text(json.dumps(dataclasses.asdict(packed)))
    return packed


def _packed_before(record: Path, path: Path) -> Packed | None:
    """What is known of a shard that is there, whole as far as its size tells."""
    try:
        values = json.loads(record.read_bytes())
        found = Packed(**{**values, "shard": Shard(**values["shard"])})
        return found if path.stat().st_size == found.shard.bytes else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(records: np.ndarray, path: Path) -> None:
    try:
        writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
        for item in records:
            writer.write(item.tobytes())
        writer.close()
    except RuntimeError as error:  # all that ArrayRecord raises, on a full disk too
        raise OSError(f"cannot write {path}: {' '.join(str(error).split())[:200]}") from error


def _seen_at_window_ends(stream: Stream, sequence_length: int) -> Iterator[int]:
    """Tower tokens of the stream seen by the last input of every window, one unit in memory."""
    position = sequence_length - 1
    for part in stream.parts:
        if position < part.end:
            with np.load(part.unit.path) as arrays:
                seen = arrays["seen"][position - part.begin :: sequence_length].astype(np.int64)
            yield from (seen + part.tower_begin).tolist()
            position += sequence_length * len(seen)
    yield stream.tower_tokens


def _windows(encoding: Encoding, job: ShardJob) -> tuple[np.ndarray, dict[str, int]]:
    """Records of a shard (structured array), and the counts of its segments."""
    length = encoding.sequence_length
    size = job.last - job.first
    begin = job.first * length
    tokens = np.full(size * length + 1, encoding.tokenizer.pad_id, np.int64)
    real = job.stream.tokens_between(begin, begin + len(tokens))
    tokens[: len(real)] = real
    rows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]
    counts = np.minimum(len(real) - np.arange(size) * length, length + 1)
    if encoding.tower_tokenizer is None:
        table = manifest.tower_table(encoding.tokenizer)
        fields: dict[str, np.ndarray] = {}
        tower, tower_counts = table[rows[:, :length]], np.minimum(counts, length)
    else:
        fields, tower_counts = _tower_fields(job, length=length, real=len(real))
        tower = fields["tower_tokens"]
    starts = segments.starts(
        tower, rule=encoding.rule, separators=encoding.separators, counts=tower_counts
    )
    fields |= {"count": counts, "tokens": rows}
    fields["starts"] = np.packbits(starts, axis=1, bitorder="little")
    records = np.zeros(size, layout(encoding, job.tower_length))
    for name, values in fields.items():
        records[name] = values
    return records, _segment_counts(starts, tower_counts, encoding.separators.longest)


def layout(encoding: Encoding, tower_length: int | None) -> np.dtype[Any]:
    """Layout of the records these settings give."""
    tower = encoding.tower_tokenizer or encoding.tokenizer
    return manifest.record_dtype(
        sequence_length=encoding.sequence_length,
        vocab_size=encoding.tokenizer.vocab_size,
        tower_length=tower_length,
        tower_vocab_size=tower.vocab_size - tower.lm_offset,
    )


def _tower_fields(
    job: ShardJob, *, length: int, real: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Tower tokens and index of the windows (aligned mode), and the count of their tower tokens.

    A window's tower tokens are those that its last input may look at and the token before the
    window may not.
    """
    begin = job.first * length
    size = job.last - job.first
    seen = job.stream.seen_between(max(begin - 1, 0), begin + min(real, size * length))
    if begin == 0:
        seen = np.append(0, seen)
    # seen[i] belongs to stream position begin - 1 + i; behind the end of the text it stays.
    seen = np.append(seen, np.repeat(seen[-1], size * length + 1 - len(seen)))
    before = seen[:-1:length]
    counts = seen[length::length] - before
    index = seen[1:].reshape(size, length) - before[:, None]
    ids = job.stream.tower_between(int(before[0]), int(seen[-1]))
    columns = np.arange(job.tower_length or 0)
    inside = columns < counts[:, None]
    padded = np.append(ids, 0)
    place = np.where(inside, before[:, None] - before[0] + columns, len(ids))
    return {"tower_tokens": padded[place], "tower_index": index}, counts


def _segment_counts(starts: np.ndarray, counts: np.ndarray, longest: int) -> dict[str, int]:
    rows = [segments.lengths(row[:count]) for row, count in zip(starts, counts, strict=True)]
    found = np.concatenate(rows) if rows else np.zeros(0, int)
    return {
        "segments": len(found),
        "segment_tokens": int(found.sum()),
        "full_segments": int((found == longest).sum()),
    }
