"""How Orbax writes checkpoints: all processes into one directory, or each its part into its own.

Into one: OCDBT, which the first process merges. Apart none may read what another has written, so
each array is a directory of zarr there, a file for each piece, and the parts of all together are
the array: each piece is written by one process, all else by every one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from blindvalm_jax import ownership
from blindvalm_jax.checkpoints import layout


class _Manager(ocp.CheckpointManager):
    """Orbax's, which leaves SIGTERM to the loop."""

    def reached_preemption(self, step: int) -> bool:
        """Asks JAX nothing: it would take a saved step for the one that training has come to.

        It is asked when a save ends, updates later. Processes would then stop at different steps.
        """
        del step
        return False


def manager(directory: Path, policy: Any, *, seconds: int) -> ocp.CheckpointManager:
    """What saves in `directory` in the background.

    Args:
      directory: of the checkpoints.
      policy: of what is kept.
      seconds: that a save may take.
    """
    limit = ocp.AsyncOptions(timeout_secs=seconds)
    if not ownership.apart():
        return _Manager(
            directory,
            item_names=layout.ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, enable_async_checkpointing=True, async_options=limit
            ),
        )
    each = ocp.options.MultiprocessingOptions(primary_host=None)
    pieces = type_handlers.create_type_handler_registry(
        (
            jax.Array,
            type_handlers.ArrayHandler(primary_host=None, replica_id=0, use_replica_parallel=False),
        )
    )
    handlers: dict[str, Any] = {
        name: ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, multiprocessing_options=each, type_handler_registry=pieces
        )
        if name in (layout.STATE, layout.GUARD)
        else ocp.JsonCheckpointHandler(multiprocessing_options=each)
        for name in layout.ITEMS
    }
    return _Manager(
        directory,
        item_handlers=handlers,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            enable_async_checkpointing=True,
            async_options=limit,
            multiprocessing_options=each,
            enable_per_process_directory_creation=True,
        ),
    )


def arrays(tree: Any) -> Any:
    """What `manager` is given to save of an item of arrays."""
    return ocp.args.PyTreeSave(tree) if ownership.apart() else ocp.args.StandardSave(tree)
