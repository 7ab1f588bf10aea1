"""CLIP's two towers as they are trained: loss over the global batch, gradients, metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from blindvalm_jax.models.contrastive import Clip, Encoded, contrastive_loss


@struct.dataclass
class Batch:
    """Images uint8 with a caption each, as `models.contrastive.Clip` reads them."""

    images_BHWC: Array
    tokens_BS: Array
    length_B: Array


@dataclasses.dataclass(frozen=True)
class Model:
    """The towers, and their loss."""

    clip: Clip

    def init(self, key: Array) -> Any:
        """Boxed parameters of both towers and the temperature."""
        size = self.clip.config.vision.image_size
        images_BHWC = jnp.zeros((1, size, size, 3), jnp.uint8)
        length_B = jnp.zeros((1,), jnp.int32)
        return self.clip.init(key, images_BHWC, jnp.zeros((1, 1), jnp.int32), length_B)["params"]

    def encode(self, params: Any, batch: Batch) -> Encoded:
        """Unit features of images and captions."""
        encoded: Any = self.clip.apply(
            {"params": params}, batch.images_BHWC, batch.tokens_BS, batch.length_B
        )
        return encoded

    def gradients(
        self, params: Any, frozen: Mapping[str, Any], batch: Batch, key: Array
    ) -> tuple[Any, dict[str, Array]]:
        """Gradients of the loss over the global batch, and metrics; nothing in it is random."""

        def loss(params: Any) -> tuple[Array, dict[str, Array]]:
            encoded = self.encode(params, batch)
            nats = contrastive_loss(encoded.image_BE, encoded.text_BE, encoded.scale)
            return nats, {"train/loss": nats, "train/temperature": encoded.scale}

        return jax.grad(loss, has_aux=True)(params)
