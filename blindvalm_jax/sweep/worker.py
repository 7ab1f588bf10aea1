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
from blindvalm_jax.config import Config
from blindvalm_jax.errors import DIVERGED, Preempted, UserError, first_line, print_error
from blindvalm_jax.runs import held
from blindvalm_jax.survival import preemption
from blindvalm_jax.sweep import plans, trunks
from blindvalm_jax.sweep.leases import Leases
from blindvalm_jax.sweep.manifest import Manifest

_MOST_CUTS = 3  # attempts in a row that never ended, before a run is called failed
_POLL_SECONDS = 1.0


def runs_of(workdir: Path) -> Path:
    """Where the directories of the runs are."""
    return workdir / "runs"


def leases_of(workdir: Path, *, seconds: float) -> Leases:
    """The leases of a sweep for a worker of its own name."""
    worker = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    return Leases(workdir / "leases", worker=worker, seconds=seconds)


def work(workdir: Path, runs: Mapping[str, Config], *, lease_seconds: float) -> int:
    """Trains until no run is open, also those that other workers drop; returns the exit code.

    0: all are done; 1: some failed or diverged, each named.

    Raises:
      Preempted: SIGTERM ended it, and its run is saved.
    """
    with preemption.noticed():
        return _work(workdir, runs, lease_seconds)


def _work(workdir: Path, runs: Mapping[str, Config], lease_seconds: float) -> int:
    manifest, leases = Manifest(workdir), leases_of(workdir, seconds=lease_seconds)
    waiting = False
    while True:
        states = manifest.states()
        left = [name for name in runs if states[name].open]
        if not left:
            return _conclude(manifest, list(runs))
        if not any(_done_by_this(name, leases, manifest, runs, workdir) for name in left):
            if not waiting:
                print(f"waiting: others train {', '.join(left)}", flush=True)
            waiting = True
            time.sleep(_POLL_SECONDS)
        else:
            waiting = False


def _done_by_this(
    name: str, leases: Leases, manifest: Manifest, runs: Mapping[str, Config], workdir: Path
) -> bool:
    """Trains a run, if nobody else does."""
    if not _may_begin(name, manifest, runs, workdir) or leases.take(name) is not None:
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


def _may_begin(name: str, manifest: Manifest, runs: Mapping[str, Config], workdir: Path) -> bool:
    """Whether a run need not wait for its trunk: that has come so far, or never will."""
    trunk = trunks.of(runs[name])
    if trunk is None or trunks.ready(runs[name], runs_of(workdir)):
        return True
    return not manifest.states()[trunk.run].open


def _attempt(manifest: Manifest, name: str, settings: Config, workdir: Path) -> None:
    """Trains a run and writes down how it ended; what ends it ends no other run."""
    cut = manifest.states()[name].cut
    if cut >= _MOST_CUTS:
        manifest.add(name, "failed", about=f"{cut} attempts in a row were cut off")
        print_error(f"{name}: {cut} attempts in a row were cut off; given up")
        return
    print(f"{name}: {'taken over' if cut else 'begun'}", flush=True)
    manifest.add(name, "started", process=f"{socket.gethostname()}:{os.getpid()}")
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
    event = {0: "done", DIVERGED: "diverged"}.get(code, "failed")
    manifest.add(name, event, **({"about": about} if about else {}))


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
