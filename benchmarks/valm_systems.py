"""The processes of valm_cost: each holds one system, answers "step", and "search" if it retrieves.

"search" is the system's retrieval alone: the search on the queries and the index of the step, or,
where neighbours were found ahead, what makes the batch of a step: ids and vectors read through
memory maps (`images.PreparedWindows`, as in a run) and their way to the device.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from benchmarks import approximate, turns
from blindvalm_jax.command_line import run_main
from blindvalm_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from blindvalm_jax.config import Config
    from blindvalm_jax.grounding.index import ImageIndex
    from blindvalm_jax.grounding.retrieval import Search
    from blindvalm_jax.models.clip import TowerConfig

DECODER = flags.DEFINE_list("decoder", ["6", "384", "6"], "Layers, width and heads.")
TOWER = flags.DEFINE_list("tower", ["12", "512", "8"], "Layers, width and heads; E = width.")
NEIGHBOURS = flags.DEFINE_integer("neighbours", 4, "Images of a token (K).", lower_bound=1)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Computation of all systems, and the index."
)

FIXED = ("gpt2", "blind")
APPROXIMATE = ("faiss", "faiss_ranked")
RETRIEVING = ("prepared", "valm", *APPROXIMATE)
_LENGTH = 256
_WINDOWS = 256  # with neighbours found ahead; a step takes the next ones
_BATCHES = 8  # of those that search, in turn: the same one's vectors would lie in caches
_CENTRES_FILE = "centres.npy"


def length() -> int:
    """Tokens of a row."""
    return turns.length(_LENGTH)


def start(name: str, *more: str) -> turns.Worker:
    """Starts the process of a system, with the settings of this one."""
    command = ["benchmarks.valm_systems", f"--system={name}", f"--rows={turns.ROWS.value}"]
    command += [f"--length={length()}", f"--dropout={turns.DROPOUT.value}"]
    command += [f"--decoder={','.join(DECODER.value)}", f"--tower={','.join(TOWER.value)}"]
    command += [f"--neighbours={NEIGHBOURS.value}", f"--dtype={DTYPE.value}"]
    command += [f"--nprobe={approximate.NPROBE.value}"]
    command += [f"--candidates={approximate.CANDIDATES.value}", *more]
    return turns.Worker(command)


def shape(words: list[str], flag: str) -> list[int]:
    """Layers, width and heads.

    Raises:
      UserError: they are not.
    """
    sizes = turns.whole_numbers(words, flag)
    if len(sizes) != 3 or sizes[1] % sizes[2]:
        raise UserError(
            f"--{flag} must be layers, width and heads that divide it, got {','.join(words)!r}"
        )
    return sizes


def centres(count: int, directory: Path) -> np.ndarray:
    """What the tower says at tokens of other batches than those of the steps, float32 [C, E].

    Images that lie around them are asked for as a CLIP's are: everywhere, and no list of FAISS more
    often than others. What a tower with random weights says lies close together; images drawn
    elsewhere would have a few neighbours in common to all tokens, which would stay in caches.
    """
    import numpy as np

    made = start("centres", f"--directory={directory}", f"--centres={count}")
    try:
        made.ask("write")
    finally:
        made.stop()
    return np.load(directory / _CENTRES_FILE)


def write_centres(count: int, directory: Path) -> None:
    """See `centres`; in a process of its own, as the one that compares holds no model."""
    import jax
    import numpy as np

    from blindvalm_jax import partitioning
    from blindvalm_jax.objectives import language

    settings = _settings("blind")
    layers, width, heads = shape(TOWER.value, "tower")
    mesh = partitioning.make_mesh(settings.mesh)
    model, frozen = turns.build(
        settings, turns.tower_shape(layers, width, heads, projection=width), mesh
    )
    said: list[np.ndarray] = []
    with partitioning.use(mesh):
        read = jax.jit(model.features)
        while sum(map(len, said)) < count:
            rows = turns.random_rows(settings, tower=True, seed=_BATCHES + len(said))
            z_BTKE = read(frozen, language.to_device(rows, mesh))
            said.append(np.asarray(z_BTKE, np.float32).reshape(-1, width))
    drawn = np.random.default_rng(0).permutation(np.concatenate(said))[:count]
    np.save(directory / _CENTRES_FILE, drawn)


def worker(name: str, directory: Path) -> None:
    """Compiles the step of a system and answers on standard input; directory: of the index."""
    from blindvalm_jax.grounding.index import ImageIndex

    settings = _settings(name)
    layers, width, heads = shape(TOWER.value, "tower")
    tower = None if name == "gpt2" else turns.tower_shape(layers, width, heads, projection=width)
    if name in FIXED:
        turns.serve(turns.compile_system(settings, tower), {})
        return
    index = ImageIndex.open(directory / "index")
    if name == "prepared":
        system, alone = _prepared(settings, tower, index, directory)
    else:
        system, alone = _searching(name, settings, tower, index)

    def searched() -> dict[str, Any]:
        import jax

        begin = time.perf_counter()
        jax.block_until_ready(alone())
        return {"seconds": time.perf_counter() - begin}

    turns.serve(system, {"search": searched})


def _settings(name: str) -> Config:
    from blindvalm_jax import presets
    from blindvalm_jax.config import default, parse

    values = presets.variant(
        presets.paper(default(), "mini"), "gpt2" if name == "gpt2" else "blind"
    )
    decoder = values.decoder
    decoder.layers, decoder.width, decoder.heads = shape(DECODER.value, "decoder")
    decoder.dropout = decoder.attention_dropout = turns.DROPOUT.value
    values.train.batch_size = turns.ROWS.value
    values.train.dtype = values.grounding.dtype = DTYPE.value
    values.data.sequence_length = length()
    if name in RETRIEVING:
        values.grounding.source, values.grounding.index = "images", "synthetic"
        values.grounding.neighbours = NEIGHBOURS.value
    if name in APPROXIMATE:
        values.grounding.search = "faiss"
    if name == "prepared":
        values.grounding.search = values.grounding.prepared = "prepared"
    return parse(values)


def _prepared(
    settings: Config, tower: TowerConfig | None, index: ImageIndex, directory: Path
) -> tuple[turns.System, Callable[[], Any]]:
    """The system without tower and search, and the making of its batches."""
    import numpy as np

    from benchmarks import clusters
    from blindvalm_jax import partitioning
    from blindvalm_jax.data import pipeline
    from blindvalm_jax.grounding.images import PreparedWindows
    from blindvalm_jax.objectives import language

    found = clusters.write_neighbours(
        directory / "neighbours",
        index,
        windows=_WINDOWS,
        length=length(),
        each=NEIGHBOURS.value,
    )
    rng = np.random.default_rng(0)
    # Text is held in memory: all systems would read it alike, and for none is that counted.
    texts: Any = [
        {"tokens": tokens, "count": np.int32(length() + 1)}
        for tokens in rng.integers(4, turns.VOCABULARY, (_WINDOWS, length() + 1), np.int32)
    ]
    windows = PreparedWindows(texts, found, index.vectors)
    order = itertools.cycle(pipeline.eval_order(_WINDOWS, 0))
    mesh = partitioning.make_mesh(settings.mesh)

    def rows() -> dict[str, np.ndarray]:
        chosen = itertools.islice(order, turns.ROWS.value)
        each = [pipeline.window_row(windows[int(place)], tower=False) for place in chosen]
        return {name: np.stack([row[name] for row in each]) for name in each[0]}

    def load() -> Any:
        return language.to_device(rows(), mesh)

    system = turns.compile_system(settings, tower, rows=rows())
    system.load = load
    return system, load


def _searching(
    name: str, settings: Config, tower: TowerConfig | None, index: ImageIndex
) -> tuple[turns.System, Callable[[], Any]]:
    """A system that searches in the step, and its search alone."""
    import jax
    import jax.numpy as jnp

    from blindvalm_jax import partitioning
    from blindvalm_jax.grounding import retrieval
    from blindvalm_jax.grounding.images import on_devices, on_host
    from blindvalm_jax.objectives import language

    mesh = partitioning.make_mesh(settings.mesh)
    search: Search
    keys = None
    if name == "valm":
        keys = retrieval.place_keys(index.vectors, mesh, dtype=jnp.dtype(DTYPE.value))
        search = on_devices(mesh, count=len(index.vectors), neighbours=NEIGHBOURS.value)
    else:
        candidates = approximate.CANDIDATES.value if name == "faiss_ranked" else 0
        engine = approximate.engine(index, neighbours=NEIGHBOURS.value, candidates=candidates)
        search = on_host(engine)
    system = turns.compile_system(settings, tower, index=keys, search=search)
    batches = [
        language.to_device(turns.random_rows(settings, tower=True, seed=seed), mesh)
        for seed in range(_BATCHES)
    ]
    with partitioning.use(mesh):
        blind = jax.jit(dataclasses.replace(system.model, search=None).features)
        queries = [blind(system.frozen, batch)[:, :, 0] for batch in batches]
        alone = jax.jit(search).lower(queries[0], keys).compile()
    system.load = functools.partial(next, itertools.cycle(batches))
    asked = itertools.cycle(queries)
    return system, lambda: alone(next(asked), keys)


if __name__ == "__main__":
    _SYSTEM = flags.DEFINE_enum(
        "system", "gpt2", ("centres", *FIXED, *RETRIEVING), "System of this process."
    )
    _DIRECTORY = flags.DEFINE_string("directory", "", "Where its index lies.")
    _CENTRES = flags.DEFINE_integer("centres", 1, "How many centres are written.")

    def _main(_: Sequence[str]) -> None:
        if _SYSTEM.value == "centres":
            for _ in sys.stdin:
                write_centres(_CENTRES.value, Path(_DIRECTORY.value))
                print("{}", flush=True)
        else:
            worker(_SYSTEM.value, Path(_DIRECTORY.value))

    run_main(_main)
