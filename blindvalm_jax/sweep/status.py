"""Where each run of a sweep is."""

from __future__ import annotations

from pathlib import Path

from blindvalm_jax import metrics
from blindvalm_jax.errors import UserError
from blindvalm_jax.sweep import leases, worker
from blindvalm_jax.sweep.leases import Lease
from blindvalm_jax.sweep.manifest import Manifest, State


def lines(workdir: Path) -> list[str]:
    """A line for each run: how it ended, or who trains it, and its newest loss.

    Raises:
      UserError: the directory holds no sweep.
    """
    if not (workdir / "manifest.jsonl").exists():
        raise UserError(f"{workdir} holds no sweep: it has no manifest.jsonl")
    found = []
    place = worker.leases_in(workdir)
    for name, state in Manifest(workdir).states().items():
        records = metrics.records(worker.runs_of(workdir) / name / "metrics.jsonl")
        last = next((line for line in reversed(records) if "train/loss" in line), None)
        loss = last and last["train/loss"]  # null where it is not finite
        at = "" if last is None else f"step {last['step']:,}  loss "
        at += "" if last is None else "not finite" if loss is None else f"{loss:.4f}"
        found.append(f"{name:30} {_word(state, leases.holder(place, name)):40} {at}".rstrip())
    return found


def _word(state: State, lease: Lease | None) -> str:
    if state.open and lease is not None:  # a worker that is killed at the end leaves its lease
        silent = ", silent for too long" if lease.expired else ""
        return f"{'dropped' if lease.expired else 'training'} by {lease.worker}{silent}"
    return state.ended or "waiting"
