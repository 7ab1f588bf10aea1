"""Time of a training step of VALM over that of GPT-2, as the index grows; BLIND-VALM beside it.

VALM searches M vectors exactly inside the step, for K neighbours of each token. For each M the
systems take turns (see `turns`): gpt2, blind (the tower, its own output), prepared (neighbours
found ahead of time: no tower, no search; ids are looked up before the step, which is not counted)
and valm. Vectors and rows are random, which exact search does not notice.

The share of retrieval is measured twice: the search alone, on the queries and the index of the
step, over the step; and what a step of VALM takes beyond one of BLIND-VALM, which reads the same
tower and has one grounding vector instead of K. --png draws the ratios over M.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from benchmarks import turns
from blindvalm_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from blindvalm_jax.config import Config

_SIZES = flags.DEFINE_list(
    "index_sizes", ["1000", "10000", "100000", "1000000"], "Sizes M of the index."
)
_DECODER = flags.DEFINE_list("decoder", ["6", "384", "6"], "Layers, width and heads.")
_TOWER = flags.DEFINE_list("tower", ["12", "512", "8"], "Layers, width and heads; E = width.")
_NEIGHBOURS = flags.DEFINE_integer("neighbours", 4, "Images of a token (K).", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Computation of all systems, and the index."
)
_PNG = flags.DEFINE_string("png", None, "Also draw the ratios to this file.")

SYSTEMS = ("gpt2", "blind", "prepared", "valm")
_LENGTH = 256
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


def run() -> dict[str, Any]:
    """Prints the table and returns the numbers."""
    sizes = sorted(_sizes(_SIZES.value, "index_sizes"))
    if sizes[0] < _NEIGHBOURS.value:
        raise UserError(f"--index_sizes must be --neighbours={_NEIGHBOURS.value} or more")
    shapes = {"decoder": _shape(_DECODER.value, "decoder"), "tower": _shape(_TOWER.value, "tower")}
    png = None if _PNG.value is None else Path(_PNG.value)
    if png is not None and (png.is_dir() or not png.parent.is_dir()):
        raise UserError(f"--png={png} must be a file in a directory that is there")
    print(
        f"{'M':>10} {'index MiB':>10} {'gpt2, s':>8} {'blind':>7} {'prepared':>9} {'valm':>8} "
        f"{'range':>13} {'retrieval':>10} {'by diff.':>9}"
    )
    workers = {name: _start(name) for name in SYSTEMS[:-1]}
    try:
        about = {name: worker.ask("ready") for name, worker in workers.items()}
        rows = [_measured(size, workers) for size in sizes]
    finally:
        for worker in workers.values():
            worker.stop()
    machine = turns.machine(
        about["gpt2"],
        length=turns.length(_LENGTH),
        dtype=_DTYPE.value,
        neighbours=_NEIGHBOURS.value,
        **shapes,
    )
    print(json.dumps(machine))
    if png is not None:
        draw(rows, png)
    flops = {name: found["mflops_per_token"] for name, found in about.items()}
    return {"mflops_per_token": flops, "sizes": rows, **machine}


def _measured(size: int, workers: dict[str, turns.Worker]) -> dict[str, Any]:
    """A row of the table."""
    valm = _start("valm", f"--vectors={size}")
    try:
        about = valm.ask("ready")
        turn = {name: worker.seconds for name, worker in {**workers, "valm": valm}.items()}
        seconds = turns.take({**turn, "search": lambda: valm.seconds("search")})
    finally:
        valm.stop()
    systems = {name: turns.over(seconds[name], seconds["gpt2"]) for name in SYSTEMS}
    pairs = list(zip(seconds["valm"], seconds["search"], seconds["blind"], strict=True))
    row = {
        "vectors": size,
        "index_bytes": size * _shape(_TOWER.value, "tower")[1] * _ITEM_BYTES[_DTYPE.value],
        "systems": systems,
        "search_seconds": statistics.median(seconds["search"]),
        "search_share": statistics.median([search / step for step, search, _ in pairs]),
        "search_share_by_difference": statistics.median([(a - c) / a for a, _, c in pairs]),
        "valm_mflops_per_token": about["mflops_per_token"],
        "valm_plan_mib": about["plan_mib"],
    }
    ratios = systems["valm"]
    spread = f"{ratios['ratio_low']:.2f}-{ratios['ratio_high']:.2f}"
    print(
        f"{size:10,} {row['index_bytes'] / 2**20:10,.1f} {systems['gpt2']['seconds']:8.3f} "
        f"{systems['blind']['ratio']:7.3f} {systems['prepared']['ratio']:9.3f} "
        f"{ratios['ratio']:8.3f} {spread:>13} {row['search_share']:10.1%} "
        f"{row['search_share_by_difference']:9.1%}",
        flush=True,
    )
    return row


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratio to GPT-2 over M, both logarithmic; BLIND-VALM and prepared neighbours are flat."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    sizes = [row["vectors"] for row in rows]
    found = [row["systems"]["valm"] for row in rows]
    ratios = [x["ratio"] for x in found]
    low, high = [x["ratio_low"] for x in found], [x["ratio_high"] for x in found]
    axes.plot(sizes, ratios, "o-", color="C0", label="VALM, exact search in the step")
    axes.fill_between(sizes, low, high, color="C0", alpha=0.2)
    names = {"prepared": "VALM, neighbours found ahead", "blind": "BLIND-VALM", "gpt2": "GPT-2"}
    for number, (name, label) in enumerate(names.items(), start=1):
        flat = statistics.median(row["systems"][name]["ratio"] for row in rows)
        axes.axhline(flat, color=f"C{number}", linestyle="--", label=f"{label} {flat:.2f}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.set_xlabel("vectors in the index")
    axes.set_ylabel("time of a training step, GPT-2 = 1")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _start(name: str, *more: str) -> turns.Worker:
    command = ["benchmarks.valm_cost", f"--system={name}", f"--rows={turns.ROWS.value}"]
    command += [f"--length={turns.length(_LENGTH)}", f"--dropout={turns.DROPOUT.value}"]
    command += [f"--decoder={','.join(_DECODER.value)}", f"--tower={','.join(_TOWER.value)}"]
    command += [f"--neighbours={_NEIGHBOURS.value}", f"--dtype={_DTYPE.value}", *more]
    return turns.Worker(command)


def _sizes(words: list[str], flag: str) -> list[int]:
    if not words or not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"--{flag} must be positive whole numbers, got {','.join(words)!r}")
    return [int(word) for word in words]


def _shape(words: list[str], flag: str) -> list[int]:
    """Layers, width and heads."""
    sizes = _sizes(words, flag)
    if len(sizes) != 3 or sizes[1] % sizes[2]:
        raise UserError(
            f"--{flag} must be layers, width and heads that divide it, got {','.join(words)!r}"
        )
    return sizes


def _settings(name: str) -> Config:
    from blindvalm_jax import presets
    from blindvalm_jax.config import default, parse

    values = presets.variant(
        presets.paper(default(), "mini"), "gpt2" if name == "gpt2" else "blind"
    )
    decoder = values.decoder
    decoder.layers, decoder.width, decoder.heads = _shape(_DECODER.value, "decoder")
    decoder.dropout = decoder.attention_dropout = turns.DROPOUT.value
    values.train.batch_size = turns.ROWS.value
    values.train.dtype = values.grounding.dtype = _DTYPE.value
    values.data.sequence_length = turns.length(_LENGTH)
    if name in ("prepared", "valm"):
        values.grounding.source, values.grounding.index = "images", "synthetic"
        values.grounding.neighbours = _NEIGHBOURS.value
    if name == "prepared":
        values.grounding.search = values.grounding.prepared = "prepared"
    return parse(values)


def worker(name: str, vectors: int) -> None:
    """Compiles the step of a system and answers on standard input."""
    import jax
    import jax.numpy as jnp

    from blindvalm_jax import partitioning
    from blindvalm_jax.grounding import retrieval
    from blindvalm_jax.grounding.images import on_devices

    settings = _settings(name)
    layers, width, heads = _shape(_TOWER.value, "tower")
    tower = None if name == "gpt2" else turns.tower_shape(layers, width, heads, projection=width)
    if name == "prepared":
        size = (turns.ROWS.value, turns.length(_LENGTH), _NEIGHBOURS.value)
        found = _Vectors(size[0] * size[1] * size[2], width)[:].reshape(*size, width)
        turns.serve(turns.compile_system(settings, tower, features=found.astype("float16")), {})
        return
    if name != "valm":
        turns.serve(turns.compile_system(settings, tower), {})
        return
    mesh = partitioning.make_mesh(settings.mesh)
    index = retrieval.place_keys(_Vectors(vectors, width), mesh, dtype=jnp.dtype(_DTYPE.value))
    search = on_devices(mesh, count=vectors, neighbours=_NEIGHBOURS.value)
    system = turns.compile_system(settings, tower, index=index, search=search)
    with partitioning.use(mesh):
        blind = jax.jit(dataclasses.replace(system.model, search=None).features)
        queries_BTE = blind(system.frozen, system.batch)[:, :, 0]
        alone = jax.jit(search).lower(queries_BTE, index).compile()

    def searched() -> dict[str, Any]:
        begin = time.perf_counter()
        jax.block_until_ready(alone(queries_BTE, index))
        return {"seconds": time.perf_counter() - begin}

    turns.serve(system, {"search": searched})


class _Vectors:
    """Random unit vectors, see `retrieval.Rows`."""

    def __init__(self, count: int, width: int) -> None:
        self.shape = (count, width)

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        import numpy as np

        first, last, _ = rows.indices(self.shape[0])
        size = (last - first, self.shape[1])
        vectors = np.random.default_rng([0, first]).standard_normal(size, np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors


if __name__ == "__main__":
    from absl import app

    _SYSTEM = flags.DEFINE_enum("system", "gpt2", SYSTEMS, "System of this process.")
    _VECTORS = flags.DEFINE_integer("vectors", 1000, "Vectors of this process.")
    app.run(lambda _: worker(_SYSTEM.value, _VECTORS.value))
