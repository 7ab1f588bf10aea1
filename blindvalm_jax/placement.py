"""Where every tensor of a run lies: name, shape, dtype, split, bytes in all and on a device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview
from jax.sharding import Mesh, NamedSharding

from blindvalm_jax import files, markdown, step

LARGE = 4 * 2**20  # bytes; what is larger and whole on every device is worth a warning


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor and its place; group: what it belongs to; spec: mesh axes of its dimensions."""

    group: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes: int
    bytes_per_device: int

    @property
    def whole(self) -> bool:
        """Whether every device holds all of it."""
        return self.bytes_per_device == self.bytes


@dataclasses.dataclass(frozen=True)
class Sum:
    """What a group of tensors takes."""

    group: str
    tensors: int
    bytes: int
    bytes_per_device: int


def tensors(
    state: step.TrainState, frozen: Mapping[str, Any], batch: Any, *, trained: str
) -> list[Tensor]:
    """Every tensor that a step takes, from shapes or arrays; trained: what is trained, in a word.

    The moments of the optimizer stand behind the parameters, then what else an update changes, then
    what is frozen, then the batch.
    """
    groups = {
        trained: state.params,
        "optimizer": state.opt_state,
        "progress": {"step": state.step, "guard": state.guard},
        **frozen,
        "batch": batch,
    }
    return [_tensor(group, path, x) for group, tree in groups.items() for path, x in _leaves(tree)]


def _leaves(tree: Any) -> Iterable[tuple[str, Any]]:
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/") or "all", x


def _tensor(group: str, name: str, x: Any) -> Tensor:
    size = x.dtype.itemsize
    placed = x.sharding
    spec = str(placed.spec) if isinstance(placed, NamedSharding) else str(placed)
    return Tensor(
        group,
        name,
        tuple(x.shape),
        str(x.dtype),
        spec.removeprefix("PartitionSpec").replace("P(", "(") if "(" in spec else spec,
        math.prod(x.shape) * size,
        math.prod(placed.shard_shape(x.shape)) * size,
    )


def sums(found: Sequence[Tensor]) -> list[Sum]:
    """Bytes of each group, in the order of the tensors."""
    names = list(dict.fromkeys(one.group for one in found))
    return [
        Sum(
            name,
            len(group),
            sum(one.bytes for one in group),
            sum(one.bytes_per_device for one in group),
        )
        for name in names
        for group in [[one for one in found if one.group == name]]
    ]


def replicated(found: Sequence[Tensor], mesh: Mesh, *, larger_than: int = LARGE) -> list[Tensor]:
    """Large tensors that are whole on every device of a mesh that should split them."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return []
    return [one for one in found if one.whole and one.bytes > larger_than]


def table(found: Sequence[Tensor]) -> list[str]:
    """Markdown lines: every tensor, then the sums of the groups."""
    head = ("of", "tensor", "shape", "dtype", "split", "bytes", "a device")
    rows = [
        (
            one.group,
            f"`{one.name}`",
            " x ".join(map(str, one.shape)) or "scalar",
            one.dtype,
            f"`{one.spec}`" if not one.whole else "whole",
            f"{one.bytes:,}",
            f"{one.bytes_per_device:,}",
        )
        for one in found
    ]
    return [*markdown.aligned(head, rows, numbers=2), *sums_table(found)]


def sums_table(found: Sequence[Tensor]) -> list[str]:
    """Markdown lines: the sums of the groups, and of all."""
    groups = sums(found)
    everything = Sum(
        "all", len(found), sum(x.bytes for x in groups), sum(x.bytes_per_device for x in groups)
    )
    return markdown.aligned(
        ("of", "tensors", "MiB", "MiB a device"),
        [
            (one.group, str(one.tensors), mib(one.bytes), mib(one.bytes_per_device))
            for one in (*groups, everything)
        ],
        numbers=3,
    )


def mib(count: float) -> str:
    """Bytes as MiB, with decimals where there are few."""
    size = count / 2**20
    return f"{size:,.0f}" if size >= 100 else f"{size:,.2f}"


def write_parameters(workdir: Path, params: Any) -> None:
    """Writes parameters.txt: name, shape, size and sharding of every parameter."""
    table = parameter_overview.get_parameter_overview(params, include_stats="sharding")
    files.write_bytes(workdir / "parameters.txt", f"{table}\n".encode())
