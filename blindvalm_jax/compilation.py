"""What a run compiles: shapes and places of the state, and the update over it and a batch.

Everything is compiled from shapes before any parameter exists, so a model that does not fit is
known by its memory plan, not by running out of memory.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from blindvalm_jax import optim, partitioning, step
from blindvalm_jax.config import Config


def state_init(model: step.Model, optimizer: Any) -> Any:
    """A function key -> fresh state, its parameters boxed with their axis names."""

    def init(key: jax.Array) -> step.TrainState:
        params = model.init(key)
        return step.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return init


def abstract_state(model: step.Model, optimizer: Any, mesh: Mesh) -> step.TrainState:
    """Shapes and shardings of the state."""
    return partitioning.abstract(state_init(model, optimizer), mesh)


def init_state(model: step.Model, optimizer: Any, *, seed: int, mesh: Mesh) -> step.TrainState:
    """A fresh state, every array born on the devices that keep it."""
    return partitioning.init_sharded(state_init(model, optimizer), jax.random.key(seed), mesh)


def make_update(settings: Config, model: step.Model, optimizer: Any) -> Any:
    """The update (state, frozen, batch) -> (state, metrics) of a run."""
    return functools.partial(
        step.train_step,
        model=model,
        optimizer=optimizer,
        rate=optim.schedule(settings.optimizer, steps=settings.train.steps),
        seed=settings.seed,
    )


def compile_step(update: Any, state: step.TrainState, frozen: Any, batch: Any, mesh: Mesh) -> Any:
    """Compiles an update ahead of time; the state's memory is reused for the next state."""
    placed = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(
        update, donate_argnums=0, out_shardings=(placed, partitioning.replicated(mesh))
    )
    with partitioning.use(mesh):
        return jitted.lower(state, frozen, batch).compile()


class MemoryPlan(NamedTuple):
    """Bytes on one device: arguments of the compiled step, and what it needs besides."""

    held: int
    temporary: int


def memory_plan(compiled: Any) -> MemoryPlan | None:
    """The plan of a compiled step, where the backend tells."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    return MemoryPlan(stats.argument_size_in_bytes, stats.temp_size_in_bytes)
