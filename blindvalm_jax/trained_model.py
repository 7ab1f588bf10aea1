"""The model that is asked: its parts together, and the batches that it reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from blindvalm_jax import config, partitioning, trained_rows
from blindvalm_jax.data import prepared
from blindvalm_jax.data.clip_bpe import ClipTokenizer
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import segments
from blindvalm_jax.grounding.images import Images
from blindvalm_jax.objectives import language
from blindvalm_jax.objectives.language_model import Batch, Model


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A language model with its parameters on the devices of `mesh`.

    tower_tokenizer: of a tower that does not read the language model's tokens; step: updates done,
    0 of weights without a run; images: its index, for a VALM.
    """

    model: Model
    params: Any
    frozen: Mapping[str, Any]
    tokenizer: Tokenizer
    tower_tokenizer: ClipTokenizer | None
    settings: config.Config
    step: int
    mesh: Mesh
    images: Images | None

    def batch(self, texts: Sequence[str], *, length: int = 0, start: bool = True) -> Batch:
        """Rows of texts, each as the beginning of a document, padded behind to a common length.

        Targets are the next tokens, weights 1 where there is one. length: of a row, 0: the
        longest's. start: with the end-of-text token in front, as in training.

        Raises:
          UserError: a text does not fit, or has no token.
        """
        if self.model.tower is None or self.tower_tokenizer is None:
            front = np.full(int(start), self.tokenizer.eos_id, np.int32)
            encoded = self.tokenizer.encode_lm_batch(texts)
            return self.batch_of_ids([np.append(front, ids) for ids in encoded], length=length)
        return self._aligned([self._document(text, start=start) for text in texts], length)

    def batch_of_ids(
        self, rows: Sequence[np.ndarray], *, length: int = 0, texts: Sequence[str] | None = None
    ) -> Batch:
        """Rows of language-model ids as they are, padded behind to a common length; see `batch`.

        texts: needed where the tower has a tokenizer of its own: of each row, a text that it is the
        beginning of, behind an end-of-text token if the row starts with that.

        Raises:
          UserError: a row does not fit or is empty, or there are no texts where they are needed, or
            a text does not begin with its row's tokens.
        """
        if self.model.tower is not None and self.tower_tokenizer is not None:
            if texts is None:
                raise UserError(
                    "the tower has a tokenizer of its own, which needs the text and not the "
                    "language model's ids: make the batch from texts"
                )
            documents = []
            for row, text in zip(rows, texts, strict=True):
                whole = self._document(text, start=bool(row[:1] == self.tokenizer.eos_id))
                documents.append(trained_rows.beginning(whole, row, text=text))
            return self._aligned(documents, length)
        found = self._language_rows(rows, length)
        if self.model.tower is not None:
            found |= trained_rows.shared_tower(
                found["tokens"],
                np.array([len(row) for row in rows]),
                tokenizer=self.tokenizer,
                rule=self._rule,
                separators=self._separators,
            )
        return self._placed(found)

    def _document(self, text: str, *, start: bool) -> trained_rows.Document:
        if self.tower_tokenizer is None:
            raise ValueError("a tower that reads the language model's tokens reads no documents")
        return trained_rows.document(
            text,
            tokenizer=self.tokenizer,
            tower_tokenizer=self.tower_tokenizer,
            rule=self._rule,
            start=start,
        )

    def _aligned(self, documents: Sequence[trained_rows.Document], length: int) -> Batch:
        rows = self._language_rows([document.tokens for document in documents], length)
        tower = trained_rows.aligned_tower(
            documents,
            length=rows["tokens"].shape[1],
            rule=self._rule,
            separators=self._separators,
        )
        return self._placed(rows | tower)

    def _language_rows(self, ids: Sequence[np.ndarray], length: int) -> trained_rows.Rows:
        decoder = self.model.decoder
        learned = decoder.config.positions == "learned"
        return trained_rows.language_rows(
            ids,
            vocab_size=decoder.vocab_size,
            pad_id=self.tokenizer.pad_id,
            length=length,
            longest=decoder.config.max_positions if learned else None,
        )

    def _placed(self, rows: trained_rows.Rows) -> Batch:
        """On the mesh: split where it divides the number of rows, else whole on every device."""
        split = partitioning.row_shards(self.mesh)
        whole = len(rows["tokens"]) % split
        where = (
            partitioning.replicated(self.mesh) if whole else partitioning.batch_sharding(self.mesh)
        )
        return language.make_batch({name: jax.device_put(x, where) for name, x in rows.items()})

    @property
    def _rule(self) -> segments.Rule:
        return prepared.segment_rule(self.settings.grounding.segments)

    @functools.cached_property
    def _separators(self) -> segments.Separators:
        tower = self.model.tower
        if tower is None:
            raise ValueError("a model without a tower reads no segments")
        read = self.tower_tokenizer or self.tokenizer
        return segments.separators_for(read, tower.config.longest_segment)
