"""The decoder: causality, layout of the stack, padded vocabulary, precision, sizes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blindvalm_jax import config, memory, system
from blindvalm_jax.config import DecoderConfig
from blindvalm_jax.errors import UserError
from blindvalm_jax.models.clip import TextTower, TowerConfig
from blindvalm_jax.models.decoder import Decoder, padded_vocab, sinusoidal
from blindvalm_jax.models.transformer import split_stack
from blindvalm_jax.objectives import language_model
from tests import small_models

LENGTH, WIDTH, E = 12, small_models.CONFIG.width, 24


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


def fused(**fields: Any) -> Decoder:
    return small_models.decoder(fusion_layers=(1,), memory_width=E, **fields)


def embedded(rows: int = 2) -> tuple[jax.Array, jax.Array]:
    """Random states x [B, T, D] and two memory vectors for each, [B, T, 2, E]."""
    rng = np.random.default_rng(0)
    x_BTD = rng.standard_normal((rows, LENGTH, WIDTH))
    z_BTKE = rng.standard_normal((rows, LENGTH, 2, E))
    return jnp.asarray(x_BTD, jnp.float32), jnp.asarray(z_BTKE, jnp.float32)


def input_gradients(model: Decoder, params: Any, *inputs: jax.Array) -> list[np.ndarray]:
    """Gradients of a random sum of the logits at t: for each input [t, B, T, ...]."""

    def states(*inputs: jax.Array) -> jax.Array:
        hidden: Any = model.apply({"params": params}, *inputs, method="transform")
        return hidden.hidden_BTD

    @jax.jit
    def gradients(*inputs: jax.Array) -> Any:
        hidden_BTD, pull = jax.vjp(states, *inputs)
        weights_BTD = jax.random.normal(jax.random.key(1), hidden_BTD.shape)

        def at(position: jax.Array) -> Any:
            here_T = jnp.arange(LENGTH) == position
            return pull(weights_BTD * here_T[None, :, None])

        return jax.vmap(at)(jnp.arange(LENGTH))

    return [np.asarray(g) for g in gradients(*inputs)]


def largest_by_position(gradient: np.ndarray) -> np.ndarray:
    """|gradient| [of position t, with respect to position s]."""
    return np.abs(gradient).max(axis=(1, *range(3, gradient.ndim)))


def test_a_plain_decoder_has_no_gradient_from_the_future() -> None:
    model = small_models.decoder()
    (gradient,) = input_gradients(model, small_models.decoder_params(model), embedded()[0])
    found_TS = largest_by_position(gradient)
    assert (found_TS[np.triu_indices(LENGTH, 1)] == 0).all()
    assert (found_TS[np.tril_indices(LENGTH)] > 0).all()


def test_a_fused_decoder_has_no_gradient_from_the_future() -> None:
    """Nor from later memories; an earlier memory acts only through its own position's state."""
    model = fused()
    found = input_gradients(model, small_models.decoder_params(model), *embedded())
    for gradient in found:
        found_TS = largest_by_position(gradient)
        assert (found_TS[np.triu_indices(LENGTH, 1)] == 0).all()
        assert (found_TS[np.tril_indices(LENGTH)] > 0).all()


def test_memory_made_from_the_past_keeps_a_fused_decoder_causal() -> None:
    model = fused()
    params = small_models.decoder_params(model)
    x_BTD, _ = embedded(rows=1)
    mix_DE = jax.random.normal(jax.random.key(2), (WIDTH, E))

    @jax.jit
    def jacobian(x_BTD: jax.Array) -> jax.Array:
        def states(x_BTD: jax.Array) -> jax.Array:
            z_BTE = jnp.tanh(jnp.cumsum(x_BTD, axis=1) @ mix_DE)
            hidden: Any = model.apply(
                {"params": params}, x_BTD, z_BTE[:, :, None], method="transform"
            )
            return hidden.hidden_BTD[0, :, :2]

        return jax.jacrev(states)(x_BTD)

    found_TS = np.abs(jacobian(x_BTD)).max(axis=(1, 2, 4))
    assert (found_TS[np.triu_indices(LENGTH, 1)] == 0).all()
    assert (found_TS[np.tril_indices(LENGTH)] > 0).all()


