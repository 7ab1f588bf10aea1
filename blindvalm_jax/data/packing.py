"""`prepare`: text in, a directory of fixed windows out; the same bytes for any number of workers.

First documents become units of token ids (units.py), then units become shards of windows
(shards.py); `manifest.json`, written last, makes the directory complete. A run killed at any point
goes on where it stopped when started again. The stream of a split is
  <eos> document <eos> document ...
and a window holds T + 1 tokens of it, windows advance by T, the last one is padded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blindvalm_jax import files
from blindvalm_jax.config import LONGEST_WINDOW
from blindvalm_jax.data import corpora, manifest, output, shards, units
from blindvalm_jax.data.clip_bpe import ClipTokenizer
from blindvalm_jax.data.corpora import Advance, FileSource, Source
from blindvalm_jax.data.manifest import Manifest, SplitRecord, TokenizerRecord
from blindvalm_jax.data.workers import Progress, Workers
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import segments

if TYPE_CHECKING:
    from blindvalm_jax.data.tokenizers import Tokenizer

WINDOWS_PER_SHARD = 8192
_DECIDING = ("ftfy", "regex", "tokenizers")  # another version of one may give other tokens
_VERSIONED = ("array_record", "blindvalm_jax", "ftfy", "numpy", "regex", "tokenizers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that determines the bytes of a directory of windows.

    sequence_length: T. tower_tokenizer: CLIP's, when the tower does not read the language model's
    own tokens. eval_fraction: share of documents held out, by a hash of their text and at least
    one, unless there is an eval_source.
    """

    source: Source
    tokenizer: Tokenizer
    sequence_length: int
    tower_tokenizer: Tokenizer | None = None
    rule: segments.Rule = "causal"
    longest_segment: int = segments.LONGEST
    eval_fraction: float = 0.01
    eval_source: Source | None = None
    windows_per_shard: int = WINDOWS_PER_SHARD

    @functools.cached_property
    def encoding(self) -> units.Encoding:
        """What the worker processes need.

        Raises:
          UserError: windows too short, or a tower with a tokenizer that is not CLIP's.
        """
        if not 2 <= self.sequence_length <= LONGEST_WINDOW:
            raise UserError(
                f"windows must be 2 ... {LONGEST_WINDOW:,} tokens long, got {self.sequence_length}"
            )
        tower = self.tower_tokenizer
        if tower is not None and tower.fingerprint == self.tokenizer.fingerprint:
            tower = None
        if tower is not None and not isinstance(tower, ClipTokenizer):
            raise UserError(
                f"a tower with a tokenizer of its own must have CLIP's, got {tower.kind}"
            )
        return units.Encoding(
            tokenizer=self.tokenizer,
            tower_tokenizer=tower,
            separators=segments.separators_for(tower or self.tokenizer, self.longest_segment),
            rule=self.rule,
            sequence_length=self.sequence_length,
        )

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The fields of the manifest that are known before any text is tokenized."""
        tower = self.encoding.tower_tokenizer
        return {
            "mode": "shared" if tower is None else "aligned",
            "sequence_length": self.sequence_length,
            "tokenizer": record(self.tokenizer),
            "tower_tokenizer": None if tower is None else record(tower),
            "segments": self.rule,
            "longest_segment": self.longest_segment,
            "eval_rule": _eval_rule(self.eval_fraction, self.eval_source),
            "sources": self.source.describe(),
            "eval_sources": [] if self.eval_source is None else self.eval_source.describe(),
        }

    @functools.cached_property
    def key(self) -> str:
        """Hash of settings and text, wherever it lies: equal keys, equal bytes."""
        settings = {
            name: vars(value) if isinstance(value, TokenizerRecord) else value
            for name, value in self.settings.items()
            if name not in ("sources", "eval_sources")
        }
        texts = [corpora.contents(source) for source in (self.source, self.eval_source) if source]
        versions = [importlib.metadata.version(name) for name in _DECIDING]
        rules = [self.encoding.separators.fingerprint, manifest.FORMAT_VERSION]
        return hash_of([settings, texts, versions, self.windows_per_shard, rules])

    def paths(self) -> list[Path]:
        """Where the text lies."""
        sources = [source for source in (self.source, self.eval_source) if source is not None]
        return [path for source in sources for path in source.paths()]

    def documents(self) -> Iterator[tuple[str, str]]:
        """Every document with the split it belongs to."""
        if self.eval_source is not None:
            for text in self.eval_source.documents():
                yield "eval", text
        fraction = self.eval_fraction if self.eval_source is None else 0.0
        with progress("tokenize", self.source) as report:
            yield from split_documents(self.source, fraction, report.advance)


def progress(title: str, source: Source) -> Progress:
    """How much of a source has been read."""
    unit = "B" if isinstance(source, FileSource) else "examples"
    return Progress(title, total=source.size(), unit=unit)


def split_documents(
    source: Source, eval_fraction: float, advance: Advance | None = None
) -> Iterator[tuple[str, str]]:
    """Every document with its split; held out are those whose hash falls below the fraction.

    Of two or more different texts at least one is held out, the one of the smallest hash, and at
    least one is not, unless the fraction is 0.
    """
    bound = _eval_bound(source, eval_fraction) if eval_fraction > 0 else 0
    for text in source.documents(advance):
        yield ("eval" if units.text_hash(text) < bound else "train"), text


def _eval_bound(source: Source, fraction: float) -> int:
    """The hash below which a document is held out; reads until both splits have one."""
    bound = int(fraction * 2.0**64)
    smallest, largest = 1 << 64, -1
    for text in source.documents():
        found = units.text_hash(text)
        smallest, largest = min(smallest, found), max(largest, found)
        if smallest < bound <= largest:
            return bound
    if smallest == largest:
        return bound
    return largest if largest < bound else smallest + 1


def prepare(
    recipe: Recipe,
    out: Path,
    *,
    workers: int = 0,
    unit_characters: int = units.UNIT_CHARACTERS,
) -> Manifest:
    """Writes the windows of a recipe to `out`, or keeps them if they are there already.

    `workers` (0: one per core) and `unit_characters` change speed and memory, never the bytes.

    Raises:
      UserError: the text cannot be read; a split is left without text; `out` holds other windows,
        the text itself, or what `prepare` did not make.
    """
    output.claim(out, recipe.paths())
    try:
        found = _finished(out, recipe.key)
        if found is not None:  # perhaps read-only
            return found
        with output.locked(out):
            return _finished(out, recipe.key) or _make(
                recipe, out, workers=workers, unit_characters=unit_characters
            )
    except OSError as error:
        raise UserError(
            f"cannot prepare {out}: {error}; run the same again when that is mended, it goes on "
            "where it stopped"
        ) from error


def _make(recipe: Recipe, out: Path, *, workers: int, unit_characters: int) -> Manifest:
    encoding = recipe.encoding
    work = out / "work"
    work.mkdir(exist_ok=True)
    tallies = {split: units.Tally() for split in manifest.SPLITS}
    with Workers(workers, encoding) as pool:
        jobs = units.jobs(
            recipe.documents(),
            directory=work,
            key=recipe.key,
            tallies=tallies,
            unit_characters=unit_characters,
        )
        streams = _encode(pool, jobs)
        _check_splits(recipe, streams, tallies)
        splits, tower_length = _pack(
            pool, encoding, streams, tallies, out=out, shard=recipe.windows_per_shard
        )
    encoding.tokenizer.save(out / "tokenizer")
    if encoding.tower_tokenizer is not None:
        encoding.tower_tokenizer.save(out / "tower_tokenizer")
    done = Manifest(
        key=recipe.key,
        tower_length=tower_length,
        splits=splits,
        versions={name: importlib.metadata.version(name) for name in _VERSIONED},
        **recipe.settings,
    )
    done.save(out, work=work)
    output.remove_work(work)
    return done


def hash_of(values: Any) -> str:
    """SHA-256 (hex) of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def record(tokenizer: Tokenizer) -> TokenizerRecord:
    """What windows and runs keep of a tokenizer."""
    return TokenizerRecord(
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        lm_offset=tokenizer.lm_offset,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        fingerprint=tokenizer.fingerprint,
    )


