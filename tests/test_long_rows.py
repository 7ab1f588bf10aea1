"""Rows of 4,096 tokens: every system reads them, causally, and the tower at a cost linear in T."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blindvalm_jax import memory, partitioning
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.grounding import images
from blindvalm_jax.models.clip import Readout, TextTower
from blindvalm_jax.objectives.language_model import Batch, Model
from tests import small_models

LENGTH, VECTORS = 4096, 40
SHAPE = dataclasses.replace(small_models.TOWER, layers=1, width=8, mlp_width=16, context=77)
CONFIG = dataclasses.replace(small_models.CONFIG, layers=2, width=8, heads=1)
LEARNED = dataclasses.replace(CONFIG, positions="learned", max_positions=LENGTH)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


def batch_of(length: int) -> Batch:
    """One row, cut at random and at the tower's longest segment at the latest."""
    batch = small_models.blind_batch(rows=1, length=length)
    assert batch.tower is not None
    starts = np.array(batch.tower.starts_BS)
    starts[:, :: SHAPE.longest_segment] = True
    return batch.replace(tower=batch.tower.replace(starts_BS=jnp.asarray(starts)))  # type: ignore[attr-defined]


def model_of(system: str, *, learned: bool) -> tuple[Model, dict[str, Any]]:
    """A system and what is frozen of it."""
    readout: Readout = "eos" if system.endswith("eos") else "token"
    config = LEARNED if learned else CONFIG
    decoder = small_models.decoder(config, fusion_layers=(1,), memory_width=SHAPE.projection)
    frozen: dict[str, Any] = {"tower": small_models.tower_params(SHAPE)}
    model = Model(decoder, TextTower(SHAPE), readout)
    if system.startswith("valm"):
        mesh = partitioning.make_mesh(MeshConfig(), jax.devices()[:1])
        search = images.on_devices(mesh, count=VECTORS, neighbours=2)
        model = dataclasses.replace(model, search=search)
        keys = np.random.default_rng(0).standard_normal((VECTORS, SHAPE.projection))
        frozen["index"] = jnp.asarray(keys, jnp.float32)
    return model, frozen


@pytest.mark.parametrize(
    ("system", "learned"), [("blind", True), ("eos", False), ("valm", True)], ids=lambda x: str(x)
)
def test_long_rows_are_causal_to_their_end(system: str, learned: bool) -> None:
    """Other tokens from a place on change what is said there, and nothing before it."""
    model, frozen = model_of(system, learned=learned)
    params = small_models.decoder_params(model.decoder)
    batch, place = batch_of(LENGTH), LENGTH - 100

    @jax.jit
    def hidden(tokens_BT: jax.Array, tower_BS: jax.Array) -> jax.Array:
        assert batch.tower is not None
        read = batch.tower.replace(tokens_BS=tower_BS)  # type: ignore[attr-defined]
        z_BTKE = model.features(frozen, batch.replace(tower=read))  # type: ignore[attr-defined]
        found: Any = model.decoder.apply({"params": params}, tokens_BT, z_BTKE, method="hidden")
        return found.hidden_BTD

    assert batch.tower is not None
    before = hidden(batch.tokens_BT, batch.tower.tokens_BS)
    other = batch.tokens_BT.at[:, place:].add(1) % small_models.VOCAB
    read = batch.tower.tokens_BS.at[:, place:].set(batch.tower.tokens_BS[:, place:] // 2)
    after = hidden(other, read)
    np.testing.assert_array_equal(before[:, :place], after[:, :place])
    assert np.all(np.any(before[:, place:] != after[:, place:], axis=-1))
    assert np.all(np.isfinite(before))


@functools.cache
def temporary(length: int, readout: Readout) -> int:
    """Bytes that the tower needs besides its arguments for a row."""
    model, frozen = model_of("eos" if readout == "eos" else "blind", learned=False)
    compiled = jax.jit(model.features).lower(frozen, batch_of(length)).compile()
    plan = memory.plan(compiled)
    assert plan is not None
    return plan.temporary


@pytest.mark.parametrize("readout", ["token", "eos"])
def test_memory_of_the_tower_grows_with_the_row_and_not_its_square(readout: Readout) -> None:
    """Twice the row, twice the blocks of segments: up to one block of filling."""
    short, middle, long = (temporary(length, readout) for length in (2048, LENGTH, 2 * LENGTH))
    assert 1.8 < middle / short < 2.2
    assert 1.8 < long / middle < 2.2
