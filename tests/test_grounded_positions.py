"""Positions that are to do without their grounding, and a fusion block turned into a plain one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blindvalm_jax.config import FusionConfig
from blindvalm_jax.models import attention
from blindvalm_jax.models.decoder import Decoder
from blindvalm_jax.objectives import language_model
from blindvalm_jax.toyworld import language, measure
from blindvalm_jax.toyworld.world import SPLITS, WorldConfig, objects
from blindvalm_jax.trained import TrainedModel
from tests import small_models

B, T, K, N, H, E = 2, 7, 3, 4, 8, 24


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def fused(query_scale: str) -> Decoder:
    fusion = FusionConfig(query_scale=query_scale)
    return small_models.decoder(fusion=fusion, fusion_layers=(1,), memory_width=E)


def hidden(model: Decoder, params: Any, tokens: np.ndarray, *rest: Any) -> np.ndarray:
    found: Any = model.apply({"params": params}, jnp.asarray(tokens), *rest, method="hidden")
    return np.asarray(found.hidden_BTD)


def test_a_hidden_memory_has_no_weight() -> None:
    """Where it is seen the result is numpy's over text and memory, elsewhere over text alone."""
    q, k, v = (normal(i, B, T, N, H) for i in range(3))
    memory_k, memory_v = (normal(i, B, T, K, N, H) for i in (3, 4))
    seen = np.random.default_rng(5).random((B, T)) < 0.5
    assert seen.any()
    assert not seen.all()
    found = attention.Causal(grounded_BT=jnp.asarray(seen)).attend(
        jnp.asarray(q),
        jnp.asarray(k),
        jnp.asarray(v),
        scale=0.3,
        memory=attention.Memory(jnp.asarray(memory_k), jnp.asarray(memory_v)),
    )
    want, share = np.zeros((B, T, N, H)), np.zeros((B, T))
    for b, t, n in np.ndindex(B, T, N):
        extra = K if seen[b, t] else 0
        keys = np.concatenate([k[b, : t + 1, n], memory_k[b, t, :extra, n]]).astype(np.float64)
        values = np.concatenate([v[b, : t + 1, n], memory_v[b, t, :extra, n]])
        weights = np.exp(0.3 * keys @ q[b, t, n])
        weights /= weights.sum()
        want[b, t, n] = weights @ values
        share[b, t] += weights[t + 1 :].sum() / N
    np.testing.assert_allclose(found.out_BTNH, want, rtol=0, atol=1e-5)
    assert found.memory_share_BT is not None
    np.testing.assert_allclose(found.memory_share_BT, share, rtol=0, atol=1e-6)
    assert np.all(np.asarray(found.memory_share_BT)[~seen] == 0)


def test_hidden_features_do_not_matter() -> None:
    model = fused("model_width")
    params = small_models.decoder_params(model)
    tokens = np.random.default_rng(0).integers(0, small_models.VOCAB, (B, T))
    seen = jnp.asarray(np.arange(T)[None, :] == 3).repeat(B, axis=0)
    z = normal(6, B, T, K, E)
    changed = z.copy()
    changed[:, [0, 1, 2, 4, 5, 6]] += 1.0
    own = hidden(model, params, tokens, z, None, seen)
    np.testing.assert_array_equal(own, hidden(model, params, tokens, changed, None, seen))
    changed[:, 3] += 1.0
    moved = np.abs(own - hidden(model, params, tokens, changed, None, seen)).max(axis=(0, 2))
    assert np.all(moved[:3] == 0)
    assert np.all(moved[3:] > 0)


@pytest.mark.parametrize("query_scale", ["model_width", "head_width"])
def test_without_fusion_is_what_a_mask_everywhere_gives(query_scale: str) -> None:
    """1e-5: the queries are scaled before, not after, the product, in fp32."""
    model = fused(query_scale)
    params = small_models.decoder_params(model)
    tokens = np.random.default_rng(1).integers(0, small_models.VOCAB, (B, T))
    everything = {field.name: None for field in dataclasses.fields(TrainedModel)}
    whole = TrainedModel(**{**everything, "model": language_model.Model(model), "params": params})
    plain = measure.without_fusion(whole)
    assert plain.model.decoder.fusion_layers == ()
    nowhere = jnp.zeros((B, T), bool)
    masked = hidden(model, params, tokens, normal(7, B, T, 1, E), None, nowhere)
    removed = hidden(plain.model.decoder, plain.params, tokens)
    np.testing.assert_allclose(removed, masked, rtol=0, atol=1e-5)
    grounded = hidden(model, params, tokens, normal(7, B, T, 1, E))
    assert np.abs(grounded - masked).max() > 1e-2


def test_donors_differ_in_what_is_asked_and_share_the_split() -> None:
    config = WorldConfig(train_objects=24, dev_objects=9, heldout_objects=9)
    things = objects(config)
    of = {thing.name: thing for thing in things}
    probes = list(language.probes(config, things))
    donors = measure.donors(things, probes)
    assert len(donors) == len(probes)
    for probe, donor in zip(probes, donors, strict=True):
        assert donor.split == probe.split
        assert donor.value(probe.attribute) != of[probe.object].value(probe.attribute)
    assert {donor.split for donor in donors} == set(SPLITS)


def test_the_mask_is_for_positions_of_all_rows() -> None:
    """Under jit, as the probes use it."""
    model = fused("model_width")
    params = small_models.decoder_params(model)
    tokens = np.random.default_rng(2).integers(0, small_models.VOCAB, (B, T))
    z, seen = normal(8, B, T, 1, E), np.zeros((B, T), bool)
    seen[1] = True
    run = jax.jit(lambda seen: hidden_of(model, params, tokens, z, seen))
    mixed = np.asarray(run(jnp.asarray(seen)))
    none, every = (np.asarray(run(jnp.full((B, T), flag))) for flag in (False, True))
    np.testing.assert_allclose(mixed[0], none[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(mixed[1], every[1], rtol=0, atol=1e-6)
    assert np.abs(none - every).max() > 1e-2


def hidden_of(model: Decoder, params: Any, tokens: Any, z: Any, seen: Any) -> Any:
    found: Any = model.apply({"params": params}, tokens, z, None, seen, method="hidden")
    return found.hidden_BTD
