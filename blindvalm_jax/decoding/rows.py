"""Rows that grow by drawn tokens: from caches in blocks on the device, or read whole each time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from blindvalm_jax.decoding import cached, sampling, unstacked
from blindvalm_jax.decoding.cached import Reader, State
from blindvalm_jax.decoding.sampling import Sampling
from blindvalm_jax.models.decoder import memory_shares
from blindvalm_jax.objectives.language_model import Batch, Model
from blindvalm_jax.trained import TrainedModel

_STEP = 64  # lengths are rounded up to a multiple: few of them are compiled
_ROOM = 256  # tokens behind the prompts that the first caches hold


class Drawn(NamedTuple):
    """Tokens of all rows, int32 [B, T]; what a row has behind its last one means nothing.

    shares: [L', B, T], mean over heads of the weight on the grounding vectors where each token was
    predicted; None: not asked for.
    """

    tokens: np.ndarray
    shares: np.ndarray | None


class Draw(NamedTuple):
    """How every row draws.

    never: bool [V], see `sampling.never_text`. layers: fusion layers whose shares are wanted, 0 or
    all that the model has.
    """

    sampling: Sampling
    never: np.ndarray
    eos_id: int
    layers: int

    def __call__(
        self, logits_BV: Array, keys_B: Array, number_B: Array, seen_BV: Array | None
    ) -> Array:
        """Token number_B of each row, from the row's key and that number alone."""
        found_BV = sampling.scores(
            logits_BV, sampling=self.sampling, never_V=self.never, seen_BV=seen_BV
        )
        keys_B = jax.vmap(jax.random.fold_in)(keys_B, number_B)
        return sampling.draw(found_BV, keys_B, sampling=self.sampling)


class Rows(Protocol):
    """Rows that are begun with prompts and then go on."""

    def begin(self, prompts: Sequence[np.ndarray], samples: int, keys_B: Array, most: int) -> Drawn:
        """The first token of each row: `samples` rows of each prompt; most: tokens of a row."""

    def go_on(self, stopped_B: np.ndarray) -> Drawn:
        """Some tokens more of the rows that have neither ended nor been stopped."""


@struct.dataclass
class Carry:
    """State of a loop. token_B: drawn and not read yet; number_B: tokens that were drawn."""

    state: State
    token_B: Array
    number_B: Array
    done_B: Array
    seen_BV: Array | None


class CachedRows:
    """Each token costs one step; blocks of steps run on the device without the host.

    A step costs what the caches hold, so these begin small and double when they are full: what is
    paid is what was read, not what was asked for.
    """

    def __init__(self, trained: TrainedModel, draw: Draw, *, block: int) -> None:
        """block: most tokens of a `go_on`. Compiles nothing yet."""
        self._weights = unstacked.of(trained.params, trained.frozen)
        self._trained, self._draw, self._block = trained, draw, block
        self._programs = functools.cache(self._compiled)

    def begin(self, prompts: Sequence[np.ndarray], samples: int, keys_B: Array, most: int) -> Drawn:
        """See `Rows`; compiles what `go_on` runs until the caches double.

        Raises:
          UserError: the model's rows cannot be read in pieces (see `cached.Reader`), or a row
            could grow past its learned positions.
        """
        self._read = max(len(prompt) for prompt in prompts)
        self._limit = self._read + most - 1
        cached.check_capacity(self._trained.model, self._limit)
        self._capacity = _rounded(self._trained, min(self._read + _ROOM, self._limit))
        reader, first, self._more = self._programs(self._capacity)
        width = min(_rounded(self._trained, self._read), self._capacity)
        tokens_PT, counts_P = _padded(prompts, width)
        row_B = np.repeat(np.arange(len(prompts), dtype=np.int32), samples)
        self._fixed = {"keys_B": keys_B, "most": np.int32(most)}
        with self._trained.computing():
            state = reader.start(self._weights[1], rows=len(prompts))
            self._carry, shares = first(
                *self._weights, state, tokens_PT, counts_P, row_B, **self._fixed
            )
        drawn = _drawn(np.asarray(self._carry.token_B)[:, None], shares)
        self._advance(np.zeros(len(row_B), bool), 0)
        return drawn

    def go_on(self, stopped_B: np.ndarray) -> Drawn:
        """See `Rows`."""
        return self._advance(stopped_B, self._block)

    def _advance(self, stopped_B: np.ndarray, steps: int) -> Drawn:
        self._make_room(steps)
        with self._trained.computing():
            self._carry, tokens_BT, shares = self._more(
                *self._weights, self._carry, stopped_B, np.int32(steps), **self._fixed
            )
        return _drawn(tokens_BT, shares)

    def _make_room(self, steps: int) -> None:
        """Doubles the caches until they hold so many more tokens of each row."""
        self._read = min(self._read + steps, self._limit)
        capacity = self._capacity
        while capacity < self._read:
            capacity = _rounded(self._trained, min(2 * capacity, self._limit))
        if capacity > self._capacity:
            reader, _, self._more = self._programs(capacity)
            state = reader.widened(self._carry.state)
            self._carry, self._capacity = dataclasses.replace(self._carry, state=state), capacity

    def _compiled(self, capacity: int) -> tuple[Reader, Callable[..., Any], Callable[..., Any]]:
        reader = cached.reader(self._trained, capacity=capacity)
        first = jax.jit(functools.partial(_first, reader, self._draw))
        more = functools.partial(_more, reader, self._draw, self._block)
        return reader, first, jax.jit(more, donate_argnums=2)


def _first(
    reader: Reader,
    draw: Draw,
    params: Any,
    frozen: Mapping[str, Any],
    state: State,
    tokens_PT: Array,
    counts_P: Array,
    row_B: Array,
    *,
    keys_B: Array,
    most: Array,
) -> tuple[Carry, Array | None]:
    """Reads the prompts, and draws the first token of each row from that of prompt row_B."""
    logits_P1V, state, shares = reader.probed_step(
        params, frozen, state, tokens_PT, counts_P, logits="last", probe=draw.layers > 0
    )
    seen_BV = None
    if draw.sampling.repetition_penalty != 1:
        real_PT = jnp.arange(tokens_PT.shape[1])[None] < counts_P[:, None]
        seen_PV = jnp.zeros((len(tokens_PT), logits_P1V.shape[2]), bool)
        seen_BV = seen_PV.at[jnp.arange(len(tokens_PT))[:, None], tokens_PT].max(real_PT)[row_B]
    number_B = jnp.zeros(len(row_B), jnp.int32)
    token_B = draw(logits_P1V[row_B, 0], keys_B, number_B, seen_BV)
    taken: State = jax.tree.map(lambda x: jnp.take(x, row_B, axis=0, mode="clip"), state)
    done_B = (token_B == draw.eos_id) | (most == 1)
    carry = Carry(taken, token_B, number_B + 1, done_B, _with(seen_BV, token_B))
    return carry, None if shares is None else jnp.mean(shares[:, row_B], axis=3)


def _more(
    reader: Reader,
    draw: Draw,
    width: int,
    params: Any,
    frozen: Mapping[str, Any],
    carry: Carry,
    stopped_B: Array,
    steps: Array,
    *,
    keys_B: Array,
    most: Array,
) -> tuple[Carry, Array, Array | None]:
    """Up to `steps` tokens more of each row, [B, width], and where asked for their shares."""
    size = (len(stopped_B), width)
    shares = jnp.zeros((draw.layers, *size)) if draw.layers else None

    def goes_on(at: tuple[Array, Carry, Array, Any]) -> Array:
        return (at[0] < steps) & ~jnp.all(at[1].done_B)

    def one(at: tuple[Array, Carry, Array, Any]) -> tuple[Array, Carry, Array, Any]:
        place, carry, tokens_BT, shares = at
        reads_B = jnp.where(carry.done_B, 0, 1)
        logits_B1V, state, share = reader.probed_step(
            *(params, frozen, carry.state, carry.token_B[:, None], reads_B),
            logits="last",
            probe=draw.layers > 0,
        )
        token_B = draw(logits_B1V[:, 0], keys_B, carry.number_B, carry.seen_BV)
        number_B = carry.number_B + reads_B
        done_B = carry.done_B | (token_B == draw.eos_id) | (number_B == most)
        if share is not None:
            shares = shares.at[:, :, place].set(jnp.mean(share[:, :, 0], axis=2))
        carry = Carry(state, token_B, number_B, done_B, _with(carry.seen_BV, token_B))
        return place + 1, carry, tokens_BT.at[:, place].set(token_B), shares

    carry = dataclasses.replace(carry, done_B=carry.done_B | stopped_B)
    begin = (jnp.int32(0), carry, jnp.zeros(size, jnp.int32), shares)
    _, carry, tokens_BT, shares = jax.lax.while_loop(goes_on, one, begin)
    return carry, tokens_BT, shares


def _with(seen_BV: Array | None, token_B: Array) -> Array | None:
    return None if seen_BV is None else seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)


