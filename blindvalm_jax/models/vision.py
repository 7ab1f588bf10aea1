"""CLIP's image towers: a vision transformer (Radford et al. 2021), or a small convolutional net.

Both take images as they are stored and normalise them inside, so that mean and deviation travel
with the weights. The transformer equals Hugging Face's `CLIPVisionModelWithProjection`.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from blindvalm_jax.errors import UserError
from blindvalm_jax.models import attention, initializers
from blindvalm_jax.models.clip import unit
from blindvalm_jax.models.precision import einsum_fp32
from blindvalm_jax.models.transformer import ACTIVATIONS, BlockShape, Stack, layer_norm

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_TRANSFORMER_SIZES = ("patch", "layers", "heads", "mlp_width")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Shape of an image tower.

    kind: "vit", a transformer over square patches, with `patch` (their side in pixels), `layers`,
    `heads` and `mlp_width`; or "conv", 3x3 convolutions of stride 2 with `channels` outputs each
    and a hidden layer of `width`. Fields of the other kind stay at their defaults. mean, std: of
    each colour, for values from 0 to 1.

    Raises:
      UserError: the sizes fit no such tower.
    """

    kind: str
    image_size: int
    width: int
    projection: int
    patch: int = 0
    layers: int = 0
    heads: int = 0
    mlp_width: int = 0
    channels: tuple[int, ...] = ()
    activation: str = "quick_gelu"
    norm_epsilon: float = 1e-5
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __post_init__(self) -> None:
        """Refuses what fits no tower."""
        if self.kind not in ("vit", "conv"):
            raise UserError(f"an image tower's kind must be vit or conv, got {self.kind!r}")
        vit = self.kind == "vit"
        sizes = {name: getattr(self, name) for name in _TRANSFORMER_SIZES}
        own = {"image_size": self.image_size, "width": self.width, "projection": self.projection}
        for name, size in (own | sizes if vit else own).items():
            if size < 1:
                raise UserError(f"{name} of a {self.kind} image tower must be positive, got {size}")
        if vit and self.image_size % self.patch:
            raise UserError(f"image_size {self.image_size} is not a multiple of patch {self.patch}")
        if vit and self.width % self.heads:
            raise UserError(f"width {self.width} is not a multiple of {self.heads} heads")
        if vit and self.channels:
            raise UserError(f"channels are for kind conv, got {self.channels} with kind vit")
        if not vit and (any(sizes.values()) or min(self.channels, default=0) < 1):
            raise UserError(
                f"kind conv needs one or more positive channels and leaves "
                f"{', '.join(_TRANSFORMER_SIZES)} out, got channels {self.channels} and {sizes}"
            )
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )
        colours = (*self.mean, *self.std)
        lengths = len(self.mean), len(self.std)
        if lengths != (3, 3) or not all(map(math.isfinite, colours)) or min(self.std) <= 0:
            raise UserError(
                f"mean and std must be three numbers each, std positive, got {self.mean} "
                f"and {self.std}"
            )


