"""The language-model objective: windows of text, a frozen tower, and a decoder that is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blindvalm_jax import config, distributed, fitting, flops, partitioning, runs, system
from blindvalm_jax.console import is_first, say
from blindvalm_jax.data import pipeline, prepared, tokenizers
from blindvalm_jax.data.replacing import Replacing
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.data.windows import Windows
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding.images import Images
from blindvalm_jax.grounding.text import TowerInput
from blindvalm_jax.models.clip import TextTower, TowerConfig
from blindvalm_jax.objectives.language_model import Batch, Model, Sums
from blindvalm_jax.objectives.objective import Scalars


class Language:
    """A decoder on windows of text, grounded or not (see `objective.Objective`).

    mesh: what it was made for; images: the index of a VALM.
    """

    unit, trained = "token", "decoder"

    def __init__(
        self, settings: config.Config, workdir: Path, mesh: Mesh, *, resuming: bool
    ) -> None:
        """Reads the tower, if any, and the windows, and checks them against each other."""
        self._settings, self._workdir, self.mesh = settings, workdir, mesh
        system.check_tower_name(settings, workdir, resuming=resuming)
        tower = system.read_tower(settings, workdir if resuming else None)
        partitioning.check_divisible(settings, mesh, None if tower is None else tower.config)
        directory = prepared.ensure_prepared(
            settings,
            workdir,
            tower_context=system.tower_context(settings, tower),
            stored_tower=workdir / "tower" if resuming else None,
            shared=tower is not None and tower.shares_tokens,
        )
        may_miss = settings.data.on_corrupt == "skip"
        self.damaged: list[str] = []
        self._windows = Windows(directory, "train", may_miss=may_miss)
        held_out = None
        if settings.eval.every_steps:
            held_out = Windows(directory, "eval", may_miss=may_miss)
        self._vocabulary = self._windows.manifest.tokenizer
        self._tower = system.prepare_tower(
            settings, tower, vocabulary=self._windows.manifest.tower_record, resuming=resuming
        )
        if resuming and self._tower is not None:
            self._check_named_tower(self._tower)
        shape = None if self._tower is None else self._tower.config
        partitioning.check_divisible(settings, mesh, shape)
        self.images = None
        if settings.grounding.source == "images" and self._tower is not None:
            self.images = Images(settings.grounding, mesh, text_sha256=self._tower.sha256)
        self._rows = self._with_images(self._windows, "train")
        self._held_out_rows = None if held_out is None else self._with_images(held_out, "eval")
        self.model: Model = system.build(
            settings,
            vocab_size=self._vocabulary.vocab_size,
            tower=self._tower,
            platform=jax.devices()[0].platform,
            search=None if self.images is None else self.images.search,
        )
        self.units_per_row = settings.data.sequence_length
        self._evaluate = jax.jit(self.model.loss)
        say(
            f"text: {len(self._windows)} windows of {settings.data.sequence_length} tokens "
            f"({directory})"
        )
        if len(self._windows) < settings.train.batch_size:
            rows = settings.train.batch_size
            say(f"note: so few windows are repeated within a batch of {rows} rows")
        if self._tower is not None:
            say(f"tower: {self._tower.source}, {_describe_grounding(settings)}")
        if self.images is not None:
            about = self.images.describe()
            say(
                f"images: the {about['neighbours']} nearest of {about['vectors']:,} "
                f"({settings.grounding.index}), search: {about['search']}"
            )

    def _check_named_tower(self, kept: system.Tower) -> None:
        """Refuses to resume under the name of another tower than the run has kept.

        A tower that is named as before need not be there any more.
        """
        name = self._settings.grounding.tower
        if name == runs.given_before(self._workdir)["grounding"]["tower"]:
            return
        read = system.read_tower(self._settings, None)
        vocabulary = self._windows.manifest.tower_record
        if system.new_tower(self._settings, read, vocabulary=vocabulary).sha256 != kept.sha256:
            raise UserError(
                f"{self._workdir} was trained with another tower ({kept.source}) than "
                f"grounding.tower={name} is: name that tower, or take another --workdir"
            )

    def abstract_frozen(self) -> dict[str, Any]:
        """Shapes and shardings of tower and index; matrices are in the dtype they compute in."""
        frozen = {}
        if self._tower is not None and self.model.tower is not None:
            frozen["tower"] = abstract_tower(self._tower.config, self._settings, self.mesh)
        return frozen | ({} if self.images is None else self.images.abstract_keys())

    def place_frozen(self, like: Mapping[str, Any], *, resuming: bool) -> dict[str, Any]:
        """Tower and index on the devices, as `like` describes them; a new run stores the tower."""
        if self._tower is None:
            return {}
        placed = {} if self.images is None else self.images.place_keys()
        if "tower" in like:
            placed["tower"] = place_tower(self._tower, like["tower"])
        if not resuming and is_first():
            aligned = self._windows.manifest.aligned
            own = self._windows.directory / "tower_tokenizer" if aligned else None
            system.store_tower(self._tower, self._workdir, tokenizer=own)
        self._tower = dataclasses.replace(self._tower, params=None)  # one copy is enough
        return placed

    def read_start(self, shapes: Any) -> system.Start | None:
        """Weights that the decoder starts from, if settings name some."""
        init_from = self._settings.train.init_from
        if not init_from:
            return None
        start = system.read_start(shapes, self.model.decoder, init_from, self._vocabulary)
        say(
            f"starts from {init_from}; fresh: {', '.join(start.fresh) or 'nothing'}; "
            f"left out: {', '.join(start.dropped) or 'nothing'}"
        )
        return start

    def abstract_batch(self) -> Batch:
        """Shapes and shardings of a batch."""
        rows = next(iter(pipeline.eval_batches(self._rows, **self._reading(1), limit=1)))
        size = self._settings.train.batch_size
        sharding = partitioning.batch_sharding(self.mesh)
        shapes = {
            name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=sharding)
            for name, x in rows.items()
        }
        return make_batch(shapes)

    def batches(self, start_step: int) -> pipeline.Batches:
        """Shuffled windows from a step on."""
        settings = self._settings
        return pipeline.batches(
            self._rows,
            **self._reading(settings.train.batch_size, processes=True),
            seed=settings.seed,
            start_step=start_step,
        )

    def to_device(self, rows: Mapping[str, Any]) -> Batch:
        """This process's rows as arrays of the global batch."""
        return to_device(rows, self.mesh)

    def evaluate(self, params: Any, frozen: Mapping[str, Any]) -> Scalars:
        """Loss over the held-out windows, without dropout."""
        if self._held_out_rows is None:
            raise ValueError("evaluation without held-out windows")
        train = self._settings.train
        rows = pipeline.eval_batches(
            self._held_out_rows,
            **self._reading(train.batch_size // train.microbatches, processes=True),
            limit=self._settings.eval.windows,
        )
        zero = jnp.zeros(())
        total = Sums(zero, zero, zero)
        with partitioning.use(self.mesh):
            for batch in rows:
                total += self._evaluate(params, frozen, self.to_device(batch))
        loss = float(total.loss) / float(total.weight)
        return {"eval/loss": loss, "eval/perplexity": float(np.exp(loss))}

    def describe(self, batch: Batch) -> dict[str, Any]:
        """Tokenizer, data, tower, kernels and cost."""
        manifest, tower = self._windows.manifest, self._tower
        cost = flops.per_token(
            self._settings,
            vocab_size=manifest.tokenizer.vocab_size,
            tower=None if tower is None else tower.config,
            tower_length=0 if batch.tower is None else batch.tower.tokens_BS.shape[1],
            vectors=0 if self.images is None else self.images.compared,
        )
        grounding = None
        if tower is not None:
            projection = tower.config.projection
            grounding = {"source": tower.source, "sha256": tower.sha256, "projection": projection}
        return {
            "kernels": {"attention": self.model.decoder.kernel, "fusion": "xla", "tower": "xla"},
            "flops_per_token": {**dataclasses.asdict(cost), "total": cost.total},
            "tokenizer": dataclasses.asdict(manifest.tokenizer),
            "data": {
                "key": manifest.key,
                "directory": str(self._windows.directory.resolve()),
                "train_windows": len(self._windows),
            },
            "tower": grounding,
            "images": None if self.images is None else self.images.describe(),
        }

    def settle(self, settings: config.Config) -> None:
        """Takes over the remat and microbatches that were chosen."""
        self._settings = settings
        self.model = fitting.settled(self.model, settings.train)

    def resolved(self) -> config.Config:
        """The settings with vocabulary, mesh and layers filled in, and where the grounding lies."""
        resolved = config.resolve(
            self._settings, vocab_size=self._vocabulary.vocab_size, mesh=self.mesh.shape
        )
        return dataclasses.replace(resolved, grounding=_placed(resolved.grounding))

    def read_tokenizers(self) -> tuple[Tokenizer, Tokenizer | None]:
        """The tokenizers that cut the windows: the language model's, and the tower's own if any."""
        manifest, directory = self._windows.manifest, self._windows.directory
        own = directory / "tower_tokenizer"
        return (
            tokenizers.load(manifest.tokenizer.kind, str(directory / "tokenizer")),
            tokenizers.load("clip", str(own)) if manifest.aligned else None,
        )

    def _with_images(self, windows: Windows, split: str) -> pipeline.WindowSource:
        """The windows, with features found ahead of time; damaged ones replaced if wanted."""
        rows = windows if self.images is None else self.images.windows(windows, split)
        return Replacing(rows, self.damaged) if self._settings.data.on_corrupt == "skip" else rows

    def _reading(self, batch_size: int, *, processes: bool = False) -> dict[str, Any]:
        """What every reading of windows shares."""
        options: dict[str, Any] = {"batch_size": batch_size, "tower": self.model.tower is not None}
        if processes:
            options |= distributed.processes()
        return options


def abstract_tower(shape: TowerConfig, settings: config.Config, mesh: Mesh) -> Any:
    """Shapes and shardings of a text tower's parameters, matrices in the dtype they compute in."""
    tokens_BS = jnp.zeros((1, 1), jnp.int32)

    def init(key: jax.Array) -> Any:
        return TextTower(shape).init(key, tokens_BS, tokens_BS == 0, readout="token")["params"]

    def cast(path: Any, x: Any) -> Any:
        matrix = path[-1].key in ("kernel", "text_projection")
        dtype = jnp.dtype(settings.grounding.dtype) if matrix else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(cast, partitioning.abstract(init, mesh))


def place_tower(tower: system.Tower, like: Any) -> Any:
    """The tower's parameters on the devices, as `abstract_tower` describes them."""
    return jax.tree.map(
        lambda x, to: jax.device_put(np.asarray(x).astype(to.dtype), to.sharding),
        tower.params,
        like,
    )


def to_device(rows: Mapping[str, Any], mesh: Mesh) -> Batch:
    """A process's rows as arrays of the global batch."""
    return make_batch({name: partitioning.put_rows(x, mesh) for name, x in rows.items()})


def make_batch(arrays: Mapping[str, Any]) -> Batch:
    """A batch from the arrays that the pipeline names."""
    tower = None
    if "tower_tokens" in arrays:
        index = arrays.get("tower_index")
        tower = TowerInput(arrays["tower_tokens"], arrays["tower_starts"], index)
    return Batch(
        arrays["tokens"], arrays["targets"], arrays["weights"], tower, arrays.get("features")
    )


def _placed(grounding: config.GroundingConfig) -> config.GroundingConfig:
    """With absolute paths: a run may be read from elsewhere than it was started in."""

    def place(name: str) -> str:
        path = Path(name).expanduser()
        named = name in ("", "random") or not path.exists()  # a hub id, or gone
        return name if named else str(path.resolve())

    return dataclasses.replace(
        grounding,
        tower=place(grounding.tower),
        index=place(grounding.index),
        prepared=place(grounding.prepared),
    )


def _describe_grounding(settings: config.Config) -> str:
    """The grounding in a few words."""
    grounding = settings.grounding
    control = "" if grounding.control == "none" else f", control: {grounding.control}"
    return f"read out at {grounding.readout}, {grounding.segments} segments{control}"
