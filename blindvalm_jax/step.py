"""One update of any objective: gradients, clipping, AdamW, and what is worth knowing of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array


@struct.dataclass
class TrainState:
    """What an update changes: the number of updates done, parameters, optimizer moments."""

    step: Array
    params: Any
    opt_state: Any


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
) -> tuple[TrainState, dict[str, Array]]:
    """One update and its metrics; what is random in it depends on (seed, step) alone.

    frozen: parameters that take part and do not learn, by the name of what they belong to.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    grads, metrics = model.gradients(state.params, frozen, batch, key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norms = {
        "train/grad_norm": optax.tree.norm(grads),
        "train/update_norm": optax.tree.norm(updates),
        "train/param_norm": optax.tree.norm(params),
        "train/learning_rate": rate(state.step),
    }
    return TrainState(jnp.add(state.step, 1), params, opt_state), metrics | norms
