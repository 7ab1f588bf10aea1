"""A finished run as a model to ask: decoder, tower, index and tokenizer, as they were trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from blindvalm_jax import config, files, partitioning, runs, system
from blindvalm_jax.data import manifest, prepared, tokenizers
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import segments
from blindvalm_jax.grounding.images import Images
from blindvalm_jax.grounding.text import TowerInput
from blindvalm_jax.interop import run_directory, weights
from blindvalm_jax.objectives import language
from blindvalm_jax.objectives.language_model import Batch, Model


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A language model with its parameters on the devices of `mesh`.

    step: updates done; images: its index, for a VALM.
    """

    model: Model
    params: Any
    frozen: dict[str, Any]
    tokenizer: Tokenizer
    settings: config.Config
    step: int
    mesh: Mesh
    images: Images | None

    def batch(self, texts: Sequence[str], *, length: int = 0) -> Batch:
        """Rows of texts, each as the beginning of a document, padded behind to a common length.

        Targets are the next tokens, weights 1 where there is one. length: of a row, 0: the
        longest's.

        Raises:
          UserError: a text does not fit, or the tower has a tokenizer of its own.
        """
        vocabulary = self.tokenizer
        ids = [np.append(vocabulary.eos_id, vocabulary.encode_lm(text)) for text in texts]
        return self.batch_of_ids(ids, length=length)

    def batch_of_ids(self, ids: Sequence[np.ndarray], *, length: int = 0) -> Batch:
        """The same of rows of ids, which are taken as they are."""
        vocabulary = self.tokenizer
        counts = np.array([len(row) for row in ids])
        length = length or int(counts.max())
        if counts.max() > length:
            raise UserError(f"a text of {counts.max()} tokens does not fit in rows of {length}")
        tokens = np.full((len(ids), length + 1), vocabulary.pad_id, np.int32)
        for row, values in zip(tokens, ids, strict=True):
            row[: len(values)] = values
        weights_ = (np.arange(1, length + 1) < counts[:, None]).astype(np.float32)
        rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights_}
        placed = {name: jax.numpy.asarray(value) for name, value in rows.items()}
        tower = None if self.model.tower is None else self._tower_input(rows["tokens"], counts)
        return Batch(placed["tokens"], placed["targets"], placed["weights"], tower)

    def _tower_input(self, tokens: np.ndarray, counts: np.ndarray) -> TowerInput:
        """What the tower reads: the language model's own tokens, cut by the rule of the run."""
        ids = manifest.tower_table(self.tokenizer)[tokens]
        tower = self.model.tower
        if tower is None:
            raise ValueError("a model without a tower reads no segments")
        starts = segments.starts(
            ids,
            rule=prepared.segment_rule(self.settings.grounding.segments),
            separators=segments.separators_for(self.tokenizer, tower.config.longest_segment),
            counts=counts,
        )
        return TowerInput(jax.numpy.asarray(ids), jax.numpy.asarray(starts))


def load(workdir: str | Path, *, mesh: Mesh | None = None) -> TrainedModel:
    """The newest checkpoint of a language model's run.

    Raises:
      UserError: it is no such run, lacks something, or its tower reads tokens of its own; its image
        index, or FAISS's of it, is another than it was trained on.
    """
    workdir = Path(workdir).expanduser()
    run = run_directory.load(workdir)
    if not isinstance(run.config, weights.DecoderSpec):
        raise UserError(f"{workdir} is a run of a {weights.kind_of(run.config)}, not of a decoder")
    settings = config.from_dict(files.read_object(workdir / "config.json"))
    mesh = mesh or partitioning.make_mesh(config.MeshConfig(), jax.devices()[:1])
    if run.tokenizer_directory is None:
        raise UserError(f"the tokenizer of {workdir} is gone: its windows are where it was kept")
    if (run.tokenizer_directory.parent / "tower_tokenizer").exists():
        raise UserError(f"{workdir}: towers with a tokenizer of their own cannot be asked yet")
    tower = system.read_tower(settings, workdir)
    images = None
    if settings.grounding.source == "images" and tower is not None:
        grounding = settings.grounding
        if grounding.search == "prepared":  # there are no neighbours of new texts
            grounding = dataclasses.replace(grounding, search="exact", prepared="")
            settings = dataclasses.replace(settings, grounding=grounding)
        images = Images(grounding, mesh, text_sha256=tower.sha256)
        runs.check_images(workdir, images.describe())
    model = system.build(
        settings,
        vocab_size=run.config.vocab_size,
        tower=tower,
        platform=jax.devices()[0].platform,
        search=None if images is None else images.search,
    )
    frozen: dict[str, Any] = {} if images is None else images.place_keys()
    if tower is not None:
        like = language.abstract_tower(tower.config, settings, mesh)
        frozen["tower"] = language.place_tower(tower, like)
    return TrainedModel(
        model=model,
        params=jax.device_put(run.params, partitioning.replicated(mesh)),
        frozen=frozen,
        tokenizer=tokenizers.load(run.tokenizer["kind"], str(run.tokenizer_directory)),
        settings=settings,
        step=run.step,
        mesh=mesh,
        images=images,
    )
