"""Fusion blocks: the joint softmax, its variants, and causality from text to logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blindvalm_jax.config import FusionConfig
from blindvalm_jax.grounding import segments, text
from blindvalm_jax.models import attention, initializers
from blindvalm_jax.models.clip import Readout, TextTower
from blindvalm_jax.models.decoder import Decoder
from blindvalm_jax.models.transformer import Block, BlockShape, MemoryProjection, MemoryShape, Stack
from blindvalm_jax.objectives import language_model
from tests import small_models

B, T, N, H, K = 2, 10, 4, 8, 4
WIDTH = small_models.CONFIG.width


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tokens_of(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, small_models.VOCAB, (B, T)))


def fused(layers: tuple[int, ...] = (1,), width: int = WIDTH, **fusion: str) -> Decoder:
    return small_models.decoder(
        fusion=FusionConfig(**fusion), fusion_layers=layers, memory_width=width
    )


def logits(model: Decoder, params: Any, *inputs: Any) -> np.ndarray:
    """Logits of the real vocabulary."""
    found = jax.jit(model.apply)({"params": params}, *inputs)
    return np.asarray(found)[..., : small_models.VOCAB]


@pytest.mark.parametrize("biased", [False, True])
def test_joint_attention_is_one_softmax_over_text_and_memory(biased: bool) -> None:
    """VALM, eq. 5, head by head and query by query in float64; 1e-5 for fp32."""
    q, k, v = (normal(i, B, T, N, H) for i in range(3))
    memory_k, memory_v = (normal(i, B, T, K, N, H) for i in (3, 4))
    bias = normal(5, N) if biased else None
    mask = np.random.default_rng(6).random((B, T, T)) < 0.4
    mask |= np.eye(T, dtype=bool)
    attended = jax.jit(attention.joint_attention)(
        q,
        k,
        v,
        mask_BTS=jnp.asarray(mask),
        scale=0.3,
        memory=attention.Memory(memory_k, memory_v, bias),
    )
    want, share = np.zeros((B, T, N, H)), np.zeros((B, T))
    for b, t, n in np.ndindex(B, T, N):
        seen = np.flatnonzero(mask[b, t])
        keys = np.concatenate([k[b, seen, n], memory_k[b, t, :, n]]).astype(np.float64)
        values = np.concatenate([v[b, seen, n], memory_v[b, t, :, n]]).astype(np.float64)
        scores = 0.3 * keys @ np.asarray(q[b, t, n], np.float64)
        scores[len(seen) :] += 0.0 if bias is None else float(bias[n])
        weights = np.exp(scores) / np.exp(scores).sum()
        want[b, t, n] = weights @ values
        share[b, t] += weights[len(seen) :].sum() / N
    np.testing.assert_allclose(attended.out_BTNH, want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(attended.memory_share_BT, share, rtol=0, atol=1e-5)


def test_the_joint_softmax_of_bf16_states_is_fp32() -> None:
    """bf16 logits around 20 would be off by 0.06, and weights by 6 %."""
    q, k, v = (normal(i, B, T, N, H).astype(jnp.bfloat16) for i in range(3))
    memory_k, memory_v = (normal(i, B, T, K, N, H).astype(jnp.bfloat16) for i in (3, 4))

    @jax.jit
    def attend(*states: jax.Array) -> attention.Attended:
        q, k, v, memory_k, memory_v = states
        memory = attention.Memory(memory_k, memory_v)
        return attention.Causal().attend(q, k, v, scale=3.0, memory=memory)

    states = (q, k, v, memory_k, memory_v)
    rough, exact = attend(*states), attend(*(x.astype(jnp.float32) for x in states))
    assert rough.out_BTNH.dtype == jnp.bfloat16
    np.testing.assert_allclose(rough.memory_share_BT, exact.memory_share_BT, rtol=0, atol=1e-4)


def test_dropout_of_weights_has_its_rate_and_follows_its_key() -> None:
    ones = jnp.ones((400, 500))
    rate = 0.3
    found = np.asarray(attention.Dropout(jax.random.key(0), rate)(ones))
    dropped = (found == 0).mean()
    assert abs(dropped - rate) < 5 * np.sqrt(rate * (1 - rate) / ones.size)
    np.testing.assert_allclose(found[found != 0], 1 / (1 - rate), rtol=1e-6)
    again, other = (attention.Dropout(jax.random.key(i), rate)(ones) for i in (0, 1))
    np.testing.assert_array_equal(found, again)
    assert (found != np.asarray(other)).any()


def test_dropout_acts_on_text_and_memory_of_the_joint_softmax() -> None:
    """With all values one, an output is the sum of the kept weights; some of each are dropped."""
    q, k = normal(0, 1, T, 1, H), normal(1, 1, T, 1, H)
    memory_k = normal(2, 1, T, K, 1, H)
    dropout = attention.Dropout(jax.random.key(3), 0.5)

    def kept(text: float, memory: float) -> np.ndarray:
        attended = attention.Causal().attend(
            q,
            k,
            jnp.full_like(q, text),
            scale=0.1,
            memory=attention.Memory(memory_k, jnp.full_like(memory_k, memory)),
            dropout=dropout,
        )
        return np.asarray(attended.out_BTNH[0, :, 0, 0])

    text_only, memory_only = kept(1, 0), kept(0, 1)
    whole = attention.Causal().attend(
        q, k, k, scale=0.1, memory=attention.Memory(memory_k, memory_k)
    )
    share = np.asarray(whole.memory_share_BT)[0]
    np.testing.assert_allclose(kept(1, 1), text_only + memory_only, rtol=0, atol=1e-5)
    assert (np.abs(text_only - (1 - share)) > 0.01).sum() > T // 2
    assert (np.abs(memory_only - share) > 0.01).sum() > T // 2


def test_dropout_of_a_decoder_is_off_without_a_key_and_repeats_with_one() -> None:
    config = dataclasses.replace(small_models.CONFIG, dropout=0.3, attention_dropout=0.3)
    still = fused()
    wild = still.clone(config=config)
    params, tokens, z = small_models.decoder_params(still), tokens_of(), normal(0, B, T, K, WIDTH)
    want = logits(still, params, tokens, z)
    np.testing.assert_array_equal(logits(wild, params, tokens, z), want)
    training = wild.clone(deterministic=False)

    @jax.jit
    def train(key: jax.Array) -> Any:
        return training.apply({"params": params}, tokens, z, rngs={"dropout": key})

    one, again, other = (np.asarray(train(jax.random.key(i))) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one[..., :90] - want).max() > 0.1
    assert np.abs(one[..., :90] - other[..., :90]).max() > 0.1


def test_queries_are_divided_by_the_root_of_model_or_head_width() -> None:
    """model_width equals head_width with the fusion block's queries times sqrt(H / D)."""
    params, tokens, z = small_models.decoder_params(fused()), tokens_of(), normal(1, B, T, K, WIDTH)
    found = logits(fused(query_scale="model_width"), params, tokens, z)
    assert np.abs(found - logits(fused(query_scale="head_width"), params, tokens, z)).max() > 0.01
    block = params["h"]["fusion_1"]
    qkv = {name: x.copy() for name, x in block["attn"]["qkv"].items()}
    qkv["kernel"][:, 0] *= np.sqrt(H / WIDTH)
    qkv["bias"][0] *= np.sqrt(H / WIDTH)
    block = block | {"attn": block["attn"] | {"qkv": qkv}}
    params = params | {"h": params["h"] | {"fusion_1": block}}
    want = logits(fused(query_scale="head_width"), params, tokens, z)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


