"""Runs of `train` in processes of their own: small enough to begin in seconds, watched, ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from blindvalm_jax import config
from blindvalm_jax.checkpoints import differences, layout
from tests import small_text

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300.0  # seconds until a process that should have ended is killed and shown
# Waits before it reads a batch, counted from 1, until a file is there.
PAUSES = """
import os, time
from blindvalm_jax.data import pipeline
real = pipeline.Batches.__next__
count = 0
def slow(self):
    global count
    count += 1
    if count == {batch}:
        print("waiting", flush=True)
        while not os.path.exists({flag!r}):
            time.sleep(0.05)
    return real(self)
pipeline.Batches.__next__ = slow
"""
ENDED = 0  # exit codes
FAILED, PREEMPTED, DIVERGED = 1, 42, 43
LEFT = (134, -signal.SIGABRT)  # without the others: found out by the program, or by JAX
# {code}: what happens inside of `train` before it begins; it may take arguments from sys.argv.
TRAIN = """
import sys
from absl import app
{code}
from blindvalm_jax import train
from blindvalm_jax.command_line import run_main
run_main(train.main, takes_addresses=["workdir"])
"""


def settings(text: Path, **changes: Any) -> ml_collections.ConfigDict:
    """One block of width 16 on rows of 16 tokens, without a tower; changes: dotted names."""
    values = config.default()
    values.data.files = str(text)
    values.data.sequence_length = 16
    values.data.eval_fraction = 0.2
    values.data.workers = 1
    values.tokenizer.kind = "train"
    values.tokenizer.train_vocab_size = 300
    values.decoder.layers, values.decoder.width, values.decoder.heads = 1, 16, 2
    values.decoder.fusion_layers = ()
    values.grounding.source = "none"
    values.train.dtype = "float32"
    values.train.steps, values.train.batch_size = 400, 8
    values.optimizer.schedule, values.optimizer.warmup_steps = "cosine", 2
    values.checkpoint.every_steps = 1_000_000
    values.eval.every_steps = 0
    values.log.every_steps = 1
    values.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return values


def quickly(directory: Path, *, devices: int) -> dict[str, str]:
    """Variables of JAX: programs are small and run a few times, and several processes have them.

    directory: where compiled programs are kept for the next process, if there is no other place.
    """
    place = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(directory / "compiled"))
    count = f"--xla_force_host_platform_device_count={devices}"
    return {
        "XLA_FLAGS": f"{count} --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": place,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def write_text(directory: Path) -> Path:
    """A text for `settings`."""
    path = directory / "text.txt"
    small_text.write_text(path, small_text.documents(60))
    return path


class Process:
    """A process whose output is read as it comes; killed with its output shown if it overstays."""

    def __init__(self, arguments: list[str], **environment: str) -> None:
        """Starts it."""
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def output(self) -> str:
        """What it has printed so far, on both streams."""
        return "".join(self.lines)

    def until(self, pattern: str) -> re.Match[str]:
        """Waits for a line that the pattern is found in."""
        deadline, seen = time.monotonic() + LIMIT, 0
        with self._news:
            while True:
                for line in self.lines[seen:]:
                    if found := re.search(pattern, line):
                        return found
                seen = len(self.lines)
                ended = not self._reader.is_alive()
                if ended or not self._news.wait(max(0.0, deadline - time.monotonic())):
                    self._show(f"printed no line with {pattern!r}")

    def send(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Sends a signal."""
        self._process.send_signal(number)

    def ends(self, *codes: int, within: float = LIMIT) -> str:
        """Waits for its end with one of these exit codes, else 0; what it has printed."""
        try:
            found = self._process.wait(within)
        except subprocess.TimeoutExpired:
            self._show(f"was still there after {within} seconds")
        self._reader.join()
        if found not in (codes or (ENDED,)):
            raise AssertionError(f"exit code {found}, expected {codes}:\n{self.output}")
        return self.output

    def close(self) -> None:
        """Kills it if it is there."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def _show(self, what: str) -> None:
        self.close()
        raise AssertionError(f"a process {what}:\n{self.output}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with self._news:
                    self.lines.append(line)
                    self._news.notify_all()
        with self._news:
            self._news.notify_all()


class Runs:
    """Starts trainings with the same settings; all are ended when the test ends."""

    def __init__(self, directory: Path) -> None:
        """Directory: of the config file."""
        self._directory = directory
        self._processes: list[Process] = []

    def start(
        self,
        values: ml_collections.ConfigDict,
        workdir: Path | str,
        *flags: str,
        code: str = "",
        devices: int = 1,
        **environment: str,
    ) -> Process:
        """Starts `train`; code: what is run in the process before."""
        number = len(self._processes)
        stored = self._directory / f"settings_{number}.json"
        stored.write_text(values.to_json())
        file = self._directory / f"config_{number}.py"
        file.write_text(
            "import json, ml_collections\n"
            "def get_config():\n"
            f"    return ml_collections.ConfigDict(json.load(open({str(stored)!r})))\n"
        )
        main = ["-c", TRAIN.format(code=code)]
        arguments = [*main, f"--config={file}", f"--workdir={workdir}", *flags]
        environment = {**quickly(self._directory, devices=devices), **environment}
        self._processes.append(Process([sys.executable, *arguments], **environment))
        return self._processes[-1]

    def several(
        self,
        count: int,
        values: ml_collections.ConfigDict,
        workdir: Path | str,
        *flags: str,
        devices: int = 1,
        heartbeat: int = 10,
        codes: dict[int, str] | None = None,
        **environment: str,
    ) -> list[Process]:
        """Starts `train` in several processes, `devices` each; codes: by process, run before."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        return [
            self.start(
                values,
                workdir,
                f"--distributed=localhost:{port}",
                f"--processes={count}",
                f"--process={index}",
                f"--heartbeat_seconds={heartbeat}",
                *flags,
                code=(codes or {}).get(index, ""),
                devices=devices,
                **environment,
            )
            for index in range(count)
        ]

    def close(self) -> None:
        """Kills what is left."""
        for process in self._processes:
            process.close()


@contextlib.contextmanager
def runs(directory: Path) -> Iterator[Runs]:
    """What starts processes, and ends them all."""
    found = Runs(directory)
    try:
        yield found
    finally:
        found.close()


def wait_for(holds: Callable[[], bool]) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps(workdir: Path) -> list[int]:
    """Steps that are saved."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())


def computed(workdir: Path) -> dict[int, dict[str, float | None]]:
    """By step what was computed, without what a clock says; None: it was not finite."""
    found: dict[int, dict[str, float | None]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        at = found.setdefault(record.pop("step"), {})
        for name, value in record.items():
            if not name.startswith("perf/"):
                assert name not in at, f"{name} twice"
                at[name] = value
    return found


def check_equal(one: Path, other: Path) -> None:
    """The same metrics, but for the order in which sums over devices are taken (float32)."""
    expected, found = computed(one), computed(other)
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step].keys() == values.keys()
        for name, value in values.items():
            other_value = found[step][name]
            if value is None or other_value is None:
                assert value is other_value, name
            else:
                np.testing.assert_allclose(other_value, value, rtol=1e-5, err_msg=name)


def check_alike(one: Path, other: Path, *, step: int) -> None:
    """The checkpoints of a step hold the same arrays; values: Adam makes much of last bits."""
    found = differences.compare(*(layout.directory(run) / str(step) for run in (one, other)))
    assert (found.others, found.only) == ({}, [[], []])
    assert found.equal > 0
    assert not any(leaf.not_finite for leaf in found.leaves)
