"""Real processes that are killed, told to stop, doubled and hung (docs/reliability.md)."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.faults import small_run
from tests.faults.small_run import FAILED, PREEMPTED, Runs, computed, steps


def test_sigterm_saves_the_update_under_way_and_a_second_run_is_kept_out(
    text: Path, tmp_path: Path, runs: Runs
) -> None:
    """Rows 3 and 17, the cheapest of them: one process that trains, another that may not."""
    values = small_run.settings(text, train__steps=100_000)
    first = runs.start(values, tmp_path / "run")
    first.until(r"^step 3/")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir() if p.suffix == ".json"}
    second = runs.start(values, tmp_path / "run").ends(FAILED)
    assert second.startswith(f"error: {tmp_path / 'run'} is in use by process {first.pid} on ")
    assert second.count("\n") == 1
    assert {p: p.stat().st_mtime_ns for p in before} == before
    first.send()
    said = first.ends(PREEMPTED)
    [last] = steps(tmp_path / "run")
    assert f"stopped by SIGTERM: step {last} of 100000 is saved, the same command goes on" in said
    assert list(computed(tmp_path / "run")) == list(range(1, last + 1))


@pytest.mark.faults
def test_what_sigterm_stopped_ends_bit_identical(text: Path, tmp_path: Path, runs: Runs) -> None:
    """Row 3, with evaluation: also that of the step at which it was stopped."""
    values = small_run.settings(text, train__steps=60, eval__every_steps=1)
    runs.start(values, tmp_path / "whole").ends()
    stopped = runs.start(
        values, tmp_path / "a", code=small_run.PAUSES.format(batch=9, flag=str(tmp_path / "go"))
    )
    stopped.until("waiting")
    stopped.send()
    stopped.until("SIGTERM: what is under way is saved first")
    (tmp_path / "go").touch()
    stopped.ends(PREEMPTED)
    assert steps(tmp_path / "a") == [8]  # whose evaluation was left out
    again = runs.start(values, tmp_path / "a").ends()
    assert "held-out data was not evaluated at step 8 before the run ended: now" in again
    assert computed(tmp_path / "a") == computed(tmp_path / "whole")


@pytest.mark.faults
def test_what_sigkill_ended_ends_bit_identical(text: Path, tmp_path: Path, runs: Runs) -> None:
    """Row 1."""
    values = small_run.settings(text, checkpoint__every_steps=7, eval__every_steps=50)
    runs.start(values, tmp_path / "whole").ends()
    killed = runs.start(values, tmp_path / "a")
    killed.until(r"^step 30/")
    killed.send(signal.SIGKILL)
    killed.ends(-signal.SIGKILL)
    runs.start(values, tmp_path / "a").ends()
    assert computed(tmp_path / "a") == computed(tmp_path / "whole")


# The state is on the way to the disk until a file is there.
_SLOW_SAVE = """
import os, time
import orbax.checkpoint as ocp
finish = ocp.CheckpointManager.wait_until_finished
def wait(self):
    print("saving", flush=True)
    while not os.path.exists({flag!r}):
        time.sleep(0.05)
    finish(self)
ocp.CheckpointManager.wait_until_finished = wait
"""


@pytest.mark.faults
def test_more_signals_do_not_end_a_save(text: Path, tmp_path: Path, runs: Runs) -> None:
    """Row 6."""
    values = small_run.settings(text, train__steps=100_000)
    code = _SLOW_SAVE.format(flag=str(tmp_path / "go"))
    process = runs.start(values, tmp_path / "run", code=code)
    process.until(r"^step 3/")
    process.send()
    process.until("^saving")
    process.send()
    process.send()
    (tmp_path / "go").touch()
    said = process.ends(PREEMPTED)
    [last] = steps(tmp_path / "run")
    assert f"step {last} of 100000 is saved" in said
    assert said.count("SIGTERM") == 2  # that it came, and what became of it
    runs.start(values, tmp_path / "run").until(rf"resumed at step {last}$")


# Compiling takes as long as it may, without an instruction of Python in between.
_SLOW_COMPILE = """
import ctypes
from blindvalm_jax import compilation
def compile_step(*args):
    print("compiling", flush=True)
    ctypes.CDLL(None).sleep(1000)
    ctypes.CDLL(None).sleep(1000)
