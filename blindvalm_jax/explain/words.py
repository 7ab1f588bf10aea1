"""Words whose features lie nearest to a grounding vector, and how near chance brings some word.

With tens of thousands of words, some are near any vector: a list of nearest words says something
only where they are nearer than chance has them. Two nulls stand beside it: directions at random,
which every vector of CLIP's narrow cone is nearer than, and the grounding that has nothing to do
with the prompt: texts of words drawn at random, of a VALM images drawn from its index.
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
_OTHERS = 512
_LETTERS = 3  # a word has at least so many


@dataclasses.dataclass(frozen=True)
class Words:
    """Words, their ids [W], what the tower makes of each alone: float32 [W, E], unit length."""

    texts: list[str]
    ids: np.ndarray
    vectors: np.ndarray


@dataclasses.dataclass(frozen=True)
class Nearest:
    """The words nearest to a vector.

    cosines: of each. directions, others: float [2, n], mean and 97.5 % quantile of the cosine of
    the nearest, second nearest ... word of random directions, and of other grounding vectors.
    """

    words: list[str]
    cosines: np.ndarray
    directions: np.ndarray
    others: np.ndarray


def of_vocabulary(model: TrainedModel, *, count: int) -> Words:
    """The first `count` words of the vocabulary: single tokens of letters alone.

    A byte-pair vocabulary lists what it merged first, which is what is frequent. Their features
    are those of the model's readout at the word's token, as if a text began with it.

    Raises:
      UserError: the vocabulary has no such words.
    """
    tokenizer = model.tokenizer
    texts: list[str] = []
    found: list[int] = []
    for token in range(tokenizer.vocab_size - tokenizer.lm_offset):
        text = tokenizer.decode([token]).strip()
        if len(text) < _LETTERS or not text.isalpha() or text in texts[-1:]:
            continue
        ids = tokenizer.encode_lm(f" {text}")
        if len(ids) == 1 and int(ids[0]) - tokenizer.lm_offset == token:
            texts.append(text)
            found.append(int(ids[0]))
        if len(texts) == count:
            break
    if not texts:
        raise UserError("the vocabulary has no token that is a word of letters")
    ids = np.array(found)
    return Words(texts, ids, unit(_features(model, ids[:, None])))


def drawn(model: TrainedModel, words: Words, *, tokens: int, seed: int = 0) -> np.ndarray:
    """Grounding vectors [n, E] of unit length that no prompt asked for.

    Of a VALM images of its index; else texts of `tokens` words, at the last of them.
    """
    rng = np.random.default_rng(seed)
    if model.images is not None:
        vectors = model.images.index.vectors
        return unit(vectors.rows(rng.permutation(len(vectors))[:_OTHERS]))
    return unit(_features(model, rng.choice(words.ids, (_OTHERS, max(tokens, 1)))))


def nearest(
    words: Words, vector: np.ndarray, *, others: np.ndarray, count: int, seed: int = 0
) -> Nearest:
    """The `count` words nearest to a vector [E] of unit length, and what chance gives.

    others: vectors as `drawn` gives them.
    """
    count = min(count, len(words.texts))
    cosines = words.vectors @ vector
    order = np.argsort(-cosines, kind="stable")[:count]
    random = np.random.default_rng(seed).standard_normal((_DRAWS, len(vector)), np.float32)
    return Nearest(
        [words.texts[place] for place in order],
        cosines[order],
        _null(words, unit(random), count),
        _null(words, others, count),
    )


def _null(words: Words, vectors: np.ndarray, count: int) -> np.ndarray:
    cosines = np.sort(vectors @ words.vectors.T, axis=1)[:, ::-1][:, :count]
    return np.stack([cosines.mean(axis=0), np.quantile(cosines, 0.975, axis=0)])


def _features(model: TrainedModel, ids: np.ndarray) -> np.ndarray:
    """Text features [rows, E] at the last of words [rows, n], behind the start of a text.

    No images are sought.
    """
    text = dataclasses.replace(model.model, search=None)
    # A tower that reads text, not tokens, knows a word by the blank behind it.
    behind = model.tokenizer.encode_lm(" " if model.tower_tokenizer else "")
    rows = [np.concatenate([[model.tokenizer.eos_id], row, behind]).astype(np.int32) for row in ids]

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
