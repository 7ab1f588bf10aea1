"""Golden cases of the reference, recomputed by the code that trains (a .npz and its .json each).

The weights come in through `interop`, the numbers through the models, the segment rules and the
train step themselves, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax

from blindvalm_jax.errors import UserError
from blindvalm_jax.golden import parts
from blindvalm_jax.golden.case import Case, Check
from blindvalm_jax.golden.end_to_end import end_to_end

KINDS: dict[str, Callable[[Case], Iterator[Check]]] = {
    "fusion_layer": parts.fusion_layer,
    "decoder": parts.decoder,
    "clip_text": parts.clip_text,
    "end_to_end": end_to_end,
    "segmentation": parts.segmentation,
}


def run(case: Case) -> list[Check]:
    """Recomputes a case and compares.

    Raises:
      UserError: the kind is unknown, or the case lacks something its kind needs.
    """
    kind = case.meta["kind"]
    if kind not in KINDS:
        raise UserError(f"{case.name}: kind {kind!r} is unknown; known: {', '.join(KINDS)}")
    try:
        with jax.default_matmul_precision("highest"):
            return list(KINDS[kind](case))
    except (KeyError, TypeError) as error:
        raise UserError(f"{case.name}: incomplete for its kind: {error!r}") from error
