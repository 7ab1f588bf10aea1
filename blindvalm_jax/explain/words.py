"""Words whose features lie nearest to a grounding vector, and how near chance brings some word.

With tens of thousands of words, some are near any vector: a list of nearest words says something
only where they are nearer than those of a vector that means nothing. Two such nulls stand beside
it: directions at random, and draws from the cloud that the words themselves make (a Gaussian with
their mean and covariance), which lies in a narrow cone of CLIP's space.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from blindvalm_jax.data.workers import Progress
from blindvalm_jax.errors import UserError
from blindvalm_jax.explain.probing import unit
from blindvalm_jax.trained import TrainedModel

_ROWS = 256
_DRAWS = 1000
_LETTERS = 3  # a word has at least so many


@dataclasses.dataclass(frozen=True)
class Words:
    """Words and what the tower makes of each alone: vectors float32 [W, E], unit length."""

    texts: list[str]
    vectors: np.ndarray


@dataclasses.dataclass(frozen=True)
class Nearest:
    """The words nearest to a vector.

    cosines: of each. directions, cloud: float [2, n], mean and 97.5 % quantile of the cosine of
    the nearest, second nearest ... word of random directions, and of draws from the words' cloud.
    """

    words: list[str]
    cosines: np.ndarray
    directions: np.ndarray
    cloud: np.ndarray


def of_vocabulary(model: TrainedModel, *, count: int) -> Words:
    """The first `count` words of the vocabulary: single tokens of letters alone.

    A byte-pair vocabulary lists what it merged first, which is what is frequent. Their features
    are those of the model's readout at the word's token, as if a text began with it.

    Raises:
      UserError: the vocabulary has no such words.
    """
    tokenizer = model.tokenizer
    # A tower that reads text, not tokens, knows a word by the blank behind it.
    behind = tokenizer.encode_lm(" " if model.tower_tokenizer else "")
    texts: list[str] = []
    rows: list[np.ndarray] = []
    for token in range(tokenizer.vocab_size - tokenizer.lm_offset):
        text = tokenizer.decode([token]).strip()
        if len(text) < _LETTERS or not text.isalpha() or text in texts[-1:]:
            continue
        ids = tokenizer.encode_lm(f" {text}")
        if len(ids) == 1 and int(ids[0]) - tokenizer.lm_offset == token:
            texts.append(text)
            rows.append(np.concatenate([[tokenizer.eos_id], ids, behind]).astype(np.int32))
        if len(texts) == count:
            break
    if not texts:
        raise UserError("the vocabulary has no token that is a word of letters")
    return Words(texts, unit(_features(model, rows)))


def nearest(words: Words, vector: np.ndarray, *, count: int, seed: int = 0) -> Nearest:
    """The `count` words nearest to a vector [E] of unit length, and what chance gives."""
    count = min(count, len(words.texts))
    cosines = words.vectors @ vector
    order = np.argsort(-cosines, kind="stable")[:count]
    rng = np.random.default_rng(seed)
    mean = words.vectors.mean(axis=0)
    spread = (words.vectors - mean) / np.sqrt(max(len(words.vectors) - 1, 1))
    drawn = mean + rng.standard_normal((_DRAWS, len(spread)), np.float32) @ spread
    random = rng.standard_normal((_DRAWS, len(vector)), np.float32)
    return Nearest(
        [words.texts[place] for place in order],
        cosines[order],
        _null(words, unit(random), count),
        _null(words, unit(drawn), count),
    )


def _null(words: Words, vectors: np.ndarray, count: int) -> np.ndarray:
    cosines = np.sort(vectors @ words.vectors.T, axis=1)[:, ::-1][:, :count]
    return np.stack([cosines.mean(axis=0), np.quantile(cosines, 0.975, axis=0)])


def _features(model: TrainedModel, rows: list[np.ndarray]) -> np.ndarray:
    """Text features [rows, E] behind the last token of rows of one length; no images are sought."""
    text = dataclasses.replace(model.model, search=None)

    @jax.jit
    def run(frozen: Any, batch: Any) -> Any:
        z_BTKE = text.features(frozen, batch)
        return None if z_BTKE is None else z_BTKE[:, -1, 0]

    found = []
    with Progress("words", total=len(rows), unit="word") as progress:
        for first in range(0, len(rows), _ROWS):
            part = rows[first : first + _ROWS]
            batch = model.batch_of_ids([*part, *[part[-1]] * (_ROWS - len(part))])
            with model.computing():
                values = run(model.frozen, batch)
            found.append(np.asarray(values, np.float32)[: len(part)])
            progress.advance(len(part))
    return np.concatenate(found)
