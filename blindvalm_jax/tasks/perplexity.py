"""How well a model predicts texts: perplexity by token and by word, and bits per byte."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import readers, statistics, windows
from blindvalm_jax.tasks.asked import Asked, Outcome, Windows
from blindvalm_jax.tasks.passages import BlockFiles, Blocks, Texts
from blindvalm_jax.tasks.scoring import Scorer
from blindvalm_jax.tasks.task import Group

LONGEST_BLOCK = 512  # tokens, end token included, of the reference's models
_ADDED = 0.1  # to every count of the unigram
FAULTS = (
    "every line stands alone behind an end token: no paragraph sees those before it",
    f"lines of more than {LONGEST_BLOCK} tokens are left out",
    "the end tokens of lines count as tokens",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTask:
    """Texts of which every token is predicted.

    valid, blocks_valid: what the unigram baseline is counted in, where it is there. blocks: what
    the published protocol scores, None where the reference has no script for it.
    """

    name: str
    group: Group | None
    source: str
    corrected: Texts
    valid: Texts | None = None
    blocks: BlockFiles | None = None
    blocks_valid: BlockFiles | None = None

    def open(self, protocol: str, data: Path, cut: Windows) -> Asked:
        """The task with its files read.

        Raises:
          UserError: one is not there, or not what it should be; or the task has no such protocol.
        """
        if protocol == "corrected":
            valid = self.valid
            known = valid is not None and readers.holds(data, valid.files)
            counted = valid.open(data) if valid is not None and known else None
            of = self.corrected
            texts, file = of.open(data)
            return AskedTexts(
                *(self.name, self.source, of.document, texts),
                None if counted is None else counted.texts,
                cut,
                file=file,
                majority_file=None if counted is None else counted.file,
            )
        if self.blocks is None:
            raise UserError(f"{self.name} was not published with a protocol: take corrected")
        beside = self.blocks_valid
        known = beside is not None and readers.holds(data, (*beside.ids, *beside.texts))
        others = beside.open(data) if beside is not None and known else None
        return AskedBlocks(self.name, self.source, self.blocks.open(data), others)


@dataclasses.dataclass(frozen=True)
class AskedTexts:
    """Documents in windows; counted: those of the unigram baseline, None without."""

    name: str
    source: str
    document: str
    texts: list[str]
    counted: list[str] | None
    cut: Windows
    file: readers.File | None = None
    majority_file: readers.File | None = None

    def run(self, scorer: Scorer, tokenizer: Tokenizer) -> Outcome:
        """Scores every token of every document."""
        encoded = tokenizer.encode_lm_batch(self.texts)
        kept = [number for number, ids in enumerate(encoded) if len(ids)]
        cut = windows.resolve(self.cut, scorer)
        return _scored(
            Tokens(
                document=self.document,
                ids=encoded,
                kept=kept,
                texts=self.texts,
                counted=None if self.counted is None else tokenizer.encode_lm_batch(self.counted),
                cut=cut,
                file=self.file,
                majority_file=self.majority_file,
            ),
            (self.name, self.source),
            scorer,
            tokenizer,
            notes=(f"windows of {cut.window} tokens, {cut.stride} apart; {len(kept)} documents",),
        )


@dataclasses.dataclass(frozen=True)
class AskedBlocks:
    """Lines as `fairseq-eval-lm --sample-break-mode eos` scores them."""

    name: str
    source: str
    blocks: Blocks
    counted: Blocks | None

    def run(self, scorer: Scorer, tokenizer: Tokenizer) -> Outcome:
        """Scores every line with its end token, behind an end token."""
        lines = self.blocks.encode(tokenizer)
        counted = None if self.counted is None else self.counted.encode(tokenizer)
        longest = min(LONGEST_BLOCK, scorer.longest or LONGEST_BLOCK)
        kept = [number for number, ids in enumerate(lines.ids) if len(ids) <= longest]
        skipped = len(lines.ids) - len(kept)
        notes = (f"{skipped} lines of more than {longest} tokens are left out",) if skipped else ()
        return _scored(
            Tokens(
                document="line",
                ids=lines.ids,
                kept=kept,
                texts=None if lines.texts is None else [f"{line}\n" for line in lines.texts],
                counted=None if counted is None else counted.ids,
                cut=Windows(longest, longest),
                file=lines.file,
                majority_file=None if counted is None else counted.file,
            ),
            (self.name, self.source),
            scorer,
            tokenizer,
            faults=FAULTS,
            notes=notes,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """What is scored: tokens of documents or lines, and how they are cut.

    kept: places of those that are scored. texts: what they were made of, None where unknown.
    counted: tokens of the unigram baseline. file, majority_file: what the documents and those of
    the baseline are of, None where they are of no file.
    """

    document: str
    ids: list[np.ndarray]
    kept: list[int]
    texts: list[str] | None
    counted: list[np.ndarray] | None
    cut: Windows
    file: readers.File | None
    majority_file: readers.File | None


def _scored(
    tokens: Tokens,
    about: tuple[str, str],
    scorer: Scorer,
    tokenizer: Tokenizer,
    *,
    faults: Sequence[str] = (),
    notes: tuple[str, ...] = (),
) -> Outcome:
    """Entry, a line for each document, and notes; about: name and source of the task.

    Bytes and words are those of the texts that are handed to the tokenizer, of documents that are
    scored: in UTF-8, without a byte order mark and with one byte at the end of a line, and without
    what stands between two documents (of articles the line feed before a title). The tokenizer may
    change them: CLIP's drops case and joins white space. Lines of the published protocol have the
    line feed that their end token stands for.
    """
    (name, source), ids = about, [tokens.ids[number] for number in tokens.kept]
    if not ids:
        raise UserError(f"{name}: nothing is left to score of {len(tokens.ids)} documents")
    rows = [windows.cut(own, front=tokenizer.eos_id, windows=tokens.cut) for own in ids]
    nats = windows.nats(scorer, rows, title=name)
    lower_cased = tokenizer.kind == "clip"
    lines: list[dict[str, Any]] = [
        {"item": f"{number}", "nats": float(own), "tokens": len(of), "rows": len(cut)}
        for number, own, of, cut in zip(tokens.kept, nats, ids, rows, strict=True)
    ]
    if tokens.texts is not None:
        for line, number in zip(lines, tokens.kept, strict=True):
            text = tokens.texts[number]
            line |= {"bytes": len(text.encode()), "words": len(text.split())}
            line["text_sha256"] = readers.text_sha256(text)
        if lower_cased:
            notes = (*notes, "bytes are those of the text before the tokenizer drops its case")
    for file in (tokens.file, tokens.majority_file):
        notes = notes if file is None else (*notes, *file.notes)
    counts = np.array([len(own) for own in ids])
    entry = {
        **_entry(nats, counts, lines),
        **_without_model(tokens.counted, ids, tokenizer),
        "per_prompt": [],
        "per_item": {line["item"]: line["nats"] / line["tokens"] for line in lines},
        "document": tokens.document,
        "window": tokens.cut.window,
        "stride": tokens.cut.stride,
        "skipped": len(tokens.ids) - len(ids),
        "lower_cased": lower_cased,
        "faults": list(faults),
        "source": source,
        "file": None if tokens.file is None else tokens.file.entry,
        "majority_file": None if tokens.majority_file is None else tokens.majority_file.entry,
    }
    return Outcome(entry, lines, notes)


def _entry(nats: np.ndarray, counts: np.ndarray, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The part of an entry that tells of the model."""
    found, total = statistics.perplexity(nats, counts), float(nats.sum())
    known = "bytes" in lines[0]
    size = sum(line["bytes"] for line in lines) if known else None
    words = sum(line["words"] for line in lines) if known else None
    return {
        "metric": "perplexity",
        "score": found.mean,
        "stderr": found.stderr,
        "interval": [found.low, found.high],
        "n": len(nats),
        "tokens": int(counts.sum()),
        "bytes": size,
        "words": words,
        "nats_per_token": total / int(counts.sum()),
        "bits_per_byte": total / math.log(2) / size if size else None,
        "word_perplexity": statistics.power(total / words) if words else None,
    }


def _without_model(
    counted: Sequence[np.ndarray] | None, ids: Sequence[np.ndarray], tokenizer: Tokenizer
) -> dict[str, float | None]:
    size = tokenizer.vocab_size
    majority = None if counted is None else unigram(counted, ids, vocab_size=size)
    return {"majority": majority, "random": float(size)}


def unigram(counted: Sequence[np.ndarray], ids: Sequence[np.ndarray], *, vocab_size: int) -> float:
    """Perplexity of `ids` under the frequencies of tokens in `counted`, each count plus 0.1."""
    counts = np.bincount(np.concatenate(counted), minlength=vocab_size) + _ADDED
    log_p = np.log(counts / counts.sum())
    return float(np.exp(-log_p[np.concatenate(ids)].mean()))
