"""The packed text tower against plain CLIP, one text at a time in float64; its causality."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blindvalm_jax.grounding import segments, text
from blindvalm_jax.models.attention import Dropout, Memory, Packed
from blindvalm_jax.models.clip import Readout, TextTower, TowerConfig, packed_positions
from tests import small_models

CONTEXTS = [77, 16, 18]  # the longest segment fills most, almost all, or all of a block of keys


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


def tower_of(context: int) -> tuple[TextTower, Any]:
    config = dataclasses.replace(small_models.TOWER, context=context)
    return TextTower(config), small_models.tower_params(config, seed=context)


@functools.cache
def compiled(tower: TextTower, readout: Readout) -> Any:
    return jax.jit(functools.partial(tower.apply, readout=readout))


def features(
    tower: TextTower, params: Any, tokens: np.ndarray, starts: np.ndarray, readout: Readout
) -> np.ndarray:
    """Packed features [B, 1 + S, E]."""
    run = compiled(tower, readout)
    return np.asarray(run({"params": params}, jnp.asarray(tokens), jnp.asarray(starts)))


def encode(config: TowerConfig, params: Any, ids: np.ndarray) -> np.ndarray:
    """CLIP's text tower on rows [R, context] as its paper has it: unit outputs [R, context, E]."""
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        return (
            x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config.norm_epsilon) * scale + bias
        )

    x = weights["token_embedding"][ids] + weights["position_embedding"]
    causal = np.tril(np.ones((config.context, config.context), bool))
    blocks = weights["h"][f"blocks_0_{config.layers - 1}"]
    for layer in range(config.layers):
        w = jax.tree.map(lambda x, layer=layer: x[layer], blocks)
        h = norm(x, w["ln_1"]["scale"], w["ln_1"]["bias"])
        qkv = np.einsum("rtd,dcnh->crnth", h, w["attn"]["qkv"]["kernel"])
        q, k, v = qkv + w["attn"]["qkv"]["bias"][:, None, :, None]
        scores = np.einsum("rnth,rnsh->rnts", q, k) / np.sqrt(config.width / config.heads)
        scores = np.exp(np.where(causal, scores, -np.inf))
        mixed = np.einsum("rnts,rnsh->rtnh", scores / scores.sum(-1, keepdims=True), v)
        out = np.einsum("rtnh,nhd->rtd", mixed, w["attn"]["out"]["kernel"])
        x = x + out + w["attn"]["out"]["bias"]
        h = norm(x, w["ln_2"]["scale"], w["ln_2"]["bias"])
        h = h @ w["c_fc"]["kernel"] + w["c_fc"]["bias"]
        x = x + h / (1 + np.exp(-1.702 * h)) @ w["c_proj"]["kernel"] + w["c_proj"]["bias"]
    x = norm(x, weights["ln_final"]["scale"], weights["ln_final"]["bias"])
    x = x @ weights["text_projection"]
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def one_by_one(
    config: TowerConfig, params: Any, tokens: np.ndarray, starts: np.ndarray, readout: Readout
) -> np.ndarray:
    """Features [1 + S, E] of one row, each text alone: [start] text [end] and zeros."""
    lengths = segments.lengths(starts)
    texts = np.split(tokens, np.cumsum(lengths)[:-1])
    if readout == "eos":  # each prefix is a text of its own, the empty one first
        texts = [np.array([], int)] + [t[: i + 1] for t in texts for i in range(len(t))]
    ids = np.zeros((len(texts), config.context), int)
    for row, one in zip(ids, texts, strict=True):
        row[: len(one) + 2] = [config.start_id, *one, config.end_id]
    found = encode(config, params, ids)
    if readout == "eos":
        return np.stack([row[len(one) + 1] for row, one in zip(found, texts, strict=True)])
    kept = [row[1 : len(one) + 1] for row, one in zip(found, texts, strict=True)]
    return np.concatenate([found[0, :1], *kept])