class WholeRows:
    """Every token reads its whole row: for rows that cannot be read in pieces, and to compare."""

    def __init__(self, trained: TrainedModel, draw: Draw) -> None:
        """Compiles nothing yet."""
        self._trained, self._draw = trained, draw
        model = trained.model
        decoder = model.decoder.clone(deterministic=True, remat="none")
        self._next = jax.jit(
            functools.partial(_whole, dataclasses.replace(model, decoder=decoder), draw)
        )

    def begin(self, prompts: Sequence[np.ndarray], samples: int, keys_B: Array, most: int) -> Drawn:
        """See `Rows`."""
        self._rows = [prompt for prompt in prompts for _ in range(samples)]
        self._prompts = np.array([len(row) for row in self._rows])
        self._done_B, self._most, self._keys_B = np.zeros(len(self._rows), bool), most, keys_B
        return self.go_on(self._done_B)

    def go_on(self, stopped_B: np.ndarray) -> Drawn:
        """See `Rows`; a token at a time."""
        self._done_B = self._done_B | stopped_B
        counts_B = np.array([len(row) for row in self._rows], np.int32)
        length = _rounded(self._trained, int(counts_B.max()))
        batch = self._trained.batch_of_ids(self._rows, length=length)
        number_B = (counts_B - self._prompts).astype(np.int32)
        with self._trained.computing():
            token_B, shares = self._next(
                *(self._trained.params, self._trained.frozen, batch),
                *(counts_B, self._keys_B, number_B),
            )
        found = np.asarray(token_B)
        for row in np.flatnonzero(~self._done_B):
            self._rows[row] = np.append(self._rows[row], found[row])
        number_B = number_B + ~self._done_B
        self._done_B = self._done_B | (found == self._draw.eos_id) | (number_B == self._most)
        return _drawn(found[:, None], shares)