def test_own_projections_are_used_instead_of_the_text_s() -> None:
    tokens, z = tokens_of(), normal(2, B, T, K, WIDTH)
    own = fused(grounding_kv="own")
    params = small_models.decoder_params(own)
    attn = params["h"]["fusion_1"]["attn"]
    attn["memory"]["kv_kernel"] = attn["qkv"]["kernel"][:, 1:]
    same = logits(own, params, tokens, z)
    attn["memory"]["kv_kernel"] = attn["memory"]["kv_kernel"] + 0.1
    changed = logits(own, params, tokens, z)
    del attn["memory"]["kv_kernel"]
    np.testing.assert_allclose(same, logits(fused(), params, tokens, z), rtol=0, atol=1e-6)
    assert np.abs(changed - same).max() > 0.01


@pytest.mark.parametrize("kind", ["shared", "own"])
def test_the_memory_s_gradient_reaches_the_text_s_projections_only_if_shared(kind: str) -> None:
    shape = block_shape()
    module = MemoryProjection(
        shape, MemoryShape(width=WIDTH, fusion=FusionConfig(grounding_kv=kind))
    )
    z, text_kv = normal(3, B, T, K, WIDTH), normal(4, WIDTH, 2, N, H)
    params = small_models.random_params(lambda key: module.init(key, z, text_kv)["params"], seed=0)
    assert ("kv_kernel" in params) == (kind == "own")

    @jax.jit
    def gradient(params: Any, text_kv: jax.Array) -> Any:
        def total(params: Any, text_kv: jax.Array) -> jax.Array:
            memory: Any = module.apply({"params": params}, z, text_kv)
            return jnp.sum(memory.k_BTKNH**2) + jnp.sum(memory.v_BTKNH**2)

        return jax.grad(total, argnums=(0, 1))(params, text_kv)

    own, shared = gradient(params, text_kv)
    assert (np.asarray(shared) != 0).any() == (kind == "shared")
    assert kind == "shared" or (np.asarray(own["kv_kernel"]) != 0).all()