def rows_of(size: int, longest: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Four rows: as few texts as fit, texts of one token, few texts, many texts."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 62, (4, size))
    starts = rng.random((4, size)) < np.array([[0.0], [1.0], [0.05], [0.4]])
    starts[:, 0] = True
    for row in starts:
        since = 0
        for position in range(size):
            since = 0 if row[position] else since + 1
            if since == longest:
                row[position], since = True, 0
    return tokens, starts


@pytest.mark.parametrize("readout", ["token", "eos"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_packed_rows_equal_one_text_at_a_time(context: int, readout: Readout) -> None:
    """To 1e-5 for unit vectors in fp32; rows shorter, as long as, and longer than a block of keys.

    A block holds 128 keys for context 77 and 16 for the others.
    """
    tower, params = tower_of(context)
    longest = tower.config.longest_segment
    block = 128 if context == 77 else 16
    for size in (3, block - 1, block, 2 * block + longest):
        if readout == "eos" and context == 77 and size == block:
            continue  # what one more token changes is seen with the short contexts
        tokens, starts = rows_of(size, longest, seed=size)
        found = features(tower, params, tokens, starts, readout)
        assert found.shape == (4, 1 + size, tower.config.projection)
        for row in range(4):
            assert size < longest or segments.lengths(starts[0]).max() == longest
            want = one_by_one(tower.config, params, tokens[row], starts[row], readout)
            np.testing.assert_allclose(found[row], want, rtol=0, atol=1e-5)


def test_both_readouts_differ() -> None:
    """Guards the test above: the plain encoder must tell them apart."""
    tower, params = tower_of(18)
    tokens, starts = rows_of(20, 16, seed=0)
    token, eos = (features(tower, params, tokens, starts, r) for r in ("token", "eos"))
    assert (np.abs(token - eos).max(axis=-1) > 0.01).all()


def test_eos_of_no_token_is_the_empty_text_in_every_row() -> None:
    tower, params = tower_of(18)
    tokens, starts = rows_of(20, 16, seed=1)
    found = features(tower, params, tokens, starts, "eos")
    ids = np.zeros((1, 18), int)
    ids[0, :2] = tower.config.start_id, tower.config.end_id
    empty = encode(tower.config, params, ids)[0, 1]
    np.testing.assert_allclose(found[:, 0], np.tile(empty, (4, 1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("readout", ["token", "eos"])
def test_a_feature_has_no_gradient_from_the_future_or_another_text(readout: Readout) -> None:
    """Every token of the row has its own row of the table, which so stands for its position."""
    tower, params = tower_of(18)
    size = 40
    _, starts = rows_of(size, 16, seed=2)
    starts = starts[2:3]
    tokens = np.arange(size)[None]
    weights = np.random.default_rng(3).standard_normal((1 + size, tower.config.projection))

    @jax.jit
    def gradients(table: jax.Array) -> jax.Array:
        def outputs(table: jax.Array) -> jax.Array:
            tree = {"params": params | {"token_embedding": table}}
            found: Any = tower.apply(
                tree, jnp.asarray(tokens), jnp.asarray(starts), readout=readout
            )
            return jnp.sum(found[0] * weights, axis=-1)

        return jax.jacrev(outputs)(table)

    found = np.abs(np.asarray(gradients(jnp.asarray(params["token_embedding"])))).max(axis=-1)
    number = np.cumsum(starts[0])
    seen = np.tril(number[:, None] == number[None])
    assert 2 < number[-1] < size
    assert (found[1:, :size][~seen] == 0).all()
    assert (found[1:, :size][seen] > 0).all()
    assert (found[0, :size] == 0).all()
    assert (found[:, tower.config.start_id] > 0).all()
    assert ((found[:, tower.config.end_id] > 0) == (readout == "eos")).all()


@pytest.mark.parametrize("readout", ["token", "eos"])
def test_later_tokens_and_cuts_change_no_earlier_feature_at_all(readout: Readout) -> None:
    """Exactly: row i has other tokens and other cuts after position i."""
    tower, params = tower_of(18)
    size = 40
    tokens, starts = (np.repeat(x[3:], size, axis=0) for x in rows_of(size, 16, seed=4))
    others, other_starts = (np.repeat(x[2:3], size, axis=0) for x in rows_of(size, 16, seed=5))
    later = np.triu(np.ones((size, size), bool), 1)
    other_starts[:, :] |= np.eye(size, k=1, dtype=bool)  # so that no text grows over the limit
    before = features(tower, params, tokens, starts, readout)
    after = features(
        tower,
        params,
        np.where(later, others, tokens),
        np.where(later, other_starts, starts),
        readout,
    )
    np.testing.assert_array_equal(before[:, 1:][~later], after[:, 1:][~later])
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert (before[:, 1:][later] != after[:, 1:][later]).any()


def test_features_are_unit_vectors_in_fp32_also_from_bf16() -> None:
    """bf16 has 8 bits of mantissa; two blocks leave a cosine within 1e-3 of 1."""
    config = small_models.TOWER
    params = small_models.tower_params(config)
    tokens, starts = rows_of(20, config.longest_segment, seed=6)
    exact = features(TextTower(config), params, tokens, starts, "token")
    rough = features(TextTower(config, dtype=jnp.bfloat16), params, tokens, starts, "token")
    assert rough.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rough, axis=-1), 1.0, rtol=0, atol=1e-5)
    assert np.abs(rough - exact).max() > 1e-4
    assert ((rough * exact).sum(-1) > 1 - 1e-3).all()


def test_features_of_words_are_picked_by_index_and_carry_no_gradient() -> None:
    tower, params = tower_of(18)
    tokens, starts = rows_of(12, 16, seed=7)
    packed = features(tower, params, tokens, starts, "token")
    index = np.random.default_rng(8).integers(0, 13, (4, 9)).astype(np.int32)
    arrays = jnp.asarray(tokens), jnp.asarray(starts)
    plain, picked = text.TowerInput(*arrays), text.TowerInput(*arrays, jnp.asarray(index))

    @functools.partial(jax.jit, static_argnames="readout")
    def run(params: Any, inputs: text.TowerInput, readout: Readout = "token") -> jax.Array:
        return text.features(tower, params, inputs, readout=readout)

    np.testing.assert_allclose(run(params, plain)[:, :, 0], packed[:, 1:], rtol=0, atol=1e-6)
    found = np.asarray(run(params, picked))
    assert found.shape == (4, 9, 1, tower.config.projection)
    for row in range(4):
        np.testing.assert_allclose(found[row, :, 0], packed[row, index[row]], rtol=0, atol=1e-6)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(run(p, picked) ** 3)))(params)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


def test_positions_restart_with_each_text() -> None:
    starts = jnp.asarray([[False, False, True, True, False], [True, False, False, False, True]])
    number, position = jax.jit(packed_positions)(starts)
    assert number.tolist() == [[0, 1, 1, 2, 3, 3], [0, 1, 1, 1, 1, 2]]
    assert position.tolist() == [[0, 1, 2, 1, 1, 2], [0, 1, 2, 3, 4, 1]]


def test_packed_attention_refuses_what_it_would_ignore() -> None:
    q = jnp.zeros((1, 3, 1, 2))
    pattern = Packed(jnp.asarray([[0, 1, 1]]), longest=2)
    memory = Memory(q[:, :, None], q[:, :, None])
    with pytest.raises(ValueError, match="neither a memory nor dropout"):
        pattern.attend(q, q, q, scale=1.0, memory=memory)
    with pytest.raises(ValueError, match="neither a memory nor dropout"):
        pattern.attend(q, q, q, scale=1.0, dropout=Dropout(jax.random.key(0), 0.5))
