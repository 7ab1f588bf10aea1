"""Time of a training step of VALM over that of GPT-2, as the index grows; BLIND-VALM beside it.

VALM looks for K neighbours of each token among M vectors. For each M the systems take turns (see
`turns`): gpt2; blind (the tower, its own output); prepared (neighbours found ahead of time: no
tower, no search; a step's ids and vectors are read through memory maps and brought to the device,
one after the other with the step, where a run does it beside the step before); valm (exact search
inside the step); faiss and faiss_ranked (IVF-PQ on the host, as the paper has it: by its codes
alone, and with --candidates ranked again), where FAISS is installed. Vectors are synthetic, in
clusters around what the tower says elsewhere; rows and the tower are random. What FAISS finds of
the exact neighbours is in `search`.

The share of retrieval is the retrieval alone over the step, round by round (see `valm_systems`);
and, of exact search, what a step of VALM takes beyond one of BLIND-VALM, which reads the same tower
and has one grounding vector instead of K. --png draws ratios and shares over M.
"""

from __future__ import annotations

import functools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import approximate, turns, valm_systems
from benchmarks.valm_systems import APPROXIMATE, DECODER, DTYPE, FIXED, NEIGHBOURS, TOWER
from blindvalm_jax.errors import UserError

_SIZES = flags.DEFINE_list(
    "index_sizes", ["1000", "10000", "100000", "1000000"], "Sizes M of the index."
)
_PNG = flags.DEFINE_string("png", None, "Also draw ratios and shares to this file.")

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


def run() -> dict[str, Any]:
    """Prints the table and returns the numbers."""
    sizes = sorted(turns.whole_numbers(_SIZES.value, "index_sizes", least=NEIGHBOURS.value))
    shapes = {
        "decoder": valm_systems.shape(DECODER.value, "decoder"),
        "tower": valm_systems.shape(TOWER.value, "tower"),
    }
    png = None if _PNG.value is None else Path(_PNG.value)
    if png is not None and (png.is_dir() or not png.parent.is_dir()):
        raise UserError(f"--png={png} must be a file in a directory that is there")
    approximate.announce(sizes)
    print(
        f"{'M':>10} {'system':13} {'s/step':>8} {'ratio':>7} {'range':>13} {'retrieval, s':>13} "
        f"{'share':>7} {'range':>15}"
    )
    workers = {name: valm_systems.start(name) for name in FIXED}
    try:
        about = {name: worker.ask("ready") for name, worker in workers.items()}
        rows = []
        for number, size in enumerate(sizes, start=1):
            title = f"{size:,} vectors (size {number} of {len(sizes)})"
            with tempfile.TemporaryDirectory() as directory:
                rows.append(_measured(size, workers, about, Path(directory), title))
    finally:
        for worker in workers.values():
            worker.stop()
    machine = turns.machine(
        about["gpt2"],
        length=valm_systems.length(),
        dtype=DTYPE.value,
        neighbours=NEIGHBOURS.value,
        nprobe=approximate.NPROBE.value,
        candidates=approximate.CANDIDATES.value,
        **shapes,
    )
    machine["versions"] = {**machine["versions"], **approximate.versions()}
    print(json.dumps(machine))
    if png is not None:
        from benchmarks import valm_figure

        valm_figure.draw(rows).savefig(png, dpi=120, metadata={"Software": None})
    return {"sizes": rows, **machine}


def _measured(
    size: int,
    fixed: dict[str, turns.Worker],
    about_fixed: dict[str, Any],
    directory: Path,
    title: str,
) -> dict[str, Any]:
    """What is measured at a size of the index, which is written to a directory."""
    from benchmarks import clusters

    begin = time.perf_counter()
    width = valm_systems.shape(TOWER.value, "tower")[1]
    around = valm_systems.centres(clusters.centres_of(size), directory)
    index = clusters.write_index(directory / "index", clusters.Clusters(size, width, around=around))
    written = time.perf_counter() - begin
    made = None
    if approximate.left_out(size) is None:
        made = approximate.make(index, neighbours=NEIGHBOURS.value)
    names = ("prepared", "valm", *(APPROXIMATE if made else ()))
    own = {name: valm_systems.start(name, f"--directory={directory}") for name in names}
    try:
        about = about_fixed | {name: worker.ask("ready") for name, worker in own.items()}
        turn = {name: worker.seconds for name, worker in {**fixed, **own}.items()}
        for name, worker in own.items():
            turn[_alone(name)] = functools.partial(worker.seconds, "search")
        seconds = turns.take(turn, title=title)
    finally:
        for worker in own.values():
            worker.stop()
    row = {
        "vectors": size,
        "index_bytes": size * width * _ITEM_BYTES[DTYPE.value],
        "seconds_to_write": written,
        "faiss": made,
        "systems": {name: _system(name, seconds, about[name]) for name in (*FIXED, *names)},
        "exact_share_by_difference": statistics.median(
            (a - b) / a for a, b in zip(seconds["valm"], seconds["blind"], strict=True)
        ),
    }
    _print(row)
    return row


def _alone(name: str) -> str:
    """The turn in which a system retrieves and does nothing else."""
    return f"{name}, retrieval"


def _system(name: str, seconds: dict[str, list[float]], about: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a system; its retrieval's where it has one."""
    found = {
        **turns.over(seconds[name], seconds["gpt2"]),
        "mflops_per_token": about["mflops_per_token"],
        "plan_mib": about["plan_mib"],
    }
    if _alone(name) in seconds:
        share = turns.over(seconds[_alone(name)], seconds[name])
        found |= {
            "retrieval_seconds": share["seconds"],
            "share": share["ratio"],
            "share_low": share["ratio_low"],
            "share_high": share["ratio_high"],
        }
    return found


def _print(row: dict[str, Any]) -> None:
    for name, found in row["systems"].items():
        spread = f"{found['ratio_low']:.2f}-{found['ratio_high']:.2f}"
        line = f"{row['vectors']:10,} {name:13} {found['seconds']:8.3f} {found['ratio']:7.3f} "
        line += f"{spread:>13}"
        if "share" in found:
            spread = f"{found['share_low']:.1%}-{found['share_high']:.1%}"
            line += f" {found['retrieval_seconds']:13.4f} {found['share']:7.1%} {spread:>15}"
        print(line)
    made = f"index {row['index_bytes'] / 2**20:,.0f} MiB on the devices"
    if row["faiss"]:
        lists, code = (row["faiss"]["settings"][name] for name in ("lists", "code_bytes"))
        made += f"; FAISS, {lists:,} lists and codes of {code} bytes, built in "
        made += f"{row['faiss']['seconds_to_make']:,.1f} s"
    by_difference = f"{row['exact_share_by_difference']:.1%}"
    print(f"{'':10} {made}; VALM's share beyond BLIND-VALM's step {by_difference}", flush=True)
