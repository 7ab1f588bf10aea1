"""Scores of rows and of what may follow prompts: on a mesh, with texts, with a shared beginning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from blindvalm_jax import config, partitioning, system, trained
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.data import packing
from blindvalm_jax.interop import weights
from blindvalm_jax.tasks.scoring import Row, Scorer
from blindvalm_jax.trained import TrainedModel
from tests import foreign_models, small_models, small_text

POSITIONS = 64


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that share one BPE: blind/, its tower/, and plain/, of learned positions."""
    root = tmp_path_factory.mktemp("weights")
    tokenizer = small_text.small_bpe()
    tokenizer.save(root / "bpe")
    vocabulary = packing.record(tokenizer)
    shape = config.TextTowerConfig(layers=1, width=16, projection=16)
    tower = system.tower_shape(shape, vocabulary, setting="grounding.random")
    specs: dict[str, weights.Spec] = {
        "blind": foreign_models.BLIND,
        "plain": foreign_models.GPT2,
        "tower": tower,
    }
    for name, spec in specs.items():
        if isinstance(spec, weights.DecoderSpec):
            resized = dataclasses.replace(
                spec.decoder, vocab_size=0, layers=3, max_positions=POSITIONS
            )
            spec = dataclasses.replace(spec, decoder=resized, vocab_size=vocabulary.vocab_size)
        weights.save(
            root / name,
            foreign_models.random_params(spec),
            config=spec,
            source="made for a test",
            tokenizer={"kind": "train", "fingerprint": vocabulary.fingerprint},
            tokenizer_files=None if name == "tower" else root / "bpe",
        )
    return root


def model_of(kind: str, saved: Path, mesh: MeshConfig | None = None) -> TrainedModel:
    tower = "" if kind == "plain" else saved / "tower"
    placed = None if mesh is None else partitioning.make_mesh(mesh)
    return trained.from_weights(saved / kind, mesh=placed, tower=tower)


def rows_of(model: TrainedModel, count: int) -> list[Row]:
    """Random rows of 17 to 30 tokens, asked for two tokens behind each of two."""
    rng = np.random.default_rng(6)
    size = model.tokenizer.vocab_size
    found = []
    for _ in range(count):
        tokens = rng.integers(0, size, rng.integers(17, 31)).astype(np.int32)
        at = rng.integers(0, len(tokens), 2)
        found.append(Row(tokens, at, rng.integers(0, size, (2, 2))))
    return found


def test_rows_are_split_over_the_devices_of_a_mesh(saved: Path) -> None:
    """29 rows, 8 devices; 1e-5: sums in fp32 in another order."""
    one = model_of("blind", saved)
    rows = rows_of(one, 29)
    many = model_of("blind", saved, MeshConfig(data=4, fsdp=2))
    batch = many.batch_of_ids([row.tokens for row in rows[:16]], length=32)
    assert {shard.data.shape for shard in batch.tokens_BT.addressable_shards} == {(2, 32)}
    odd = many.batch_of_ids([row.tokens for row in rows[:5]], length=32)
    assert odd.tokens_BT.sharding.is_fully_replicated
    assert odd.tokens_BT.sharding.device_set == set(jax.devices())
    split = Scorer(many, tokens_at_once=64).log_probabilities(rows)
    for got, expected in zip(split, Scorer(one).log_probabilities(rows), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
