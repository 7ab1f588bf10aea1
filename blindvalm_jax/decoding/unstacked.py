"""Parameters with every block by itself, as decoding reads them.

Training scans runs of blocks over stacked parameters. Where one token is read at a time the slices
of that scan would be copies, of all parameters for each token.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import jax

_RUN = re.compile(r"blocks_(\d+)_(\d+)")


def of(params: Any, frozen: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A decoder's parameters and what grounds it, for many calls of a `Reader` or a loop of steps.

    Blocks are copied, everything else is shared with the arguments.
    """
    towers = {name: params_of(frozen[name]) for name in frozen if name == "tower"}
    return params_of(params), {**frozen, **towers}


def params_of(params: Any) -> Any:
    """Parameters of a stack's owner (`Decoder`, `TextTower`) for its `stacked=False`.

    Parameters that are unstacked already are returned as they are.
    """
    blocks: dict[str, Any] = {}
    for name, value in params["h"].items():
        run = _RUN.fullmatch(name)
        if run is None:
            blocks[name] = value
            continue
        first, last = int(run[1]), int(run[2])
        for index in range(first, last + 1):
            blocks[f"block_{index}"] = jax.tree.map(operator.itemgetter(index - first), value)
    return {**params, "h": blocks}
