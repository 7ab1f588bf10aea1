"""Workers of a sweep that are killed: others go on with what they had begun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from blindvalm_jax.sweep import worker
from blindvalm_jax.sweep.manifest import Manifest
from tests import small_text
from tests.faults import small_run

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 240.0  # seconds
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


class Workers:
    """Workers of one sweep, in processes of their own."""

    def __init__(self, config: Path, workdir: Path) -> None:
        self.command = [
            *(sys.executable, "-m", "blindvalm_jax.sweep", "run", f"--config={config}"),
            *(f"--workdir={workdir}", "--lease_seconds=3"),
        ]
        self.workdir = workdir
        self.running: list[subprocess.Popen[str]] = []

    def start(self) -> subprocess.Popen[str]:
        """One more."""
        quickly = small_run.quickly(self.workdir.parent, devices=1)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **quickly}
        log = (self.workdir.parent / f"worker{len(self.running)}.txt").open("w")
        process = subprocess.Popen(
            self.command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True
        )
        log.close()
        self.running.append(process)
        return process

    def logs(self) -> str:
        """What all of them said."""
        return "".join(p.read_text() for p in sorted(self.workdir.parent.glob("worker*.txt")))

    def saved_by(self, worker: subprocess.Popen[str]) -> str:
        """Waits until a worker has saved a run that it has not finished; the run's name."""
        until = time.monotonic() + DEADLINE
        while time.monotonic() < until:
            for line in Manifest(self.workdir).lines():
                own = str(line.get("process", "")).endswith(f":{worker.pid}")
                run = self.workdir / "runs" / str(line["run"])
                found = metrics(run) if own and (run / "checkpoints" / "10").exists() else []
                if found and found[-1]["step"] < 50:
                    return str(line["run"])
            assert worker.poll() is None, self.logs()
            time.sleep(0.05)
        raise AssertionError(f"nothing saved in {DEADLINE:g} s: {self.logs()}")


@pytest.mark.faults
def test_a_killed_workers_run_is_finished_by_the_other_bit_for_bit(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    small_text.write_text(text, small_text.documents(60))
    given = tmp_path / "sweep.py"
    names = f"TEXT, CACHE = {str(text)!r}, {str(tmp_path / 'cache')!r}\n"
    given.write_text(names + _SWEEP)
    workers = Workers(given, tmp_path / "sweep")
    workers.workdir.mkdir()
    try:
        first, second = workers.start(), workers.start()
        killed = workers.saved_by(first)
        first.kill()
        assert first.wait(DEADLINE) < 0
        assert second.wait(DEADLINE) == 0, workers.logs()
    finally:
        for process in workers.running:
            process.kill()
            process.wait()
    states = Manifest(workers.workdir).states()
    assert {state.ended for state in states.values()} == {"done"}, workers.logs()
    assert not list((workers.workdir / "leases").glob("*.json"))
    starts = [line for line in Manifest(workers.workdir).lines() if line["event"] == "started"]
    assert [line["run"] for line in starts].count(killed) == 2
    record = json.loads((workers.workdir / "runs" / killed / "run.json").read_text())
    assert [start["step"] > 0 for start in record["starts"]] == [False, True]

    alone = Workers(given, tmp_path / "undisturbed")
    alone.command.append(f"--index={killed.removeprefix('seed')}")
    alone.workdir.mkdir()
    assert alone.start().wait(DEADLINE) == 0, alone.logs()
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
        until = time.monotonic() + DEADLINE
        while "waiting: others train" not in workers.logs() and time.monotonic() < until:
            time.sleep(0.05)
        waiting.terminate()
        assert waiting.wait(DEADLINE) == 42, workers.logs()
    finally:
        for process in workers.running:
            process.kill()
            process.wait()
