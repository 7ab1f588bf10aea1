"""A prompt read with and without its grounding vectors, and how much each head looks at them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from blindvalm_jax.errors import UserError
from blindvalm_jax.models import decoder
from blindvalm_jax.objectives.language_model import Batch, Model
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
    """Reads the prompt with each candidate behind it, and alone: attention and vectors are of that.

    Where features depend on later tokens (see `tower_text.whole_only`) a candidate changes them.

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
    grounded, shares, vectors = _run(model, front, behind, grounded=True)
    ungrounded, _, _ = _run(model, front, behind, grounded=False)
    offset = model.tokenizer.lm_offset
    return Reading(
        tokens=["(start)", *(model.tokenizer.decode([int(i) - offset]) for i in front[1:])],
        candidates=[candidate.strip() for candidate in candidates],
        grounded=grounded,
        ungrounded=ungrounded,
        attention=shares,
        layers=sorted(model.model.decoder.fusion_layers),
        vectors=unit(vectors),
    )


def _run(
    model: TrainedModel, front: np.ndarray, behind: Sequence[np.ndarray], *, grounded: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log probabilities [C], and of the prompt alone attention [L', T, N] and vectors [T, K, E].

    front: ids of the prompt; behind: of the candidates. grounded: with grounding vectors.
    """
    batch = model.batch_of_ids([*(np.concatenate([front, ids]) for ids in behind), front])
    behind_BT = np.zeros((len(batch.tokens_BT), max(map(len, behind))), np.int32)
    for row, ids in zip(behind_BT, behind, strict=False):
        row[: len(ids)] = ids
    with model.computing():
        log_p_BT, shares_LTN, z_TKE = _compiled(model.model, len(front))(
            model.params, model.frozen, batch, behind_BT, jnp.full(batch.tokens_BT.shape, grounded)
        )
    log_p = np.asarray(log_p_BT, np.float64)
    totals = [row[: len(ids)].sum() for row, ids in zip(log_p, behind, strict=False)]
    return np.array(totals), np.asarray(shares_LTN, np.float32), np.asarray(z_TKE, np.float32)


@functools.cache
def _compiled(model: Model, length: int) -> Callable[..., tuple[Array, Array, Array]]:
    """The forward pass of rows with a prompt of so many tokens, the last of them that alone."""

    @jax.jit
    def run(
        params: Any, frozen: Any, batch: Batch, behind_BT: Array, grounded_BT: Array
    ) -> tuple[Array, Array, Array]:
        z_BTKE: Any = model.features(frozen, batch)
        hidden: Any
        hidden, kept = model.decoder.apply(
            {"params": params},
            batch.tokens_BT,
            z_BTKE,
            grounded_BT=grounded_BT,
            method="hidden",
            mutable=["probes"],
        )
        before_BTD = hidden.hidden_BTD[:, length - 1 : length - 1 + behind_BT.shape[1]]
        logits_BTV: Any = model.decoder.apply({"params": params}, before_BTD, method="logits")
        log_p_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
        log_p_BT = jnp.take_along_axis(log_p_BTV, behind_BT[..., None], axis=2)[..., 0]
        shares_LBTN = decoder.memory_shares(kept["probes"])
        return log_p_BT, shares_LBTN[:, -1, :length], z_BTKE[-1, :length]

    return run


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
