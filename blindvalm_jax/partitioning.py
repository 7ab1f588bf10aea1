"""Which device holds what: the mesh, the table of logical axes, and a check that it is obeyed.

Axes of the mesh: `data` (replicas with their own rows), `fsdp` (rows, and parameters along the
model width), `tensor` (heads, MLP, vocabulary). One table, `RULES`, maps the logical axis names
that the modules carry to these.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from blindvalm_jax import slices
from blindvalm_jax.config import Config, MeshConfig
from blindvalm_jax.errors import UserError
from blindvalm_jax.models.clip import TowerConfig
from blindvalm_jax.models.contrastive import ClipConfig

RULES = (
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("activation", None),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv", None),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
)

# Above this share of replicated parameters, a mesh that should shard them does not.
UNSHARDED_LIMIT = 0.02
_VECTORS = ("scale", "bias")
_SPLIT_BY_FSDP_ALONE = (
    *("wpe", "position_embedding", "token_embedding", "text_projection", "adapter/kernel"),
    *("class_embedding", "patch_embedding", "visual_projection"),
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh (data, fsdp, tensor) over all devices; -1 takes what is left.

    Over several slices (see `slices`) the data axis goes across them, the others stay within one.
    With several processes it follows their order, with one the way that JAX knows to be short.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or not to that of a slice.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if -1 in sizes or math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} does not fit "
            f"{len(devices)} devices: the sizes must multiply to that number (one may be -1)"
        )
    count = slices.count(config.slices, devices)
    names, types = ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3
    if count > 1:
        return Mesh(slices.arranged(sizes, count, devices), names, axis_types=types)
    if slices.reported(devices, "process_index") > 1:
        return Mesh(slices.in_order(sizes, devices), names, axis_types=types)
    return jax.make_mesh(tuple(sizes), names, axis_types=types, devices=devices)


def check_divisible(config: Config, mesh: Mesh, tower: TowerConfig | None) -> None:
    """Refuses sizes that the mesh does not divide, before anything is compiled."""
    rows = row_shards(mesh)
    microbatch = config.train.batch_size // config.train.microbatches
    checks = [
        (microbatch, rows, "train.batch_size / train.microbatches", "mesh.data x mesh.fsdp"),
        (config.decoder.width, mesh.shape["fsdp"], "decoder.width", "mesh.fsdp"),
        (config.decoder.heads, mesh.shape["tensor"], "decoder.heads", "mesh.tensor"),
        (
            config.decoder.vocab_multiple,
            mesh.shape["tensor"],
            "decoder.vocab_multiple",
            "mesh.tensor",
        ),
        (
            config.decoder.mlp_width or 4 * config.decoder.width,
            mesh.shape["tensor"],
            "decoder.mlp_width",
            "mesh.tensor",
        ),
    ]
    if tower is not None:
        checks += [
            (tower.width, mesh.shape["fsdp"], "the tower's width", "mesh.fsdp"),
            (tower.heads, mesh.shape["tensor"], "the tower's heads", "mesh.tensor"),
            (tower.mlp_width, mesh.shape["tensor"], "the tower's MLP width", "mesh.tensor"),
        ]
    _refuse_remainders(checks)


def check_clip_divisible(config: Config, mesh: Mesh, clip: ClipConfig) -> None:
    """Refuses batches and towers of a contrastive run that the mesh does not divide."""
    microbatch = config.train.batch_size // config.train.microbatches
    rows, fsdp, tensor = (
        mesh.shape["data"] * mesh.shape["fsdp"],
        mesh.shape["fsdp"],
        mesh.shape["tensor"],
    )
    checks = [
        (microbatch, rows, "train.batch_size / train.microbatches", "mesh.data x mesh.fsdp"),
        (clip.text.width, fsdp, "clip.text.width", "mesh.fsdp"),
        (clip.text.heads, tensor, "clip.text.heads", "mesh.tensor"),
        (clip.vision.width, fsdp, "clip.image.width", "mesh.fsdp"),
    ]
    if clip.vision.kind == "vit":
        checks.append((clip.vision.heads, tensor, "clip.image.heads", "mesh.tensor"))
    for channels in clip.vision.channels:
        checks.append((channels, fsdp, "a number in clip.image.channels", "mesh.fsdp"))
        checks.append((channels, tensor, "a number in clip.image.channels", "mesh.tensor"))
    _refuse_remainders(checks)


def _refuse_remainders(checks: list[tuple[int, int, str, str]]) -> None:
    for size, divisor, name, axis in checks:
        if size % divisor:
            raise UserError(f"{name} is {size}, not a multiple of {axis} = {divisor}")


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Makes the mesh and the rules visible to the modules' sharding constraints."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def shardings(abstract_boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of boxed abstract parameters (or of a state that holds them)."""
    specs = nn.get_partition_spec(abstract_boxed)
    return nn.logical_to_mesh_sharding(specs, mesh, RULES)


def abstract(init: Callable[[jax.Array], Any], mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of what `init(key)` makes, unboxed, without making it."""
    boxed = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nn.unbox(boxed),
        shardings(boxed, mesh),
    )


def init_sharded(init: Callable[[jax.Array], Any], key: jax.Array, mesh: Mesh) -> Any:
    """Runs `init(key)` so that every leaf is born on the devices that keep it, and unboxes it."""
    placed = jax.tree.map(lambda x: x.sharding, abstract(init, mesh))
    with use(mesh):
        return jax.jit(lambda k: nn.unbox(init(k)), out_shardings=placed)(key)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def row_shards(mesh: Mesh) -> int:
    """Over how many devices rows are split: a batch must hold a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """A process's rows of a batch, as an array of the global batch."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), rows)


def check_sharded(params: Any, mesh: Mesh) -> None:
    """Refuses a mesh with fsdp or tensor that leaves more than 2 % of the matrices' entries whole.

    What may stay whole is told by names, not by the rules, so that a module without axis names is
    found out: norms and biases, and what only fsdp splits on a mesh without it.
    """
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return
    small = (*_VECTORS, *(_SPLIT_BY_FSDP_ALONE if mesh.shape["fsdp"] == 1 else ()))
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), x)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    ]
    matrices = [(name, x) for name, x in leaves if not name.endswith(small)]
    whole = [(x.size, name) for name, x in matrices if x.sharding.is_fully_replicated]
    share = sum(size for size, _ in whole) / sum(x.size for _, x in matrices)
    if share > UNSHARDED_LIMIT:
        names = [name for _, name in sorted(whole, reverse=True)]
        raise UserError(
            f"{share:.1%} of the matrices are on every device whole, at most "
            f"{UNSHARDED_LIMIT:.0%} expected on mesh {dict(mesh.shape)}; largest: "
            f"{', '.join(names[:5])}"
        )


def bytes_per_device(tree: Any) -> int:
    """Bytes that the fullest device holds of a tree of arrays."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
