"""What the text tower reads of rows that come in pieces, and where its segments start in them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from blindvalm_jax.data import manifest
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import segments
from blindvalm_jax.trained import TrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TowerText:
    """How a tower reads a language model's tokens, in segments of the causal rule.

    separators: of these; ids: its id of each of the language model's, int32 [V].
    """

    separators: segments.Separators
    ids: np.ndarray


def of(trained: TrainedModel) -> TowerText | None:
    """That of a finished run; None: it has no tower.

    Raises:
      UserError: it reads whole rows only.
    """
    tower, why = trained.model.tower, whole_only(trained)
    if why:
        raise UserError(f"text cannot be read in pieces: {why}")
    if tower is None:
        return None
    return TowerText(
        separators=segments.separators_for(trained.tokenizer, tower.config.longest_segment),
        ids=manifest.tower_table(trained.tokenizer),
    )


def whole_only(trained: TrainedModel) -> str:
    """Why a model's rows cannot be read in pieces, "" if they can."""
    if not trained.model.decoder.fusion_layers:
        return ""
    if trained.settings.grounding.segments != "causal":
        return (
            f"under grounding.segments={trained.settings.grounding.segments} later tokens move "
            "segment borders, so the probabilities of earlier ones change as a text grows"
        )
    if trained.tower_tokenizer is not None:
        return "the tower has a tokenizer of its own and reads the text so far, not its tokens"
    return ""


def positions(
    ids_BT: Array, real_BT: Array, segment_B: Array, *, minimum: Any
) -> tuple[Array, Array]:
    """Place of each token in its segment [B, T], from 1, and the open segments' lengths after all.

    The causal rule (see `segments.step`) on tower ids; segment_B: lengths before them. Tokens that
    are not real, the last of a row, change no length.
    """
    minimum = jnp.asarray(minimum, jnp.int32)

    def read(length_B: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        ids_B, real_B = at
        after_B = segments.step(length_B, ids_B, minimum=minimum)
        return jnp.where(real_B, after_B, length_B), length_B + 1

    segment_B, position_TB = jax.lax.scan(read, segment_B, (ids_BT.T, real_BT.T))
    return position_TB.T, segment_B
