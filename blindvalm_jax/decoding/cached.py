"""Rows that are read in pieces: one more token costs one step in the decoder and in the tower.

What attention needs of earlier tokens is kept, in the decoder and in the frozen text tower. The
tower's segments go on too: under the `causal` rule where one starts follows from the tokens before
it, by one integer a row. So the logits are those of whole rows (`Model.features` and `Decoder`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blindvalm_jax import partitioning
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.decoding import caches as caches_of
from blindvalm_jax.decoding import tower_text, unstacked
from blindvalm_jax.decoding.tower_text import TowerText
from blindvalm_jax.errors import UserError
from blindvalm_jax.models.decoder import memory_shares
from blindvalm_jax.objectives.language_model import Model
from blindvalm_jax.trained import TrainedModel
from blindvalm_jax.trained_model import computing

Wanted = Literal["all", "last"]

_CACHE_AXES = PartitionSpec("batch", "heads", None, "kv")


@struct.dataclass
class State:
    """What rows of tokens have left behind.

    caches: "decoder" and, where there is one, "tower": keys and values [B, N, S, H] of each block;
    the tower's S is one more, for its start token.
    length_B: tokens read, of numpy outside jit. segment_B: those in the open segment, 0: none is.
    """

    caches: dict[str, Any]
    length_B: Any
    segment_B: Any


class Reader:
    """Reads rows of up to `capacity` tokens in pieces; compiles once for each width of a piece.

    Parameters may be as trained; those of `unstacked.of` are not cut again by every call.
    """

    def __init__(
        self,
        model: Model,
        *,
        capacity: int,
        text: TowerText | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Compiles nothing yet. text: needed with a tower; mesh: None: the first device alone.

        Raises:
          UserError: the model's rows cannot be read in pieces, or not so many tokens of them.
        """
        _check(model, capacity, text)
        self.capacity = capacity
        self.mesh = mesh or partitioning.make_mesh(MeshConfig(), jax.devices()[:1])
        decoder = model.decoder.clone(deterministic=True, remat="none", stacked=False)
        tower = None if model.tower is None else model.tower.clone(stacked=False)
        self._model = dataclasses.replace(model, decoder=decoder, tower=tower)
        self._text = text if decoder.fusion_layers else None
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        rows = nn.logical_to_mesh_sharding(_CACHE_AXES, self.mesh, partitioning.RULES)
        placed = State(jax.tree.map(lambda _: rows, self._shapes(1)), everywhere, everywhere)
        self.placed = placed
        self._start = jax.jit(self._new, static_argnames="rows", out_shardings=placed)
        self._take = jax.jit(caches_of.take, out_shardings=placed.caches)
        self._widen = jax.jit(self._padded, out_shardings=placed.caches)
        run = functools.partial(
            jax.jit, self._run, static_argnames="logits", out_shardings=(None, placed)
        )
        self._keep, self._consume = run(), run(donate_argnums=2)

    def start(self, frozen: Mapping[str, Any], *, rows: int) -> State:
        """The state of `rows` rows before their first token.

        Raises:
          UserError: the mesh does not divide the rows.
        """
        self._check_rows(rows)
        with computing(self._model, self.mesh):
            state = self._start(frozen, rows=rows)
        return dataclasses.replace(state, length_B=np.zeros(rows, np.int32))

    def prefill(
        self,
        params: Any,
        frozen: Mapping[str, Any],
        tokens_BT: Any,
        counts_B: Any = None,
        *,
        logits: Wanted = "all",
    ) -> tuple[Array, State]:
        """`extend` of rows that have no tokens yet."""
        state = self.start(frozen, rows=len(tokens_BT))
        return self.extend(params, frozen, state, tokens_BT, counts_B, logits=logits, consume=True)

    def extend(
        self,
        params: Any,
        frozen: Mapping[str, Any],
        state: State,
        tokens_BT: Any,
        counts_B: Any = None,
        *,
        logits: Wanted = "all",
        consume: bool = False,
    ) -> tuple[Array, State]:
        """Logits [B, T, V padded] after each of T more tokens of each row, and the new state.

        params, frozen: of the decoder, and of what grounds it (see `Model`). counts_B: how many of
        a row's tokens are real, the first ones; None: all. The logits of the others mean nothing.
        logits "last": of each row's last real token alone, [B, 1, V padded]. consume: `state`
        must not be used again, its memory is.

        Raises:
          UserError: a row would grow over the capacity, or tokens and counts do not fit the state.
        """
        lengths = np.asarray(state.length_B)
        counts = self._checked(lengths, np.shape(tokens_BT), counts_B)
        rows = partitioning.batch_sharding(self.mesh)
        tokens_BT = jax.device_put(jnp.asarray(tokens_BT, jnp.int32), rows)
        run = self._consume if consume else self._keep
        with computing(self._model, self.mesh):
            found, state = run(
                params,
                frozen,
                state.caches,
                lengths,
                state.segment_B,
                tokens_BT,
                counts,
                logits=logits,
            )
        return found, dataclasses.replace(state, length_B=lengths + counts)

    def take(self, state: State, rows: Any) -> State:
        """The state of some of the rows, in any order, each as often as it is named.

        Raises:
          UserError: there is no such row, or the mesh does not divide their number.
        """
        rows_N, there = np.asarray(rows, np.int32), len(state.length_B)
        self._check_rows(len(rows_N))
        if rows_N.min() < 0 or rows_N.max() >= there:
            raise UserError(f"rows {rows_N.tolist()} of a state of {there}: they count from 0")
        segment_B = np.asarray(state.segment_B)[rows_N]
        placed = jax.device_put(segment_B, NamedSharding(self.mesh, PartitionSpec()))
        return State(self._take(state.caches, rows_N), np.asarray(state.length_B)[rows_N], placed)

    def widened(self, state: State) -> State:
        """The state of the same rows for this reader, from that of one of a smaller capacity."""
        with computing(self._model, self.mesh):
            return dataclasses.replace(state, caches=self._widen(state.caches))

    def step(
        self,
        params: Any,
        frozen: Mapping[str, Any],
        state: State,
        tokens_BT: Array,
        counts_B: Array,
        *,
        logits: Wanted = "all",
    ) -> tuple[Array, State]:
        """`extend` as a pure function, for loops under jit. Nothing is checked.

        What does not fit in a row's capacity is not kept, and the logits from there on are wrong.
        """
        found, state, _ = self.probed_step(
            params, frozen, state, tokens_BT, counts_B, logits=logits, probe=False
        )
        return found, state

    def probed_step(
        self,
        params: Any,
        frozen: Mapping[str, Any],
        state: State,
        tokens_BT: Array,
        counts_B: Array,
        *,
        logits: Wanted = "all",
        probe: bool = True,
    ) -> tuple[Array, State, Array | None]:
        """`step`, and how the positions of the logits attend to their grounding vectors.

        That is `decoder.memory_shares` [L', B, T or 1, N]; None without fusion layers or `probe`.
        """
        decoder, params = self._model.decoder, unstacked.params_of(params)
        at_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        real_BT = at_T[None] < counts_B[:, None]
        slot_BT = jnp.where(real_BT, state.length_B[:, None] + at_T[None], self.capacity)
        z_BTKE, caches, segment_B = None, {}, state.segment_B
        if self._text is not None:
            z_BTKE, caches["tower"], segment_B = self._grounding(
                frozen, state, tokens_BT, slot_BT, self._text
            )
        hidden, kept = decoder.apply(
            {"params": params, "cache": state.caches["decoder"]},
            tokens_BT,
            slot_BT,
            z_BTKE,
            capacity=self.capacity,
            method="extend",
            mutable=["cache", "probes"] if probe else ["cache"],
        )
        caches["decoder"] = kept["cache"]
        shares = memory_shares(kept["probes"]) if "probes" in kept else None
        if logits == "last":
            last_B11 = (jnp.maximum(counts_B, 1) - 1)[:, None, None]
            hidden = jnp.take_along_axis(hidden, last_B11, axis=1)
            if shares is not None:
                shares = jnp.take_along_axis(shares, last_B11[None], axis=2)
        found: Any = decoder.apply({"params": params}, hidden, method="logits")
        return found, State(caches, state.length_B + counts_B, segment_B), shares

    def _grounding(
        self,
        frozen: Mapping[str, Any],
        state: State,
        tokens_BT: Array,
        slot_BT: Array,
        text: TowerText,
    ) -> tuple[Array, Any, Array]:
        """z [B, T, K, E], the tower's cache, and the length of each row's open segment."""
        ids_BT = jnp.take(jnp.asarray(text.ids), tokens_BT, mode="clip")
        position_BT, segment_B = tower_text.positions(
            ids_BT, slot_BT < self.capacity, state.segment_B, minimum=text.separators.minimum
        )
        features_BTE, kept = self._read(
            frozen, state.caches["tower"], ids_BT, slot_BT + 1, position_BT
        )
        if self._model.search is None:
            return features_BTE[:, :, None], kept, segment_B
        return self._model.search(features_BTE, frozen.get("index")), kept, segment_B

    def _read(
        self,
        frozen: Mapping[str, Any],
        cache: Any,
        ids_BT: Array,
        slot_BT: Array,
        position_BT: Array,
    ) -> tuple[Array, Any]:
        """Features of the tower's tokens, and its cache with them."""
        tower = self._model.tower
        if tower is None:
            raise ValueError("a model without a tower reads no text with it")
        features: Any
        features, kept = tower.apply(
            {"params": unstacked.params_of(frozen["tower"]), "cache": cache},
            ids_BT,
            slot_BT,
            position_BT,
            capacity=self.capacity + 1,
            readout=self._model.readout,
            method="extend",
            mutable=["cache"],
        )
        return features, kept["cache"]

    def _new(self, frozen: Mapping[str, Any], *, rows: int) -> State:
        """Empty caches; the tower's holds its start token."""
        caches = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._shapes(rows))
        tower, none_B = self._model.tower, jnp.zeros(rows, jnp.int32)
        if tower is not None and self._text is not None:
            start_B1 = jnp.full((rows, 1), tower.config.start_id, jnp.int32)
            _, caches["tower"] = self._read(
                frozen, caches["tower"], start_B1, none_B[:, None], none_B[:, None]
            )
        return State(caches, none_B, none_B)

    def _padded(self, caches: dict[str, Any]) -> dict[str, Any]:
        return caches_of.padded(caches, self._shapes(len(jax.tree.leaves(caches)[0])))

    def _run(
        self,
        params: Any,
        frozen: Mapping[str, Any],
        caches: dict[str, Any],
        length_B: Array,
        segment_B: Array,
        tokens_BT: Array,
        counts_B: Array,
        *,
        logits: Wanted,
    ) -> tuple[Array, State]:
        state = State(caches, length_B, segment_B)
        return self.step(params, frozen, state, tokens_BT, counts_B, logits=logits)

    def _check_rows(self, rows: int) -> None:
        split = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if rows < 1 or rows % split:
            raise UserError(
                f"{rows} rows, not a positive multiple of mesh.data x mesh.fsdp = {split}"
            )

    def _checked(self, lengths: np.ndarray, shape: tuple[int, ...], counts_B: Any) -> np.ndarray:
        """The counts, of numpy."""
        if len(shape) != 2 or shape[0] != len(lengths) or not shape[1]:
            raise UserError(
                f"tokens of shape {list(shape)} for {len(lengths)} rows: give [rows, T]"
            )
        counts = np.full(len(lengths), shape[1]) if counts_B is None else np.asarray(counts_B)
        if counts.shape != lengths.shape or counts.min() < 0 or counts.max() > shape[1]:
            raise UserError(
                f"counts must be {len(lengths)} numbers from 0 to {shape[1]}, got {counts.tolist()}"
            )
        over = int(np.argmax(lengths + counts))
        if lengths[over] + counts[over] > self.capacity:
            raise UserError(
                f"row {over} has {lengths[over]} tokens and gets {counts[over]} more, the cache "
                f"holds {self.capacity}: read with a larger capacity, or less text"
            )
        return counts.astype(np.int32)

    def _shapes(self, rows: int) -> dict[str, Any]:
        grounded = self._text is not None
        return caches_of.shapes(self._model, rows=rows, capacity=self.capacity, grounded=grounded)


