"""A worker: takes a run of the sweep that nobody has, trains it, and the next one."""

from __future__ import annotations

import os
import socket
import time
import traceback
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from blindvalm_jax import files, starting
from blindvalm_jax.checkpoints import layout
from blindvalm_jax.command_line import print_error
from blindvalm_jax.config import Config
from blindvalm_jax.errors import DIVERGED, Preempted, UserError, first_line
from blindvalm_jax.runs import held
from blindvalm_jax.survival import preemption
from blindvalm_jax.sweep import outcome, plans, trunks
from blindvalm_jax.sweep.leases import Leases
from blindvalm_jax.sweep.manifest import Manifest, State

# Attempts in a row that never ended and left no newer checkpoint, before a run is called failed.
_MOST_CUTS = 3
_POLL_SECONDS = 1.0


def runs_of(workdir: Path) -> Path:
    """Where the directories of the runs are."""
    return workdir / "runs"


def leases_of(workdir: Path, *, seconds: float) -> Leases:
    """The leases of a sweep for a worker of its own name."""
    worker = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    return Leases(workdir / "leases", worker=worker, seconds=seconds)


def work(
    workdir: Path,
    runs: Mapping[str, Config],
    *,
    lease_seconds: float,
    only: Sequence[str] | None = None,
) -> int:
    """Trains until no run is open, also those that other workers drop; returns the exit code.

    0: all are done; 1: some failed or diverged, each named. only: the runs that matter, and are
    trained with those that they branch from, as far as nobody else trains these.

    Raises:
      UserError: runs branch from each other.
      Preempted: SIGTERM ended it, and its run is saved.
    """
    trunks.levels(runs)
    with preemption.noticed():
        return _work(workdir, runs, list(runs) if only is None else only, lease_seconds)


def _work(
    workdir: Path, runs: Mapping[str, Config], wanted: Sequence[str], lease_seconds: float
) -> int:
    manifest, leases = Manifest(workdir), leases_of(workdir, seconds=lease_seconds)
    told: list[str] = []
    while True:
        states = manifest.states()
        left = [name for name in wanted if states[name].open]
        if not left:
            return _conclude(manifest, wanted)
        # several may wait for the same one
        left = list(dict.fromkeys(_first_of(name, states, runs, runs_of(workdir)) for name in left))
        if any(_done_by_this(name, leases, manifest, runs, workdir) for name in left):
            told = []
            continue
        if told != left:
            print(f"waiting: others train {', '.join(left)}", flush=True)
        told = left
        time.sleep(_POLL_SECONDS)


def _first_of(
    name: str, states: Mapping[str, State], runs: Mapping[str, Config], place: Path
) -> str:
    """A run, or the one to train before it can begin: its trunk, if that has not come so far.

    place: of the directories of the runs.
    """
    trunk = trunks.of(runs[name])
    if trunk is None or trunks.ready(runs[name], place):
        return name
    if not states[trunk.run].open:  # it never will
        return name
    return _first_of(trunk.run, states, runs, place)


def _done_by_this(
    name: str, leases: Leases, manifest: Manifest, runs: Mapping[str, Config], workdir: Path
) -> bool:
    """Trains a run, if nobody else does."""
    if leases.take(name) is not None:
        return False
    directory = runs_of(workdir) / name
    with leases.kept(name, lost=_end_at_once):
        try:
            with held(directory):  # by a worker that is silent and lives, say
                # Another may have ended it between the look at the manifest and the lease.
                if manifest.states()[name].open:
                    _attempt(manifest, name, runs[name], directory)
        except files.HeldError:
            return False
    return True


def _attempt(manifest: Manifest, name: str, settings: Config, workdir: Path) -> None:
    """Trains a run and writes down how it ended; what ends it ends no other run."""
    newest = max(layout.steps(workdir), default=0)
    cut = manifest.states()[name].cut_at(newest)
    if cut >= _MOST_CUTS:
        about = f"{cut} attempts in a row were cut off, and left no newer checkpoint"
        manifest.add(name, "failed", about=about)
        print_error(f"{name}: {about}; given up")
        return
    print(f"{name}: {f'goes on at step {newest}' if newest else 'begun'}", flush=True)
    process = f"{socket.gethostname()}:{os.getpid()}"
    manifest.add(name, "started", process=process, step=newest)
    about = ""
    try:
        code = starting.start(plans.placed(settings, workdir.parents[1]), workdir)
    except UserError as error:
        code, about = 1, str(error)
        print_error(f"{name}: {error}")
    except Exception as error:  # a lack of memory, a bug: the other runs go on
        code, about = 1, f"{type(error).__name__}: {first_line(error)}"
        traceback.print_exc()
        print_error(f"{name}: {about}")
    except (Preempted, KeyboardInterrupt):
        with preemption.kept():
            manifest.add(name, "preempted")
        raise
    if code == 0:
        manifest.add(name, "done", **outcome.of(workdir))
        return
    if code == DIVERGED:
        about = outcome.of_divergence(workdir)
    about = outcome.about(about, workdir.parent.parent)
    manifest.add(name, "diverged" if code == DIVERGED else "failed", about=about)


def _conclude(manifest: Manifest, names: Sequence[str]) -> int:
    states = manifest.states()
    bad = [name for name in names if states[name].ended != "done"]
    print(f"{len(names) - len(bad)} of {len(names)} runs are done", flush=True)
    for name in bad:
        about = states[name].about
        print_error(f"{name} {states[name].ended}{f': {about}' if about else ''}")
    return 1 if bad else 0


def _end_at_once() -> None:
    """What trains under a lease that is another's would write over the other's work."""
    print_error("this worker stood still and its run was taken over by another: it ends here")
    os._exit(1)
