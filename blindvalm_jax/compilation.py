"""What a run compiles: shapes and places of state, tower and batch, and the update over them.

Everything is compiled from shapes before any parameter exists, so a model that does not fit is
known by its memory plan, not by running out of memory.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blindvalm_jax import optim, partitioning, step
from blindvalm_jax.config import Config
from blindvalm_jax.data import pipeline
from blindvalm_jax.data.windows import Windows
from blindvalm_jax.grounding.text import TowerInput
from blindvalm_jax.models.clip import TextTower, TowerConfig
from blindvalm_jax.system import Tower


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


def abstract_tower(shape: TowerConfig, settings: Config, mesh: Mesh) -> Any:
    """Shapes and shardings of the tower; its matrices are kept in the dtype they compute in."""
    tokens_BS = jnp.zeros((1, 1), jnp.int32)

    def init(key: jax.Array) -> Any:
        return TextTower(shape).init(key, tokens_BS, tokens_BS == 0, readout="token")["params"]

    def cast(path: Any, x: Any) -> Any:
        matrix = path[-1].key in ("kernel", "text_projection")
        dtype = jnp.dtype(settings.grounding.dtype) if matrix else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(cast, partitioning.abstract(init, mesh))


def place_tower(tower: Tower, like: Any) -> Any:
    """The tower's parameters on the devices, as `abstract_tower` describes them."""
    return jax.tree.map(
        lambda x, to: jax.device_put(np.asarray(x).astype(to.dtype), to.sharding),
        tower.params,
        like,
    )


def abstract_batch(settings: Config, windows: Windows, mesh: Mesh, *, tower: bool) -> step.Batch:
    """Shapes of a batch."""
    rows = next(iter(pipeline.eval_batches(windows, batch_size=1, limit=1, tower=tower)))
    size, sharding = settings.train.batch_size, partitioning.batch_sharding(mesh)
    shapes = {
        name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=sharding)
        for name, x in rows.items()
    }
    return make_batch(shapes)


def to_device(batch: pipeline.Batch, mesh: Mesh) -> step.Batch:
    """This process's rows as arrays of the global batch."""
    return make_batch({name: partitioning.put_rows(x, mesh) for name, x in batch.items()})


def make_batch(arrays: Mapping[str, Any]) -> step.Batch:
    """A batch from the arrays that the pipeline names."""
    tower = None
    if "tower_tokens" in arrays:
        index = arrays.get("tower_index")
        tower = TowerInput(arrays["tower_tokens"], arrays["tower_starts"], index)
    return step.Batch(arrays["tokens"], arrays["targets"], arrays["weights"], tower)


def make_update(settings: Config, model: step.Model, optimizer: Any) -> Any:
    """The update (state, frozen, batch) -> (state, metrics) of a run."""
    return functools.partial(
        step.train_step,
        model=model,
        optimizer=optimizer,
        rate=optim.schedule(settings.optimizer, steps=settings.train.steps),
        seed=settings.seed,
        microbatches=settings.train.microbatches,
    )


def compile_step(
    update: Any, state: step.TrainState, frozen: Any, batch: step.Batch, mesh: Mesh
) -> Any:
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
