"""One update of any objective: gradients, clipping, AdamW, and what is worth knowing of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from blindvalm_jax import guard
from blindvalm_jax.layer_norms import layer_norms


@struct.dataclass
class TrainState:
    """What an update changes: the number of updates done, parameters, optimizer moments.

    guard: what the guard of the update remembers; None: nothing guards it.
    """

    step: Array
    params: Any
    opt_state: Any
    guard: guard.GuardState | None = None


class Model(Protocol):
    """What an update needs to know of a model."""

    def init(self, key: Array) -> Any:
        """Fresh parameters, boxed with the names of their axes."""

    def gradients(
        self, params: Any, frozen: Mapping[str, Any], batch: Any, key: Array
    ) -> tuple[Any, dict[str, Array]]:
        """Gradients over the whole batch, and metrics with "train/loss" among them."""


def train_step(
    state: TrainState,
    frozen: Mapping[str, Any],
    batch: Any,
    *,
    model: Model,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    seed: int,
    rules: guard.Guard | None = None,
    by_layer: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """One update and its metrics; what is random in it depends on (seed, step) alone.

    frozen: parameters that take part and do not learn, by the name of what they belong to. rules:
    those of the guard, for a state with the memory of one; the optimizer then takes `applied` (see
    `optim.scale_by_adam`). by_layer: norms of each layer too.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    grads, metrics = model.gradients(state.params, frozen, batch, key)
    done, norm = jnp.add(state.step, 1), optax.tree.norm(grads)
    verdict, applied = None, {}
    scaled = grads
    if rules is not None and state.guard is not None:
        verdict = rules.judge(state.guard, step=done, loss=metrics["train/loss"], norm=norm)
        applied = {"applied": verdict.applied}
        metrics |= guard.metrics(verdict.state)
        if rules.on_spike == "clip":
            scaled = optax.tree.scale(verdict.scale, grads)
    updates, opt_state = optimizer.update(scaled, state.opt_state, state.params, **applied)
    params = optax.apply_updates(state.params, updates)
    moved = {"train/update_norm": optax.tree.norm(updates)}
    if by_layer:
        moved |= layer_norms("update", updates)
    if verdict is not None:
        params = guard.kept_unless(verdict.applied, params, state.params)
        moved = {name: jnp.where(verdict.applied, x, 0.0) for name, x in moved.items()}
    metrics |= moved | {
        "train/grad_norm": norm,
        "train/param_norm": optax.tree.norm(params),
        "train/learning_rate": rate(state.step),
    }
    if by_layer:
        metrics |= layer_norms("grad", grads) | layer_norms("param", params)
    return TrainState(done, params, opt_state, verdict and verdict.state), metrics