def _whole(
    model: Model,
    draw: Draw,
    params: Any,
    frozen: Mapping[str, Any],
    batch: Batch,
    counts_B: Array,
    keys_B: Array,
    number_B: Array,
) -> tuple[Array, Array | None]:
    """The next token of each row, and where asked for the shares [L', B, 1]."""
    hidden: Any
    hidden, kept = model.decoder.apply(
        {"params": params},
        batch.tokens_BT,
        model.features(frozen, batch),
        method="hidden",
        mutable=["probes"] if draw.layers else [],
    )
    last_B11 = counts_B[:, None, None] - 1
    last_B1D = jnp.take_along_axis(hidden.hidden_BTD, last_B11, axis=1)
    logits_B1V: Any = model.decoder.apply({"params": params}, last_B1D, method="logits")
    seen_BV = None
    if draw.sampling.repetition_penalty != 1:
        real_BT = jnp.arange(batch.tokens_BT.shape[1])[None] < counts_B[:, None]
        seen_BV = jnp.zeros((len(counts_B), logits_B1V.shape[2]), bool)
        seen_BV = seen_BV.at[jnp.arange(len(counts_B))[:, None], batch.tokens_BT].max(real_BT)
    token_B = draw(logits_B1V[:, 0], keys_B, number_B, seen_BV)
    if "probes" not in kept:
        return token_B, None
    shares = jnp.take_along_axis(memory_shares(kept["probes"]), last_B11[None], axis=2)
    return token_B, jnp.mean(shares, axis=3)


def _padded(prompts: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [P, width] with zeros behind, and the lengths [P]."""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(prompt) for prompt in prompts], np.int32)


def _rounded(trained: TrainedModel, length: int) -> int:
    """A length that is compiled for, at least this one and within the model's positions."""
    config = trained.model.decoder.config
    length = -(-length // _STEP) * _STEP
    return min(length, config.max_positions) if config.positions == "learned" else length


def _drawn(tokens_BT: Any, shares: Any) -> Drawn:
    return Drawn(np.asarray(tokens_BT), None if shares is None else np.asarray(shares))
