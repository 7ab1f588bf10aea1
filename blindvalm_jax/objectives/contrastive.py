"""The contrastive objective: images with captions, and CLIP's two towers that are trained on them.

What it leaves is a CLIP: `grounding.tower` and the image index take the run's directory.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from blindvalm_jax import config, distributed, partitioning
from blindvalm_jax.console import say
from blindvalm_jax.data import images, packing, pairs, pipeline, prepared
from blindvalm_jax.data.images import ImageSource
from blindvalm_jax.data.replacing import Replacing, Source
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError
from blindvalm_jax.models.contrastive import contrastive_loss
from blindvalm_jax.objectives.contrastive_model import Batch
from blindvalm_jax.objectives.contrastive_shapes import Towers
from blindvalm_jax.objectives.objective import Scalars

_RANKS = (1, 5)
_BLOCK = 256  # rows of cosines held at once: 100 MB of 50,000 pairs in float64


class Contrastive(Towers):
    """CLIP on images with captions (see `objective.Objective`)."""

    def __init__(
        self, settings: config.Config, workdir: Path, mesh: Mesh, *, resuming: bool
    ) -> None:
        """Opens images and tokenizer and checks them against the settings."""
        cache = Path(settings.data.cache or workdir / "data")
        self._source, self._held_out = images.open_sources(
            settings.data, digests=cache / "file_hashes.json"
        )
        if settings.eval.every_steps and self._held_out is None:
            raise UserError(
                "no images are held out: name some (data.eval_images, data.tfds_eval_split), set "
                "data.eval_fraction, or evaluate never (eval.every_steps=0)"
            )
        if settings.data.tfds:  # a folder's captions are checked when it is opened
            for source in filter(None, (self._source, self._held_out)):
                images.check_captions(source, known=cache / "read_captions.json")
        tokenizer = _tokenizer(settings.tokenizer, self._source, cache)
        super().__init__(settings, mesh, packing.record(tokenizer))
        context = settings.clip.text.context
        self._read = pairs.Reader(
            tokenizer, settings.clip.image.size, context, self._record.tower_end_id
        )
        key = packing.hash_of([images.fingerprint(self._source), self._record.fingerprint, context])
        self._rows = self._kept(self._source)
        self._held_out_rows = None if self._held_out is None else self._kept(self._held_out)
        self._directory = cache / f"pairs-{key[:16]}"
        self._key = key
        prepared.keep_tokenizer(tokenizer, self._directory / "tokenizer")
        # Whole on every process: each compares all pairs.
        self._encode = jax.jit(
            lambda params, batch: (self.model.encode(params, batch), batch.tokens_BS),
            out_shardings=partitioning.replicated(mesh),
        )
        say(
            f"images: {len(self._source):,} with captions, "
            f"{0 if self._held_out is None else len(self._held_out):,} held out"
        )
        if len(self._source) < settings.train.batch_size:
            rows = settings.train.batch_size
            say(f"note: so few images are repeated within a batch of {rows} pairs")

    def _kept(self, source: ImageSource) -> Source:
        """Images as they are read: decoded once if they fit, damaged ones replaced if wanted."""
        kept = pairs.keep(source, self._settings.clip.image.size)
        skips = self._settings.data.on_corrupt == "skip"
        return Replacing(kept, self.damaged) if skips else kept

    def place_frozen(self, like: Mapping[str, Any], *, resuming: bool) -> dict[str, Any]:
        """Nothing is frozen."""
        return {}

    def batches(self, start_step: int) -> pipeline.Batches:
        """Shuffled images from a step on, each with one of its captions."""
        return pairs.batches(
            self._rows,
            self._read,
            batch_size=self._settings.train.batch_size,
            seed=self._settings.seed,
            start_step=start_step,
            **distributed.processes(),
        )

    def to_device(self, rows: Mapping[str, Any]) -> Batch:
        """This process's rows as arrays of the global batch."""
        placed = {name: partitioning.put_rows(x, self._mesh) for name, x in rows.items()}
        return Batch(placed["images"], placed["tokens"], placed["length"])

    def evaluate(self, params: Any, frozen: Mapping[str, Any]) -> Scalars:
        """Loss in batches of the training size, and recall among all held-out pairs.

        The last batch holds what is left: fewer rivals make its loss smaller.
        """
        if self._held_out_rows is None:
            raise ValueError("evaluation without held-out images")
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        losses: list[tuple[float, int]] = []
        rows = pairs.eval_batches(
            self._held_out_rows,
            self._read,
            batch_size=self._settings.train.batch_size,
            limit=self._settings.eval.windows,
            **distributed.processes(),
        )
        with partitioning.use(self._mesh):
            for host, count in rows:
                encoded, tokens_BS = jax.device_get(self._encode(params, self.to_device(host)))
                image_BE, text_BE = encoded.image_BE[:count], encoded.text_BE[:count]
                nats = contrastive_loss(image_BE, text_BE, encoded.scale)
                losses.append((float(nats), count))
                parts.append((image_BE, text_BE, tokens_BS[:count]))
        image, text, tokens = (np.concatenate(column) for column in zip(*parts, strict=True))
        total = sum(count for _, count in losses)
        found = {"eval/loss": sum(loss * count for loss, count in losses) / total}
        for rank in _RANKS:
            shares = recall(image, text, tokens, rank=rank)
            found[f"eval/image_to_text_recall_at_{rank}"] = shares.image_to_text
            found[f"eval/text_to_image_recall_at_{rank}"] = shares.text_to_image
        return found

    def describe(self, batch: Batch) -> dict[str, Any]:
        """Tokenizer, data, towers and cost."""
        data = {
            "key": self._key,
            "directory": str(self._directory.resolve()),
            "train_images": len(self._source),
        }
        return {**super().describe(batch), "data": data}


