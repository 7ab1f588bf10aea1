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
from blindvalm_jax.objectives import microbatches


@struct.dataclass
class Batch:
    """Images uint8 with a caption each, as `models.contrastive.Clip` reads them."""

    images_BHWC: Array
    tokens_BS: Array
    length_B: Array


@dataclasses.dataclass(frozen=True)
class Model:
    """The towers, and their loss.

    microbatches: parts in which a batch goes through the towers. The loss is over the whole batch
    all the same: only unit features are kept of a part, and the backward pass encodes it once more
    (gradient caching, Gao et al. 2021, arXiv 2101.06983).
    """

    clip: Clip
    microbatches: int = 1

    def init(self, key: Array) -> Any:
        """Boxed parameters of both towers and the temperature."""
        size = self.clip.config.vision.image_size
        images_BHWC = jnp.zeros((1, size, size, 3), jnp.uint8)
        length_B = jnp.zeros((1,), jnp.int32)
        return self.clip.init(key, images_BHWC, jnp.zeros((1, 1), jnp.int32), length_B)["params"]

    def encode(self, params: Any, batch: Batch) -> Encoded:
        """Unit features of images and captions."""

        def rows(part: Batch) -> Any:
            return self.clip.apply(
                {"params": params}, part.images_BHWC, part.tokens_BS, part.length_B
            )

        if self.microbatches == 1:
            return rows(batch)
        parts = microbatches.split(batch, self.microbatches)
        found = jax.lax.map(jax.checkpoint(rows, prevent_cse=False), parts)
        image_BE, text_BE = microbatches.join((found.image_BE, found.text_BE))
        return Encoded(image_BE, text_BE, found.scale[0])

    def gradients(
        self, params: Any, frozen: Mapping[str, Any], batch: Batch, key: Array
    ) -> tuple[Any, dict[str, Array]]:
        """Gradients of the loss over the global batch, and metrics; nothing in it is random."""

        def loss(params: Any) -> tuple[Array, dict[str, Array]]:
            encoded = self.encode(params, batch)
            nats = contrastive_loss(encoded.image_BE, encoded.text_BE, encoded.scale)
            return nats, {"train/loss": nats, "train/temperature": encoded.scale}

        return jax.grad(loss, has_aux=True)(params)
