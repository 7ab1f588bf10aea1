"""Processes killed while they save: the half-written checkpoint is none, the one before is used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blindvalm_jax.checkpoints import layout
from tests import dying, small_text, test_checkpoints, test_train
from tests.faults import small_run

# argv: the moment, as the end of what is made or renamed to; the rename of the whole is the commit.
DYING = """
import os, signal, sys
from pathlib import Path
moment = sys.argv.pop(1)
def dying(function):
    def call(*args, **keywords):
        if any(str(x).endswith(moment) for x in args[:2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **keywords)
    return call
for owner in (os, Path):
    for name in ("mkdir", "rename", "replace"):
        setattr(owner, name, dying(getattr(owner, name)))
"""
SAVE = """
from tests import test_checkpoints
test_checkpoints.save(Path(sys.argv[1]), 2, 4)
"""


@pytest.mark.faults
def test_a_run_killed_before_the_commit_ends_bit_identical(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    small_text.write_text(text, small_text.documents(120))
    flags = test_train.command(test_train.settings(text), tmp_path)[3:]
    died = _train(
        ["-c", small_run.TRAIN.format(code=DYING), "checkpoints/4"], flags, tmp_path / "run"
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert [path.name for path in layout.unfinished(tmp_path / "run")] == ["4.orbax-checkpoint-tmp"]
    assert layout.steps(tmp_path / "run") == [2]
    for name in ("run", "whole"):
        done = _train(["-m", "blindvalm_jax.train"], flags, tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert ("resumed at step 2" in done.stdout) == (name == "run")
        assert ("a checkpoint that was never finished" in done.stdout) == (name == "run")
        assert layout.steps(tmp_path / name) == [2, 4, 6]
        assert layout.unfinished(tmp_path / name) == []
    found, expected = (
        test_train.computed(test_train.read_metrics(tmp_path / name)) for name in ("run", "whole")
    )
    assert found == expected


def _train(start: list[str], flags: list[str], run: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *start, *flags, f"--workdir={run}"],
        cwd=test_train.ROOT,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.faults
@pytest.mark.parametrize(
    "moment",
    ["/4.orbax-checkpoint-tmp", "/4.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp", "/4"],
)
def test_killed_at_any_moment_of_a_save(tmp_path: Path, moment: str) -> None:
    """Before anything is written, among the items, and between data and commit."""
    died = dying.run_python(DYING + SAVE, moment, tmp_path)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert layout.steps(tmp_path) == [2]
    test_checkpoints.assert_equal(test_checkpoints.restore(tmp_path), test_checkpoints.state(2))
    assert [path.name for path in layout.directory(tmp_path).iterdir()] == ["2"]
