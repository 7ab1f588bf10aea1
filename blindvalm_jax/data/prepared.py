"""From the settings of a run to its windows: given ones are checked, missing ones are made."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, get_args

from blindvalm_jax.config import Config, DataConfig
from blindvalm_jax.data import (
    byte_level_bpe,
    corpora,
    manifest,
    output,
    packing,
    tokenizer_files,
    tokenizers,
)
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import segments

# A learned BPE sees the first training documents up to this many characters: enough for its
# merges to settle, bounded in time, and the same on every run.
TOKENIZER_SAMPLE_CHARACTERS = 50_000_000


def ensure_prepared(
    config: Config,
    workdir: str | Path,
    *,
    tower_context: int = 77,
    stored_tower: Path | None = None,
    shared: bool = False,
) -> Path:
    """Directory of the windows a run trains on; a second run with the same settings reuses it.

    With `data.windows` that directory is checked against the settings; else `data.files` or
    `data.tfds` is prepared in the cache (`data.cache`, else <workdir>/data), in a directory named
    by a hash of all that determines its bytes. `tower_context` counts the tower's positions, start
    and end token included. `stored_tower` is what a resumed run has kept of its tower: the tower's
    tokenizer is read from there. shared: the tower reads the language model's tokens, whatever lies
    beside it. Other processes on this machine wait for the one that prepares.

    Raises:
      UserError: there is no text, it cannot be read, or `data.windows` does not fit the settings.
    """
    longest = tower_context - 2
    if config.data.windows:
        directory = Path(config.data.windows).expanduser()
        found = manifest.load(directory)
        _check(
            found,
            directory,
            config,
            None if shared else tower_tokenizer(config, stored_tower),
            longest=longest,
        )
        return directory
    cache = Path(config.data.cache or Path(workdir) / "data")
    source, eval_source = sources(config.data, digests=cache / "file_hashes.json")
    tokenizer = load_or_train(
        config.tokenizer.kind,
        config.tokenizer.path,
        vocab_size=config.tokenizer.train_vocab_size,
        source=source,
        eval_fraction=0.0 if eval_source else config.data.eval_fraction,
        cache=cache,
    )
    recipe = packing.Recipe(
        source=source,
        tokenizer=tokenizer,
        tower_tokenizer=None if shared else tower_tokenizer(config, stored_tower),
        sequence_length=config.data.sequence_length,
        rule=segment_rule(config.grounding.segments),
        longest_segment=longest,
        eval_fraction=config.data.eval_fraction,
        eval_source=eval_source,
    )
    directory = cache / f"windows-{recipe.key[:16]}"
    packing.prepare(recipe, directory, workers=config.data.workers)
    return directory


def sources(
    data: DataConfig, *, digests: Path | None = None
) -> tuple[corpora.Source, corpora.Source | None]:
    """Training text and held-out text (None: a share of the training text).

    `digests` is where hashes of files are kept (see `corpora.FileSource`).

    Raises:
      UserError: neither files nor a TFDS dataset is named.
    """

    def files(patterns: str) -> corpora.FileSource:
        if not corpora.split_patterns(patterns):
            raise UserError(f"{patterns!r} names no file: give globs, separated by commas")
        return corpora.FileSource(corpora.split_patterns(patterns), data.text_field, digests)

    def tfds(split: str) -> corpora.TfdsSource:
        return corpora.TfdsSource(data.tfds, split, data.tfds_dir, data.text_field, digests)

    if data.files:
        source: corpora.Source = files(data.files)
    elif data.tfds:
        source = tfds(data.tfds_split)
    else:
        raise UserError("there is no text: set data.files, data.tfds or data.windows")
    if data.eval_files:
        return source, files(data.eval_files)
    return source, tfds(data.tfds_eval_split) if data.tfds_eval_split and data.tfds else None


def load_or_train(
    kind: str,
    path: str,
    *,
    vocab_size: int,
    source: corpora.Source,
    eval_fraction: float,
    cache: Path,
) -> Tokenizer:
    """The tokenizer at `path`; without a path, `train` learns a BPE and keeps it in the cache.

    It learns from the first training documents (held-out ones are left out), 50 M characters at
    most.
    """
    return load_or_learn(
        kind,
        path,
        vocab_size=vocab_size,
        contents=[corpora.contents(source), eval_fraction] if kind == "train" and not path else [],
        texts=lambda: _documents(source, eval_fraction),
        cache=cache,
    )


def load_or_learn(
    kind: str,
    path: str,
    *,
    vocab_size: int,
    contents: Any,
    texts: Callable[[], Generator[str, None, None]],
    cache: Path,
) -> Tokenizer:
    """The tokenizer at `path`, or with `train` and no path a BPE learned from texts.

    contents: JSON that tells one collection of texts from another. The first 50 M characters are
    learned from.

    Raises:
      UserError: there is no path, and the kind is not `train`.
    """
    if path:
        return tokenizers.load(kind, path)
    if kind != "train":
        raise UserError(f"tokenizer.kind={kind} needs tokenizer.path, a directory or a hub id")
    key = packing.hash_of([contents, vocab_size, TOKENIZER_SAMPLE_CHARACTERS])
    directory = cache / f"tokenizer-{key[:16]}"
    if directory.is_dir():  # perhaps read-only
        return tokenizers.load("train", str(directory))
    with output.locked(cache):
        if not directory.is_dir():
            _save(byte_level_bpe.train(_sample(texts()), vocab_size=vocab_size), directory)
    return tokenizers.load("train", str(directory))


def keep_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Saves a tokenizer, unless it is there; other processes wait for the one that does.

    Raises:
      UserError: it cannot be written.
    """
    if directory.is_dir():  # perhaps read-only
        return
    with output.locked(directory.parent):
        if not directory.is_dir():
            try:
                _save(tokenizer, directory)
            except OSError as error:
                raise UserError(f"{directory} cannot be written: {error.strerror}") from error


