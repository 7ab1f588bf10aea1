"""Golden cases of single parts: fusion layer, decoder, CLIP text tower, cut rule."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blindvalm_jax.config import DecoderConfig, FusionConfig
from blindvalm_jax.golden.case import FEATURE, OUTPUT, Case, Check
from blindvalm_jax.grounding import segments, text
from blindvalm_jax.interop import clip_text as clip_weights
from blindvalm_jax.interop import fairseq, rules, weights
from blindvalm_jax.models import attention, initializers
from blindvalm_jax.models.clip import TextTower, TowerConfig
from blindvalm_jax.models.decoder import Decoder, sinusoidal
from blindvalm_jax.models.transformer import Attention, Block, BlockShape, MemoryShape


def fusion_layer(case: Case) -> Iterator[Check]:
    """The joint attention and its block, with gradients."""
    arrays = case.arrays
    with case.building():
        config = case.meta["config"]
        heads, width, mlp_width = case.sizes(config, "heads", "embed_dim", "ffn_dim")
        shape = BlockShape(
            width=width,
            heads=heads,
            mlp_width=mlp_width,
            activation="gelu_erf",
            norm_epsilon=1e-5,
            init=initializers.fairseq(width=width, mlp_width=mlp_width),
            dtype=jnp.float32,
        )
        tensors = {f"layers.0.{k}": v for k, v in case.weights("w/").items()}
        load = functools.partial(_load_block, tensors, heads=heads, source=case.name)
        params, plain = load(fused=True), load(fused=False)
        x_BTD = jnp.swapaxes(jnp.asarray(arrays["x"]), 0, 1)
        z_BTKE = jnp.asarray(arrays["image_features"])
    pattern = attention.Causal()

    def module(kind: type, memory: MemoryShape | None = None) -> Any:
        return kind(shape, deterministic=True, memory_shape=memory)

    def apply(module: Any, params: Any, x_BTD: Any, z_BTKE: Any = None) -> Any:
        run = jax.jit(
            lambda params, x_BTD: module.apply({"params": params}, x_BTD, pattern, z_BTKE)
        )
        return run(params, x_BTD)

    memory = MemoryShape(width=z_BTKE.shape[-1], fusion=FusionConfig(query_scale="model_width"))
    block = module(Block, memory)
    attn_BTD, share_BT = apply(module(Attention, memory), params["attn"], x_BTD, z_BTKE)
    seen = arrays["out/attn_weights_mean_over_heads"]
    share = seen[..., x_BTD.shape[1] :].sum(axis=-1)
    yield case.check("attention", jnp.swapaxes(attn_BTD, 0, 1), arrays["out/attn"], OUTPUT)
    yield case.check("share on the memory", share_BT, share, OUTPUT)
    layer_BTD, _ = apply(block, params, x_BTD, z_BTKE)
    yield case.check("layer", jnp.swapaxes(layer_BTD, 0, 1), arrays["out/layer"], OUTPUT)
    for name, kind, tree in (("attn", Attention, plain["attn"]), ("layer", Block, plain)):
        out_BTD, _ = apply(module(kind), tree, x_BTD)
        expected = arrays[f"out/{name}_no_image"]
        yield case.check(f"{name} without memory", jnp.swapaxes(out_BTD, 0, 1), expected, OUTPUT)
    if "wrong/layer_if_scaled_by_head_dim" in arrays:
        variant = module(
            Block, dataclasses.replace(memory, fusion=FusionConfig(query_scale="head_width"))
        )
        out_BTD, _ = apply(variant, params, x_BTD, z_BTKE)
        expected = arrays["wrong/layer_if_scaled_by_head_dim"]
        yield case.check("layer, head_width", jnp.swapaxes(out_BTD, 0, 1), expected, OUTPUT)

    cotangent_BTD = jnp.swapaxes(jnp.asarray(arrays["cotangent"]), 0, 1)

    def total(params: Any, x_BTD: Any) -> Any:
        return jnp.sum(apply(block, params, x_BTD, z_BTKE)[0] * cotangent_BTD)

    grads, grad_x_BTD = jax.jit(jax.grad(total, argnums=(0, 1)))(params, x_BTD)
    yield case.check_relative("gradient x", jnp.swapaxes(grad_x_BTD, 0, 1), arrays["grad/x"])
    got = rules.save(
        {"h": {"fusion_0": grads}},
        model=[],
        block=lambda index: fairseq.block_rules(index, heads=heads, fused=True),
        layers=1,
        fusion_layers=(0,),
    )
    got = {name.removeprefix("layers.0."): gradient for name, gradient in got.items()}
    expected_gradients = case.weights("grad/")
    del expected_gradients["x"]
    names = set(expected_gradients)
    yield case.check_names("gradients on one side only", set(got), names)
    for name in sorted(names & set(got)):
        yield case.check_relative(f"gradient {name}", got[name], expected_gradients[name])


def _load_block(tensors: rules.Tensors, *, heads: int, fused: bool, source: str) -> dict[str, Any]:
    """Parameters of one block; without a memory, the image tensors are left aside."""
    if not fused:
        tensors = {name: x for name, x in tensors.items() if ".img_" not in name}
    tensors = {name: x for name, x in tensors.items() if not fairseq.is_dead(name)}
    layers = (0,) if fused else ()
    params = rules.load(
        tensors,
        model=[],
        block=lambda index: fairseq.block_rules(index, heads=heads, fused=fused),
        layers=1,
        fusion_layers=layers,
        source=source,
    )["h"]
    if fused:
        return params["fusion_0"]
    return jax.tree.map(lambda x: x[0], params["blocks_0_0"])


def decoder(case: Case) -> Iterator[Check]:
    """The whole decoder: embedding, every layer, final norm, logits."""
    arrays = case.arrays
    decoder, params = build_decoder(case, case.meta["config"])
    with case.building():
        z_BTKE = arrays.get("image_features")
        valid_BT = jnp.asarray(arrays["valid"])
        tokens_BT = jnp.asarray(arrays["tokens"])
        inner = [np.swapaxes(x, 0, 1) for x in arrays["out/inner_states"]]
    positions = sinusoidal(tokens_BT.shape[1], decoder.config.width, valid_BT)
    yield case.check("position embedding", positions, arrays["positions_emb"], FEATURE)
    variables = {"params": params}
    embedded_BTD = decoder.apply(variables, tokens_BT, valid_BT, method="embed")
    yield case.check("embedding", embedded_BTD, inner[0], OUTPUT)
    run_hidden = functools.partial(decoder.apply, method="hidden", mutable=["intermediates"])
    hidden, sown = jax.jit(run_hidden)(variables, tokens_BT, z_BTKE, valid_BT)
    outputs = _block_outputs(sown["intermediates"]["h"])
    yield case.check("number of layers", len(outputs), len(inner) - 1, 0.0)
    for index, (output_BTD, expected) in enumerate(zip(outputs, inner[1:], strict=False)):
        yield case.check(f"layer {index}", output_BTD, expected, OUTPUT)
    yield case.check("final norm", hidden.hidden_BTD, arrays["out/final_features"], OUTPUT)
    logits_BTV = jax.jit(decoder.apply)(variables, tokens_BT, z_BTKE, valid_BT)
    vocab = decoder.vocab_size
    yield case.check("logits", logits_BTV[..., :vocab], arrays["out/logits"], OUTPUT)


def _block_outputs(sown: Any) -> list[Any]:
    """Outputs of all blocks in order, from what the stack's runs and fusion blocks recorded."""
    outputs: list[Any] = []
    for name in sorted(sown, key=lambda name: int(name.split("_")[1])):
        (output,) = sown[name]["output"]
        outputs.extend(output if name.startswith("blocks_") else [output])
    return outputs