def block_shape() -> BlockShape:
    """Shape of the blocks of the small decoder."""
    return BlockShape(
        width=WIDTH,
        heads=N,
        mlp_width=4 * WIDTH,
        activation="gelu_erf",
        norm_epsilon=1e-5,
        init=initializers.fairseq(width=WIDTH, mlp_width=4 * WIDTH),
        dtype=jnp.dtype("float32"),
    )


def plain_params(params: Any, layers: int) -> Any:
    """Parameters of the decoder without memory that a fused decoder is built on."""
    blocks = blocks_of(params, layers)
    for block in blocks:
        block["attn"] = {k: x for k, x in block["attn"].items() if k != "memory"}
    stacked = jax.tree.map(lambda *x: np.stack(x), *blocks)
    return params | {"h": {f"blocks_0_{layers - 1}": stacked}}


def blocks_of(params: Any, layers: int) -> list[Any]:
    """Parameters of each block in order."""
    found: dict[int, Any] = {}
    for name, tree in params["h"].items():
        first, last = int(name.split("_")[1]), int(name.split("_")[-1])
        for index in range(first, last + 1):
            at = index - first
            stacked = name.startswith("blocks_")
            found[index] = jax.tree.map(lambda x, at=at: x[at], tree) if stacked else dict(tree)
    return [found[index] for index in range(layers)]