@pytest.mark.parametrize("with_memory", [False, True])
def test_later_tokens_change_no_earlier_logit_at_all(with_memory: bool) -> None:
    """Exactly: row i of the batch has other tokens, and other memories, after position i."""
    model = fused() if with_memory else small_models.decoder()
    params = small_models.decoder_params(model)
    rng = np.random.default_rng(3)
    tokens = np.repeat(rng.integers(0, small_models.VOCAB, (1, LENGTH)), LENGTH, axis=0)
    z = np.repeat(rng.standard_normal((1, LENGTH, 2, E)), LENGTH, axis=0).astype(np.float32)
    later = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
    others = np.where(later, rng.integers(0, small_models.VOCAB, tokens.shape), tokens)
    other_z = np.where(later[:, :, None, None], -z, z)
    apply = jax.jit(model.apply)
    grounding = (z, other_z) if with_memory else (None, None)
    before, after = (
        np.asarray(apply({"params": params}, *pair))
        for pair in zip((tokens, others), grounding, strict=True)
    )
    np.testing.assert_array_equal(before[~later], after[~later])
    assert (before[later] != after[later]).any()


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    """Exactly in a batch of the same shape; alone, up to rounding of another matrix shape."""
    model = fused()
    params = small_models.decoder_params(model)
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, small_models.VOCAB, (4, LENGTH))
    _, z = embedded(rows=4)
    apply = jax.jit(model.apply)
    whole = np.asarray(apply({"params": params}, tokens, z))[..., : small_models.VOCAB]
    others = (tokens + np.array([[0], [1], [2], [3]])) % small_models.VOCAB
    changed = apply({"params": params}, others, z * jnp.arange(1.0, 5.0)[:, None, None, None])
    np.testing.assert_array_equal(whole[0], np.asarray(changed)[0, :, : small_models.VOCAB])
    alone = apply({"params": params}, tokens[2:3], z[2:3])
    np.testing.assert_allclose(
        whole[2], np.asarray(alone)[0, :, : small_models.VOCAB], rtol=0, atol=1e-5
    )


def stacked(**fields: Any) -> Decoder:
    """Four blocks with dropout, so that a run of three is scanned and keys matter."""
    config = dataclasses.replace(small_models.CONFIG, layers=4, dropout=0.1, attention_dropout=0.1)
    return small_models.decoder(
        config, fusion_layers=(3,), memory_width=E, deterministic=False, **fields
    )


def logits_and_gradient(model: Decoder, params: Any) -> Any:
    tokens = np.random.default_rng(5).integers(0, small_models.VOCAB, (2, LENGTH))
    _, z = embedded()

    def loss(params: Any) -> Any:
        logits_BTV: Any = model.apply(
            {"params": params}, tokens, z, rngs={"dropout": jax.random.key(6)}
        )
        logits_BTV = logits_BTV[..., : small_models.VOCAB]
        return jnp.mean(jax.nn.logsumexp(logits_BTV, axis=-1)), logits_BTV

    grads, logits_BTV = jax.jit(jax.grad(loss, has_aux=True))(params)
    return logits_BTV, grads


@pytest.fixture(scope="module")
def rolled() -> Any:
    """Parameters, and the logits and gradients of the plain scan."""
    params = small_models.decoder_params(stacked())
    return params, logits_and_gradient(stacked(), params)


@pytest.mark.parametrize(
    "fields",
    [{"scan_unroll": 2}, {"scan_unroll": 4}, {"remat": "dots"}, {"remat": "full"}]
    + [{"remat": "full", "scan_unroll": 4}],
    ids=str,
)
def test_unrolling_and_recomputing_change_no_number(rolled: Any, fields: dict[str, Any]) -> None:
    """Same parameters, same dropout; 1e-5 for sums that XLA fuses in another order in fp32."""
    params, (logits, grads) = rolled
    got_logits, got_grads = logits_and_gradient(stacked(**fields), params)
    np.testing.assert_allclose(got_logits, logits, rtol=0, atol=1e-5)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(
            got, want, rtol=0, atol=1e-5 * max(1.0, float(np.abs(want).max()))
        ),
        got_grads,
        grads,
    )