def build_decoder(case: Case, config: dict[str, Any]) -> tuple[Decoder, Any]:
    """The decoder of a case, with the case's weights.

    Raises:
      UserError: they do not fit the config.
    """
    with case.building():
        names = ("layers", "embed_dim", "heads", "ffn_dim", "vocab")
        layers, width, heads, mlp_width, vocab_size = case.sizes(config, *names)
        joint = config["joint_layer"]
        fused = () if joint is None else (joint,)
        spec = weights.DecoderSpec(
            decoder=DecoderConfig(
                layers=layers,
                width=width,
                heads=heads,
                mlp_width=mlp_width,
                dropout=0.0,
                attention_dropout=0.0,
            ),
            fusion=FusionConfig(),
            vocab_size=vocab_size,
            fusion_layers=fused,
            memory_width=width if fused else 0,
        )
        params = fairseq.load_decoder(
            case.weights("w/"),
            layers=layers,
            heads=heads,
            fusion_layers=fused,
            vocab_multiple=spec.decoder.vocab_multiple,
            source=case.name,
        )
    weights.check(params, spec, case.name)
    return spec.module(), jax.tree.map(jnp.asarray, params)


def clip_text(case: Case) -> Iterator[Check]:
    """Segments and features of the text tower."""
    arrays = case.arrays
    tower, params = build_tower(case, case.meta["config"])
    with case.building():
        length = case.meta["segment_lengths"][0][0]
        raw = arrays["out/first_segment_raw"][1 : length + 1]
        unit = raw / np.linalg.norm(raw, axis=-1, keepdims=True)
    inputs = tower_input(arrays["clip_ids"])
    yield segment_check(case, inputs)
    z_BTKE = features(tower, params, inputs)
    yield case.check("features", z_BTKE[:, :, 0], arrays["out/features"], FEATURE)
    yield case.check("first segment", z_BTKE[0, :length, 0], unit, FEATURE)