def _eval_rule(fraction: float, source: Source | None) -> str:
    if source is not None:
        return "eval_files"
    return f"blake2b(text) < {fraction!r}, at least one" if fraction > 0 else "none"


def _finished(out: Path, key: str) -> Manifest | None:
    if not (out / manifest.FILE_NAME).exists():
        return None
    found = manifest.load(out)
    if found.key != key:
        raise UserError(
            f"{out} already holds windows made of other text or with other settings: choose "
            "another directory or delete it"
        )
    with contextlib.suppress(OSError):  # left by a run killed at its very end
        output.remove_work(out / "work")
    return found


def _encode(pool: Workers, jobs: Iterator[tuple[str, units.UnitJob]]) -> dict[str, shards.Stream]:
    found: dict[str, list[units.Unit]] = {split: [] for split in manifest.SPLITS}
    for split, unit in pool.map(units.encode, jobs):
        found[split].append(unit)
    return {split: shards.Stream.of(parts) for split, parts in found.items()}


def _check_splits(
    recipe: Recipe, streams: dict[str, shards.Stream], tallies: dict[str, units.Tally]
) -> None:
    documents = sum(tally.documents for tally in tallies.values())
    for split, stream in streams.items():
        wanted = split == "train" or recipe.eval_fraction > 0 or recipe.eval_source is not None
        if not wanted or shards.count_windows(stream.tokens, recipe.sequence_length):
            continue
        if recipe.eval_source is not None or recipe.eval_fraction == 0:
            raise UserError(f"the {split} files hold no text that gives a token")
        raise UserError(
            f"no text is left for the {split} split: the text is {documents} document(s), a split "
            "takes two that differ, and in a .txt file a blank line ends a document. Put blank "
            "lines between documents, or name held-out text (data.eval_files), or hold out "
            "nothing (data.eval_fraction=0 and eval.every_steps=0)"
        )


