"""What may follow prompts, scored behind a prompt that is read once for all its candidates.

First tokens come from a prompt's last position; the further ones of each candidate are read on a
copy of what the prompt has left behind (`decoding.cached`). The log probabilities are those of
whole rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from blindvalm_jax import partitioning
from blindvalm_jax.decoding import cached
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import buckets
from blindvalm_jax.trained import TrainedModel

# Room behind a prompt's bucket: this share of its length, but no less than so many tokens.
_ROOM, _LEAST_ROOM = 1 / 4, 16
_LOGITS_AT_ONCE = 1024  # positions: of 49,412 entries each they take 200 MB

Candidates = Sequence[np.ndarray]


class Shape(NamedTuple):
    """Lengths that programs are compiled for.

    prompt: tokens of a prompt; first: how many first tokens are asked behind it; further: tokens of
    a candidate that are read, its last one left out.
    """

    prompt: int
    first: int
    further: int


class Tokens(NamedTuple):
    """What the tokens of a candidate are given, float32 [n] each.

    log_p: of the token behind the prompt and those before it. best: of the likeliest token there; a
    token that has it is what greedy decoding takes.
    """

    log_p: np.ndarray
    best: np.ndarray

    def followed_by(self, more: Tokens) -> Tokens:
        """These and further ones."""
        return Tokens(*(np.concatenate(both) for both in zip(self, more, strict=True)))


class _Longer(NamedTuple):
    """A candidate of more than one token: its prompt's place, its own among the candidates."""

    prompt: int
    number: int
    ids: np.ndarray


