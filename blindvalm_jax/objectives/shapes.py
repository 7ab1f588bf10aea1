"""A model known by its settings alone: what a plan needs, before there is any data."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from blindvalm_jax import addresses, config, fitting, flops, partitioning, system
from blindvalm_jax.console import say
from blindvalm_jax.data import manifest, pipeline, tokenizers
from blindvalm_jax.data.manifest import TokenizerRecord
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import images, retrieval
from blindvalm_jax.grounding.index import load_manifest
from blindvalm_jax.interop import clip_text
from blindvalm_jax.models.clip import TowerConfig
from blindvalm_jax.objectives import language
from blindvalm_jax.objectives.language_model import Batch, Model
from blindvalm_jax.objectives.objective import Scalars

# Entries of the vocabularies that have a fixed one; CLIP's has fairseq's four specials in front.
_VOCABULARIES = {"clip": 49_412, "gpt2": 50_257}
_CLIP_SPECIALS = 4
_ALIGNED = 1.25  # tower tokens for one of the language model's, at most, where they differ
# In the place of an index: how many vectors one would hold.
_TOLD = re.compile(r"vectors:(\d+)")


def without_data(settings: config.Config) -> bool:
    """Whether settings name no data, so that shapes are all there is."""
    data = settings.data
    return not (data.files or data.tfds or data.windows or data.images)


def check_index(settings: config.Config) -> None:
    """Refuses a number of vectors in the place of an index that is to be searched."""
    if _TOLD.fullmatch(settings.grounding.index):
        raise UserError(
            f"grounding.index={settings.grounding.index} is for --dry_run without data: build an "
            "index with python -m blindvalm_jax.index build, and name its directory"
        )


class ShapesAlone:
    """What is refused of an objective without data: it can be compiled, not run."""

    def place_frozen(self, like: Mapping[str, Any], *, resuming: bool) -> dict[str, Any]:
        """Refused: there is nothing to place."""
        raise ValueError("shapes alone cannot be run")

    def batches(self, start_step: int) -> pipeline.Batches:
        """Refused: there are no rows."""
        raise ValueError("shapes alone cannot be run")

    def to_device(self, rows: Mapping[str, Any]) -> Any:
        """Refused: there are no rows."""
        raise ValueError("shapes alone cannot be run")

    def evaluate(self, params: Any, frozen: Mapping[str, Any]) -> Scalars:
        """Refused: there are no rows."""
        raise ValueError("shapes alone cannot be run")


class Shapes(ShapesAlone):
    """The shapes of a language model without data (see `objective.Objective`).

    tower: shape of the text tower, None without one; vectors: of the index, 0 without one.
    """

    unit, trained = "token", "decoder"

    def __init__(
        self,
        settings: config.Config,
        workdir: Path | None,
        mesh: Mesh,
        *,
        resuming: bool = False,
    ) -> None:
        """Fills in what data would say.

        A named tower and the manifest of an index are read for their shapes, as a run does; a
        random tower is never made, and `grounding.index` may be `vectors:NUMBER` of none yet.

        Raises:
          UserError: the mesh does not divide the sizes, or the tower or index cannot be read.
        """
        if resuming:
            raise UserError("a run is resumed on its data: set data.files, data.tfds or .windows")
        self._settings, self.mesh = settings, mesh
        self.damaged: list[str] = []
        self._vocabulary = vocabulary(settings.tokenizer, entries=settings.decoder.vocab_size)
        self.tower, self._aligned = tower_of(settings, self._vocabulary)
        partitioning.check_divisible(settings, mesh, self.tower)
        self.vectors = vectors_of(settings.grounding)
        grounding, search = settings.grounding, None
        if grounding.source == "images" and grounding.search == "exact":
            search = images.on_devices(mesh, count=self.vectors, neighbours=grounding.neighbours)
        elif grounding.source == "images" and grounding.search == "faiss":
            raise UserError("grounding.search=faiss answers from the host: a plan needs the data")
        tower = None
        if self.tower is not None:
            tower = system.Tower(self.tower, None, "shapes alone", "")
        self.model: Model = system.build(
            settings,
            vocab_size=self._vocabulary.vocab_size,
            tower=tower,
            platform=jax.devices()[0].platform,
            search=search,
        )
        self.units_per_row = settings.data.sequence_length
        if workdir is not None:
            self._say()

    def _say(self) -> None:
        """Says what stands in for the data."""
        settings = self._settings
        say(
            f"no data is named: shapes alone, a vocabulary of {self._vocabulary.vocab_size:,} "
            + ("(decoder.vocab_size)" if settings.decoder.vocab_size else "(tokenizer)")
        )

    def abstract_frozen(self) -> dict[str, Any]:
        """Shapes and shardings of tower and index."""
        frozen: dict[str, Any] = {}
        if self.tower is not None and self.model.tower is not None:
            frozen["tower"] = language.abstract_tower(self.tower, self._settings, self.mesh)
            if self.model.search is not None:
                frozen["index"] = jax.ShapeDtypeStruct(
                    (retrieval.padded_rows(self.vectors, self.mesh), self.tower.projection),
                    np.dtype(self._settings.grounding.dtype),
                    sharding=retrieval.keys_sharding(self.mesh),
                )
        return frozen

    def abstract_batch(self) -> Batch:
        """Shapes and shardings of a batch."""
        rows, length = self._settings.train.batch_size, self._settings.data.sequence_length
        sharding = partitioning.batch_sharding(self.mesh)

        def shape(dtype: Any, *sizes: int) -> Any:
            return jax.ShapeDtypeStruct((rows, *sizes), dtype, sharding=sharding)

        arrays = {
            "tokens": shape(np.int32, length),
            "targets": shape(np.int32, length),
            "weights": shape(np.float32, length),
        }
        if self.model.tower is not None:
            size = self.tower_length
            arrays |= {
                "tower_tokens": shape(np.int32, size),
                "tower_starts": shape(np.bool_, size),
            }
            if self._aligned:
                arrays["tower_index"] = shape(np.int32, length)
        elif self.tower is not None:
            neighbours = self._settings.grounding.neighbours
            arrays["features"] = shape(np.float16, length, neighbours, self.tower.projection)
        return language.make_batch(arrays)

    @property
    def tower_length(self) -> int:
        """Tower tokens of a row, S."""
        return tower_length(self._settings.data, aligned=self._aligned)[0]

    def describe(self, batch: Batch) -> dict[str, Any]:
        """Cost of a token."""
        cost = flops.per_token(
            self._settings,
            vocab_size=self._vocabulary.vocab_size,
            tower=self.tower,
            tower_length=self.tower_length,
            vectors=self.vectors if self.model.search is not None else 0,
        )
        return {"flops_per_token": {**dataclasses.asdict(cost), "total": cost.total}}

    def settle(self, settings: config.Config) -> None:
        """Takes over the remat and microbatches that were chosen."""
        self._settings = settings
        self.model = fitting.settled(self.model, settings.train)

    def resolved(self) -> config.Config:
        """The settings with vocabulary, mesh and layers filled in."""
        return config.resolve(
            self._settings, vocab_size=self._vocabulary.vocab_size, mesh=self.mesh.shape
        )

    def read_start(self, shapes: Any) -> system.Start | None:
        """Weights that the decoder starts from, checked if settings name some."""
        named = self._settings.train.init_from
        if not named:
            return None
        return system.read_start(shapes, self.model.decoder, named, self._vocabulary)


def vocabulary(
    named: config.TokenizerConfig, *, entries: int = 0, windows: str = ""
) -> TokenizerRecord:
    """A vocabulary of this kind.

    entries: of it; 0: as many as the tokenizer of prepared text has (windows: its directory), or
    the one that is named and lies here, or else as the kind has, or is to learn.

    Raises:
      UserError: windows, or a tokenizer that lies here or was learned before, cannot be read.
    """
    kind = named.kind
    if not entries and (prepared := _prepared(windows)) is not None:
        entries = prepared.tokenizer.vocab_size
    if not entries and named.path:
        # Unlike pathlib, os.path takes a "~" of nobody for a name, which is not there.
        here = os.path.isdir(os.path.expanduser(named.path))
        entries = _entries(kind, named.path) if here or kind == "train" else 0
    return TokenizerRecord(
        kind=kind,
        vocab_size=entries or _VOCABULARIES.get(kind) or named.train_vocab_size,
        lm_offset=_CLIP_SPECIALS if kind == "clip" else 0,
        eos_id=0,
        pad_id=0,
        fingerprint="",
    )


def yet_to_learn(named: config.TokenizerConfig, *, entries: int = 0, windows: str = "") -> bool:
    """Whether `vocabulary` guesses: the tokenizer is learned from the text that is trained on."""
    known = entries or named.path or (windows and not addresses.is_address(windows))
    return named.kind == "train" and not known


def _prepared(windows: str) -> manifest.Manifest | None:
    """What prepared text says of itself; None where none is named, or it lies in a bucket."""
    if not windows or addresses.is_address(windows):
        return None
    try:
        return manifest.load(Path(os.path.expanduser(windows)))
    except UserError as error:
        raise UserError(
            f"data.windows: {error}; to plan without it, name none and set decoder.vocab_size"
        ) from error


@functools.lru_cache(maxsize=8)
def _entries(kind: str, path: str) -> int:
    """Of a tokenizer; of a sweep each run asks anew."""
    return tokenizers.load(kind, path).vocab_size


def tower_of(
    settings: config.Config, vocabulary: TokenizerRecord
) -> tuple[TowerConfig | None, bool]:
    """The shape of the text tower, and whether it has a tokenizer of its own."""
    grounding = settings.grounding
    if grounding.source == "none":
        return None, False
    # An index is asked by its CLIP's tower: without one, the shape that settings give.
    if grounding.tower == "random" or (grounding.source == "images" and not grounding.tower):
        return system.tower_shape(grounding.random, vocabulary, setting="grounding.random"), False
    if not grounding.tower:
        system.read_tower(settings, None)  # says what is missing
    shape, shares_tokens = _named_tower(grounding.tower)
    return shape, not (shares_tokens or vocabulary.kind == "clip")


def tower_length(data: config.DataConfig, *, aligned: bool) -> tuple[int, bool]:
    """Tower tokens of a row, S, and whether that is an upper guess.

    Of a tower with a tokenizer of its own it is known of prepared text alone, of `data.windows`.
    """
    if not aligned:
        return data.sequence_length, False
    prepared = _prepared(data.windows)
    known = None if prepared is None else prepared.tower_length
    return known or round(_ALIGNED * data.sequence_length), known is None


@functools.lru_cache(maxsize=8)
def _named_tower(name: str) -> tuple[TowerConfig, bool]:
    """Shape of a tower, and whether it shares its tokens; of a sweep each run asks anew."""
    loaded = clip_text.load_tower(name)
    tower = system.Tower(*loaded[:2], loaded.source, loaded.sha256, loaded.tokenizer)
    return tower.config, tower.shares_tokens


def vectors_of(grounding: config.GroundingConfig) -> int:
    """Vectors of the image index, which may be told instead of read."""
    if grounding.source != "images":
        return 0
    if told := _TOLD.fullmatch(grounding.index):
        count = int(told[1])
    else:
        try:
            count = load_manifest(Path(grounding.index).expanduser()).count
        except UserError as error:
            raise UserError(
                f"{error}, or plan without one: grounding.index=vectors:NUMBER"
            ) from error
    if grounding.neighbours > count:
        raise UserError(
            f"grounding.neighbours is {grounding.neighbours}, the index has {count} vectors"
        )
    return count
