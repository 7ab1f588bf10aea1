"""LAMBADA: the last word of a passage, which only its whole context tells (Paperno et al. 2016)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import readers, statistics
from blindvalm_jax.tasks.asked import Asked, Outcome, Windows
from blindvalm_jax.tasks.passages import Texts, straight_quotes
from blindvalm_jax.tasks.scoring import Row, Scorer
from blindvalm_jax.tasks.task import Group

_WORDS = re.compile(r"[\w']+")
FAULTS = (
    "the last token alone is asked for: the pieces of a word before it are given",
    "no end of a text stands in front of a passage, as it does in training",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastWordTask:
    """Passages of which the last word is asked for."""

    name: str
    group: Group | None
    source: str
    texts: Texts

    def open(self, protocol: str, data: Path, cut: Windows) -> Asked:
        """The task with its file read; passages are never cut in windows.

        Raises:
          UserError: the file is not there, or not what it should be; or a passage is one word.
        """
        passages, file = self.texts.open(data)
        return AskedLastWords(self.name, self.source, protocol, passages, file)


@dataclasses.dataclass(frozen=True)
class AskedLastWords:
    """The last words of passages; file: what these are of, None of a TFDS data set.

    Raises:
      UserError: a passage is one word, or none.
    """

    name: str
    source: str
    protocol: str
    passages: list[str]
    file: readers.File | None = None

    def __post_init__(self) -> None:
        """Checks the passages, wherever they are from."""
        for number, text in enumerate(self.passages):
            if len(text.split()) < 2:
                raise UserError(f"{self.name}: passage {number} has no two words: {text[:40]!r}")

    def run(self, scorer: Scorer, tokenizer: Tokenizer) -> Outcome:
        """Asks for every token of the word, or as published for the last one."""
        published = self.protocol == "published"
        ask = _last_token if published else _last_word
        rows = [ask(tokenizer, text) for text in self.passages]
        held = [_within(row, scorer.longest) for row in rows]
        cut = sum(len(a.tokens) < len(b.tokens) for a, b in zip(held, rows, strict=True))
        found = scorer.scores(held, title=self.name)
        right = np.array([bool(np.all(own.log_p[:, 0] >= own.best)) for own in found])
        nats = np.array([-np.sum(own.log_p, dtype=np.float64) for own in found])
        items = [f"{number}" for number in range(len(rows))]
        words = [text.split()[-1] for text in self.passages]
        lines: list[dict[str, Any]] = [
            {
                "item": item,
                "word": word,
                "text_sha256": readers.text_sha256(text),
                "nats": float(own),
                "tokens": len(row.wanted),
                "right": bool(hit),
            }
            for item, text, word, own, row, hit in zip(
                items, self.passages, words, nats, rows, right, strict=True
            )
        ]
        answers = [int(row.wanted[-1, 0]) for row in rows] if published else words
        sure = statistics.accuracy(right, items)
        entry = {
            "metric": "accuracy",
            "score": sure.mean,
            "stderr": None if math.isnan(sure.stderr) else sure.stderr,
            "interval": [sure.low, sure.high],
            "n": len(rows),
            "questions": len(rows),
            "clusters": sure.clusters,
            "clustered_by": statistics.BY_ITEM,
            "majority": max(Counter(answers).values()) / len(answers),
            "random": context_word(self.passages),
            "per_prompt": [sure.mean],
            "per_item": dict(zip(items, right.astype(float).tolist(), strict=True)),
            "scored_by": "last token" if published else "greedy",
            "tokens": sum(len(row.wanted) for row in rows),
            "last_word_perplexity": None if published else statistics.power(float(nats.mean())),
            "prompts_cut": cut,
            "faults": list(FAULTS) if published else [],
            "source": self.source,
            "file": None if self.file is None else self.file.entry,
        }
        notes = () if self.file is None else self.file.notes
        if cut:
            notes = (*notes, f"{cut} passages lost their beginning: {scorer.longest} positions")
        return Outcome(entry, lines, notes)


def context_word(passages: Sequence[str]) -> float:
    """How often a word drawn from the context is the last one: runs of letters, lower case."""
    shares = []
    for text in passages:
        context, word = text.lower().rstrip().rsplit(None, 1)
        known = _WORDS.findall(context)
        shares.append(known.count(word) / len(known) if known else 0.0)
    return float(np.mean(shares))


def _last_word(tokenizer: Tokenizer, text: str) -> Row:
    """All tokens of the last word as running text has them, behind the end of a text.

    A token is of the word if it holds a byte of it: the first bytes of a character are not given.
    """
    text = text.rstrip()
    ids, reach = tokenizer.encode_with_reach(text)
    given = int(np.sum(reach <= len(text) - len(text.split()[-1])))
    if given == len(ids):
        raise UserError(f"the last word of {text[-40:]!r} has no tokens")
    stream = np.append(np.int32(tokenizer.eos_id), ids)
    at = np.arange(given, len(ids))
    return Row(stream[:-1], at, ids[given:, None])


def _last_token(tokenizer: Tokenizer, text: str) -> Row:
    """The very last token; the row holds it too, as the published script gives it to the model."""
    ids = tokenizer.encode_lm(straight_quotes(text).strip())
    if len(ids) < 2:
        raise UserError(f"a passage of {len(ids)} tokens: {text[:40]!r}")
    return Row(ids, np.array([len(ids) - 2]), ids[None, -1:])


def _within(row: Row, longest: int) -> Row:
    """A row without its beginning, where it is longer than the model's positions."""
    over = max(len(row.tokens) - longest, 0) if longest else 0
    if over and row.at[0] < over:
        raise UserError(f"a last word of {len(row.wanted)} tokens: the model has {longest}")
    return Row(row.tokens[over:], row.at - over, row.wanted) if over else row
