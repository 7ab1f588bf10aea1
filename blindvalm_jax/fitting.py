"""Remat and microbatches chosen by a rule: the first of a list whose memory plan fits.

The list: no recomputing with as few microbatches as may be, then more of them, then the same with
`dots`, then with `full`. Recomputing costs up to a third of the FLOPs, in every step; a microbatch
more costs what fsdp gathers again, and smaller products. A plan fits if it takes at most 90 % of a
device's memory. More microbatches never need more, so the list is halved, not walked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from blindvalm_jax import files, memory, partitioning
from blindvalm_jax.checkpoints import layout
from blindvalm_jax.config import Config, TrainConfig
from blindvalm_jax.console import say
from blindvalm_jax.errors import UserError
from blindvalm_jax.placement import mib

SHARE = 0.9
AUTO = "auto"
REMATS = ("none", "dots", "full")


def wanted(settings: Config) -> bool:
    """Whether settings leave remat or microbatches to the rule."""
    return settings.train.remat == AUTO or settings.train.microbatches == 0


def provisional(settings: Config) -> Config:
    """Settings that say something where the rule has not been asked yet."""
    return _with(settings, _remats(settings)[0], settings.train.microbatches or 1)


def kept(settings: Config, workdir: Path) -> Config:
    """Settings of a run to resume, with what was chosen when it began.

    Another choice would be another run: each microbatch draws its own dropout.
    """
    path = workdir / "config.json"
    if not wanted(settings) or not path.is_file() or not layout.steps(workdir):
        return settings
    before = files.read_object(path).get("train", {})
    remat = before.get("remat") if settings.train.remat == AUTO else settings.train.remat
    count = settings.train.microbatches or before.get("microbatches")
    if remat not in REMATS or not isinstance(count, int) or count < 1:
        return settings
    say(f"as the run began: train.remat={remat}, train.microbatches={count}")
    return _with(settings, remat, count)


def settled(model: Any, train: TrainConfig) -> Any:
    """A model of either objective with these microbatches and, if it has a decoder, this remat."""
    if not hasattr(model, "decoder"):
        return dataclasses.replace(model, microbatches=train.microbatches)
    decoder = model.decoder.clone(remat=train.remat)
    return dataclasses.replace(model, decoder=decoder, microbatches=train.microbatches)


def choose(
    settings: Config, mesh: Mesh, compile_for: Callable[[Config], Any]
) -> tuple[Config, Any]:
    """The settings with the first pair of remat and microbatches that fits, and what it compiled.

    compile_for: compiles the step of some settings. Every pair that is tried is printed.

    Raises:
      UserError: the memory is not known, or nothing fits; then with the smallest plan.
    """
    limit = device_memory(settings, mesh)
    allowed = SHARE * limit
    counts = microbatches(settings, mesh)
    say(
        f"choosing train.remat of {', '.join(_remats(settings))} and train.microbatches of "
        f"{', '.join(map(str, counts))}: the first that fits {SHARE:.0%} of {mib(limit)} MiB"
    )
    tried: dict[tuple[str, int], tuple[Any, int]] = {}

    def fits(remat: str, count: int) -> bool:
        if (remat, count) not in tried:
            compiled = compile_for(_with(settings, remat, count))
            plan = memory.plan(compiled)
            if plan is None:
                raise UserError(
                    "this backend tells no memory plan: set train.remat and train.microbatches"
                )
            tried[remat, count] = (compiled, plan.total)
            verdict = "fits" if plan.total <= allowed else "does not fit"
            say(f"remat {remat}, {count} microbatches: {mib(plan.total)} MiB, {verdict}")
        return tried[remat, count][1] <= allowed

    for remat in _remats(settings):
        if fits(remat, counts[0]):
            chosen = counts[0]
        elif fits(remat, counts[-1]):
            low, high = 0, len(counts) - 1  # the first does not fit, the last does
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if fits(remat, counts[middle]) else (middle, high)
            chosen = counts[high]
        else:
            continue
        say(f"chosen: train.remat={remat}, train.microbatches={chosen}")
        return _with(settings, remat, chosen), tried[remat, chosen][0]
    (remat, count), (_, size) = min(tried.items(), key=lambda item: item[1][1])
    raise UserError(
        f"nothing fits {SHARE:.0%} of {mib(limit)} MiB: the smallest plan, remat {remat} with "
        f"{count} microbatches, takes {mib(size)} MiB a device. A larger mesh.fsdp or mesh.tensor, "
        "a shorter data.sequence_length or train.loss_chunk need less"
    )


def microbatches(settings: Config, mesh: Mesh) -> list[int]:
    """The numbers of microbatches that may be, fewest first."""
    train, rows = settings.train, partitioning.row_shards(mesh)
    if train.microbatches:
        return [train.microbatches]
    least = 2 if settings.grounding.control == "shuffled" else 1
    found = [
        count
        for count in range(1, train.batch_size // rows + 1)
        if train.batch_size % (count * rows) == 0 and train.batch_size // count >= least
    ]
    if not found:
        raise UserError(
            f"train.batch_size is {train.batch_size}, not a multiple of mesh.data x mesh.fsdp = "
            f"{rows}, or holds too few rows"
        )
    return found


def device_memory(settings: Config, mesh: Mesh) -> float:
    """Bytes of the smallest device here: as settings say, or as it reports.

    Raises:
      UserError: neither says.
    """
    if settings.mesh.device_memory_gib:
        return settings.mesh.device_memory_gib * 2**30
    stats = [device.memory_stats() for device in mesh.local_devices]
    limits = [known["bytes_limit"] for known in stats if known and "bytes_limit" in known]
    least = min(limits, default=0)
    if jax.process_count() > 1:
        # In KiB, which int32 holds: what travels through JAX loses its upper half.
        all_kib = multihost_utils.process_allgather(np.array(least // 2**10, np.int32))
        least = int(all_kib.min()) * 2**10
    if not least:
        raise UserError(
            "train.remat=auto and train.microbatches=0 need the memory of a device, which these "
            "do not report: set mesh.device_memory_gib"
        )
    return float(least)


def _remats(settings: Config) -> tuple[str, ...]:
    return REMATS if settings.train.remat == AUTO else (settings.train.remat,)


def _with(settings: Config, remat: str, count: int) -> Config:
    train = dataclasses.replace(settings.train, remat=remat, microbatches=count)
    return dataclasses.replace(settings, train=train)