compilation.compile_step = compile_step
"""


@pytest.mark.faults
@pytest.mark.parametrize(
    "code",
    [
        _SLOW_COMPILE,
        _SLOW_COMPILE.replace("ctypes.CDLL(None).sleep(1000)", "__import__('time').sleep(1000)"),
    ],
    ids=["C", "Python"],
)
def test_sigterm_before_the_first_update_ends_at_once(
    text: Path, tmp_path: Path, runs: Runs, code: str
) -> None:
    process = runs.start(small_run.settings(text), tmp_path / "run", code=code)
    process.until("^compiling")
    process.send()
    said = process.ends(PREEMPTED, within=60)
    assert "stopped by SIGTERM: the same command goes on from what is on disk" in said
    assert "Traceback" not in said
    assert steps(tmp_path / "run") == []
    runs.start(small_run.settings(text, train__steps=2), tmp_path / "run").ends()


_LONG_EVALUATION = """
import time
from blindvalm_jax.objectives.language import Language
def evaluate(self, params, frozen):
    print("evaluating", flush=True)
    time.sleep(1000)
Language.evaluate = evaluate
"""


@pytest.mark.faults
@pytest.mark.parametrize("step", [3, 5])  # the last one is 5
def test_sigterm_cuts_an_evaluation_short(
    text: Path, tmp_path: Path, runs: Runs, step: int
) -> None:
    values = small_run.settings(text, train__steps=5, eval__every_steps=step)
    runs.start(values, tmp_path / "whole").ends()
    process = runs.start(values, tmp_path / "a", code=_LONG_EVALUATION)
    process.until("^evaluating")
    process.send()
    process.ends(PREEMPTED)
    assert steps(tmp_path / "a") == [step]
    runs.start(values, tmp_path / "a").ends()
    assert computed(tmp_path / "a") == computed(tmp_path / "whole")
    assert "nothing to do" in runs.start(values, tmp_path / "a").ends()


@pytest.mark.faults
def test_a_run_that_hangs_says_where_and_ends(text: Path, tmp_path: Path, runs: Runs) -> None:
    """Row 19: the data source sleeps."""
    values = small_run.settings(text, train__watchdog_seconds=10.0, checkpoint__every_steps=2)
    code = small_run.PAUSES.format(batch=8, flag=str(tmp_path / "never"))
    said = runs.start(values, tmp_path / "run", code=code).ends(FAILED)
    assert "error: no update has ended for 10 seconds (train.watchdog_seconds)" in said
    assert " in slow\n" in said  # the stack of the thread that hangs
    assert steps(tmp_path / "run")[-1] == 6


@pytest.mark.faults
def test_what_takes_long_is_no_hang(text: Path, tmp_path: Path, runs: Runs) -> None:
    """Compilation, evaluation and saving longer than the watchdog waits."""
    values = small_run.settings(
        text, train__steps=2, train__watchdog_seconds=10.0, eval__every_steps=2
    )
    code = """
import time
import orbax.checkpoint as ocp
from blindvalm_jax import compilation
from blindvalm_jax.objectives.language import Language
def longer(owner, name):
    real = getattr(owner, name)
    def call(*args, **keywords):
        print(f"long {name}", flush=True)
        time.sleep(15)
        return real(*args, **keywords)
    setattr(owner, name, call)
longer(compilation, "compile_step")
longer(Language, "evaluate")
longer(ocp.CheckpointManager, "save")
longer(ocp.CheckpointManager, "wait_until_finished")
"""
    said = runs.start(values, tmp_path / "run", code=code).ends()
    assert all(f"long {name}" in said for name in ("compile_step", "evaluate", "save", "wait"))


@pytest.mark.faults
def test_a_run_goes_on_with_other_numbers_of_devices(
    text: Path, tmp_path: Path, runs: Runs
) -> None:
    """Row 16: the same batches, and losses within 1e-5."""
    values = small_run.settings(text, train__steps=8, eval__every_steps=4)
    values.checkpoint.every_steps = 4
    runs.start(values, tmp_path / "8", devices=8).ends()
    expected = computed(tmp_path / "8")
    assert sorted(expected) == list(range(1, 9))
    for devices in (1, 2, 4):
        workdir = tmp_path / str(devices)
        shutil.copytree(tmp_path / "8", workdir)
        shutil.rmtree(workdir / "checkpoints" / "8")
        assert "resumed at step 4" in runs.start(values, workdir, devices=devices).ends()
        found = computed(workdir)
        assert found.keys() == expected.keys()
        for step, metrics in found.items():
            assert metrics == pytest.approx(expected[step], rel=1e-5), step
