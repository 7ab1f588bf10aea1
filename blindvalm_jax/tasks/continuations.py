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
# So many candidates, and further tokens of one, cost no more than fewer, and need fewer programs.
_FEWEST_FIRST, _FEWEST_FURTHER = 16, 4
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
        self._programs: dict[int, _Programs] = {}
        self._sizes: set[tuple[str | int, ...]] = set()

    @property
    def compiled(self) -> int:
        """Programs compiled so far."""
        return len(self._sizes)

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
        first = buckets.power_of_two(max(len(candidates), _FEWEST_FIRST))
        return Shape(length, first, buckets.power_of_two(max(further, _FEWEST_FURTHER)))

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
        programs = self._programs_of(shape.prompt)
        params, frozen = self._model.params, self._model.frozen
        wanted = np.zeros((size, 1, shape.first), np.int32)
        for row, own in enumerate(candidates):
            wanted[row, 0, : len(own)] = [ids[0] for ids in own]
        asked = self._placed(*_filled(prompts, size=size, length=shape.prompt), wanted)
        caches = programs.reader.start(frozen, rows=size).caches
        with self._model.computing():
            values, state = programs.first(params, frozen, caches, *asked)
        log_p, best = _finite(values)
        found = [
            [Tokens(log_p[row, :, number], best[row]) for number in range(len(own))]
            for row, own in enumerate(candidates)
        ]
        self._sizes |= {("start", size, shape.prompt), ("first", size, shape.prompt, shape.first)}
        longer = [
            _Longer(row, number, ids)
            for row, own in enumerate(candidates)
            for number, ids in enumerate(own)
            if len(ids) > 1
        ]
        at_once = min(size, self._rows(_LOGITS_AT_ONCE, shape.further, there=size))
        for first in range(0, len(longer), at_once):
            part = longer[first : first + at_once]
            asked = self._placed(*_asked(part, size=at_once, length=shape.further))
            with self._model.computing():
                values = programs.further(params, frozen, state, *asked)
            self._sizes.add(("further", size, at_once, shape.prompt, shape.further))
            for one, log_p_TK, best_T in zip(part, *_finite(values), strict=False):
                count = len(one.ids) - 1
                known = found[one.prompt][one.number]
                more = Tokens(log_p_TK[:count, 0], best_T[:count])
                found[one.prompt][one.number] = known.followed_by(more)
        return found

    def _placed(self, *arrays: np.ndarray) -> Any:
        """Rows over the devices of the mesh."""
        return jax.device_put(arrays, partitioning.batch_sharding(self._model.mesh))

    def _programs_of(self, length: int) -> _Programs:
        """The programs for prompts of a bucket."""
        if length not in self._programs:
            capacity = length + _room(length)
            if self._longest:
                capacity = min(capacity, self._longest)
            self._programs[length] = _Programs(cached.reader(self._model, capacity=capacity))
        return self._programs[length]

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


def _finite(values: tuple[Array, Array]) -> tuple[np.ndarray, np.ndarray]:
    log_p_BTK, best_BT = values
    check_finite(best_BT)
    return np.asarray(log_p_BTK), np.asarray(best_BT)


class _Programs:
    """What reads prompts of a bucket, and what follows them; compiled for each size of a batch."""

    def __init__(self, reader: cached.Reader) -> None:
        self.reader = reader
        self.first = jax.jit(
            functools.partial(_first, reader), donate_argnums=2, out_shardings=(None, reader.placed)
        )
        self.further = jax.jit(functools.partial(_further, reader))


def _first(
    reader: cached.Reader,
    params: Any,
    frozen: Any,
    caches: dict[str, Any],
    tokens_BT: Array,
    counts_B: Array,
    wanted_B1K: Array,
) -> tuple[tuple[Array, Array], cached.State]:
    """See `_log_p`, behind prompts read into empty caches; and what these leave behind."""
    state = cached.State(caches, jnp.zeros_like(counts_B), jnp.zeros_like(counts_B))
    logits, state = reader.step(params, frozen, state, tokens_BT, counts_B, logits="last")
    return _log_p(logits, wanted_B1K), state


def _further(
    reader: cached.Reader,
    params: Any,
    frozen: Any,
    state: cached.State,
    row_B: Array,
    tokens_BT: Array,
    counts_B: Array,
    wanted_BTK: Array,
) -> tuple[Array, Array]:
    """See `_log_p`, behind tokens that follow prompts `row_B` of the state."""
    state = jax.tree.map(lambda x: jnp.take(x, row_B, axis=0, mode="clip"), state)
    logits, _ = reader.step(params, frozen, state, tokens_BT, counts_B)
    return _log_p(logits, wanted_BTK)


def _log_p(logits_BTV: Array, wanted_BTK: Array) -> tuple[Array, Array]:
    """Log probabilities [B, T, K] of wanted tokens, and the highest [B, T]."""
    log_p_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
    return jnp.take_along_axis(log_p_BTV, wanted_BTK, axis=2), jnp.max(log_p_BTV, axis=2)


def _asked(rows: Sequence[_Longer], *, size: int, length: int) -> tuple[np.ndarray, ...]:
    """Places of prompts, what is read behind them with its lengths, and what is wanted there."""
    places = [row.prompt for row in rows]
    places += places[-1:] * (size - len(places))
    tokens, counts = _filled([row.ids[:-1] for row in rows], size=size, length=length)
    wanted, _ = _filled([row.ids[1:] for row in rows], size=size, length=length)
    return np.array(places, np.int32), tokens, counts, wanted[:, :, None]


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
