"""Guards the parameters: an update that would break them is left out, or made smaller.

What becomes of an update is decided from its loss and gradient norm, before the optimizer sees it;
both are of the whole batch, so that all devices decide alike. A loss or norm that is not finite:
the update is left out. A norm far above the usual, a *spike*: it is left out or scaled down.

Usual is the running geometric mean of the norms: their logarithm's exponential moving average,
corrected for its start at 0 as Adam's moments are (Kingma and Ba, arXiv 1412.6980). That clipping
should follow such an average, with the 0.97 used here, is ZClip's idea (Kumar et al. 2025, arXiv
2504.02507), which measures the distance in standard deviations; here it is a factor, so that a calm
stretch does not make small deviations into spikes. The norm alone decides: it grows as the loss
does when a batch is to blame, and parameters that have gone astray are not mended by leaving
updates out.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from blindvalm_jax.config import TrainConfig

_DECAY = 0.97


@struct.dataclass
class Mark:
    """Updates that the guard changed: how many; step, loss and gradient norm of the latest."""

    count: Array
    step: Array
    loss: Array
    norm: Array

    def made(self, happened: Array, *, step: Array, loss: Array, norm: Array) -> Mark:
        """With one more, if it happened."""
        latest = Mark(self.count + 1, step, loss, norm)
        return jax.tree.map(lambda new, old: jnp.where(happened, new, old), latest, self)


@struct.dataclass
class GuardState:
    """What the guard remembers from update to update.

    row: updates left out one after the other as not finite, up to now; longest: most of these so
    far; seen: finite norms so far; log_norm: moving average of their logarithms, uncorrected.
    """

    skipped: Mark
    clipped: Mark
    row: Array
    longest: Array
    seen: Array
    log_norm: Array


class Verdict(NamedTuple):
    """What becomes of an update: whether it is applied, the factor on its gradients, new memory."""

    applied: Array
    scale: Array
    state: GuardState


def fresh() -> GuardState:
    """The memory of a guard that has seen nothing."""
    whole, zero = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    mark = Mark(whole, whole, zero, zero)
    return GuardState(mark, mark, whole, whole, whole, zero)


@dataclasses.dataclass(frozen=True)
class Guard:
    """The rules, as settings give them; see `config.TrainConfig`."""

    on_nonfinite: str = "skip"
    on_spike: str = "none"
    factor: float = 4.0
    warmup: int = 100

    def judge(self, state: GuardState, *, step: Array, loss: Array, norm: Array) -> Verdict:
        """What becomes of an update with this loss and gradient norm; step: updates done with it.

        A norm enters the mean at most `factor` away from it, so that one spike moves it little, and
        a lasting change of level is followed after some tens of updates.
        """
        loss, norm = loss.astype(jnp.float32), norm.astype(jnp.float32)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        settled = state.seen >= self.warmup
        seen = state.seen.astype(jnp.float32)
        mean = state.log_norm / jnp.maximum(1 - _DECAY**seen, 1 - _DECAY)
        limit = self.factor * jnp.exp(mean)
        spike = finite & settled & (norm > limit)
        skipped = jnp.zeros((), bool)
        if self.on_nonfinite == "skip":
            skipped |= ~finite
        if self.on_spike == "skip":
            skipped |= spike
        clipped = spike if self.on_spike == "clip" else jnp.zeros((), bool)

        row = jnp.where(finite, 0, state.row + 1)
        span = jnp.where(settled, jnp.log(self.factor), jnp.inf)
        usable = finite & (norm > 0)
        entering = jnp.clip(jnp.log(jnp.where(usable, norm, 1.0)), mean - span, mean + span)
        average = _DECAY * state.log_norm + (1 - _DECAY) * entering
        about = {"step": step, "loss": loss, "norm": norm}
        return Verdict(
            applied=~skipped,
            scale=jnp.where(clipped, limit / norm, 1.0),
            state=GuardState(
                skipped=state.skipped.made(skipped, **about),
                clipped=state.clipped.made(clipped, **about),
                row=row,
                longest=jnp.maximum(state.longest, row),
                seen=state.seen + usable,
                log_norm=jnp.where(usable, average, state.log_norm),
            ),
        )


def make(settings: TrainConfig) -> Guard | None:
    """The guard that settings ask for, or None."""
    if settings.on_nonfinite == "stop" and settings.on_spike == "none":
        return None
    return Guard(
        settings.on_nonfinite, settings.on_spike, settings.spike_factor, settings.spike_warmup
    )


def kept_unless(applied: Array, new: Any, old: Any) -> Any:
    """The new tree if the update is applied, else the old one, to the last bit."""
    return jax.tree.map(lambda new, old: jnp.where(applied, new, old), new, old)


def metrics(state: GuardState) -> dict[str, Array]:
    """Counts for the file of metrics; and, as `guard/...`, what the loop alone reads."""
    found = {
        "train/skipped_updates": state.skipped.count,
        "train/clipped_updates": state.clipped.count,
        "guard/longest": state.longest,
    }
    for name, mark in (("skipped", state.skipped), ("clipped", state.clipped)):
        found |= {
            f"guard/{name}_step": mark.step,
            f"guard/{name}_loss": mark.loss,
            f"guard/{name}_norm": mark.norm,
        }
    return found
