"""A sweep of six small runs, and workers of it in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blindvalm_jax.checkpoints import layout
from blindvalm_jax.sweep import worker
from blindvalm_jax.sweep.manifest import Manifest
from tests import small_tasks, small_text
from tests.faults import small_run

DEADLINE = 240.0  # seconds


def six_runs(directory: Path) -> dict[str, Any]:
    """A GPT-2 that is asked a task, a trunk and its branch, a BLIND, one that diverges, one fails.

    directory: for their text, tasks and prepared data.
    """
    text = directory / "text.txt"
    small_text.write_text(text, small_text.documents(60))
    small_tasks.write(directory / "tasks")
    shape: dict[str, Any] = {
        **{"data__cache": str(directory / "cache"), "mesh__data": 1, "train__batch_size": 4},
        **{"train__steps": 40, "checkpoint__every_steps": 4, "eval__every_steps": 20},
    }
    tasks = {
        **{"eval__tasks": "memory_colors", "eval__tasks_data": str(directory / "tasks")},
        **{"eval__tasks_protocol": "published", "eval__tasks_every_steps": 20},
        "data__sequence_length": 32,
    }
    trunk = {"optimizer__schedule": "constant_cooldown", "checkpoint__keep": 1}
    blind = {
        **{
            "grounding__source": "text",
            "grounding__tower": "random",
            "grounding__dtype": "float32",
        },
        **{"grounding__random__width": 16, "grounding__random__layers": 1},
        **{"grounding__random__projection": 16, "decoder__fusion_layers": (0,)},
    }
    given: dict[str, dict[str, Any]] = {
        "gpt2": tasks,
        "short": {**trunk, "train__steps": 24, "train__branch_from": "run:trunk@16"},
        "trunk": {**trunk, "checkpoint__keep_every": 16},
        "blind": blind,
        "diverging": {"optimizer__learning_rate": 1e30, "optimizer__warmup_steps": 0},
        "failing": {"data__files": str(directory / "none.txt")},
    }
    return {
        name: small_run.settings(text, **{**shape, **changes}) for name, changes in given.items()
    }


def write_config(directory: Path, runs: Mapping[str, Any]) -> Path:
    """The sweep's config file."""
    stored = directory / "runs.json"
    stored.write_text(json.dumps({name: json.loads(x.to_json()) for name, x in runs.items()}))
    file = directory / "sweep.py"
    file.write_text(
        "import json, ml_collections\n"
        "def get_config():\n"
        f"    runs = json.load(open({str(stored)!r}))\n"
        "    return ml_collections.ConfigDict({'runs': runs})\n"
    )
    return file


class Workers:
    """Workers of one sweep; what each says is in workdir's parent."""

    def __init__(self, config: Path, workdir: Path, *, lease_seconds: float = 3) -> None:
        """Makes the directory; starts none."""
        workdir.mkdir()
        self.arguments = [
            *("run", f"--config={config}", f"--workdir={workdir}"),
            f"--lease_seconds={lease_seconds:g}",
        ]
        self.workdir = workdir
        self.running: list[subprocess.Popen[str]] = []

    def start(self, *, dies_at: int | str | None = None) -> subprocess.Popen[str]:
        """One more; dies_at: a moment of `dying_worker`."""
        quickly = small_run.quickly(self.workdir.parent, devices=1)
        plain = {"PYTHONPATH": str(small_run.ROOT), "JAX_PLATFORMS": "cpu"}
        module = ["blindvalm_jax.sweep"]
        if dies_at is not None:
            module = ["tests.faults.dying_worker", str(dies_at)]
        with self._log(len(self.running)).open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *module, *self.arguments],
                env={**os.environ, **plain, **quickly},
                cwd=small_run.ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.running.append(process)
        return process

    def said(self, worker: subprocess.Popen[str]) -> str:
        """What one of them has said so far."""
        return self._log(self.running.index(worker)).read_text()

    def logs(self) -> str:
        """What all of them said."""
        return "".join(self._log(number).read_text() for number in range(len(self.running)))

    def end(self, worker: subprocess.Popen[str]) -> int:
        """Waits for the end of one; its exit code."""
        try:
            return worker.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {DEADLINE:g} s:\n{self.logs()}") from None

    def close(self) -> None:
        """Kills what is left."""
        for process in self.running:
            process.kill()
            process.wait()

    def _log(self, number: int) -> Path:
        return self.workdir.parent / f"{self.workdir.name}.worker{number}.txt"


def wait_until_said(workers: Workers, worker: subprocess.Popen[str], *words: str) -> None:
    """Waits until a worker has said one of these words, or has ended."""
    until = time.monotonic() + DEADLINE
    while worker.poll() is None and not any(word in workers.said(worker) for word in words):
        assert time.monotonic() < until, workers.logs()
        time.sleep(0.02)


def check_same(one: Path, other: Path) -> None:
    """Two sweeps ended with the same manifest contents, metrics and checkpoints, bit for bit."""
    expected, found = (Manifest(sweep).contents() for sweep in (one, other))
    assert found == expected
    assert {about["ended"] for about in expected.values()} <= {"done", "diverged", "failed"}
    for name, about in expected.items():
        if about["ended"] != "done":
            continue
        runs = [worker.runs_of(sweep) / name for sweep in (one, other)]
        assert small_run.computed(runs[1]) == small_run.computed(runs[0]), name
        assert layout.steps(runs[1])[-1] == layout.steps(runs[0])[-1] == about["step"]
        kept = [layout.directory(run) / str(about["step"]) for run in runs]
        leaves = [layout.read_json(path, layout.DIGESTS)["leaves"] for path in kept]
        assert leaves[0] == leaves[1] != {}, name
