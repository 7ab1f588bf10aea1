"""A sweep: leases that only one worker holds, a manifest that only grows, runs that are trained."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from blindvalm_jax import changes, config, config_fields, starting
from blindvalm_jax.checkpoints import layout
from blindvalm_jax.config import Config
from blindvalm_jax.errors import UserError
from blindvalm_jax.sweep import outcome, status, worker
from blindvalm_jax.sweep.leases import Leases, holder
from blindvalm_jax.sweep.manifest import Manifest, State
from tests import small_models, small_text, test_train
from tests.faults import small_sweep


def settings(**changes: object) -> Config:
    values = config.default()
    values.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config.parse(values)


def leases(directory: Path, name: str, *, seconds: float = 60.0) -> Leases:
    return Leases(directory, worker=name, seconds=seconds)


def age(directory: Path, name: str, *, seconds: float) -> None:
    """Makes a lease as old as if its holder had been silent."""
    path = directory / f"{name}.json"
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_a_lease_has_one_holder_until_it_is_released(tmp_path: Path) -> None:
    one, two = leases(tmp_path, "one"), leases(tmp_path, "two")
    assert one.take("run") is None
    held = two.take("run")
    assert held is not None
    assert held.worker == "one"
    assert 50 < held.left <= 60
    two.release("run")  # is not its own
    assert two.take("run") is not None
    one.release("run")
    assert two.take("run") is None
    assert one.take("other") is None


def test_a_silent_holder_loses_its_lease_and_learns_of_it(tmp_path: Path) -> None:
    one, two = leases(tmp_path, "one"), leases(tmp_path, "two")
    assert one.take("run") is None
    age(tmp_path, "run", seconds=59)
    assert two.take("run") is not None
    assert one.renew("run")
    age(tmp_path, "run", seconds=61)
    assert two.take("run") is None
    assert not one.renew("run")
    one.release("run")  # must not free the other's
    found = holder(tmp_path, "run")
    assert found is not None
    assert found.worker == "two"
    assert holder(tmp_path / "nowhere", "run") is None
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UserError, match=r"run\.json is no lease .* delete it"):
        two.renew("run")


def test_leases_that_may_be_read_alone_are_told_by_this_machines_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert leases(tmp_path, "one").take("run") is None

    def touch(path: Path) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(Path, "touch", touch)
    found = holder(tmp_path, "run")
    assert found is not None
    assert 50 < found.left <= 60


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(stream: Any, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"\.manifest\.lock cannot be locked \(Function not"):
        Manifest(tmp_path).plan({"a": settings()})
    assert not (tmp_path / "manifest.jsonl").exists()


def test_a_kept_lease_is_renewed_and_its_loss_is_told(tmp_path: Path) -> None:
    one, two = leases(tmp_path, "one", seconds=0.4), leases(tmp_path, "two")
    lost, renewed = threading.Event(), threading.Event()
    plain = one.renew

    def renew(name: str) -> bool:
        kept = plain(name)
        renewed.set()
        return kept

    one.renew = renew  # type: ignore[method-assign]
    assert one.take("run") is None
    with one.kept("run", lost=lost.set):
        assert renewed.wait(30)
        assert not lost.is_set()
        # Stolen, as if this process had stood still.
        age(tmp_path, "run", seconds=10)
        while two.take("run") is not None:  # renewed in between
            age(tmp_path, "run", seconds=10)
        assert lost.wait(30)
    assert two.renew("run")


def test_many_workers_at_once_take_every_lease_once(tmp_path: Path) -> None:
    names = [f"run{number}" for number in range(10)]

    def all_taken(worker_name: str) -> list[str]:
        own = leases(tmp_path, worker_name)
        return [name for name in names if own.take(name) is None]

    with ThreadPoolExecutor(8) as pool:
        taken = [name for of in pool.map(all_taken, "abcdefgh") for name in of]
    assert sorted(taken) == names


def test_manifest_plans_once_and_refuses_other_settings(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    manifest.plan({"a": settings(seed=1)})
    manifest.plan({"a": settings(seed=1), "b": settings(train__steps=7)})
    assert [line["run"] for line in manifest.lines()] == ["a", "b"]
    assert manifest.lines()[1]["settings"] == {"train.steps": 7}
    with pytest.raises(UserError, match="the run a with other settings: seed: 1 -> 2"):
        manifest.plan({"a": settings(seed=2)})
    assert len(manifest.lines()) == 2


def test_how_runs_are_computed_may_change_and_is_kept(tmp_path: Path) -> None:
    """As what is said of a lack of memory advises; what they compute may not."""
    manifest = Manifest(tmp_path)
    assert manifest.plan({name: settings() for name in "ab"}) == []
    now = settings(train__remat="full")
    said = ["another setting from now on, in 2 runs: train.remat: 'none' -> 'full'"]
    assert manifest.plan(dict.fromkeys("ab", now)) == said
    assert manifest.plan(dict.fromkeys("ab", now)) == []
    assert manifest.contents()["a"]["settings"] == {"train.remat": "full"}
    assert manifest.states() == {"a": State(), "b": State()}
    manifest.add("a", "done")
    assert manifest.plan(dict.fromkeys("ab", settings())) == [
        "another setting from now on, in 1 runs: train.remat: 'full' -> 'none'"
    ]
    assert manifest.contents()["a"]["settings"] == {"train.remat": "full"}
    both = settings(train__remat="none", train__branch_from="elsewhere@4")
    with pytest.raises(UserError, match=r"run b with other settings: train\.branch_from: '' ->"):
        manifest.plan({"b": both})


@pytest.mark.parametrize("name", [*changes.OF_COMPUTING, *changes.OF_PLACES])
def test_what_may_change_are_names_of_settings(name: str) -> None:
    assert any(changes.named(key, [name]) for key, _, _ in config_fields.describe(Config))


def test_a_setting_that_is_no_more_is_another(tmp_path: Path) -> None:
    line = {"run": "a", "event": "planned", "settings": {"train.gone": 3}}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=r"with other settings: train\.gone: 3 -> None"):
        Manifest(tmp_path).plan({"a": settings()})


def test_manifest_tells_what_became_of_runs(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    manifest.plan({name: settings() for name in "abcd"})
    for run, event in map(tuple, ("as", "bs", "bs", "cs", "bp", "bs", "cf", "ad")):
        words = {"s": "started", "p": "preempted", "f": "failed", "d": "done"}
        manifest.add(run, words[event], **({"about": "why"} if event == "f" else {}))
    assert manifest.states() == {
        "a": State("done"),
        "b": State("preempted", cut=1),
        "c": State("failed", about="why"),
        "d": State(),
    }
    assert [name for name, state in manifest.states().items() if state.open] == ["b", "d"]
    manifest.add("c", "reopened")
    assert manifest.states()["c"].open


def test_attempts_that_left_a_newer_checkpoint_are_no_cuts_in_a_row(tmp_path: Path) -> None:
    """A preempted machine says nothing; an older manifest says of no attempt where it began."""
    manifest = Manifest(tmp_path)
    manifest.plan({"a": settings()})

    def cut(**began: int) -> tuple[int, int]:
        manifest.add("a", "started", **began)
        state = manifest.states()["a"]
        return state.cut_at(10), state.cut_at(20)

    assert cut(step=0) == (0, 0)
    assert cut(step=10) == (1, 0)
    assert cut(step=10) == (2, 0)
    assert cut(step=15) == (1, 0)
    assert cut() == (2, 2)
    assert cut(step=20) == (3, 3)
    manifest.add("a", "preempted")
    assert cut(step=20) == (1, 1)


def test_a_run_that_comes_further_each_time_is_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, sweep = {"far": settings(), "stuck": settings()}, tmp_path / "sweep"
    manifest = Manifest(sweep)
    manifest.plan(runs)
    for step in range(0, 40, 10):
        manifest.add("far", "started", step=step)
        manifest.add("stuck", "started", step=30)
    for name in runs:
        (worker.runs_of(sweep) / name / "checkpoints" / "30").mkdir(parents=True)
    (worker.runs_of(sweep) / "far" / "checkpoints" / "40").mkdir()
    for name in runs:
        (worker.runs_of(sweep) / name / ".blindvalm_run").touch()
    monkeypatch.setattr(starting, "start", lambda given, workdir: 0)
    assert worker.work(sweep, runs, lease_seconds=60) == 1
    assert {name: state.ended for name, state in manifest.states().items()} == {
        "far": "done",
        "stuck": "failed",
    }
    assert [x["step"] for x in manifest.lines() if x["event"] == "started"][-1] == 40


def test_contents_are_what_runs_ended_with_however_they_came_there(tmp_path: Path) -> None:
    one, two = Manifest(tmp_path / "one"), Manifest(tmp_path / "two")
    ends: dict[str, Any] = {"step": 6, "loss": 0.1 + 0.2, "scores": {"colors": 0.5}}
    for manifest in (one, two):
        manifest.plan({"a": settings(seed=1), "b": settings()})
    one.add("a", "started", process="here:1", step=0)
    one.add("a", "done", **ends)
    one.add("b", "diverged", about="at step 3: train/loss is nan")
    two.add("b", "diverged", about="at step 3: train/loss is nan")
    for step in (0, 2, 4):
        two.add("a", "started", process="there:2", step=step)
    assert two.contents() != one.contents()
    two.add("a", "done", **ends)
    assert two.contents() == one.contents()
    assert one.contents()["a"] == {"settings": {"seed": 1}, "ended": "done", "about": "", **ends}
    two.add("a", "done", **{**ends, "loss": 0.3})  # 0.1 + 0.2 differs from it in the last bit
    assert two.contents() != one.contents()


def test_a_run_ends_with_what_its_last_update_says(tmp_path: Path) -> None:
    assert outcome.of(tmp_path) == {"step": None, "loss": None, "scores": {}}
    lines: list[dict[str, Any]] = [
        {"step": 2, "eval/loss": 9.0, "eval/tasks/sst2": 0.1},
        {"step": 4, "train/loss": 3.0},
        {"step": 4, "eval/loss": 2.5},
        {"step": 4, "eval/tasks/colors": 0.75, "eval/tasks/ptb": None},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 6, "eval/lo')
    ended = {"step": 4, "loss": 2.5, "scores": {"colors": 0.75, "ptb": None}}
    assert outcome.of(tmp_path) == ended


def test_what_is_said_of_a_run_names_no_place_of_the_sweep(tmp_path: Path) -> None:
    said = f"{tmp_path}/runs/a/checkpoints/4: it is empty; /data/x.txt is missing"
    assert outcome.about(said, tmp_path) == (
        "runs/a/checkpoints/4: it is empty; /data/x.txt is missing"
    )


@pytest.mark.parametrize(
    ("sweep", "said", "expected"),
    [
        (".", "data.files=../text/a.txt is missing", "data.files=../text/a.txt is missing"),
        ("sweep", "/home/mysweep/a.txt, sweep/b", "/home/mysweep/a.txt, b"),
        ("a", "/data/x.txt and 'a/x.txt'", "/data/x.txt and 'x.txt'"),
    ],
)
def test_other_places_stay_whole_beside_a_relative_one(
    sweep: str, said: str, expected: str
) -> None:
    assert outcome.about(said, Path(sweep)) == expected


def test_status_tells_how_a_run_ended_though_its_lease_was_left(tmp_path: Path) -> None:
    """By a worker that was killed behind the line of its end."""
    Manifest(tmp_path).plan({name: settings() for name in "abc"})
    for name in "ab":
        worker.leases_of(tmp_path, seconds=60).take(name)
    Manifest(tmp_path).add("a", "diverged")
    run = worker.runs_of(tmp_path) / "a"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1000, "train/loss": null}\n')
    a, b, c = status.lines(tmp_path)
    assert a.split() == ["a", "diverged", "step", "1,000", "loss", "not", "finite"]
    assert b.split()[:3] == ["b", "training", "by"]
    assert c.split() == ["c", "waiting"]


def test_half_a_line_of_a_dead_worker_is_replaced(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    manifest.plan({"a": settings()})
    path = tmp_path / "manifest.jsonl"
    with path.open("a") as stream:
        stream.write('{"run": "a", "ev')
    assert manifest.states() == {"a": State()}
    manifest.add("a", "done")
    assert manifest.states() == {"a": State("done")}


@pytest.mark.parametrize(
    "line",
    [
        b'{"run": "a"}',
        b'{"run": "b", "event": "planned"}',
        b'{"run": ["a"], "event": "done"}',
        b'["run", "event"]',
        b"\xff\xfe",
        b"",
    ],
)
def test_a_line_that_is_none_of_a_manifest_is_named(tmp_path: Path, line: bytes) -> None:
    manifest = Manifest(tmp_path)
    manifest.plan({"a": settings()})
    with (tmp_path / "manifest.jsonl").open("ab") as stream:
        stream.write(line + b"\n")
    with pytest.raises(UserError, match=r"manifest\.jsonl, line 2, is no line of a manifest"):
        manifest.plan({"a": settings()})


def test_a_lease_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"a\.json is no lease .*: delete it"):
        leases(tmp_path, "first").take("a")


def test_a_worker_trains_what_is_open_and_names_what_failed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    small_text.write_text(text, small_text.documents(60))
    common = {"train__steps": 2, "data__cache": str(tmp_path / "cache")}
    good = config.parse(test_train.settings(text, **common))
    bad = config.parse(test_train.settings(tmp_path / "none.txt", **common))
    runs = {"good": good, "bad": bad, "dying": good}
    sweep = tmp_path / "sweep"
    manifest = Manifest(sweep)
    manifest.plan(runs)
    for _ in range(3):
        manifest.add("dying", "started")  # and never heard of again
    with small_models.quick_compilation():
        assert worker.work(sweep, runs, lease_seconds=60) == 1
    said = capfd.readouterr()
    assert "1 of 3 runs are done" in said.out
    assert "bad failed: " in said.err
    assert "dying failed: 3 attempts in a row were cut off" in said.err
    found = test_train.read_metrics(sweep / "runs" / "good")
    assert sorted(found["train/loss"]) == [1, 2]
    ended = manifest.states()["good"]
    assert (ended.step, ended.loss, ended.scores) == (2, found["eval/loss"][2], {})
    before = manifest.lines()
    assert worker.work(sweep, {"good": good}, lease_seconds=60) == 0
    assert manifest.lines() == before  # what is done is not done again


def test_a_run_whose_directory_is_held_is_left_to_its_holder(tmp_path: Path) -> None:
    """By a worker whose lease has run out and that lives: the run has not failed."""
    runs = {"a": settings()}
    manifest, own = Manifest(tmp_path), worker.leases_of(tmp_path, seconds=60)
    manifest.plan(runs)
    directory = worker.runs_of(tmp_path) / "a"
    directory.mkdir(parents=True)
    with (directory / ".run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert worker._ended_here("a", own, manifest, runs, tmp_path) is None
    assert manifest.states() == {"a": State()}
    assert holder(worker.leases_in(tmp_path), "a") is None


def test_what_breaks_one_run_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def start(given: Config, workdir: Path) -> int:
        if given.seed == 1:
            raise RuntimeError("out of memory")
        return 43 if given.seed == 2 else 0

    monkeypatch.setattr(starting, "start", start)
    runs = {"a": settings(seed=1), "b": settings(seed=2), "c": settings(seed=3)}
    Manifest(tmp_path).plan(runs)
    assert worker.work(tmp_path, runs, lease_seconds=60) == 1
    assert Manifest(tmp_path).states() == {
        "a": State("failed", about="RuntimeError: out of memory"),
        "b": State("diverged"),
        "c": State("done"),
    }
    assert "b diverged" in capfd.readouterr().err


def fails_with_a_seed(given: Config, workdir: Path) -> int:
    if given.seed:
        raise RuntimeError("no device")
    return 0


def test_a_worker_all_of_whose_runs_fail_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another's machine may be sound; where one has trained, runs that fail are to blame."""
    monkeypatch.setattr(starting, "start", fails_with_a_seed)
    sound, sick = tmp_path / "sound", tmp_path / "sick"
    runs = {name: settings(seed=int(name > "a")) for name in "abcdef"}
    Manifest(sound).plan(runs)
    assert worker.work(sound, runs, lease_seconds=60) == 1
    ended = [state.ended for state in Manifest(sound).states().values()]
    assert ended == ["done", *["failed"] * 5]
    del runs["a"]
    Manifest(sick).plan(runs)
    with pytest.raises(UserError, match="all 3 runs that this worker took have failed: it leaves"):
        worker.work(sick, runs, lease_seconds=60)
    ended = [state.ended for state in Manifest(sick).states().values()]
    assert ended == ["failed", "failed", "failed", "", ""]