def build_tower(case: Case, config: dict[str, Any]) -> tuple[TextTower, Any]:
    """The tower of a case, with the case's weights.

    Raises:
      UserError: they do not fit the config.
    """
    with case.building():
        names = ("layers", "width", "heads", "embed_dim", "vocab", "context")
        layers, width, heads, projection, vocab_size, context = case.sizes(config, *names)
        tower_config = TowerConfig(
            layers=layers,
            width=width,
            heads=heads,
            mlp_width=4 * width,
            projection=projection,
            vocab_size=vocab_size,
            context=context,
        )
        tensors = case.weights("clip/")
        rows = tensors.pop("token_embedding.rows")
        table = np.zeros((vocab_size, width), np.float32)
        table[tensors.pop("token_embedding.row_ids")] = rows
        tensors["token_embedding.weight"] = table
        params = clip_weights.load_openai(tensors, config=tower_config, source=case.name)
    weights.check(params, tower_config, case.name)
    return TextTower(tower_config), jax.tree.map(jnp.asarray, params)


def tower_input(clip_ids_BT: np.ndarray) -> text.TowerInput:
    """CLIP ids cut by the reference rule."""
    starts_BT = segments.starts(
        clip_ids_BT, rule="reference", separators=segments.clip_separators()
    )
    return text.TowerInput(jnp.asarray(clip_ids_BT), jnp.asarray(starts_BT))


def features(tower: TextTower, params: Any, inputs: text.TowerInput) -> jax.Array:
    """Features z [B, T, 1, E], compiled."""
    return jax.jit(functools.partial(text.features, tower, readout="token"))(params, inputs)


def segment_check(case: Case, inputs: text.TowerInput) -> Check:
    """Compares the cuts with the case's segment lengths."""
    with case.building():
        expected = [list(lengths) for lengths in case.meta["segment_lengths"]]
        if len(expected) != len(inputs.starts_BS):
            raise ValueError(f"{len(inputs.starts_BS)} rows, {len(expected)} segment_lengths")
    got = [segments.lengths(np.asarray(row)).tolist() for row in inputs.starts_BS]
    wrong = sum(g != e for g, e in zip(got, expected, strict=True))
    return Check(case.name, "rows with other segments", float(wrong), 0.0)


def segmentation(case: Case) -> Iterator[Check]:
    """Rows of ids and the lengths of their segments."""
    with case.building():
        rows = [
            (f"row {row['id']}: {row['desc']}", np.asarray([row["ids"]]), list(row["lengths"]))
            for row in case.meta["cases"]
        ]
    separators = segments.clip_separators()
    for name, ids_BT, expected in rows:
        starts_BT = segments.starts(ids_BT, rule="reference", separators=separators)
        wrong = float(segments.lengths(starts_BT[0]).tolist() != expected)
        yield Check(case.name, name, wrong, 0.0)
