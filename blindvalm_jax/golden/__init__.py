"""Golden cases of the reference, recomputed by the code that trains (a .npz and its .json each).

The weights come in through `interop`, the numbers through the models, the segment rules and the
train step themselves, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax

from blindvalm_jax.errors import UserError, first_line
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
    """Recomputes a case and compares; a crash of our own code is a check that does not hold.

    Raises:
      UserError: the kind is unknown, the case lacks something its kind needs or does not fit
        together, or there is nothing in it to compare.
    """
    kind = case.meta["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{case.name}: kind {kind!r} is unknown; known: {', '.join(KINDS)}")
    checks: list[Check] = []
    try:
        with jax.default_matmul_precision("highest"):
            checks.extend(KINDS[kind](case))
    except UserError:
        raise
    except Exception as error:  # whatever it is, the case was read and our code did not answer
        crash = f"crashed: {type(error).__name__}: {first_line(error)}"
        checks.append(Check(case.name, crash, float("inf"), 0.0))
    if not checks:
        raise UserError(f"{case.name}: holds nothing to compare")
    return checks