def test_branches_of_a_failed_trunk_tell_nothing_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "start", fails_with_a_seed)
    branch = settings(seed=1, train__branch_from="run:trunk@4")
    runs = {"trunk": settings(seed=1), **dict.fromkeys("abcd", branch), "sound": settings()}
    Manifest(tmp_path).plan(runs)
    assert worker.work(tmp_path, runs, lease_seconds=60) == 1
    ended = [state.ended for state in Manifest(tmp_path).states().values()]
    assert ended == [*["failed"] * 5, "done"]


def test_schedulers_start_a_worker_again_that_lost_its_lease() -> None:
    program = "from blindvalm_jax.sweep import worker; worker._end_at_once()"
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 134
    assert ended.stderr.startswith("error: this worker stood still, so that another may have its")


def test_a_worker_without_faiss_takes_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"grounding__source": "images", "grounding__search": "faiss"}
    runs = {"a": settings(**wanted, grounding__index=str(tmp_path))}
    Manifest(tmp_path).plan(runs)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="FAISS is not installed"):
        worker.work(tmp_path, runs, lease_seconds=60)
    assert Manifest(tmp_path).states() == {"a": State()}


def test_a_directory_that_is_no_runs_fails_its_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "start", lambda given, workdir: 0)
    runs = {"a": settings(), "b": settings()}
    (worker.runs_of(tmp_path) / "a" / "checkpoints").mkdir(parents=True)
    Manifest(tmp_path).plan(runs)
    assert worker.work(tmp_path, runs, lease_seconds=60) == 1
    a, b = Manifest(tmp_path).states().values()
    assert (a.ended, b.ended) == ("failed", "done")
    assert a.about.startswith("--workdir=runs/a is not marked as a run's")


