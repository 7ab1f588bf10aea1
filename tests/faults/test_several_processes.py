"""Several processes train one run: as one does, and what becomes of them when one is ended."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import ml_collections
import pytest

from tests import small_images, test_contrastive_training
from tests.faults import small_run
from tests.faults.small_run import (
    DIVERGED,
    FAILED,
    LEFT,
    PREEMPTED,
    Runs,
    check_alike,
    check_equal,
    computed,
    steps,
)

pytestmark = pytest.mark.faults
SOON = 30.0  # seconds within which a process ends without the others


def train(
    runs: Runs,
    values: ml_collections.ConfigDict,
    workdir: Path,
    *,
    processes: int,
    until: int = 0,
    behind: int = 0,
) -> None:
    """Trains to the end; until: stops all by SIGTERM to the last process after that step.

    behind: the step that is saved then.
    """
    if not until:
        started = runs.several(processes, values, workdir)
        for process in started:
            process.ends()
        return
    go = workdir.parent / f"go_{processes}"
    pause = small_run.PAUSES.format(batch=until + 1, flag=str(go))
    started = runs.several(
        processes, values, workdir, codes={processes - 1: pause}, TF_CPP_MIN_LOG_LEVEL="0"
    )
    started[-1].until("^waiting")
    if behind:
        small_run.wait_for(lambda: steps(workdir) == [behind])
        time.sleep(0.5)  # for what Orbax does afterwards
    started[-1].send()
    for process in started:
        process.until("Preemption sync counter is set")  # JAX says so, to who listens
    go.touch()
    for process in started:
        process.ends(PREEMPTED)


def test_processes_train_as_one_does_and_hand_over(text: Path, tmp_path: Path, runs: Runs) -> None:
    """Row 4 among others: SIGTERM to one of them makes all save the same step, and end."""
    values = small_run.settings(text, train__steps=12, eval__every_steps=6)
    runs.start(values, tmp_path / "one").ends()
    train(runs, values, tmp_path / "two", processes=2)
    check_equal(tmp_path / "one", tmp_path / "two")
    train(runs, values, tmp_path / "four", processes=4, until=3)
    [stopped] = steps(tmp_path / "four")
    assert 3 <= stopped < 12
    train(runs, values, tmp_path / "four", processes=2)
    check_equal(tmp_path / "one", tmp_path / "four")
    assert steps(tmp_path / "four") == [stopped, 12]
    for several in ("two", "four"):
        check_alike(tmp_path / "one", tmp_path / several, step=12)


def test_sigterm_behind_a_save_stops_all_at_one_step(
    text: Path, tmp_path: Path, runs: Runs
) -> None:
    """Row 4; a save that has just ended must not tell JAX of an older step than the loop did."""
    values = small_run.settings(text, train__steps=6, checkpoint__every_steps=2)
    train(runs, values, tmp_path / "stopped", processes=2, until=3, behind=2)
    saved, stopped = steps(tmp_path / "stopped")
    assert saved == 2
    assert stopped in (3, 4)
    train(runs, values, tmp_path / "stopped", processes=2)
    runs.start(values, tmp_path / "one").ends()
    check_equal(tmp_path / "one", tmp_path / "stopped")


def test_any_number_of_processes_goes_on(text: Path, tmp_path: Path, runs: Runs) -> None:
    """One with what two and four began, two and four with what one did, on other cuts."""
    values = small_run.settings(text, train__steps=8, checkpoint__every_steps=4)
    runs.start(values, tmp_path / "one").ends()
    values.mesh.fsdp, values.mesh.data = 2, -1
    for first, then in ((1, 2), (2, 1), (4, 1), (1, 4)):
        workdir = tmp_path / f"{first}_{then}"
        pause = small_run.PAUSES.format(batch=6, flag=str(tmp_path / "never"))
        began = runs.several(first, values, workdir, devices=2, codes={0: pause})
        began[0].until("^waiting")
        small_run.wait_for(lambda: steps(workdir) == [4])  # noqa: B023
        for process in began:
            process.send(signal.SIGKILL)
        for process in began:
            process.ends(-signal.SIGKILL)
        for process in runs.several(then, values, workdir, devices=2):
            process.ends()
        check_equal(tmp_path / "one", workdir)
        check_alike(tmp_path / "one", workdir, step=8)


def test_the_survivor_of_a_killed_process_ends_soon(text: Path, tmp_path: Path, runs: Runs) -> None:
    """Row 5, and that the newest checkpoint is gone on from."""
    values = small_run.settings(text, train__steps=100_000, checkpoint__every_steps=2)
    for gone in (1, 0):
        both = runs.several(2, values, tmp_path / "run", heartbeat=10)
        both[0].until(r"^step \d*5/")
        both[gone].send(signal.SIGKILL)
        said = both[1 - gone].ends(*LEFT, within=SOON)
        assert "another process of the run is gone" in said or "another task died" in said
    assert steps(tmp_path / "run")


def test_a_process_that_is_silent_is_taken_for_dead(text: Path, tmp_path: Path, runs: Runs) -> None:
    """Row 5 where no connection is closed: only the missing heartbeat tells."""
    values = small_run.settings(text, train__steps=100_000)
    one, other = runs.several(2, values, tmp_path / "run", heartbeat=10)
    one.until("^step 5/")
    other.send(signal.SIGSTOP)
    try:
        one.ends(*LEFT, within=SOON)
    finally:
        other.send(signal.SIGKILL)
    other.ends(-signal.SIGKILL)


def test_a_process_that_fails_leaves_none_waiting(text: Path, tmp_path: Path, runs: Runs) -> None:
    """Also after a save that they have not yet agreed on, and while the others go on training."""
    values = small_run.settings(text, checkpoint__every_steps=3)
    fails = """