class VisionTower(nn.Module):
    """Image tower; features are L2-normalised, as in CLIP's space."""

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: Array) -> Array:
        """Features [B, E] in fp32.

        images_BHWC: [B, image_size, image_size, 3], uint8, or floats from 0 to 1.

        Raises:
          ValueError: the images are of another size or dtype.
        """
        config = self.config
        pixels_BHWC = normalised(images_BHWC, config)
        encode = self._transformer if config.kind == "vit" else self._convolutional
        pooled_BD = encode(pixels_BHWC)
        init = nn.initializers.normal(config.width**-0.5)
        init = initializers.partitioned(init, ("embed", None))
        size = (config.width, config.projection)
        projection = self.param("visual_projection", init, size, jnp.float32)
        return unit(einsum_fp32("bd,de->be", pooled_BD, projection.astype(self.dtype)))

    def _transformer(self, pixels_BHWC: Array) -> Array:
        """Output of the class token [B, D], normed."""
        config = self.config
        init = initializers.clip_vision(width=config.width, layers=config.layers)
        patches_BPC = patches(pixels_BHWC, config.patch).astype(self.dtype)
        inputs = patches_BPC.shape[-1]
        # torch's default for the convolution that OpenAI writes this as.
        patch_init = initializers.partitioned(initializers.uniform(inputs**-0.5), (None, "embed"))
        kernel = self.param("patch_embedding", patch_init, (inputs, config.width), jnp.float32)
        class_init = initializers.partitioned(init.embedding, ("embed",))
        class_D = self.param("class_embedding", class_init, (config.width,), jnp.float32)
        position_init = initializers.partitioned(init.position, (None, "embed"))
        size = (1 + patches_BPC.shape[1], config.width)
        position_TD = self.param("position_embedding", position_init, size, jnp.float32)
        x_BPD = einsum_fp32("bpc,cd->bpd", patches_BPC, kernel.astype(self.dtype))
        class_B1D = jnp.broadcast_to(class_D, (x_BPD.shape[0], 1, config.width))
        x_BTD = jnp.concatenate([class_B1D, x_BPD], axis=1) + position_TD[None]
        x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", "activation"))
        x_BTD = layer_norm(config.norm_epsilon, self.dtype, "ln_pre")(x_BTD)
        shape = BlockShape(
            width=config.width,
            heads=config.heads,
            mlp_width=config.mlp_width,
            activation=config.activation,
            norm_epsilon=config.norm_epsilon,
            init=init,
            dtype=self.dtype,
        )
        stack = Stack(shape, config.layers, deterministic=True, name="h")
        x_BTD, _ = stack(x_BTD, attention.Full())
        return layer_norm(config.norm_epsilon, self.dtype, "ln_post")(x_BTD[:, 0])

    def _convolutional(self, pixels_BHWC: Array) -> Array:
        """Output of the hidden layer [B, D]."""
        config = self.config
        act = ACTIVATIONS[config.activation]
        x_BHWC = pixels_BHWC
        for index, channels in enumerate(config.channels):
            # The three colours cannot be split.
            axes = (None, None, "mlp" if index else None, "embed")
            x_BHWC = nn.Conv(
                channels,
                (3, 3),
                strides=2,
                padding="SAME",
                dtype=self.dtype,
                kernel_init=initializers.partitioned(nn.initializers.he_normal(), axes),
                bias_init=initializers.partitioned(nn.initializers.zeros, ("embed",)),
                name=f"conv_{index}",
            )(x_BHWC)
            x_BHWC = nn.with_logical_constraint(act(x_BHWC), ("batch", None, None, None))
        x_BC = x_BHWC.reshape(x_BHWC.shape[0], -1)
        hidden = nn.Dense(
            config.width,
            dtype=self.dtype,
            kernel_init=initializers.partitioned(nn.initializers.he_normal(), ("mlp", "embed")),
            bias_init=initializers.partitioned(nn.initializers.zeros, ("embed",)),
            name="hidden",
        )
        return nn.with_logical_constraint(act(hidden(x_BC)), ("batch", "activation"))


def normalised(images_BHWC: Array, config: VisionConfig) -> Array:
    """(value - mean) / std of each colour in fp32, for values from 0 to 1.

    Raises:
      ValueError: the images are of another size, or neither uint8 nor floats.
    """
    expected = (config.image_size, config.image_size, 3)
    if images_BHWC.ndim != 4 or images_BHWC.shape[1:] != expected:
        raise ValueError(
            f"images must be [B, {', '.join(map(str, expected))}], got {list(images_BHWC.shape)}"
        )
    if images_BHWC.dtype == jnp.uint8:
        images_BHWC = images_BHWC.astype(jnp.float32) / 255.0
    elif not jnp.issubdtype(images_BHWC.dtype, jnp.floating):
        raise ValueError(f"images must be uint8 or floats from 0 to 1, got {images_BHWC.dtype}")
    mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 3) for x in (config.mean, config.std))
    return (images_BHWC.astype(jnp.float32) - mean) / std


def patches(pixels_BHWC: Array, side: int) -> Array:
    """Square patches [B, P, side * side * C], row by row, each patch's pixels row by row too."""
    batch, height, width, channels = pixels_BHWC.shape
    rows, columns = height // side, width // side
    x = pixels_BHWC.reshape(batch, rows, side, columns, side, channels)
    return jnp.swapaxes(x, 2, 3).reshape(batch, rows * columns, side * side * channels)
