"""A prompt read with and without its grounding vectors, and how much each head looks at them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blindvalm_jax import partitioning
from blindvalm_jax.errors import UserError
from blindvalm_jax.models import decoder
from blindvalm_jax.trained import TrainedModel


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a model makes of a prompt and its candidates.

    tokens: of the prompt, the end-of-text token first, as "(start)". candidates: texts. grounded,
    ungrounded: float64 [C], log probability of each candidate behind the prompt, with the grounding
    vectors and without them. attention: float32 [layers, tokens, heads], the weight on the
    grounding vectors. layers: which blocks these are. vectors: float32 [tokens, K, E], unit length.
    """

    tokens: list[str]
    candidates: list[str]
    grounded: np.ndarray
    ungrounded: np.ndarray
    attention: np.ndarray
    layers: list[int]
    vectors: np.ndarray


def read(model: TrainedModel, prompt: str, candidates: Sequence[str]) -> Reading:
    """Reads the prompt with each candidate behind it.

    Raises:
      UserError: the model has no grounding, borrows it from other rows, or its tower has a
        tokenizer of its own; or a candidate has no tokens, or the model no room for one.
    """
    if not model.model.decoder.fusion_layers:
        raise UserError("a model without grounding has nothing to explain: name one with a tower")
    if model.model.shuffled:
        raise UserError("grounding.control=shuffled reads other rows: a prompt alone has none")
    encode = model.tokenizer.encode_lm
    front = np.append(model.tokenizer.eos_id, encode(prompt.rstrip())).astype(np.int32)
    behind = [encode(f" {candidate.strip()}") for candidate in candidates]
    for candidate, ids in zip(candidates, behind, strict=True):
        if not candidate.strip() or not len(ids):
            raise UserError(f"the candidate {candidate!r} has no tokens")
    batch = model.batch_of_ids([np.concatenate([front, ids]) for ids in behind])
    size, length = batch.tokens_BT.shape

    @jax.jit
    def run(params: Any, frozen: Any, grounded_BT: jax.Array) -> tuple[Any, Any, Any]:
        of = model.model
        z_BTKE: Any = of.features(frozen, batch)
        hidden: Any
        hidden, kept = of.decoder.apply(
            {"params": params},
            batch.tokens_BT,
            z_BTKE,
            grounded_BT=grounded_BT,
            method="hidden",
            mutable=["probes"],
        )
        logits_BTV: Any = of.decoder.apply({"params": params}, hidden.hidden_BTD, method="logits")
        log_p_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
        shares_LBTN = decoder.memory_shares(kept["probes"])
        # The candidates come last, so all rows agree on the prompt.
        return log_p_BTV, shares_LBTN[:, 0, : len(front)], z_BTKE[0, : len(front)]

    with partitioning.use(model.mesh):
        with_BTV, shares, vectors = run(model.params, model.frozen, jnp.ones((size, length), bool))
        without_BTV, _, _ = run(model.params, model.frozen, jnp.zeros((size, length), bool))
    at = np.arange(len(front) - 1, length - 1)

    def totals(log_p_BTV: jax.Array) -> np.ndarray:
        values = np.asarray(log_p_BTV)
        return np.array(
            [
                values[row, at[: len(ids)], ids].sum(dtype=np.float64)
                for row, ids in enumerate(behind)
            ]
        )

    offset = model.tokenizer.lm_offset
    return Reading(
        tokens=["(start)", *(model.tokenizer.decode([int(i) - offset]) for i in front[1:])],
        candidates=[candidate.strip() for candidate in candidates],
        grounded=totals(with_BTV),
        ungrounded=totals(without_BTV),
        attention=np.asarray(shares, np.float32),
        layers=sorted(model.model.decoder.fusion_layers),
        vectors=unit(np.asarray(vectors, np.float32)),
    )


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., E] over their lengths."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