class Recall(NamedTuple):
    """Share of queries whose partner is among the nearest, each way."""

    image_to_text: float
    text_to_image: float


def recall(
    image_NE: np.ndarray,
    text_NE: np.ndarray,
    tokens_NS: np.ndarray,
    *,
    rank: int,
    block: int = _BLOCK,
) -> Recall:
    """Recall at `rank` among N pairs, row i of one side belonging to row i of the other.

    Captions of equal tokens_NS are one text: it does not matter which image it came with. A rival
    that is exactly as near counts as nearer, so that equal features find nothing. block: queries
    that are compared with all N at a time.
    """
    _, label_N = np.unique(tokens_NS, axis=0, return_inverse=True)
    label_N = label_N.reshape(-1)
    image_NE, text_NE = np.asarray(image_NE, np.float64), np.asarray(text_NE, np.float64)
    found = []
    for query_NE, key_NE in ((image_NE, text_NE), (text_NE, image_NE)):
        rivals = [
            _rivals(query_NE[first : first + block], key_NE, label_N, first=first)
            for first in range(0, len(query_NE), block)
        ]
        found.append(float(np.mean(np.concatenate(rivals) < rank)))
    return Recall(*found)


def _rivals(
    query_QE: np.ndarray, key_NE: np.ndarray, label_N: np.ndarray, *, first: int
) -> np.ndarray:
    """For the queries from row `first` on: how many wrong keys are as near as the best right one.

    Keys of a query's own label_N are right.
    """
    scores_QN = query_QE @ key_NE.T
    right_QN = label_N[first : first + len(query_QE), None] == label_N[None, :]
    best_Q1 = np.max(scores_QN, axis=1, where=right_QN, initial=-np.inf, keepdims=True)
    return np.sum(~right_QN & ~(scores_QN < best_Q1), axis=1)  # NaN finds nothing either


def _tokenizer(named: config.TokenizerConfig, source: ImageSource, cache: Path) -> Tokenizer:
    return prepared.load_or_learn(
        named.kind,
        named.path,
        vocab_size=named.train_vocab_size,
        contents=source.describe(),
        texts=lambda: _captions(source),
        cache=cache,
    )


def _captions(source: ImageSource) -> Generator[str, None, None]:
    for index in range(len(source)):
        yield from source.captions(index)
