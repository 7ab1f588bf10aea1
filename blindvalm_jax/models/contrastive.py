"""CLIP as a whole: two towers, one space, and the loss that joins them (Radford et al. 2021)."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from blindvalm_jax.errors import UserError
from blindvalm_jax.models.clip import TextTower, TowerConfig
from blindvalm_jax.models.vision import VisionConfig, VisionTower


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Both towers, and what cosines are multiplied with: at the start, and at most.

    Raises:
      UserError: the towers end in different spaces, or the scale does not fit its cap.
    """

    text: TowerConfig
    vision: VisionConfig
    temperature_start: float
    temperature_cap: float

    def __post_init__(self) -> None:
        """Refuses what does not fit together."""
        if self.text.projection != self.vision.projection:
            raise UserError(
                f"both towers of a CLIP must have one projection, got text "
                f"{self.text.projection} and vision {self.vision.projection}"
            )
        if not 0 < self.temperature_start <= self.temperature_cap < math.inf:
            raise UserError(
                f"expected 0 < temperature_start <= temperature_cap, got "
                f"{self.temperature_start} and {self.temperature_cap}"
            )


@struct.dataclass
class Encoded:
    """Unit features of images and captions, and the scale of their cosines (a scalar)."""

    image_BE: Array
    text_BE: Array
    scale: Array


class Clip(nn.Module):
    """Image tower, text tower and `logit_scale`, the logarithm of the scale."""

    config: ClipConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Declares the towers and the scale."""
        self.text = TextTower(self.config.text, dtype=self.dtype)
        self.vision = VisionTower(self.config.vision, dtype=self.dtype)
        init = nn.initializers.constant(math.log(self.config.temperature_start))
        self.logit_scale = self.param("logit_scale", init, (), jnp.float32)

    def __call__(self, images_BHWC: Array, tokens_BS: Array, length_B: Array) -> Encoded:
        """Images with their captions; see the two encoders and `capped_scale`."""
        image_BE = self.encode_image(images_BHWC)
        text_BE = self.encode_text(tokens_BS, length_B)
        return Encoded(
            image_BE, text_BE, capped_scale(self.logit_scale, self.config.temperature_cap)
        )

    def encode_image(self, images_BHWC: Array) -> Array:
        """Features [B, E] of images; see `VisionTower`."""
        return self.vision(images_BHWC)

    def encode_text(self, tokens_BS: Array, length_B: Array) -> Array:
        """CLIP's features [B, E] of captions: the tower's output at the end token.

        tokens_BS: a caption's length_B ids, then the tower's end id, then anything; no start
        token. A length outside 0 .. S - 1 gives NaN.

        Raises:
          ValueError: rows are longer than the tower's context, less the start token.
        """
        longest = self.config.text.context - 1
        if tokens_BS.shape[1] > longest:
            raise ValueError(
                f"captions with their end token must fit in {longest} places, "
                f"got {tokens_BS.shape[1]}"
            )
        # One segment per row. With its end token it may be one longer than `longest_segment`,
        # which `Packed` reaches over all the same: a block of keys and the whole block before.
        starts_BS = jnp.zeros(tokens_BS.shape, bool)
        features_BTE = self.text(tokens_BS, starts_BS, readout="token")
        at_B11 = jnp.where(length_B < 0, tokens_BS.shape[1], length_B)[:, None, None] + 1
        return jnp.take_along_axis(features_BTE, at_B11, axis=1, mode="fill")[:, 0]


def capped_scale(logit_scale: Array, cap: float) -> Array:
    """min(exp(logit_scale), cap), for a loss that is minimised.

    CLIP clamps the parameter after each update: from the cap it can go down and not up. So here:
    at the cap, and past it by the rest of an update, a gradient that would raise the parameter
    is dropped, and one that lowers it is that of exp at the cap.
    """
    return _capped(logit_scale, cap)


@jax.custom_vjp
def _capped(logit_scale: Array, cap: float) -> Array:
    return jnp.minimum(jnp.exp(logit_scale), cap)


def _capped_forward(logit_scale: Array, cap: float) -> tuple[Array, tuple[Array, Array]]:
    scale = _capped(logit_scale, cap)
    return scale, (scale, scale >= cap)


def _capped_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, None]:
    scale, at_cap = saved
    return jnp.where(at_cap & (cotangent < 0), 0.0, cotangent * scale), None


_capped.defvjp(_capped_forward, _capped_backward)


def contrastive_loss(image_BE: Array, text_BE: Array, scale: Array) -> Array:
    """CLIP's loss in nats: the mean of both cross-entropies over the global batch.

    Row i of one side belongs to row i of the other; every other row is a wrong answer. Under
    `jit` with rows over a mesh these are the rows of all devices.
    """
    # TF32 has 10 bits of mantissa, and a scale of 100 would show it.
    cosine_BB = jnp.einsum("ie,je->ij", image_BE, text_BE, precision=jax.lax.Precision.HIGHEST)
    logits_BB = scale * cosine_BB
    right_B = scale * jnp.sum(image_BE * text_BE, axis=-1)
    by_image_B = jax.nn.logsumexp(logits_BB, axis=1)
    by_text_B = jax.nn.logsumexp(logits_BB, axis=0)
    return jnp.mean(0.5 * (by_image_B + by_text_B) - right_B)