def test_recomputing_is_asked_of_xla() -> None:
    """Guards the test above against a setting that reaches nothing."""
    params = small_models.decoder_params(stacked())

    def text(**fields: Any) -> str:
        return str(jax.make_jaxpr(lambda p: logits_and_gradient(stacked(**fields), p)[1])(params))

    plain, dots, full = text(), text(remat="dots"), text(remat="full")
    assert "remat" not in plain
    assert "policy=None" in full
    assert "no_batch_dims" in re.findall("policy=(.*)", dots)[0]
    assert "unroll=3" in text(scan_unroll=4)
    assert "unroll=3" not in plain
    # Outside a loop XLA would merge what is computed again with what was there.
    assert "prevent_cse=True" in text(remat="full", scan_unroll=4)
    assert "prevent_cse=False" in full


def test_recomputing_needs_less_memory() -> None:
    """As XLA plans it, for blocks whose states weigh more than their parameters."""

    def planned(remat: str) -> int:
        config = dataclasses.replace(small_models.CONFIG, layers=8)
        model = small_models.decoder(config, remat=remat)
        params = small_models.decoder_params(model)
        tokens = jnp.zeros((8, 128), jnp.int32)

        def loss(params: Any) -> Any:
            logits_BTV: Any = model.apply({"params": params}, tokens)
            return jnp.sum(language_model.cross_entropy(logits_BTV, tokens))

        plan = memory.plan(jax.jit(jax.grad(loss)).lower(params).compile())
        assert plan is not None
        return plan.temporary

    nothing, dots, everything = map(planned, ("none", "dots", "full"))
    assert everything < dots < nothing


def test_the_padded_vocabulary_can_not_be_predicted_and_learns_nothing() -> None:
    assert [padded_vocab(v, 128) for v in (1, 127, 128, 129, 49412)] == [128, 128, 128, 256, 49536]
    model = small_models.decoder()
    params = nn.unbox(jax.jit(language_model.Model(model).init)(jax.random.key(0)))
    assert params["wte"].shape[0] == 96
    assert (params["wte"][90:] == 0).all()
    assert (params["wte"][:90] != 0).any(axis=1).all()
    tokens = np.random.default_rng(7).integers(0, 90, (2, LENGTH))

    def loss(params: Any) -> Any:
        logits_BTV: Any = model.apply({"params": params}, tokens)
        return jnp.sum(language_model.cross_entropy(logits_BTV, jnp.asarray(tokens))), logits_BTV

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert (logits[..., 90:] == jnp.finfo(jnp.float32).min).all()
    assert (logits[..., :90] > -100).all()
    assert (grads["wte"][90:] == 0).all()
    assert (grads["wte"][:90] != 0).any(axis=1).all()


def test_bf16_computation_keeps_fp32_parameters_logits_and_gradients() -> None:
    """bf16 has 8 bits of mantissa: logits of size 1 to 3 after 3 blocks agree to about 0.1."""
    exact, rough = fused(), fused(dtype=jnp.bfloat16)
    params = small_models.decoder_params(rough)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens = np.random.default_rng(8).integers(0, 90, (2, LENGTH))
    _, z = embedded()
    hidden: Any = jax.eval_shape(
        lambda p: rough.apply({"params": p}, tokens, z, method="hidden"), params
    )
    assert hidden.hidden_BTD.dtype == jnp.bfloat16

    def loss(params: Any, model: Decoder) -> Any:
        logits_BTV: Any = model.apply({"params": params}, tokens, z)
        return jnp.mean(jax.nn.logsumexp(logits_BTV[..., :90], axis=-1)), logits_BTV[..., :90]

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (grads, logits), (_, want) = run(params, rough), run(params, exact)
    assert logits.dtype == jnp.float32
    assert (logits != logits.astype(jnp.bfloat16)).mean() > 0.9  # not rounded on the way
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    difference = np.abs(logits - want)
    assert difference.max() > 1e-4
    assert difference.mean() < 0.03 * float(np.std(want))