from blindvalm_jax.data import pipeline
from blindvalm_jax.errors import UserError
real = pipeline.Batches.__next__
left = 4
def failing(self):
    global left
    left -= 1
    if left < 0:
        raise UserError("a record of mine cannot be read")
    return real(self)
pipeline.Batches.__next__ = failing
"""
    one, other = runs.several(2, values, tmp_path / "run", codes={1: fails})
    assert "error: process 1: a record of mine cannot be read" in other.ends(FAILED)
    one.ends(*LEFT, within=SOON)


def test_a_process_that_hangs_ends_all_and_says_where(
    text: Path, tmp_path: Path, runs: Runs
) -> None:
    """Row 19: the data source of the first one sleeps, and the other waits for its rows."""
    values = small_run.settings(text, train__watchdog_seconds=10.0, checkpoint__every_steps=2)
    code = small_run.PAUSES.format(batch=8, flag=str(tmp_path / "never"))
    first, other = runs.several(2, values, tmp_path / "run", codes={0: code}, heartbeat=60)
    said = first.ends(FAILED)
    assert "no update has ended for 10 seconds (train.watchdog_seconds)" in said
    assert " in slow\n" in said  # the stack of the thread that hangs
    other.ends(FAILED, *LEFT, within=SOON)
    assert steps(tmp_path / "run")[-1] == 6


def test_what_the_first_process_refuses_ends_all(text: Path, tmp_path: Path, runs: Runs) -> None:
    """Each with one line: a directory in use, text that is not there, what one process alone may.

    The last a dry run of one process refuses by the same line.
    """
    values = small_run.settings(text, train__steps=100_000)
    holder = runs.start(values, tmp_path / "run")
    holder.until("^step 1/")
    first, other = runs.several(2, values, tmp_path / "run")
    assert f"is in use by process {holder.pid} on " in first.ends(FAILED)
    assert "error: process 1: the first process cannot begin: see what it says" in other.ends(
        FAILED
    )
    holder.close()
    simulated = ("--dry_run", "--simulated_devices=2", "--simulated_processes=2")
    for values, message in (
        (small_run.settings(tmp_path / "nothing.txt"), "nothing.txt"),
        (
            small_run.settings(text, mesh__data=1, mesh__tensor=2),
            "mesh.tensor must stay within the 1 devices of one",
        ),
        (small_run.settings(text, eval__tasks=f"text:{text}"), "tasks are asked by runs of one"),
    ):
        planning = runs.start(values, tmp_path / "planned", *simulated)
        first, other = runs.several(2, values, tmp_path / "refused")
        assert message in first.ends(FAILED)
        [line] = [line for line in first.lines if line.startswith("error: ")]
        assert "error: process 1: " in other.ends(FAILED)
        assert line in planning.ends(FAILED)


def test_a_contrastive_run_of_two_processes(tmp_path: Path, runs: Runs) -> None:
    images = small_images.write_toyworld(tmp_path / "images", count=64)
    values = test_contrastive_training.settings(images, train__steps=4, mesh__data=-1)
    values.checkpoint.every_steps = values.eval.every_steps = 2
    runs.start(values, tmp_path / "one").ends()
    train(runs, values, tmp_path / "two", processes=2)
    check_equal(tmp_path / "one", tmp_path / "two")


def test_all_processes_leave_out_an_update_that_one_has_spoilt(
    text: Path, tmp_path: Path, runs: Runs
) -> None:
    """Rows 11 and 12 of several processes: none may go on with what the others have not done."""
    values = small_run.settings(text, train__steps=8, train__microbatches=2, mesh__data=-1)
    values.train.on_spike, values.train.spike_factor, values.train.spike_warmup = "clip", 2.0, 2
    spoilt = """
from blindvalm_jax.data import pipeline
real = pipeline.Batches.__next__
count = 0
def spoils(self):
    global count
    count += 1
    rows = real(self)
    if count in (3, 6):
        rows["weights"] = rows["weights"].copy()
        rows["weights"][-1, 0] = float("nan") if count == 3 else 1e6
    return rows
pipeline.Batches.__next__ = spoils
"""
    runs.start(values, tmp_path / "one", code=spoilt).ends()
    for process in runs.several(2, values, tmp_path / "two", codes={1: spoilt}):
        process.ends()
    check_equal(tmp_path / "one", tmp_path / "two")
    last = computed(tmp_path / "two")[8]
    assert (last["train/skipped_updates"], last["train/clipped_updates"]) == (1, 1)
    values.train.nonfinite_limit = 1
    for process in runs.several(2, values, tmp_path / "ends", codes={1: spoilt}):
        process.ends(DIVERGED)
