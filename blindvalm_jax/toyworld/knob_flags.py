"""The knobs of a world as flags of a command."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from absl import flags

from blindvalm_jax.toyworld.world import WorldConfig

_DEFINE: dict[type, Any] = {int: flags.DEFINE_integer, float: flags.DEFINE_float}


def define(*, leave_out: Collection[str] = ()) -> Callable[[], dict[str, Any]]:
    """Defines a flag for each knob but some; gives a function that reads them."""
    holders = {
        knob.name: _DEFINE[type(knob.default)](knob.name, knob.default, knob.metadata["meaning"])
        for knob in dataclasses.fields(WorldConfig)
        if knob.name not in leave_out
    }
    return lambda: {name: holder.value for name, holder in holders.items()}
