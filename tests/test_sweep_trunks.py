"""Runs of a sweep that branch from another one: begun when that has come so far, not before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blindvalm_jax import config, starting
from blindvalm_jax.checkpoints import layout
from blindvalm_jax.config import Config
from blindvalm_jax.errors import UserError
from blindvalm_jax.sweep import trunks, worker
from blindvalm_jax.sweep.manifest import Manifest, State
from tests import small_models, small_text
from tests.test_guard import small


def settings(text: Path, steps: int, **changes: Any) -> Config:
    shape: dict[str, Any] = {"optimizer__schedule": "constant_cooldown", "checkpoint__keep": 1}
    shape |= {"optimizer__warmup_steps": 1, "checkpoint__every_steps": 2}
    return small(text, **{"train__steps": steps, **shape, **changes})


def test_branches_wait_for_their_trunk_whatever_comes_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    small_text.write_text(text, small_text.documents(60))
    runs = {
        "short": settings(text, 5, train__branch_from="run:trunk@4"),
        "trunk": settings(text, 10, checkpoint__keep_every=4),
    }
    trunks.check(runs)
    sweep = tmp_path / "sweep"
    Manifest(sweep).plan(runs)
    with small_models.quick_compilation():
        assert worker.work(sweep, runs, lease_seconds=60) == 0
    started = [x["run"] for x in Manifest(sweep).lines() if x["event"] == "started"]
    assert started == ["trunk", "short"]
    assert "branches from" in capsys.readouterr().out
    assert layout.steps(sweep / "runs" / "short")[-1] == 5
    sweep.rename(tmp_path / "moved")  # what has begun needs its trunk no more
    assert worker.work(tmp_path / "moved", runs, lease_seconds=60) == 0


def test_a_worker_of_one_branch_trains_its_trunk_where_nobody_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a task of an array whose others wait in the queue: it would wait for ever."""
    begun = []

    def start(given: Config, workdir: Path) -> int:
        begun.append(workdir.name)
        step = layout.directory(workdir) / str(given.train.steps)
        (step / "x").mkdir(parents=True)
        return 0

    monkeypatch.setattr(starting, "start", start)
    monkeypatch.setattr(layout, "fault", lambda place: None if place.is_dir() else "missing")
    shape = {"checkpoint__keep_every": 4}
    text = tmp_path / "text.txt"
    runs = {
        "leaf": settings(text, 12, train__branch_from="run:middle@8"),
        "middle": settings(text, 8, train__branch_from="run:trunk@4", **shape),
        "other": settings(text, 5),
        "trunk": settings(text, 4, **shape),
    }
    trunks.check(runs)
    assert trunks.levels(runs) == {"leaf": 2, "middle": 1, "other": 0, "trunk": 0}
    Manifest(tmp_path).plan(runs)
    assert worker.work(tmp_path, runs, lease_seconds=60, only=["leaf"]) == 0
    assert begun == ["trunk", "middle", "leaf"]
    assert Manifest(tmp_path).states()["other"] == State()


def test_a_branch_of_a_trunk_that_failed_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = starting.start

    def start(given: Config, workdir: Path) -> int:
        return 43 if workdir.name == "trunk" else real(given, workdir)

    monkeypatch.setattr(starting, "start", start)
    text = tmp_path / "text.txt"
    runs = {
        "short": settings(text, 5, train__branch_from="run:trunk@4"),
        "trunk": settings(text, 10, checkpoint__keep_every=4),
    }
    Manifest(tmp_path).plan(runs)
    assert worker.work(tmp_path, runs, lease_seconds=60) == 1
    states = Manifest(tmp_path).states()
    assert states["trunk"] == State("diverged")
    assert states["short"].ended == "failed"
    assert "checkpoints there: none" in states["short"].about


@pytest.mark.parametrize(
    ("branch", "of_trunk", "message"),
    [
        ("run:other@4", {}, "run short branches from other, which is no run of the sweep"),
        ("run:trunk@4", {}, "which that keeps no checkpoint: it has 10 steps, .*keep_every=0 and"),
        ("run:trunk@12", {"checkpoint__keep_every": 4}, "at step 12, of which that keeps no"),
        ("run:trunk", {}, "expected RUN@STEP"),
        ("run:trunk@0", {"checkpoint__keep_every": 4}, "at step 0, of which that keeps no"),
        ("run:trunk@20", {"steps": 40, "checkpoint__keep_every": 4}, "nothing left to"),
    ],
)
def test_branches_that_could_never_begin_are_refused(
    branch: str, of_trunk: dict[str, Any], message: str, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    runs = {
        "trunk": settings(text, **{"steps": 10, **of_trunk}),
        "short": settings(text, 20, train__branch_from=branch),
    }
    with pytest.raises(UserError, match=message):
        trunks.check(runs)


def test_a_run_that_is_no_branch_waits_for_nothing(tmp_path: Path) -> None:
    plain = config.Config()
    assert trunks.of(plain) is None
    assert trunks.ready(plain, tmp_path)
    assert trunks.placed(plain, tmp_path) is plain


def test_runs_that_branch_from_each_other_are_refused(tmp_path: Path) -> None:
    shape = {"checkpoint__keep_every": 4}
    runs = {
        "one": settings(tmp_path, 12, train__branch_from="run:two@4", **shape),
        "two": settings(tmp_path, 12, train__branch_from="run:one@8", **shape),
    }
    with pytest.raises(UserError, match="runs branch from each other: one, two"):
        trunks.check(runs)
