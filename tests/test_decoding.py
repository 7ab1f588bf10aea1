"""Rows read in pieces give the logits of whole rows, at a fixed number of compilations."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from blindvalm_jax import partitioning
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.decoding.cached import Reader, State, TowerText, segment_positions
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import retrieval, segments
from blindvalm_jax.grounding.images import on_devices
from blindvalm_jax.grounding.text import TowerInput
from blindvalm_jax.objectives.language_model import Batch, Model
from tests import small_models

LENGTH, CAPACITY, IMAGES, K = 40, 44, 30, 3
COUNTS = np.array([40, 23, 31, 6])  # real tokens of the rows
VARIANTS = ("gpt_learned", "gpt_sinusoidal", "blind_token", "blind_eos", "valm")
# fp32; the logits are of size 10, attention sums over other numbers of keys
ATOL = 1e-4


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


class Case(NamedTuple):
    """A model, what it needs, random rows, and their logits [B, T, V] read whole."""

    model: Model
    params: Any
    frozen: dict[str, Any]
    text: TowerText | None
    mesh: Mesh
    tokens: np.ndarray
    whole: np.ndarray

    def reader(self, capacity: int = CAPACITY) -> Reader:
        return Reader(self.model, capacity=capacity, text=self.text, mesh=self.mesh)


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    devices = jax.devices()[: data * fsdp * tensor]
    return partitioning.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


def tower_text(rule: segments.Rule = "causal") -> TowerText:
    """Segments of 1 to 16 tokens; the tower's ids are another order of the language model's."""
    rng = np.random.default_rng(7)
    longest = small_models.TOWER.longest_segment
    minimum = rng.choice([1, 3, 7, longest], 64, p=[0.04, 0.1, 0.1, 0.76]).astype(np.int16)
    rank = np.where(minimum < longest, minimum, 127).astype(np.int8)
    separators = segments.Separators(rank=rank, minimum=minimum, longest=longest)
    ids = rng.integers(0, 60, small_models.VOCAB).astype(np.int32)
    return TowerText(rule=rule, separators=separators, ids=ids)


def model_of(variant: str, mesh: Mesh) -> Model:
    positions = "sinusoidal" if variant.endswith("sinusoidal") else "learned"
    config = dataclasses.replace(small_models.CONFIG, positions=positions, max_positions=48)
    if variant.startswith("gpt"):
        return Model(small_models.decoder(config))
    readout = "eos" if variant == "blind_eos" else "token"
    search = on_devices(mesh, count=IMAGES, neighbours=K) if variant == "valm" else None
    return small_models.blind_model(config, readout=readout, search=search)


@functools.cache
def case(variant: str, mesh: Mesh | None = None) -> Case:
    mesh = mesh or mesh_of()
    model = model_of(variant, mesh)
    params = small_models.random_params(model.init, seed=1)
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, small_models.VOCAB, (len(COUNTS), LENGTH)).astype(np.int32)
    frozen: dict[str, Any] = {}
    text, tower_input = None, None
    if model.tower is not None:
        text, frozen["tower"] = tower_text(), small_models.tower_params()
        ids = text.ids[tokens]
        starts = segments.starts(ids, rule="causal", separators=text.separators, counts=COUNTS)
        tower_input = TowerInput(jnp.asarray(ids), jnp.asarray(starts))
    if model.search is not None:
        vectors = rng.standard_normal((IMAGES, small_models.TOWER.projection)).astype(np.float32)
        frozen["index"] = retrieval.place_keys(vectors, mesh)
    here = jnp.asarray(tokens)
    batch = Batch(here, here, jnp.ones(here.shape), tower_input)

    @jax.jit
    def read_whole(params: Any, frozen: Any, batch: Batch) -> Any:
        z_BTKE = model.features(frozen, batch)
        return model.decoder.apply({"params": params}, batch.tokens_BT, z_BTKE)

    whole = np.asarray(read_whole(params, frozen, batch))
    return Case(model, params, frozen, text, mesh, tokens, whole)


def read(
    case: Case, reader: Reader, pieces: Sequence[np.ndarray], width: int
) -> tuple[np.ndarray, State]:
    """Logits of the rows read in pieces, [B] tokens of each row at a time, and the last state."""
    state = reader.start(case.frozen, rows=len(case.tokens))
    found = np.full_like(case.whole, np.nan)
    for counts in pieces:
        tokens = np.zeros((len(counts), width), np.int32)
        before = np.asarray(state.length_B)
        for row, count in enumerate(counts):
            tokens[row, :count] = case.tokens[row, before[row] : before[row] + count]
        logits, state = reader.extend(case.params, case.frozen, state, tokens, counts)
        for row, count in enumerate(counts):
            found[row, before[row] : before[row] + count] = np.asarray(logits)[row, :count]
    return found, state


def assert_same(case: Case, found: np.ndarray) -> None:
    real = np.arange(LENGTH) < COUNTS[:, None]
    assert np.isfinite(found[real]).all()
    np.testing.assert_allclose(found[real], case.whole[real], rtol=0, atol=ATOL)


def pieces_of(width: int, *, seed: int = 0) -> list[np.ndarray]:
    """Random numbers of tokens for each row, none for some, until all are read."""
    rng, left, pieces = np.random.default_rng(seed), COUNTS.copy(), []
    while left.any():
        pieces.append(np.minimum(rng.integers(0, width + 1, len(left)), left))
        left -= pieces[-1]
    return pieces


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_of_any_size_give_the_logits_of_whole_rows(variant: str) -> None:
    """At every position; rows of different lengths, one row gets nothing while another goes on."""
    given = case(variant)
    reader = given.reader()
    at_once, state = read(given, reader, [COUNTS], LENGTH)
    assert_same(given, at_once)
    chunks, chunk_state = read(given, reader, pieces_of(7), 7)
    assert_same(given, chunks)
    singles = [(COUNTS > at).astype(int) for at in range(LENGTH)]
    one_by_one, single_state = read(given, reader, singles, 1)
    assert_same(given, one_by_one)
    for other in (chunk_state, single_state):
        np.testing.assert_array_equal(other.length_B, COUNTS)
        np.testing.assert_array_equal(other.segment_B, state.segment_B)
