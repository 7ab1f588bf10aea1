"""Log probabilities of chosen tokens in many rows: few compilations, no dependence on the batch.

Rows are sorted by length into buckets, padded behind, and scored so many at once that all batches
hold about the same number of tokens. Nothing a row is given depends on the others: pads come after
all that it reads, and the tower cuts it by its own length.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from blindvalm_jax import partitioning
from blindvalm_jax.data.workers import Progress
from blindvalm_jax.decoding import tower_text
from blindvalm_jax.errors import UserError
from blindvalm_jax.objectives.language_model import Batch, Model
from blindvalm_jax.tasks import buckets
from blindvalm_jax.tasks.continuations import Continuations, Tokens, check_finite
from blindvalm_jax.trained import TrainedModel

_SHORTEST = 16  # tokens of the smallest bucket
_TOKENS_AT_ONCE = 4096
_FEWEST_ASKED = 4  # positions of a row that is asked for more than one: for fewer programs
_LOGITS_AT_ONCE = 512  # positions: of 49,412 entries each they take 100 MB


@dataclasses.dataclass(frozen=True)
class Row:
    """What a model reads, and what is asked of it.

    tokens: ids int32 [n]. at: positions [M]; wanted: ids [M, K], of each of which the log
    probability is asked as the token behind position at[m].
    """

    tokens: np.ndarray
    at: np.ndarray
    wanted: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a row was given.

    log_p: float32 [M, K] of the wanted tokens. best: float32 [M], that of the likeliest token; a
    wanted token that has it is what greedy decoding takes.
    """

    log_p: np.ndarray
    best: np.ndarray


