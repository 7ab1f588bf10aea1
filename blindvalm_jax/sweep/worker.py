"""A worker: takes a run of the sweep that nobody has, trains it, and the next one."""

from __future__ import annotations

import contextlib
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
from blindvalm_jax.errors import DIVERGED, LEFT, Preempted, UserError, first_line
from blindvalm_jax.grounding import faiss_engine
from blindvalm_jax.runs import held
from blindvalm_jax.survival import preemption
from blindvalm_jax.sweep import outcome, plans, trunks
from blindvalm_jax.sweep.leases import Leases
from blindvalm_jax.sweep.manifest import Manifest, State

# Attempts in a row that never ended and left no newer checkpoint, before a run is called failed.
_MOST_CUTS = 3
# A worker all of whose runs fail, so many of them, is on a machine that no run should be lost to.
_MOST_FAILURES = 3
_POLL_SECONDS = 1.0


def runs_of(workdir: Path) -> Path:
    """Where the directories of the runs are."""
    return workdir / "runs"


def leases_in(workdir: Path) -> Path:
    """Where the leases of the runs are."""
    return workdir / "leases"


def leases_of(workdir: Path, *, seconds: float) -> Leases:
    """The leases of a sweep for a worker of its own name."""
    worker = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    return Leases(leases_in(workdir), worker=worker, seconds=seconds)


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
      UserError: FAISS is asked for and not installed, or the first runs of this worker all failed.
      Preempted: SIGTERM ended it, and its run is saved.
    """
    with preemption.noticed():
        return _work(workdir, runs, list(runs) if only is None else only, lease_seconds)


def _work(
    workdir: Path, runs: Mapping[str, Config], wanted: Sequence[str], lease_seconds: float
) -> int:
    manifest, leases = Manifest(workdir), leases_of(workdir, seconds=lease_seconds)
    told: list[str] = []
    ends: list[str] = []  # of this worker's runs
    while True:
        states = manifest.states()
        left = [name for name in wanted if states[name].open]
        if not left:
            return _conclude(manifest, wanted)
        if any(runs[name].grounding.search == "faiss" for name in left):
            faiss_engine.library()  # or all of these would fail here
        if ends == ["failed"] * _MOST_FAILURES:
            raise UserError(
                f"all {len(ends)} runs that this worker took have failed: it leaves the others; "
                "mend what is said above and start it again, with --retry for those that failed"
            )
        # several may wait for the same one
        left = list(dict.fromkeys(_first_of(name, states, runs, runs_of(workdir)) for name in left))
        taken = (_ended_here(name, leases, manifest, runs, workdir) for name in left)
        if (ended := next((end for end in taken if end is not None), None)) is not None:
            ends += [ended] if ended else []
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


def _ended_here(
    name: str, leases: Leases, manifest: Manifest, runs: Mapping[str, Config], workdir: Path
) -> str | None:
    """Trains a run, if nobody else does, and says how it ended; None: another trains it.

    "": another has ended it in the meantime, or it fails by what others did before.
    """
    if leases.take(name) is not None:
        return None
    directory = runs_of(workdir) / name
    with leases.kept(name, lost=_end_at_once), contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(directory))
        except files.HeldError:  # by a worker that is silent and lives, say
            return None
        except UserError as error:
            return _failed(manifest, name, str(error), workdir)
        # Another may have ended it between the look at the manifest and the lease.
        if not manifest.states()[name].open:
            return ""
        can_begin = trunks.ready(runs[name], runs_of(workdir))
        ended = _attempt(manifest, name, runs[name], directory)
        return ended if can_begin else ""


def _attempt(manifest: Manifest, name: str, settings: Config, workdir: Path) -> str:
    """Trains a run, writes down how it ended, which ends no other, and returns that.

    "": it is given up, as attempts before were cut off.
    """
    sweep, newest = workdir.parents[1], max(layout.steps(workdir), default=0)
    cut = manifest.states()[name].cut_at(newest)
    if cut >= _MOST_CUTS:
        about = f"{cut} attempts in a row were cut off, and left no newer checkpoint"
        _failed(manifest, name, about, sweep)
        return ""
    print(f"{name}: {f'goes on at step {newest}' if newest else 'begun'}", flush=True)
    process = f"{socket.gethostname()}:{os.getpid()}"
    manifest.add(name, "started", process=process, step=newest)
    try:
        code = starting.start(plans.placed(settings, sweep), workdir)
    except UserError as error:
        return _failed(manifest, name, str(error), sweep)
    except Exception as error:  # a lack of memory, a bug: the other runs go on
        traceback.print_exc()
        return _failed(manifest, name, f"{type(error).__name__}: {first_line(error)}", sweep)
    except (Preempted, KeyboardInterrupt):
        with preemption.kept():
            manifest.add(name, "preempted")
        raise
    if code == DIVERGED:
        about = outcome.about(outcome.of_divergence(workdir), sweep)
        manifest.add(name, "diverged", about=about)
        return "diverged"
    if code:
        return _failed(manifest, name, f"ended with {code}", sweep)
    manifest.add(name, "done", **outcome.of(workdir))
    return "done"


def _failed(manifest: Manifest, name: str, about: str, sweep: Path) -> str:
    print_error(f"{name}: {about}")
    manifest.add(name, "failed", about=outcome.about(about, sweep))
    return "failed"


def _conclude(manifest: Manifest, names: Sequence[str]) -> int:
    states = manifest.states()
    bad = [name for name in names if states[name].ended != "done"]
    print(f"{len(names) - len(bad)} of {len(names)} runs are done", flush=True)
    for name in bad:
        about = states[name].about
        print_error(f"{name} {states[name].ended}{f': {about}' if about else ''}")
    return 1 if bad else 0


def _end_at_once() -> None:
    """What trains under a lease that is another's would write over the other's work.

    That is no error of the run: schedulers start a worker again that ends so.
    """
    print_error("this worker stood still, so that another may have its run by now: it ends here")
    os._exit(LEFT)