def reader(trained: TrainedModel, *, capacity: int) -> Reader:
    """A reader for a finished run.

    Raises:
      UserError: see `Reader`.
    """
    text = tower_text.of(trained)
    return Reader(trained.model, capacity=capacity, text=text, mesh=trained.mesh)


def check_capacity(model: Model, capacity: int) -> None:
    """Refuses what no `Reader` of the model could hold.

    Raises:
      UserError: there is no room for a token, or more than the model has positions.
    """
    config = model.decoder.config
    if capacity < 1:
        raise UserError(f"a capacity of {capacity} tokens: it must be at least 1")
    if config.positions == "learned" and capacity > config.max_positions:
        raise UserError(
            f"a capacity of {capacity} tokens exceeds the learned position table, "
            f"decoder.max_positions {config.max_positions}"
        )


def _check(model: Model, capacity: int, text: TowerText | None) -> None:
    check_capacity(model, capacity)
    tower = model.tower
    if not model.decoder.fusion_layers:
        return
    if tower is None or text is None:
        raise UserError("a grounded model reads text in pieces with its tower only, got none")
    if model.shuffled:
        raise UserError(
            "grounding.control=shuffled takes the features of other rows: score whole rows with it"
        )
    if text.separators.longest > tower.config.longest_segment:
        raise UserError(
            f"segments of up to {text.separators.longest} tokens, the tower reads "
            f"{tower.config.longest_segment}: make the separators for that"
        )
