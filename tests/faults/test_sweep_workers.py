"""Workers of a sweep that are killed: others go on with what they had begun."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from blindvalm_jax.sweep import worker
from blindvalm_jax.sweep.manifest import Manifest
from tests import small_text
from tests.faults import dying_worker, small_sweep
from tests.faults.small_sweep import DEADLINE, Workers, check_same, wait_until_said

_SWEEP = """
import ml_collections
from tests import test_train
from pathlib import Path

def get_config():
    runs = {}
    for seed in range(3):
        runs[f"seed{seed}"] = test_train.settings(
            Path(TEXT), seed=seed, train__steps=60, eval__every_steps=0, mesh__data=1,
            data__cache=CACHE, train__batch_size=4, checkpoint__every_steps=10)
    return ml_collections.ConfigDict({"runs": runs})
"""


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def saved_by(workers: Workers, worker: subprocess.Popen[str]) -> str:
    """Waits until a worker has saved a run that it has not finished; the run's name."""
    until = time.monotonic() + DEADLINE
    while time.monotonic() < until:
        for line in Manifest(workers.workdir).lines():
            own = str(line.get("process", "")).endswith(f":{worker.pid}")
            run = workers.workdir / "runs" / str(line["run"])
            found = metrics(run) if own and (run / "checkpoints" / "10").exists() else []
            if found and found[-1]["step"] < 50:
                return str(line["run"])
        assert worker.poll() is None, workers.logs()
        time.sleep(0.05)
    raise AssertionError(f"nothing saved in {DEADLINE:g} s: {workers.logs()}")


@pytest.mark.faults
def test_a_killed_workers_run_is_finished_by_the_other_bit_for_bit(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    small_text.write_text(text, small_text.documents(60))
    given = tmp_path / "sweep.py"
    names = f"TEXT, CACHE = {str(text)!r}, {str(tmp_path / 'cache')!r}\n"
    given.write_text(names + _SWEEP)
    workers = Workers(given, tmp_path / "sweep")
    try:
        first, second = workers.start(), workers.start()
        killed = saved_by(workers, first)
        first.kill()
        assert workers.end(first) < 0
        assert workers.end(second) == 0, workers.logs()
    finally:
        workers.close()
    states = Manifest(workers.workdir).states()
    assert {state.ended for state in states.values()} == {"done"}, workers.logs()
    assert not list((workers.workdir / "leases").glob("*.json"))
    starts = [line for line in Manifest(workers.workdir).lines() if line["event"] == "started"]
    assert [line["run"] for line in starts].count(killed) == 2
    record = json.loads((workers.workdir / "runs" / killed / "run.json").read_text())
    assert [start["step"] > 0 for start in record["starts"]] == [False, True]

    alone = Workers(given, tmp_path / "undisturbed")
    alone.arguments.append(f"--index={killed.removeprefix('seed')}")
    assert alone.end(alone.start()) == 0, alone.logs()
    losses = [
        [(line["step"], line["train/loss"]) for line in metrics(root / "runs" / killed)]
        for root in (workers.workdir, alone.workdir)
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, 61))


@pytest.mark.faults
def test_sigterm_ends_a_worker_that_waits(tmp_path: Path) -> None:
    given = tmp_path / "sweep.py"
    given.write_text(f"TEXT, CACHE = {str(tmp_path / 'none')!r}, ''\n{_SWEEP}")
    workers = Workers(given, tmp_path / "sweep")
    leases = worker.leases_of(workers.workdir, seconds=DEADLINE)
    for seed in range(3):
        leases.take(f"seed{seed}")
    try:
        waiting = workers.start()
        wait_until_said(workers, waiting, "waiting: others train")
        waiting.terminate()
        assert workers.end(waiting) == 42, workers.logs()
    finally:
        workers.close()


@pytest.mark.faults
def test_a_sweep_killed_at_random_points_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """To the last bit; some kills leave half a line of the manifest, or half a checkpoint."""
    given = small_sweep.write_config(tmp_path, small_sweep.six_runs(tmp_path))
    undisturbed = Workers(given, tmp_path / "undisturbed")
    disturbed = Workers(given, tmp_path / "disturbed")
    try:
        assert undisturbed.end(undisturbed.start()) == 1  # one diverges, one fails
        shutil.rmtree(tmp_path / "cache")  # is prepared again
        killed = _disturb(disturbed, random.Random(0), kills=18)
        print(f"killed at {', '.join(killed)}")
        last = [disturbed.start(), disturbed.start()]
        assert [disturbed.end(process) for process in last] == [1, 1], disturbed.logs()
    finally:
        undisturbed.close()
        disturbed.close()
    check_same(undisturbed.workdir, disturbed.workdir)
    assert not list(disturbed.workdir.glob("runs/*/quarantine"))


def _disturb(workers: Workers, source: random.Random, *, kills: int) -> list[str]:
    """Keeps two workers at it until so many were killed, or all is done; where each was killed.

    Half of them die at a moment of their own, the others some time after they have taken a run or
    begun to wait for one.
    """
    killed: list[str] = []
    alive: list[tuple[subprocess.Popen[str], str]] = []
    timers: list[threading.Thread] = []
    until = time.monotonic() + 2 * DEADLINE
    while len(killed) < kills and not _ended(workers):
        while len(alive) < 2:
            if source.random() < 0.5:
                moment = source.randint(1, 250)
                alive.append((workers.start(dies_at=moment), f"moment {moment}"))
            else:
                seconds = source.uniform(0, 3)
                process = workers.start()
                alive.append((process, f"{seconds:.1f} s"))
                timers.append(
                    threading.Thread(target=_kill_after, args=(workers, process, seconds))
                )
                timers[-1].start()
        for one in [one for one in alive if one[0].poll() is not None]:
            alive.remove(one)
            if one[0].returncode == -signal.SIGKILL:
                killed.append(one[1])
            elif not _ended(workers):  # the machine was too slow to keep a lease
                assert "was taken over by another" in workers.said(one[0]), workers.logs()
        assert time.monotonic() < until, workers.logs()
        time.sleep(0.02)
    for process, _ in alive:
        process.kill()
        process.wait()
    for timer in timers:
        timer.join()
    return killed


def _ended(workers: Workers) -> bool:
    states = Manifest(workers.workdir).states().values()
    return bool(states) and not any(state.open for state in states)


def _kill_after(workers: Workers, process: subprocess.Popen[str], seconds: float) -> None:
    """Not while it trains what was cut off so often that it would be given up the next time."""
    wait_until_said(workers, process, ": begun", ": goes on", "waiting: ")
    until = time.monotonic() + seconds
    while process.poll() is None:
        cuts = [x.cut for x in Manifest(workers.workdir).states().values() if x.open]
        if time.monotonic() >= until and max(cuts, default=0) < dying_worker.MOST_CUTS:
            process.kill()
            return
        time.sleep(0.02)
