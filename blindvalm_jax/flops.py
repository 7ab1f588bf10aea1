"""Analytic FLOPs of a training step: a multiply-add is 2, lookups and norms are 0.

Per token (V, D, F, T as everywhere, c = (T + 1) / 2T keys per position under a causal mask):
decoder L (8 D^2 + 4 D F + 4 c T D) + 2 D V forward, 3 x that in training; fusion layer with K
features 4 K D^2 for projections, 2 x in training because nothing flows back to the features (with
an adapter 3 x, and 2 K E D for the adapter itself, 2 x), and 4 K D for scores and values, 3 x; the
frozen tower forward only.
"""

from __future__ import annotations

import dataclasses

from blindvalm_jax.config import Config, fusion_layers
from blindvalm_jax.models.clip import TowerConfig
from blindvalm_jax.models.contrastive import ClipConfig

# Dense bf16 TFLOP/s of one device, by the beginning of its `device_kind`; longest name first.
PEAK_TFLOPS = {
    "TPU v6 lite": 918.0,
    "TPU v5 lite": 197.0,
    "TPU v5": 459.0,
    "TPU v4": 275.0,
    "TPU7x": 1153.0,
    "NVIDIA A100": 312.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H100": 989.0,
    "NVIDIA GH200": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA B200": 2250.0,
}


@dataclasses.dataclass(frozen=True)
class FlopsPerToken:
    """Training FLOPs of one token, by part; search: of an exact one, over all vectors."""

    decoder: float
    fusion: float
    tower: float
    search: float = 0.0

    @property
    def total(self) -> float:
        """All parts."""
        return self.decoder + self.fusion + self.tower + self.search


def per_token(
    config: Config,
    *,
    vocab_size: int,
    tower: TowerConfig | None,
    tower_length: int,
    vectors: int = 0,
) -> FlopsPerToken:
    """Training FLOPs per language-model token.

    tower_length: positions of a packed row without the start token (S); vectors: that are compared
    with each token by exact search in the step (M), 2 M E.
    """
    decoder, length = config.decoder, config.data.sequence_length
    width, mlp_width = decoder.width, decoder.mlp_width or 4 * decoder.width
    block = 8 * width**2 + 4 * width * mlp_width + 2 * (length + 1) * width
    forward = decoder.layers * block + 2 * width * vocab_size
    if tower is None:
        return FlopsPerToken(3.0 * forward, 0.0, 0.0)
    fused = len(fusion_layers(config)) * config.grounding.neighbours
    projections = 2.0 * 4 * width**2
    if tower.projection != width:
        projections = 3.0 * 4 * width**2 + 2.0 * 2 * tower.projection * width
    fusion = fused * (projections + 3.0 * 4 * width)
    frozen = 0.0
    if config.grounding.search != "prepared":
        frozen = tower_forward(config, tower, tower_length) / length
    return FlopsPerToken(3.0 * forward, fusion, frozen, 2.0 * vectors * tower.projection)


def tower_forward(config: Config, tower: TowerConfig, tower_length: int) -> float:
    """Forward FLOPs of the text tower on one packed row.

    Attention counts the keys a position sees: its segment so far, half of the longest one, and the
    start token.
    """
    sides = 2 if config.grounding.readout == "eos" else 1
    positions = sides * (tower_length + 1)
    keys = tower.longest_segment / 2 + sides
    block = 8 * tower.width**2 + 4 * tower.width * tower.mlp_width + 4 * keys * tower.width
    read_out = (tower_length + 1) * 2 * tower.width * tower.projection
    return positions * tower.layers * block + read_out


def per_pair(clip: ClipConfig) -> float:
    """Training FLOPs of an image with its caption: 3 x the forward pass of both towers.

    Attention counts all keys of the image tower, and half of the text tower's.
    """
    text, vision = clip.text, clip.vision
    forward = text.context * _dense(text.layers, text.width, text.mlp_width, text.context / 2)
    forward += 2.0 * text.context * text.width * text.projection
    if vision.kind == "vit":
        patches = (vision.image_size // vision.patch) ** 2
        positions = patches + 1
        forward += patches * 2.0 * 3 * vision.patch**2 * vision.width
        forward += positions * _dense(vision.layers, vision.width, vision.mlp_width, positions)
    else:
        side, inputs = vision.image_size, 3
        for outputs in vision.channels:
            side = -(-side // 2)
            forward += 2.0 * 9 * side**2 * inputs * outputs
            inputs = outputs
        forward += 2.0 * side**2 * inputs * vision.width
    return 3 * (forward + 2.0 * vision.width * vision.projection)


def _dense(layers: int, width: int, mlp_width: int, keys: float) -> float:
    """Forward FLOPs of a position in a stack of blocks that sees so many keys."""
    return layers * (8.0 * width**2 + 4.0 * width * mlp_width + 4.0 * keys * width)


def peak_tflops(device_kind: str, override: float) -> float | None:
    """Peak of one device, or None when it is not known (then there is no MFU)."""
    if override:
        return override
    for name, peak in PEAK_TFLOPS.items():
        if device_kind.startswith(name):
            return peak
    return None
