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
      UserError: the model has no grounding, or borrows it from other rows; or a candidate has no
        tokens or is there twice, or the model no room for one.
    """
    if not model.model.decoder.fusion_layers:
        raise UserError("a model without grounding has nothing to explain: name one with a tower")
    if model.model.shuffled:
        raise UserError("grounding.control=shuffled reads other rows: a prompt alone has none")
    check(candidates)
    encode = model.tokenizer.encode_lm
    front = np.append(model.tokenizer.eos_id, encode(prompt.rstrip())).astype(np.int32)
    behind = [encode(f" {candidate.strip()}") for candidate in candidates]
    for candidate, ids in zip(candidates, behind, strict=True):
        if not len(ids):
            raise UserError(f"the candidate {candidate!r} has no tokens")
    batch = model.batch_of_ids([np.concatenate([front, ids]) for ids in behind])
    size, length = batch.tokens_BT.shape
    behind_BT = np.zeros((size, max(map(len, behind))), np.int32)
    for row, ids in zip(behind_BT, behind, strict=True):
        row[: len(ids)] = ids

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
        # The candidates come last, so all rows agree on the prompt.
        before_BTD = hidden.hidden_BTD[:, len(front) - 1 : len(front) - 1 + behind_BT.shape[1]]
        logits_BTV: Any = of.decoder.apply({"params": params}, before_BTD, method="logits")
        log_p_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
        log_p_BT = jnp.take_along_axis(log_p_BTV, behind_BT[..., None], axis=2)[..., 0]
        shares_LBTN = decoder.memory_shares(kept["probes"])
        return log_p_BT, shares_LBTN[:, 0, : len(front)], z_BTKE[0, : len(front)]

    with partitioning.use(model.mesh):
        with_BT, shares, vectors = run(model.params, model.frozen, jnp.ones((size, length), bool))
        without_BT, _, _ = run(model.params, model.frozen, jnp.zeros((size, length), bool))

    def totals(log_p_BT: jax.Array) -> np.ndarray:
        values = np.asarray(log_p_BT, np.float64)
        return np.array([row[: len(ids)].sum() for row, ids in zip(values, behind, strict=True)])

    offset = model.tokenizer.lm_offset
    return Reading(
        tokens=["(start)", *(model.tokenizer.decode([int(i) - offset]) for i in front[1:])],
        candidates=[candidate.strip() for candidate in candidates],
        grounded=totals(with_BT),
        ungrounded=totals(without_BT),
        attention=np.asarray(shares, np.float32),
        layers=sorted(model.model.decoder.fusion_layers),
        vectors=unit(np.asarray(vectors, np.float32)),
    )


def check(candidates: Sequence[str]) -> None:
    """Refuses candidates that say nothing.

    Raises:
      UserError: one is empty, or there twice.
    """
    texts = [candidate.strip() for candidate in candidates]
    if "" in texts:
        raise UserError(f"the candidate {candidates[texts.index('')]!r} has no tokens")
    again = [text for place, text in enumerate(texts) if text in texts[:place]]
    if again:
        raise UserError(f"the candidate {again[0]!r} is there twice: name each once")


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., E] over their lengths."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
