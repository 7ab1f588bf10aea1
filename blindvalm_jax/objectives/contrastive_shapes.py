"""CLIP's two towers known by their settings: what a run is built on, and a plan without data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from blindvalm_jax import config, fitting, flops, partitioning, system
from blindvalm_jax.console import say
from blindvalm_jax.data.manifest import TokenizerRecord
from blindvalm_jax.errors import UserError
from blindvalm_jax.models.clip import TowerConfig
from blindvalm_jax.models.contrastive import Clip, ClipConfig
from blindvalm_jax.models.vision import VisionConfig
from blindvalm_jax.objectives.contrastive_model import Batch, Model
from blindvalm_jax.objectives.shapes import ShapesAlone, vocabulary


class Towers:
    """The part of the contrastive objective that needs no images (see `objective.Objective`)."""

    unit, units_per_row, trained = "pair", 1, "clip"

    def __init__(self, settings: config.Config, mesh: Mesh, record: TokenizerRecord) -> None:
        """Shapes both towers; record: the vocabulary of the captions.

        Raises:
          UserError: the heads do not divide a width, or the mesh does not divide the sizes.
        """
        self._settings, self._mesh, self._record = settings, mesh, record
        text = system.tower_shape(settings.clip.text, record, setting="clip.text")
        self.model = Model(
            Clip(clip_shape(settings, text), dtype=system.DTYPES[settings.train.dtype]),
            microbatches=settings.train.microbatches,
        )
        partitioning.check_clip_divisible(settings, mesh, self.model.clip.config)
        self.damaged: list[str] = []

    def abstract_frozen(self) -> dict[str, Any]:
        """Nothing is frozen."""
        return {}

    def read_start(self, shapes: Any) -> None:
        """Both towers start fresh."""

    def abstract_batch(self) -> Batch:
        """Shapes and shardings of a batch."""
        rows, shape = self._settings.train.batch_size, self.model.clip.config
        size, sharding = shape.vision.image_size, partitioning.batch_sharding(self._mesh)

        def array(dtype: Any, *sizes: int) -> Any:
            return jax.ShapeDtypeStruct((rows, *sizes), dtype, sharding=sharding)

        return Batch(
            array(np.uint8, size, size, 3),
            array(np.int32, shape.text.context - 1),
            array(np.int32),
        )

    def describe(self, batch: Any) -> dict[str, Any]:
        """Tokenizer, towers and cost."""
        shape = self.model.clip.config
        return {
            "kernels": {"attention": "xla"},
            "flops_per_pair": {"total": flops.per_pair(shape)},
            "tokenizer": dataclasses.asdict(self._record),
            "clip": dataclasses.asdict(shape),
        }

    def settle(self, settings: config.Config) -> None:
        """Takes over the microbatches that were chosen."""
        self._settings = settings
        self.model = fitting.settled(self.model, settings.train)

    def resolved(self) -> config.Config:
        """The settings with the mesh filled in."""
        sizes = dataclasses.replace(self._settings.mesh, **dict(self._mesh.shape))
        return dataclasses.replace(self._settings, mesh=sizes)


class ContrastiveShapes(ShapesAlone, Towers):
    """The shapes of a contrastive run without images."""

    def __init__(
        self, settings: config.Config, workdir: Path | None, mesh: Mesh, *, resuming: bool = False
    ) -> None:
        """Fills in what images would say; without a directory nothing is printed.

        Raises:
          UserError: as `Towers`, or a run is to be resumed.
        """
        if resuming:
            raise UserError("a run is resumed on its data: set data.images or data.tfds")
        super().__init__(settings, mesh, vocabulary(settings.tokenizer))
        if workdir is not None:
            entries = self._record.tower_vocab_size
            say(f"no images are named: shapes alone, a vocabulary of {entries:,} (tokenizer)")


def clip_shape(settings: config.Config, text: TowerConfig) -> ClipConfig:
    """Both towers as settings give them, around this text tower."""
    image, clip = settings.clip.image, settings.clip
    vit = {
        "patch": image.patch,
        "layers": image.layers,
        "heads": image.heads,
        "mlp_width": 4 * image.width,
    }
    return ClipConfig(
        text=text,
        vision=VisionConfig(
            kind=image.kind,
            image_size=image.size,
            width=image.width,
            projection=text.projection,
            **(vit if image.kind == "vit" else {"channels": image.channels}),
        ),
        temperature_start=clip.temperature_start,
        temperature_cap=clip.temperature_cap,
    )