class Continuations:
    """Reads prompts of a model that reads rows in pieces, and what may follow them."""

    def __init__(
        self,
        model: TrainedModel,
        *,
        bucket: Callable[[int], int],
        longest: int,
        tokens_at_once: int,
    ) -> None:
        """bucket: length that a row is filled up to; longest: most tokens of one, 0: any number.

        tokens_at_once: of a batch on each device that holds its own rows.
        """
        self._model, self._bucket, self._longest = model, bucket, longest
        self._tokens_at_once = tokens_at_once
        self._readers: dict[int, cached.Reader] = {}
        self.programs: set[tuple[str | int, ...]] = set()

    def ask(self, model: TrainedModel) -> None:
        """Goes on with the same model under other parameters."""
        self._model = model

    def shape(self, prompt: np.ndarray, candidates: Candidates) -> Shape | None:
        """None: whole rows do as well, since no candidate has two tokens or one is too long."""
        further = max(map(len, candidates)) - 1
        length = self._bucket(len(prompt))
        fits = not self._longest or len(prompt) + further <= self._longest
        if not len(prompt) or not fits or not 0 < further <= _room(length):
            return None
        return Shape(length, buckets.power_of_two(len(candidates)), buckets.power_of_two(further))

    def batches(self, shapes: Sequence[Shape | None]) -> Iterator[tuple[Shape, int, list[int]]]:
        """Shapes and sizes of batches, and places of the prompts that are read at once."""
        for shape in sorted({shape for shape in shapes if shape is not None}):
            places = [place for place, own in enumerate(shapes) if own == shape]
            size = self._rows(self._tokens_at_once, shape.prompt, there=len(places))
            for first in range(0, len(places), size):
                yield shape, size, places[first : first + size]

    def score(
        self,
        shape: Shape,
        prompts: Sequence[np.ndarray],
        candidates: Sequence[Candidates],
        *,
        size: int,
    ) -> list[list[Tokens]]:
        """Every candidate of a batch of prompts, which is filled up to `size`."""
        reader = self._reader(shape.prompt)
        tokens, counts = _filled(prompts, size=size, length=shape.prompt)
        wanted = np.zeros((size, 1, shape.first), np.int32)
        for row, own in enumerate(candidates):
            wanted[row, 0, : len(own)] = [ids[0] for ids in own]
        logits, state = reader.prefill(
            self._model.params, self._model.frozen, tokens, counts, logits="last"
        )
        log_p, best = self._log_p(logits, wanted)
        found = [
            [Tokens(log_p[row, :, number], best[row]) for number in range(len(own))]
            for row, own in enumerate(candidates)
        ]
        longer = [
            _Longer(row, number, ids)
            for row, own in enumerate(candidates)
            for number, ids in enumerate(own)
            if len(ids) > 1
        ]
        self.programs |= {(name, size, reader.capacity) for name in ("start", "prefill")}
        at_once = min(size, self._rows(_LOGITS_AT_ONCE, shape.further, there=size))
        for first in range(0, len(longer), at_once):
            part = longer[first : first + at_once]
            values = self._further(reader, state, part, size=at_once, length=shape.further)
            for one, more in zip(part, values, strict=True):
                known = found[one.prompt][one.number]
                found[one.prompt][one.number] = known.followed_by(more)
        return found

    def _further(
        self,
        reader: cached.Reader,
        state: cached.State,
        rows: Sequence[_Longer],
        *,
        size: int,
        length: int,
    ) -> list[Tokens]:
        """The second and later tokens of candidates; state: after their prompts."""
        places = [row.prompt for row in rows]
        copies = reader.take(state, [*places, *places[-1:] * (size - len(places))])
        tokens, counts = _filled([row.ids[:-1] for row in rows], size=size, length=length)
        wanted, _ = _filled([row.ids[1:] for row in rows], size=size, length=length)
        logits, _ = reader.extend(
            self._model.params, self._model.frozen, copies, tokens, counts, consume=True
        )
        log_p, best = self._log_p(logits, wanted[:, :, None])
        before = len(state.length_B)
        self.programs |= {
            ("take", before, size, reader.capacity),
            ("extend", size, length, reader.capacity),
        }
        return [
            Tokens(log_p[place, : len(row.ids) - 1, 0], best[place, : len(row.ids) - 1])
            for place, row in enumerate(rows)
        ]

    def _log_p(self, logits: Array, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.programs.add(("log_p", *wanted.shape))
        log_p_BTK, best_BT = _compiled()(logits, wanted)
        check_finite(best_BT)
        return np.asarray(log_p_BTK), np.asarray(best_BT)

    def _reader(self, length: int) -> cached.Reader:
        """The reader of prompts of a bucket."""
        if length not in self._readers:
            capacity = length + _room(length)
            if self._longest:
                capacity = min(capacity, self._longest)
            self._readers[length] = cached.reader(self._model, capacity=capacity)
        return self._readers[length]

    def _rows(self, tokens: int, length: int, *, there: int) -> int:
        shards = partitioning.row_shards(self._model.mesh)
        return buckets.rows_at_once(tokens, length, there=there, shards=shards)


def check_finite(best: Any) -> None:
    """Refuses log probabilities of the likeliest tokens that are no numbers.

    Raises:
      UserError: one is not.
    """
    if not np.isfinite(np.asarray(best)).all():
        raise UserError(
            "the model's log probabilities are not finite: its training has diverged, or bfloat16 "
            "is too coarse for it; evaluate another checkpoint, or with --dtype=float32"
        )


@functools.cache
def _compiled() -> Callable[[Array, np.ndarray], tuple[Array, Array]]:
    """Log probabilities [B, T, K] of wanted_BTK from logits [B, T, V], and the highest [B, T]."""

    def run(logits_BTV: Array, wanted_BTK: Array) -> tuple[Array, Array]:
        log_p_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
        return jnp.take_along_axis(log_p_BTV, wanted_BTK, axis=2), jnp.max(log_p_BTV, axis=2)

    return jax.jit(run)


def _filled(rows: Sequence[np.ndarray], *, size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows filled up behind [B, T], and how much of each is real; lacking rows are the last."""
    tokens = np.zeros((size, length), np.int32)
    for number, row in enumerate([*rows, *[rows[-1]] * (size - len(rows))]):
        tokens[number, : len(row)] = row
    counts = [len(row) for row in rows]
    return tokens, np.array([*counts, *counts[-1:] * (size - len(counts))], np.int32)


def _room(length: int) -> int:
    """Tokens that are read behind a prompt of a bucket; with more of them little is saved."""
    return max(int(length * _ROOM), _LEAST_ROOM)