def test_sinusoidal_positions_follow_their_formula_and_skip_pads() -> None:
    valid = np.array([[True, True, False, True], [False, True, True, False]])
    found = np.asarray(sinusoidal(4, 8, jnp.asarray(valid)))
    for row, place in ((0, (2, 3, None, 4)), (1, (None, 2, 3, None))):
        for t, p in enumerate(place):
            angles = [p * math.exp(-j * math.log(1e4) / 3) for j in range(4)] if p else []
            want = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            np.testing.assert_allclose(found[row, t], want or np.zeros(8), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(sinusoidal(4, 8, None), sinusoidal(4, 8, jnp.ones((1, 4), bool)))


def test_sinusoidal_positions_exist_for_every_width_the_config_takes() -> None:
    """At width 2 the formula divides by zero; at 4 it is sin and cos of p and of p / 1e4."""
    settings = config.default()
    settings.decoder.width, settings.decoder.heads = 2, 1
    with pytest.raises(UserError, match="config.decoder.width is 2, outside its range"):
        config.parse(settings)
    settings.decoder.width = 4
    assert config.parse(settings).decoder.width == 4
    want = [math.sin(2), math.sin(2e-4), math.cos(2), math.cos(2e-4)]
    np.testing.assert_allclose(sinusoidal(1, 4, None)[0, 0], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("with_memory", [False, True])
def test_plain_blocks_do_not_see_pads_and_fusion_blocks_do(with_memory: bool) -> None:
    """The reference drops the padding mask in its joint layer; parity needs the same."""
    model = fused() if with_memory else small_models.decoder()
    params = small_models.decoder_params(model)
    x_BTD, z_BTKE = embedded()
    valid = np.ones((2, LENGTH), bool)
    valid[0, [3, 4]] = False
    transform = jax.jit(
        lambda x: model.apply(
            {"params": params}, x, z_BTKE if with_memory else None, valid, method="transform"
        )
    )
    before: Any = transform(x_BTD)
    after: Any = transform(x_BTD.at[0, 3].set(x_BTD[0, 3] * 3))
    changed = np.asarray((before.hidden_BTD != after.hidden_BTD).any(axis=-1))
    assert not changed[1].any()
    assert changed[0, 3]
    assert not changed[0, :3].any()
    assert changed[0, 5:].all() == with_memory
    assert changed[0, 5:].any() == with_memory


def test_positions_scale_and_ties_are_what_the_config_says() -> None:
    plain = dataclasses.replace(
        small_models.CONFIG, positions="learned", max_positions=16, embedding_scale="none"
    )
    model = small_models.decoder(plain)
    params = small_models.decoder_params(model)
    tokens = jnp.asarray([[5, 7, 5]])
    found: Any = model.apply({"params": params}, tokens, method="embed")
    np.testing.assert_allclose(
        found, params["wte"][tokens] + params["wpe"][None, :3], rtol=0, atol=1e-6
    )
    paper = small_models.decoder()
    found = paper.apply({"params": params}, tokens, method="embed")
    want = params["wte"][tokens] * math.sqrt(WIDTH) + sinusoidal(3, WIDTH, None)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
    states = jax.random.normal(jax.random.key(0), (1, 3, WIDTH))
    logits: Any = model.apply({"params": params}, states, method="logits")
    want = np.asarray(states) @ np.asarray(params["wte"]).T
    np.testing.assert_allclose(logits[..., :90], want[..., :90], rtol=0, atol=1e-4)


def test_the_stack_splits_around_fusion_blocks() -> None:
    def names(layers: int, fusion: tuple[int, ...]) -> list[str]:
        return [segment.name for segment in split_stack(layers, fusion)]

    assert names(12, (10,)) == ["blocks_0_9", "fusion_10", "blocks_11_11"]
    assert names(12, ()) == ["blocks_0_11"]
    assert names(4, (3, 0)) == ["fusion_0", "blocks_1_2", "fusion_3"]
    assert names(3, (1, 2)) == ["blocks_0_0", "fusion_1", "fusion_2"]
    assert names(1, (0,)) == ["fusion_0"]


def test_a_frequent_token_gets_its_whole_gradient_in_half_precision() -> None:
    """4,096 equal contributions: added up in bfloat16 they would stop at 256 of them."""
    model = small_models.decoder(dtype=jnp.bfloat16)
    params = small_models.decoder_params(model)
    tokens = jnp.full((4, 1024), 7)

    def embedded(params: Any) -> jax.Array:
        x_BTD: Any = model.apply({"params": params}, tokens, method="embed")
        return jnp.sum(x_BTD.astype(jnp.float32))

    got = jax.jit(jax.grad(embedded))(params)["wte"][7]
    scale = np.sqrt(model.config.width)
    np.testing.assert_allclose(got, 4096 * scale, rtol=4e-3)  # bfloat16 rounds the factor


def test_auto_takes_the_flash_kernel_only_where_it_fits() -> None:
    fits: dict[str, Any] = {
        "platform": "gpu",
        "dtype": "bfloat16",
        "head_width": 64,
        "dropout": 0.0,
        "has_cudnn": lambda: True,
    }
    assert system.resolve_kernel("auto", **fits) == "cudnn"
    assert system.resolve_kernel("cudnn", **fits) == "cudnn"
    assert system.resolve_kernel("xla", **fits) == "xla"
    misfits: list[tuple[dict[str, Any], str]] = [
        ({"platform": "cpu"}, "a GPU"),
        ({"dtype": "float32"}, "train.dtype=bfloat16"),
        ({"head_width": 136}, "head width"),
        ({"head_width": 20}, "head width"),
        ({"dropout": 0.1}, "decoder.attention_dropout=0"),
        ({"has_cudnn": lambda: False}, "cuDNN with flash attention"),
    ]
    for misfit, named in misfits:
        assert system.resolve_kernel("auto", **(fits | misfit)) == "xla"
        with pytest.raises(UserError, match=named):
            system.resolve_kernel("cudnn", **(fits | misfit))


def size(init: Any, *args: Any) -> int:
    """Number of parameters, without making any."""
    shapes = nn.unbox(jax.eval_shape(init, *args))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def decoder_size(config: DecoderConfig, *, grounded: bool) -> int:
    """Parameters of a decoder over 49,412 entries, the padded rows of its table left out."""
    layers = (config.layers - 2,) if grounded else ()
    model = Decoder(
        config,
        small_models.PAPER_FUSION,
        vocab_size=49412,
        fusion_layers=layers,
        memory_width=config.width if grounded else 0,
    )
    padding = (padded_vocab(49412, config.vocab_multiple) - 49412) * config.width
    return size(language_model.Model(model).init, jax.random.key(0)) - padding


def test_sizes_are_the_reference_s() -> None:
    """reference.md, section 2; the fusion block without its 1,179,648 dead parameters."""
    paper = DecoderConfig()
    gpt2 = decoder_size(paper, grounded=False)
    assert gpt2 == 123_004_416
    assert decoder_size(paper, grounded=True) == 124_187_136 - 1_179_648
    assert decoder_size(paper, grounded=True) - gpt2 == 8_270_592 - 7_087_872 - 1_179_648
    thirteen = dataclasses.replace(paper, layers=13)
    assert decoder_size(thirteen, grounded=False) - gpt2 == 7_087_872
    medium = dataclasses.replace(paper, layers=24, width=1024, heads=16)
    assert decoder_size(medium, grounded=False) == 352_909_312


def test_the_tower_has_the_size_of_the_reference_s() -> None:
    config = TowerConfig(
        layers=12, width=768, heads=12, mlp_width=3072, projection=768, vocab_size=49408
    )
    tower = TextTower(config)
    tokens, starts = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4), bool)

    def init(key: jax.Array) -> Any:
        return tower.init(key, tokens, starts, readout="token")["params"]

    assert size(init, jax.random.key(0)) == 123_650_304
    assert size(lambda key: init(key)["h"], jax.random.key(0)) == 85_054_464
