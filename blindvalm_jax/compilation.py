"""What a run compiles: shapes and places of the state, and the update over it and a batch.

Everything is compiled from shapes before any parameter exists, so a model that does not fit is
known by its memory plan, not by running out of memory.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from blindvalm_jax import guard, optim, partitioning, step
from blindvalm_jax.config import Config


def state_init(model: step.Model, optimizer: Any, *, guarded: bool = False) -> Any:
    """A function key -> fresh state, its parameters boxed with their axis names."""

    def init(key: jax.Array) -> step.TrainState:
        params = model.init(key)
        memory = guard.fresh() if guarded else None
        return step.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), memory)

    return init


def abstract_state(
    model: step.Model, optimizer: Any, mesh: Mesh, *, guarded: bool = False
) -> step.TrainState:
    """Shapes and shardings of the state; guarded: with the memory of a guard."""
    return partitioning.abstract(state_init(model, optimizer, guarded=guarded), mesh)


def init_state(
    model: step.Model, optimizer: Any, *, seed: int, mesh: Mesh, guarded: bool = False
) -> step.TrainState:
    """A fresh state, every array born on the devices that keep it.

    guarded: see `abstract_state`.
    """
    init = state_init(model, optimizer, guarded=guarded)
    return partitioning.init_sharded(init, jax.random.key(seed), mesh)


def with_guard(state: step.TrainState, mesh: Mesh) -> step.TrainState:
    """A restored state with the memory of a guard; fresh where it has none, as an older run.

    Of rows of skipped updates only one that has not ended counts on: the limit may be another now.
    """
    memory = state.guard
    if memory is None:
        memory = partitioning.init_sharded(lambda _: guard.fresh(), jax.random.key(0), mesh)
    else:
        memory = dataclasses.replace(memory, longest=jnp.copy(memory.row))
    return dataclasses.replace(state, guard=memory)


def make_update(settings: Config, model: step.Model, optimizer: Any) -> Any:
    """The update (state, frozen, batch) -> (state, metrics) of a run."""
    return functools.partial(
        step.train_step,
        model=model,
        optimizer=optimizer,
        rate=optim.schedule(settings.optimizer, steps=settings.train.steps),
        seed=settings.seed,
        rules=guard.make(settings.train),
        by_layer=settings.log.layer_norms,
    )


def compile_step(update: Any, state: step.TrainState, frozen: Any, batch: Any, mesh: Mesh) -> Any:
    """Compiles an update ahead of time; the state's memory is reused for the next state."""
    placed = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(
        update, donate_argnums=0, out_shardings=(placed, partitioning.replicated(mesh))
    )
    with partitioning.use(mesh):
        return jitted.lower(state, frozen, batch).compile()