def tower_tokenizer(config: Config, stored_tower: Path | None) -> Tokenizer | None:
    """CLIP's tokenizer when the tower has one of its own; None: it reads the LM's tokens.

    stored_tower: see `ensure_prepared`.

    Raises:
      UserError: the tower needs one and brings none.
    """
    grounding, kind = config.grounding, config.tokenizer.kind
    if grounding.source == "none":
        return None
    if stored_tower is not None:
        has = tokenizer_files.holds_tokenizer(str(stored_tower))
        return tokenizers.load("clip", str(stored_tower)) if has else None
    if grounding.tokenizer:
        return tokenizers.load("clip", grounding.tokenizer, setting="grounding.tokenizer")
    tower = grounding.tower
    if tower in ("random", config.tokenizer.path):
        return None
    if Path(tower).expanduser().exists() and not tokenizer_files.holds_tokenizer(tower):
        if kind == "clip":
            return None
        raise UserError(
            f"grounding.tower {tower} brings no tokenizer, and with tokenizer.kind={kind} it "
            "needs CLIP's: set grounding.tokenizer to a directory that holds it"
        )
    return tokenizers.load("clip", tower, setting="grounding.tokenizer (empty: grounding.tower)")


def segment_rule(name: str) -> segments.Rule:
    """A rule by its name.

    Raises:
      UserError: there is no such rule.
    """
    for rule in get_args(segments.Rule):
        if rule == name:
            return rule
    raise UserError(f"segment rule must be {' or '.join(get_args(segments.Rule))}, got {name!r}")


def _save(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes a directory that appears only when it is whole."""
    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    os.replace(partial, directory)


def _documents(source: corpora.Source, eval_fraction: float) -> Generator[str, None, None]:
    with packing.progress("read text for a BPE", source) as progress:
        for split, text in packing.split_documents(source, eval_fraction, progress.advance):
            if split == "train":
                yield text


def _sample(texts: Generator[str, None, None]) -> Iterator[str]:
    left = TOKENIZER_SAMPLE_CHARACTERS
    with contextlib.closing(texts):
        for text in texts:
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break
    print("learn the BPE's merges from it", file=sys.stderr, flush=True)


def _check(
    found: manifest.Manifest,
    directory: Path,
    config: Config,
    tower: Tokenizer | None,
    *,
    longest: int,
) -> None:
    tokenizer = config.tokenizer
    expected: dict[str, tuple[object, object]] = {
        "data.sequence_length": (config.data.sequence_length, found.sequence_length),
        "tokenizer.kind": (tokenizer.kind, found.tokenizer.kind),
    }
    fingerprint = found.tokenizer.fingerprint
    if tokenizer.path:
        fingerprint = tokenizers.load(tokenizer.kind, tokenizer.path).fingerprint
        expected["tokenizer.path"] = (_named(fingerprint), _named(found.tokenizer.fingerprint))
    if config.grounding.source != "none":
        own = tower is not None and tower.fingerprint != fingerprint
        expected |= {
            "grounding.segments": (config.grounding.segments, found.segments),
            "longest segment of the tower": (longest, found.longest_segment),
            "grounding.tokenizer": (
                _named(tower.fingerprint if tower is not None and own else fingerprint),
                _named(found.tower_record.fingerprint),
            ),
        }
    for field, (wanted, got) in expected.items():
        if wanted != got:
            raise UserError(
                f"data.windows={directory} does not fit {field}: the settings say {wanted!r}, the "
                f"windows were made with {got!r}; change the setting or prepare the text again"
            )


def _named(fingerprint: str) -> str:
    return f"tokenizer {fingerprint[:12]}"