def test_a_learned_bias_starts_as_the_decoder_without_memory() -> None:
    """exp(-10) = 4.5e-5 of a text key's weight; without the bias the logits move by far more."""
    layers = (0, 2)
    gated = fused(layers, query_scale="head_width", memory_bias="learned")
    tokens, z = tokens_of(), normal(5, B, T, K, WIDTH)
    params = small_models.decoder_params(gated)
    born = jax.jit(language_model.Model(gated).init)(jax.random.key(0))["h"]
    for index in layers:
        bias = np.asarray(born[f"fusion_{index}"]["attn"]["memory"]["logit_bias"].value)
        np.testing.assert_array_equal(bias, np.full(N, -10.0))
        params["h"][f"fusion_{index}"]["attn"]["memory"]["logit_bias"] = bias
    plain = small_models.decoder()
    want = logits(plain, plain_params(params, 3), tokens)
    np.testing.assert_allclose(logits(gated, params, tokens, z), want, rtol=0, atol=2e-2)
    hidden: Any = jax.jit(lambda: gated.apply({"params": params}, tokens, z, method="hidden"))()
    assert hidden.memory_share_LBT.max() < 2e-3
    open_ = fused(layers, query_scale="head_width")
    for index in layers:
        del params["h"][f"fusion_{index}"]["attn"]["memory"]["logit_bias"]
    assert np.abs(logits(open_, params, tokens, z) - want).max() > 0.5


