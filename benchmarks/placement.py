"""What a model holds on a device and sends to others, as the mesh grows: no step is run.

Each mesh (data x fsdp x tensor) is compiled for simulated CPU devices, from shapes alone, with as
many rows for each part of a batch. Parameters, moments and tower are exact; memory and collectives
are those of the CPU's program (docs/scaling_up.md: what an accelerator's would not have).
`--plan` is what configs/ladder.py takes.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

from absl import flags

from blindvalm_jax.errors import UserError

_PLAN = flags.DEFINE_string("plan", "1.3b,blind", "SIZE,VARIANT,LENGTH, see configs/ladder.py.")
_MESHES = flags.DEFINE_list(
    "meshes",
    ["1x8x1", "2x8x1", "1x16x1", "1x8x2", "4x8x1", "1x32x1", "8x8x1", "4x8x2", "1x64x1"],
    "Meshes, data x fsdp x tensor.",
)
_ROWS = flags.DEFINE_integer("rows_a_part", 4, "Rows of each part of a batch.", lower_bound=1)
_REMAT = flags.DEFINE_enum("remat", "full", ("none", "dots", "full"), "train.remat.")
_VECTORS = flags.DEFINE_integer("vectors", 1_000_000, "valm: images of the index.", lower_bound=1)


def run() -> dict[str, Any]:
    """Prints the table and returns the numbers."""
    meshes = [_sizes(text) for text in _MESHES.value]
    from blindvalm_jax import planning  # what imports JAX is imported by who needs it

    planning.simulate(max(data * fsdp * tensor for data, fsdp, tensor in meshes), dry_run=True)
    print(
        f"{'mesh':>8} {'devices':>7} {'rows':>6} {'param':>8} {'moments':>8} {'tower':>8} "
        f"{'temp':>8} {'all':>8} | {'gathered':>8} {'reduced: fsdp':>14} {'data':>8} {'tensor':>8} "
        f"{'other':>8} | {'gathers':>8} {'reduces':>8} | {'warnings':>8}   MiB a device, "
        "sent in a step; how many of both run in it; seconds to compile"
    )
    rows = [_row(*sizes) for sizes in meshes]
    about = {"plan": _PLAN.value, "rows_a_part": _ROWS.value, "remat": _REMAT.value}
    print(json.dumps(about))
    return {"meshes": rows, **about}


def _sizes(text: str) -> tuple[int, int, int]:
    words = text.split("x")
    if len(words) != 3 or not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"--meshes are data x fsdp x tensor such as 2x4x1, got {text!r}")
    data, fsdp, tensor = (int(word) for word in words)
    return data, fsdp, tensor


def _row(data: int, fsdp: int, tensor: int) -> dict[str, Any]:
    """The numbers of a mesh, in bytes on one device."""
    import jax

    from blindvalm_jax import collectives, ladder, placement, planning
    from blindvalm_jax.config import default, parse

    values = ladder.rung(default(), *ladder.parse(_PLAN.value))
    values.mesh.data, values.mesh.fsdp, values.mesh.tensor = data, fsdp, tensor
    values.train.batch_size = _ROWS.value * data * fsdp
    values.train.remat = _REMAT.value
    if values.grounding.source == "images":
        values.grounding.index = f"vectors:{_VECTORS.value}"
    begin = time.perf_counter()
    plan = planning.of_settings(parse(values), devices=jax.devices()[: data * fsdp * tensor])
    seconds = time.perf_counter() - begin
    held = {one.group: one.bytes_per_device for one in placement.sums(plan.tensors)}
    totals = collectives.totals(plan.collectives)
    row = {
        "mesh": {"data": data, "fsdp": fsdp, "tensor": tensor},
        "devices": data * fsdp * tensor,
        "rows": values.train.batch_size,
        "bytes_a_device": held,
        "memory": None if plan.memory is None else dataclasses.asdict(plan.memory),
        "collectives": [dataclasses.asdict(total) for total in totals],
        "warnings": plan.warnings,
        "unheard": plan.unheard,
        "seconds_to_compile": seconds,
    }
    sent = {(total.kind, total.axes): total.bytes_sent for total in totals}
    gathered = sum(size for (kind, _), size in sent.items() if kind == "all-gather")
    reduced = [sent.get(("all-reduce", (axis,)), 0) for axis in ("fsdp", "data", "tensor")]
    other = sum(sent.values()) - gathered - sum(reduced)
    sizes = [held["decoder"], held["optimizer"], held.get("tower", 0) + held.get("index", 0)]
    sizes += [] if plan.memory is None else [plan.memory.temporary, plan.memory.total]
    counts = [
        sum(total.executions for total in totals if total.kind == kind)
        for kind in ("all-gather", "all-reduce")
    ]
    first = " ".join(f"{size / 2**20:8,.0f}" for size in sizes)
    last = " ".join(
        f"{size / 2**20:{width},.0f}"
        for size, width in zip((gathered, *reduced, other), (8, 14, 8, 8, 8), strict=True)
    )
    print(
        f"{data}x{fsdp}x{tensor}".rjust(8),
        f"{row['devices']:7} {row['rows']:6} {first} | {last} | "
        f"{counts[0]:8,} {counts[1]:8,} | {len(plan.warnings):8}   {seconds:.0f} s",
        flush=True,
    )
    return row