def test_a_directory_out_of_reach_for_long_is_a_lost_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, lost = leases(tmp_path, "one", seconds=0.2), threading.Event()
    assert own.take("run") is None

    def renew(name: str) -> bool:
        raise OSError("stale file handle")

    monkeypatch.setattr(own, "renew", renew)
    with own.kept("run", lost=lost.set):
        assert lost.wait(30)


def test_a_sweep_whose_worker_was_killed_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """And left half a line of its manifest; tests/faults kills many, at random."""
    runs = {"trunk": small_sweep.six_runs(tmp_path)["trunk"]}
    given = small_sweep.write_config(tmp_path, runs)
    undisturbed = small_sweep.Workers(given, tmp_path / "undisturbed")
    disturbed = small_sweep.Workers(given, tmp_path / "disturbed", lease_seconds=1.5)
    try:
        killed, whole = disturbed.start(dies_at="+35"), undisturbed.start()
        assert disturbed.end(killed) == -signal.SIGKILL, disturbed.logs()
        assert undisturbed.end(whole) == 0, undisturbed.logs()
        assert 0 < layout.steps(disturbed.workdir / "runs" / "trunk")[-1] < 40
        manifest = disturbed.workdir / "manifest.jsonl"
        manifest.write_bytes(manifest.read_bytes()[:-20])
        last = [disturbed.start(), disturbed.start()]
        assert [disturbed.end(process) for process in last] == [0, 0], disturbed.logs()
    finally:
        undisturbed.close()
        disturbed.close()
    small_sweep.check_same(undisturbed.workdir, disturbed.workdir)