class Scorer:
    """A model that scores rows. compiled: how many programs it took so far."""

    def __init__(
        self,
        model: TrainedModel,
        *,
        tokens_at_once: int = _TOKENS_AT_ONCE,
        share_prompts: bool = True,
    ) -> None:
        """tokens_at_once: of a batch on each device that holds its own rows, pads included.

        share_prompts: a prompt is read once for all its candidates, where the model can.

        Raises:
          UserError: the model borrows features from other rows (grounding.control=shuffled).
        """
        if model.model.shuffled:
            raise UserError(
                "a model of grounding.control=shuffled reads the features of another row of the "
                "batch: what it scores depends on the batch, and is no evaluation"
            )
        self._model, self._tokens_at_once = model, tokens_at_once
        self._shapes: set[tuple[int, ...]] = set()
        self._pieces = None
        if share_prompts and not tower_text.whole_only(model):
            self._pieces = Continuations(
                model, bucket=self._length, longest=self.longest, tokens_at_once=tokens_at_once
            )

    @property
    def longest(self) -> int:
        """Most tokens of a row, 0: any number."""
        config = self._model.settings.decoder
        return config.max_positions if config.positions == "learned" else 0

    @property
    def trained_length(self) -> int:
        """Tokens of the windows that it was trained on, as far as its positions reach."""
        length = self._model.settings.data.sequence_length
        return min(length, self.longest) if self.longest else length

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt is read once for all its candidates, where that saves anything."""
        return self._pieces is not None

    @property
    def compiled(self) -> int:
        """Programs compiled so far."""
        return len(self._shapes) + (0 if self._pieces is None else self._pieces.compiled)

    def log_probabilities(self, rows: Sequence[Row], *, title: str = "score") -> list[np.ndarray]:
        """float32 [M, K] of each row, in their order; see `scores`."""
        return [found.log_p for found in self.scores(rows, title=title)]

    def scores(self, rows: Sequence[Row], *, title: str = "score") -> list[Scored]:
        """What each row is given, in their order.

        Raises:
          UserError: a row is longer than the model's positions, or empty.
        """
        self._check(rows)
        found: dict[int, Scored] = {}
        with Progress(title, total=len(rows), unit="row") as progress:
            for length, size, places in self._batches(rows):
                part = [rows[place] for place in places]
                log_p, best = self._score(part, length=length, size=size)
                check_finite(best)
                for number, (place, row) in enumerate(zip(places, part, strict=True)):
                    asked, each = row.wanted.shape
                    found[place] = Scored(log_p[number, :asked, :each], best[number, :asked])
                progress.advance(len(places))
        return [found[place] for place in range(len(rows))]

    def ask(self, params: Any, frozen: Mapping[str, Any]) -> None:
        """Goes on with other parameters of the same model; what is compiled is kept."""
        self._model = dataclasses.replace(self._model, params=params, frozen=dict(frozen))
        if self._pieces is not None:
            self._pieces.ask(self._model)

    def _check(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if not len(row.tokens) or (self.longest and len(row.tokens) > self.longest):
                raise UserError(
                    f"a row of {len(row.tokens)} tokens: expected 1 to "
                    f"{self.longest or 'any number'}"
                )

    def continuations(
        self, prompts: Sequence[np.ndarray], candidates: Sequence[Sequence[np.ndarray]]
    ) -> list[list[Tokens]]:
        """Every candidate's tokens, each behind its prompt and those before it.

        prompts: ids of each; candidates: ids of those behind each prompt, none empty.

        Raises:
          UserError: see `scores`.
        """
        pieces = self._pieces
        if pieces is None:
            return self._whole_rows(prompts, candidates)
        shapes = [pieces.shape(*asked) for asked in zip(prompts, candidates, strict=True)]
        found: dict[int, list[Tokens]] = {}
        whole = [place for place, shape in enumerate(shapes) if shape is None]
        for place, own in zip(
            whole,
            self._whole_rows([prompts[x] for x in whole], [candidates[x] for x in whole]),
            strict=True,
        ):
            found[place] = own
        with Progress("candidates", total=len(shapes) - len(whole), unit="prompt") as progress:
            for shape, size, places in pieces.batches(shapes):
                part = [prompts[x] for x in places]
                scored = pieces.score(shape, part, [candidates[x] for x in places], size=size)
                found |= dict(zip(places, scored, strict=True))
                progress.advance(len(places))
        return [found[place] for place in range(len(prompts))]

    def _whole_rows(
        self, prompts: Sequence[np.ndarray], candidates: Sequence[Sequence[np.ndarray]]
    ) -> list[list[Tokens]]:
        """`continuations`: one row for all first tokens, and one for each longer candidate."""
        first = []
        for prompt, own in zip(prompts, candidates, strict=True):
            wanted = np.concatenate([ids[:1] for ids in own])[None]
            first.append(Row(prompt, np.array([len(prompt) - 1]), wanted))
        behind = self.scores(first, title="next token") if first else []
        found = [
            [Tokens(one.log_p[:, number], one.best) for number in range(len(own))]
            for one, own in zip(behind, candidates, strict=True)
        ]
        rows, places = [], []
        for place, (prompt, own) in enumerate(zip(prompts, candidates, strict=True)):
            for number, ids in enumerate(own):
                if len(ids) > 1:
                    at = len(prompt) + np.arange(len(ids) - 1)
                    rows.append(Row(np.concatenate([prompt, ids[:-1]]), at, ids[1:, None]))
                    places.append((place, number))
        further = self.scores(rows, title="further tokens") if rows else []
        for (place, number), one in zip(places, further, strict=True):
            more = Tokens(one.log_p[:, 0], one.best)
            found[place][number] = found[place][number].followed_by(more)
        return found

    def _batches(self, rows: Sequence[Row]) -> Iterator[tuple[int, int, list[int]]]:
        """Lengths and sizes of batches, and places of the rows of each."""
        keys = [self._bucket(row) for row in rows]
        for key in sorted(set(keys)):
            places = [place for place, own in enumerate(keys) if own == key]
            size = self._rows_at_once(key[0], len(places))
            for first in range(0, len(places), size):
                yield key[0], size, places[first : first + size]

    def _bucket(self, row: Row) -> tuple[int, int, int]:
        asked, each = row.wanted.shape
        return (
            self._length(len(row.tokens)),
            buckets.power_of_two(max(asked, _FEWEST_ASKED)) if asked > 1 else 1,
            buckets.power_of_two(each),
        )

    def _length(self, tokens: int) -> int:
        """What a row of so many tokens is filled up to."""
        length = max(buckets.power_of_two(tokens), _SHORTEST)
        return min(length, self.longest) if self.longest else length

    def _rows_at_once(self, length: int, there: int) -> int:
        shards = partitioning.row_shards(self._model.mesh)
        return buckets.rows_at_once(self._tokens_at_once, length, there=there, shards=shards)

    def _score(
        self, rows: Sequence[Row], *, length: int, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """float32 [B, M, K] and [B, M], B filled up to `size`, M and K to those of the bucket."""
        _, asked, each = self._bucket(rows[0])
        filled = [*rows, *[rows[-1]] * (size - len(rows))]
        at_BM = np.zeros((size, asked), np.int32)
        wanted_BMK = np.zeros((size, asked, each), np.int32)
        for number, row in enumerate(filled):
            at_BM[number, : len(row.at)] = row.at
            wanted_BMK[number, : row.wanted.shape[0], : row.wanted.shape[1]] = row.wanted
        model = self._model
        batch = model.batch_of_ids([row.tokens for row in filled], length=length)
        read = 0 if batch.tower is None else batch.tower.tokens_BS.shape[1]
        self._shapes.add((size, length, asked, each, read))
        with model.computing():
            log_p_BMK, best_BM = _compiled(model.model)(
                model.params, model.frozen, batch, at_BM, wanted_BMK
            )
        return np.asarray(log_p_BMK), np.asarray(best_BM)


@functools.cache
def _compiled(model: Model) -> Callable[..., tuple[Array, Array]]:
    """Log probabilities [B, M, K] of wanted_BMK behind positions at_BM, and the highest [B, M].

    M is a power of two. Few positions at a time meet the vocabulary, so that memory is bounded.
    """

    def run(
        params: Any, frozen: Mapping[str, Any], batch: Batch, at_BM: Array, wanted_BMK: Array
    ) -> tuple[Array, Array]:
        decoder = model.decoder
        hidden: Any = decoder.apply(
            {"params": params}, batch.tokens_BT, model.features(frozen, batch), method="hidden"
        )
        # Before the output projection, which is the largest of all products.
        asked_BMD = jnp.take_along_axis(hidden.hidden_BTD, at_BM[:, :, None], axis=1)

        def behind(part: tuple[Array, Array]) -> tuple[Array, Array]:
            hidden_BMD, wanted_BMK = part
            logits_BMV: Any = decoder.apply({"params": params}, hidden_BMD, method="logits")
            logits_BMV = logits_BMV.astype(jnp.float32)
            total_BM1 = jax.nn.logsumexp(logits_BMV, axis=2, keepdims=True)
            wanted_BMK = jnp.take_along_axis(logits_BMV, wanted_BMK, axis=2) - total_BM1
            return wanted_BMK, jnp.max(logits_BMV, axis=2) - total_BM1[:, :, 0]

        size, count = at_BM.shape
        each = min(count, buckets.power_of_two(max(_LOGITS_AT_ONCE // size, 1) + 1) // 2)

        def parts(x_BM: Array) -> Array:
            """[B, M, ...] to [M / each, B, each, ...]."""
            return jnp.moveaxis(x_BM.reshape(size, -1, each, *x_BM.shape[2:]), 1, 0)

        def whole(x_PBM: Array) -> Array:
            x_BPM = jnp.moveaxis(x_PBM, 0, 1)
            return x_BPM.reshape(size, count, *x_BPM.shape[3:])

        log_p, best = jax.lax.map(behind, (parts(asked_BMD), parts(wanted_BMK)))
        return whole(log_p), whole(best)

    return jax.jit(run)


class Rehearsal(Scorer):
    """A scorer that computes nothing: tasks put to it are refused as they would be, and soon."""

    def __init__(self, model: TrainedModel) -> None:
        """See `Scorer`."""
        super().__init__(model, share_prompts=False)

    def scores(self, rows: Sequence[Row], *, title: str = "score") -> list[Scored]:
        """Checks rows; every token is as likely as any."""
        self._check(rows)
        return [
            Scored(np.full(row.wanted.shape, -1, np.float32), np.zeros(len(row.at), np.float32))
            for row in rows
        ]
