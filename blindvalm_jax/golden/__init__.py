"""Golden cases of the reference, recomputed by the code that trains (a .npz and its .json each).

The weights come in through `interop`, the numbers through the models, the segment rules and the
train step themselves, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
from flax.errors import FlaxError

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
      UserError: the kind is unknown, the case lacks something its kind needs or does not fit
        together, or there is nothing in it to compare.
    """
    kind = case.meta["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{case.name}: kind {kind!r} is unknown; known: {', '.join(KINDS)}")
    try:
        with jax.default_matmul_precision("highest"):
            checks = list(KINDS[kind](case))
    except UserError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, FlaxError) as error:
        raise UserError(f"{case.name}: incomplete or wrong for its kind: {error!r}") from error
    if not checks:
        raise UserError(f"{case.name}: holds nothing to compare")
    return checks
