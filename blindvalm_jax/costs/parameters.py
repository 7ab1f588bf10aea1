"""Parameters of a model by part, from its shape alone; exact."""

from __future__ import annotations

from blindvalm_jax.config import Config, fusion_layers
from blindvalm_jax.models.clip import TowerConfig
from blindvalm_jax.models.contrastive import ClipConfig
from blindvalm_jax.models.decoder import padded_vocab
from blindvalm_jax.models.vision import VisionConfig


def blocks(layers: int, width: int, mlp_width: int) -> int:
    """Of a stack of blocks: 4 D^2 + 2 D F, biases and two norms each."""
    return layers * (4 * width**2 + 2 * width * mlp_width + 9 * width + mlp_width)


def decoder(config: Config, *, vocab_size: int, feature_width: int) -> dict[str, int]:
    """Of the decoder, the table padded as it is; its head is the table of embeddings."""
    shape, width = config.decoder, config.decoder.width
    rows = padded_vocab(vocab_size, shape.vocab_multiple)
    positions = shape.max_positions if shape.positions == "learned" else 0
    found = {
        "decoder": blocks(shape.layers, width, shape.mlp_width or 4 * width) + 2 * width,
        "head": rows * width,
        "positions": positions * width,
    }
    layers, fusion = len(fusion_layers(config)), config.fusion
    if layers:
        own = 2 * width**2 if fusion.grounding_kv == "own" else 0
        bias = shape.heads if fusion.memory_bias == "learned" else 0
        found["fusion projections"] = layers * (4 * width + own + bias)
        if feature_width != width:
            found["fusion adapter"] = layers * (feature_width + 1) * width
    return found


def text_tower(tower: TowerConfig) -> int:
    """Of CLIP's text tower with its embeddings."""
    tables = (tower.vocab_size + tower.context) * tower.width
    stack = blocks(tower.layers, tower.width, tower.mlp_width)
    return tables + stack + 2 * tower.width + tower.width * tower.projection


def text_tower_bytes(tower: TowerConfig, *, value_bytes: int) -> float:
    """Of a frozen text tower: its matrices in the dtype they compute in, the rest in fp32."""
    width = tower.width
    block = 4 * width**2 + 2 * width * tower.mlp_width
    matrices = tower.layers * block + width * tower.projection
    return float(matrices * value_bytes + (text_tower(tower) - matrices) * 4)


def image_tower(vision: VisionConfig) -> int:
    """Of an image tower of either kind."""
    width = vision.width
    if vision.kind == "vit":
        patches = (vision.image_size // vision.patch) ** 2
        found = 3 * vision.patch**2 * width + (patches + 2) * width + 4 * width
        found += blocks(vision.layers, width, vision.mlp_width)
    else:
        found, size, inputs = 0, vision.image_size, 3
        for outputs in vision.channels:
            size = -(-size // 2)
            found, inputs = found + (9 * inputs + 1) * outputs, outputs
        found += (size**2 * inputs + 1) * width
    return found + width * vision.projection


def pair(clip: ClipConfig) -> dict[str, int]:
    """Of both towers, and the temperature."""
    return {
        "image tower": image_tower(clip.vision),
        "text tower": text_tower(clip.text),
        "temperature": 1,
    }
