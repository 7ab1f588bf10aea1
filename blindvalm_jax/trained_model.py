"""The model that is asked: its parts together, and the batches that it reads."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blindvalm_jax import config, partitioning, trained_rows
from blindvalm_jax.data import prepared
from blindvalm_jax.data.clip_bpe import ClipTokenizer
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.grounding import segments
from blindvalm_jax.grounding.images import Images
from blindvalm_jax.objectives import language
from blindvalm_jax.objectives.language_model import Batch, Model


@contextlib.contextmanager
def computing(model: Model, mesh: Mesh) -> Iterator[None]:
    """Makes a mesh visible while a trained model is asked, with products as exact as its dtype.

    Left to themselves, GPUs round the operands of products in float32 to TF32, and TPUs to
    bfloat16. A model of bfloat16 throughout is left to itself. To be entered around every call:
    what is compiled inside is not what is compiled outside.
    """
    dtypes = [model.decoder.dtype] + ([] if model.tower is None else [model.tower.dtype])
    in_float32 = any(jnp.dtype(dtype) == jnp.float32 for dtype in dtypes)
    exact = jax.default_matmul_precision("highest") if in_float32 else contextlib.nullcontext()
    with partitioning.use(mesh), exact:
        yield


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

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """See the function of this name."""
        return computing(self.model, self.mesh)

    def batch(self, texts: Sequence[str], *, length: int = 0, start: bool = True) -> Batch:
        """Rows of texts, each as the beginning of a document, padded behind to a common length.

        Targets are the next tokens, weights 1 where there is one. length: of a row, 0: the
        longest's. start: with the end-of-text token in front, as in training.

        Raises:
          UserError: a text does not fit, or has no token.
        """
        front = np.full(int(start), self.tokenizer.eos_id, np.int32)
        encoded = self.tokenizer.encode_lm_batch(texts)
        return self.batch_of_ids([np.append(front, ids) for ids in encoded], length=length)

    def batch_of_ids(self, rows: Sequence[np.ndarray], *, length: int = 0) -> Batch:
        """Rows of language-model ids as they are, padded behind to a common length; see `batch`.

        A tower with a tokenizer of its own reads the text that the ids of its row spell.

        Raises:
          UserError: a row does not fit or is empty.
        """
        found = self._language_rows(rows, length)
        if self.model.tower is None:
            return self._placed(found)
        if self.tower_tokenizer is None:
            return self._placed(found | self._shared(found["tokens"], rows))
        return self._placed(found | self._aligned(rows, length=found["tokens"].shape[1]))

    def _shared(self, tokens_BT: np.ndarray, rows: Sequence[np.ndarray]) -> trained_rows.Rows:
        return trained_rows.shared_tower(
            tokens_BT,
            np.array([len(row) for row in rows]),
            tokenizer=self.tokenizer,
            rule=self._rule,
            separators=self._separators,
        )

    def _aligned(self, rows: Sequence[np.ndarray], *, length: int) -> trained_rows.Rows:
        if self.tower_tokenizer is None:
            raise ValueError("the tower reads the language model's tokens")
        readings = [
            trained_rows.reading(
                row,
                tokenizer=self.tokenizer,
                tower_tokenizer=self.tower_tokenizer,
                rule=self._rule,
            )
            for row in rows
        ]
        return trained_rows.aligned_tower(
            readings, length=length, rule=self._rule, separators=self._separators
        )

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