def test_a_memory_of_another_width_is_joined_by_a_linear_map() -> None:
    tokens, z = tokens_of(), normal(6, B, T, K, 24)
    wide = fused(width=24)
    params = small_models.decoder_params(wide)
    memory = params["h"]["fusion_1"]["attn"]["memory"]
    assert memory["adapter"]["kernel"].shape == (24, WIDTH)
    found = logits(wide, params, tokens, z)
    adapter = memory.pop("adapter")
    joined = np.asarray(z) @ adapter["kernel"] + adapter["bias"]
    np.testing.assert_allclose(found, logits(fused(), params, tokens, joined), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", [(0,), (2,), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_fusion_blocks_stand_at_their_indices(layers: tuple[int, ...]) -> None:
    """The stack equals its blocks applied one after the other; 1e-5 for fp32 in another order."""
    model = fused(layers)
    params, x, z = (
        small_models.decoder_params(model),
        normal(7, B, T, WIDTH),
        normal(8, B, T, K, 32),
    )
    shape, memory = block_shape(), MemoryShape(width=WIDTH, fusion=small_models.PAPER_FUSION)
    pattern = attention.Causal()

    @jax.jit
    def one_by_one(x: jax.Array) -> Any:
        shares: list[Any] = []
        for index, tree in enumerate(blocks_of(params, 3)):
            here = index in layers
            block = Block(shape, True, memory if here else None)
            x, share = block.apply({"params": tree}, x, pattern, z if here else None)
            shares += [share] if here else []
        return x, jnp.stack(shares)

    stack = Stack(shape, 3, True, fusion_layers=layers, memory_shape=memory)
    found, shares = jax.jit(lambda x: stack.apply({"params": params["h"]}, x, pattern, z))(x)
    want, want_shares = one_by_one(x)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(shares, want_shares, rtol=0, atol=1e-6)
    assert shares.shape == (len(layers), B, T)


def test_a_memory_without_a_fusion_block_and_the_reverse_are_refused() -> None:
    tokens, z = tokens_of(), normal(9, B, T, K, WIDTH)
    for model, memory in ((fused(), None), (small_models.decoder(), z)):
        params = small_models.decoder_params(model)
        with pytest.raises(ValueError, match="iff there are fusion layers"):
            jax.eval_shape(model.apply, {"params": params}, tokens, memory)


# What the language model's tokens are to the tower: CLIP's end of text, marks, and words.
CLIP_IDS = np.array([49407, 269, 267, 282, 281, *range(1000, 1085)])
LONGEST = 75
SEPARATORS = segments.clip_separators(LONGEST)


@pytest.fixture(scope="module")
def grounded() -> Any:
    """A BLIND-VALM with CLIP's vocabulary and window, and its parameters."""
    config = dataclasses.replace(
        small_models.TOWER, vocab_size=49408, context=77, start_id=49406, end_id=49407
    )
    model = language_model.Model(fused(width=config.projection), TextTower(config))
    tower = {"tower": small_models.tower_params(config)}
    return model, small_models.decoder_params(model.decoder), tower


def run_rows(
    grounded: Any, tokens: np.ndarray, rule: segments.Rule, readout: Readout = "token"
) -> tuple[np.ndarray, np.ndarray]:
    """From tokens [B, T] to features [B, T, 1, E] and logits, cut by a rule."""
    model, params, frozen = grounded
    model = dataclasses.replace(model, readout=readout)
    ids = CLIP_IDS[tokens]
    starts = segments.starts(ids, rule=rule, separators=SEPARATORS)
    inputs = text.TowerInput(jnp.asarray(ids), jnp.asarray(starts))
    rows = jnp.asarray(tokens)
    batch = language_model.Batch(rows, rows, jnp.ones(rows.shape), tower=inputs)
    z = jax.jit(model.features)(frozen, batch)
    return np.asarray(z), logits(model.decoder, params, rows, z)


def random_tokens(seed: int, *shape: int, marks: float = 0.15) -> np.ndarray:
    """Rows in which a share of the tokens is an end of text or a mark."""
    rng = np.random.default_rng(seed)
    return np.where(
        rng.random(shape) < marks, rng.integers(0, 5, shape), rng.integers(5, 90, shape)
    )


@pytest.mark.parametrize("readout", ["token", "eos"])
def test_with_the_causal_rule_later_text_changes_nothing_before_it(
    grounded: Any, readout: Readout
) -> None:
    """Exactly, through cuts, tower and decoder: row i has another text after its i-th position."""
    places = np.array([0, 1, 20, 55, 74, 75, 76, 110, 158])
    size = 160
    tokens = np.repeat(random_tokens(1, 1, size), len(places), axis=0)
    later = np.arange(size) > places[:, None]
    others = np.where(later, random_tokens(2, len(places), size, marks=0.4), tokens)
    z, before = run_rows(grounded, tokens, "causal", readout)
    other_z, after = run_rows(grounded, others, "causal", readout)
    np.testing.assert_array_equal(z[~later], other_z[~later])
    np.testing.assert_array_equal(before[~later], after[~later])
    assert (np.abs(before - after).max(axis=-1)[:-1, -1] > 0.01).all()


def test_the_reference_rule_leaks_the_future(grounded: Any) -> None:
    """Pins reference.md, fact 1: one later </s> moves earlier features and logits by a lot.

    Row 0 has a "." at 20, where the reference cuts, and only words besides. Row 1 is the same but
    for a </s> at 70, which outranks the ".": the cut is now after 70, and positions 21 to 69, all
    before the changed token, are encoded in another text. The row's own length leaks as well: 40
    tokens are one text, and are cut at 20 when they begin a longer row. With the features of row 0
    for both, the logits before the changed token are equal exactly: the decoder is causal, the
    cuts are not. The causal rule, on the same rows, changes nothing.
    """
    row = random_tokens(3, 1, 160, marks=0.0)
    row[0, 20] = 1
    tokens = np.repeat(row, 2, axis=0)
    tokens[1, 70] = 0
    z, found = run_rows(grounded, tokens, "reference")
    moved_z = np.abs(z[0] - z[1]).max(axis=(1, 2))
    moved = np.abs(found[0] - found[1]).max(axis=-1)
    assert (moved_z[:21] == 0).all()
    assert (moved_z[21:70] > 0.01).all()
    assert (moved[:21] == 0).all()
    assert (moved[21:70] > 0).all()
    assert moved[21:70].max() > 0.05

    short, _ = run_rows(grounded, tokens[:1, :40], "reference")
    assert np.abs(short[0, 21:] - z[0, 21:40]).max() > 0.1

    model, params, _ = grounded
    fixed = logits(model.decoder, params, jnp.asarray(tokens), np.stack([z[0], z[0]]))
    np.testing.assert_array_equal(fixed[0, :70], fixed[1, :70])
    _, causal = run_rows(grounded, tokens, "causal")
    np.testing.assert_array_equal(causal[0, :70], causal[1, :70])
