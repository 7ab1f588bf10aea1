"""The arrays of a checkpoint on the host, whatever devices they were on, by name.

Names are those of the digests: "step", "params/...", "opt_state/0/mu/...", "guard/...".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from blindvalm_jax.checkpoints import layout
from blindvalm_jax.checkpoints.orbax_log import quiet
from blindvalm_jax.errors import UserError, first_line

_AT_ONCE = 1 << 28  # bytes held at once


def shapes(checkpoint: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of a checkpoint.

    Raises:
      UserError: the index of the arrays is damaged.
    """
    return {name: x for item in _items(checkpoint) for name, x in _shapes(checkpoint, item).items()}


def read(checkpoint: Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """The named arrays (None: all) one after the other, few in memory at once.

    Raises:
      UserError: one cannot be read; a name is not there.
    """
    wanted = None if names is None else set(names)
    for item in _items(checkpoint):
        there = _shapes(checkpoint, item)
        part: list[str] = []
        for name in sorted(there):
            if wanted is not None and name not in wanted:
                continue
            if part and sum(_bytes(there[x]) for x in (*part, name)) > _AT_ONCE:
                yield from _read(checkpoint, item, part)
                part = []
            part.append(name)
        yield from _read(checkpoint, item, part)
        wanted = wanted and wanted - there.keys()
    if wanted:
        raise UserError(f"{checkpoint} has no {', '.join(sorted(wanted))}")


def _items(checkpoint: Path) -> list[str]:
    return [x for x in (layout.STATE, layout.GUARD) if layout.has(checkpoint, x)]


def _bytes(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def _name(item: str, path: Any) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name if item == layout.STATE else f"{item}/{name}"


def _tree(checkpoint: Path, item: str) -> Any:
    """The tree that was saved, as Orbax describes it."""
    try:
        found = ocp.PyTreeCheckpointHandler().metadata((checkpoint / item).absolute())
    except Exception as error:  # the storage below Orbax raises nothing more special
        raise _unreadable(checkpoint, error) from error
    return found.tree


def _shapes(checkpoint: Path, item: str) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        _name(item, path): jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)
        for path, x in jax.tree_util.tree_leaves_with_path(_tree(checkpoint, item))
    }


def _read(checkpoint: Path, item: str, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    if not names:
        return

    def chosen(path: Any, x: Any) -> Any:
        there = _name(item, path) in names
        return jax.ShapeDtypeStruct(tuple(x.shape), x.dtype) if there else ocp.PLACEHOLDER

    quiet()
    tree = jax.tree_util.tree_map_with_path(chosen, _tree(checkpoint, item))
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                (checkpoint / item).absolute(),
                args=ocp.args.PyTreeRestore(tree, restore_args=arguments),
            )
    except Exception as error:  # the storage below Orbax raises nothing more special
        raise _unreadable(checkpoint, error) from error
    for path, value in jax.tree_util.tree_leaves_with_path(restored):
        if value is not ocp.PLACEHOLDER:
            yield _name(item, path), value


def _unreadable(checkpoint: Path, error: Exception) -> UserError:
    return UserError(f"{checkpoint} cannot be read: {first_line(error)}")
