"""FLOPs of a unit of training as runs count them, and what a device could do at most.

The products themselves are in `costs`: here they are summed up as run.json has them. A budget
counts the keys that a position sees; nothing counts twice that is computed twice.
"""

from __future__ import annotations

import dataclasses

from blindvalm_jax.config import Config
from blindvalm_jax.costs import language, products
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
    """Training FLOPs per language-model token; arguments as `costs.language.token` takes them."""
    found = language.token(
        config, vocab_size=vocab_size, tower=tower, tower_length=tower_length, vectors=vectors
    )

    def of(*parts: str) -> float:
        return sum(product.training for product in found if product.part in parts)

    return FlopsPerToken(
        decoder=of("decoder", "head"),
        fusion=sum(one.training for one in found if one.part.startswith("fusion")),
        tower=of("tower", "readout"),
        search=of("search"),
    )


def per_pair(clip: ClipConfig) -> float:
    """Training FLOPs of an image with its caption."""
    return sum(product.training for product in products.pair(clip))


def peak_tflops(device_kind: str, override: float) -> float | None:
    """Peak of one device, or None when it is not known (then there is no MFU)."""
    if override:
        return override
    for name, peak in PEAK_TFLOPS.items():
        if device_kind.startswith(name):
            return peak
    return None
