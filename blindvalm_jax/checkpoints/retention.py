"""Which checkpoints of a run are kept, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blindvalm_jax.checkpoints import layout
from blindvalm_jax.config import CheckpointConfig
from blindvalm_jax.errors import UserError


def reasons(
    steps: Sequence[int], losses: Mapping[int, float], config: CheckpointConfig
) -> dict[int, list[str]]:
    """Why each checkpoint is kept; no reason: it is deleted. losses: on held-out data, by step."""
    newest = sorted(steps)[-config.keep :]
    known = sorted((losses[x], x) for x in steps if math.isfinite(losses.get(x, math.nan)))
    best = [step for _, step in known[: config.keep_best]]
    found: dict[int, list[str]] = {}
    for step in steps:
        found[step] = ["newest"] if step in newest else []
        if config.keep_every and step % config.keep_every == 0:
            found[step].append(f"every {config.keep_every}")
        if step in config.keep_steps:
            found[step].append("keep_steps")
        if step in best:
            found[step].append("best")
    return found


def loss(checkpoint: Path) -> float | None:
    """The held-out loss saved with a checkpoint, where there is one that can be read."""
    try:
        value = layout.read_json(checkpoint, layout.DATA).get("eval_loss")
    except UserError:  # a damaged checkpoint is found out where it is read
        return None
    return value if isinstance(value, float) else None


class Retention:
    """`reasons` as a policy of Orbax; `losses` grows with what is saved."""

    def __init__(self, run: Path, config: CheckpointConfig) -> None:
        """Reads the losses of the checkpoints that are there."""
        self._config = config
        self.losses = {}
        for step in layout.steps(run):
            found = loss(layout.directory(run) / str(step))
            if found is not None:
                self.losses[step] = found

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """What Orbax asks before it deletes."""
        steps = [info.step for info in checkpoints]
        why = reasons(steps, self.losses, self._config)
        return [bool(why[step]) for step in steps]