def _pack(
    pool: Workers,
    encoding: units.Encoding,
    streams: dict[str, shards.Stream],
    tallies: dict[str, units.Tally],
    *,
    out: Path,
    shard: int,
) -> tuple[dict[str, SplitRecord], int | None]:
    length = encoding.sequence_length
    width = None
    if encoding.tower_tokenizer is not None:
        width = shards.tower_length(list(streams.values()), length)
    _drop_other_shards(out, streams)
    jobs = [
        shards.ShardJob(
            path=out / split / f"windows-{number:05d}.array_record",
            work=out / "work",
            stream=stream.around(max(first * length - 1, 0), last * length + 1),
            first=first,
            last=last,
            tower_length=width,
        )
        for split, stream in streams.items()
        for count in [shards.count_windows(stream.tokens, length)]
        for number, first in enumerate(range(0, count, shard))
        for last in [min(first + shard, count)]
    ]
    packed: dict[str, list[shards.Packed]] = {split: [] for split in streams}
    with Progress("pack", total=sum(job.last - job.first for job in jobs), unit="win") as progress:
        for job, result in zip(jobs, pool.map(shards.pack, jobs), strict=True):
            packed[job.path.parent.name].append(result)
            progress.advance(result.shard.windows)
    return {
        split: _split_record(streams[split], tallies[split], packed[split]) for split in streams
    }, width


def _drop_other_shards(out: Path, streams: dict[str, shards.Stream]) -> None:
    """Keeps finished shards only if they are of this very text; units are named by their text."""
    plan = out / "work" / "plan.txt"
    names = [part.unit.path.name for stream in streams.values() for part in stream.parts]
    wanted = hash_of(names).encode()
    if not plan.exists() or plan.read_bytes() != wanted:
        for split in streams:
            output.remove_shards(out / split)
        with files.replacing(plan) as partial:
            partial.write_bytes(wanted)
    for split in streams:
        (out / split).mkdir(exist_ok=True)


def _split_record(
    stream: shards.Stream, tally: units.Tally, packed: list[shards.Packed]
) -> SplitRecord:
    count = sum(part.segments for part in packed)
    return SplitRecord(
        documents=tally.documents,
        characters=tally.characters,
        tokens=stream.tokens,
        tower_tokens=stream.tower_tokens or stream.tokens,
        windows=sum(part.shard.windows for part in packed),
        segments=count,
        mean_segment=round(sum(part.segment_tokens for part in packed) / max(count, 1), 3),
        full_segments=round(sum(part.full_segments for part in packed) / max(count, 1), 6),
        shards=tuple(part.shard for part in packed),
    )
