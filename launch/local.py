r"""Trains in several processes of this machine, as on several machines.

    python launch/local.py --processes=2 [--devices=4] -- \
        --config=configs/text.py --config.data.files='texts/*.txt' --workdir=DIR

With `sweep run` in front of the arguments of train the processes are workers of a sweep, which know
nothing of each other: one that fails ends no other.

Lines of output begin with the number of their process. SIGTERM and Ctrl-C go to all processes. When
one fails the others are ended. What is there --grace seconds later is killed. The exit code is the
worst: 43 diverged, then any other error, then 42 preempted and saved, then 0; what a signal ended
counts as 128 and its number.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import NamedTuple

SAVED, DIVERGED = 42, 43
_PROGRAMS = {name: [sys.executable, "-m", f"blindvalm_jax.{name}"] for name in ("train", "sweep")}


def main(argv: Sequence[str]) -> int:
    """Starts the processes and waits for them; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument("--devices", type=int, help="simulated CPU devices of each; else as it is")
    parser.add_argument("--grace", type=float, default=30, help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("--port", type=int, help="of the first process; else a free one")
    parser.add_argument(
        "--gpus", type=int, help="of each: process K sees those from K times so many on"
    )
    parser.add_argument("--command", help="what each process runs, in place of train or sweep")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    parser.add_argument("arguments", nargs="*", help="of train, behind --")
    given = parser.parse_args(argv)
    if given.processes < 1:
        parser.error(f"--processes must be at least 1, got {given.processes}")
    if given.devices is not None and given.devices < 1:
        parser.error(f"--devices must be at least 1, got {given.devices}")
    if given.gpus is not None and given.gpus < 1:
        parser.error(f"--gpus must be at least 1, got {given.gpus}")
    if not given.grace >= 0:
        parser.error(f"--grace must be at least 0, got {given.grace:g}")
    if given.port is not None and not 0 < given.port < 2**16:
        parser.error(f"--port must be from 1 to 65535, got {given.port}")
    apart = given.arguments[:1] == ["sweep"]
    named = _PROGRAMS["sweep" if apart else "train"]
    program = named if given.command is None else _words(given.command)
    if not program or not (given.dry_run or shutil.which(program[0])):
        parser.error(f"--command={given.command}: there is no such program")
    port = given.port or free_port()
    commands = []
    for process in range(given.processes):
        added = {}
        if given.devices:
            added = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(given.devices)}
        if given.gpus:
            first = process * given.gpus
            added["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(first, first + given.gpus)))
        meeting = [f"--distributed=localhost:{port}", f"--processes={given.processes}"]
        meeting.append(f"--process={process}")
        words = given.arguments[1:] if apart else [*meeting, *given.arguments]
        commands.append(Command([*program, *words], added))
    for command in commands:
        setting = [f"{name}={value}" for name, value in command.environment.items()]
        print(f"+ {shlex.join([*setting, *command.words])}", flush=True)
    if given.dry_run:
        return 0
    return Group(commands, grace=given.grace, apart=apart).wait()


class Command(NamedTuple):
    """A process to start; environment: added to this process's own."""

    words: Sequence[str]
    environment: Mapping[str, str]


def _words(command: str) -> list[str]:
    """The words of a command; none where a quote does not end."""
    try:
        return shlex.split(command)
    except ValueError:
        return []


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
        return port


class Group:
    """Processes that live and end together."""

    def __init__(self, commands: Sequence[Command], *, grace: float, apart: bool) -> None:
        """Starts the commands.

        grace: seconds between SIGTERM and SIGKILL; apart: one that fails ends no other.
        """
        self._grace, self._apart = grace, apart
        self._ended: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._deadline: float | None = None
        self._processes: list[subprocess.Popen[str]] = []
        self._asked_to_stop = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        for command in commands:
            process = subprocess.Popen(
                command.words,
                env={**os.environ, **command.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C reaches it through here alone
            )
            self._processes.append(process)
            if self._asked_to_stop:  # before this one was there
                process.terminate()
        self._readers = [self._start(self._read, index) for index in range(len(commands))]
        for index in range(len(commands)):
            self._start(self._watch, index)

    def wait(self) -> int:
        """Waits until all have ended; returns the worst of their exit codes.

        Those of processes that were ended because one failed do not count, unless they say more
        than that.
        """
        codes: list[int] = []
        failed = False
        killed: set[int] = set()
        for _ in self._processes:
            while (index := self._next()) is None:
                print(f"still there after {self._grace:g} s: killed", flush=True)
                self._deadline = None
                killed |= self._signal(signal.SIGKILL)
            code = self._processes[index].returncode
            code = code if code >= 0 else 128 - code
            if failed and (code == 128 + signal.SIGTERM or index in killed):
                continue
            codes.append(code)
            ends_others = not (self._apart or failed or self._asked_to_stop)
            if code not in (0, SAVED) and ends_others:
                failed = True
                print(f"[{index}] ended with exit code {code}: the others are ended", flush=True)
                self._deadline = time.monotonic() + self._grace
                self._signal(signal.SIGTERM)
        for reader in self._readers:
            reader.join(timeout=5)  # what a process has left behind may hold its output open
        return max(codes, key=rank)

    def _next(self) -> int | None:
        """Index of a process that has ended, or None at the deadline."""
        while True:
            left = None if self._deadline is None else max(0, self._deadline - time.monotonic())
            try:
                index = self._ended.get(timeout=left)
            except queue.Empty:
                return None
            if index is not None:  # else a signal came, and with it perhaps a deadline
                return index

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if not self._asked_to_stop:
            self._asked_to_stop = True
            self._deadline = self._deadline or time.monotonic() + self._grace
            self._ended.put(None)
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> set[int]:
        """Sends a signal to those still there: a kill with all that they have started."""
        there = {i for i, process in enumerate(self._processes) if process.poll() is None}
        for index in there:
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                if number == signal.SIGKILL:
                    os.killpg(self._processes[index].pid, number)
                else:
                    self._processes[index].send_signal(number)
        return there

    def _start(self, task: Callable[[int], None], index: int) -> threading.Thread:
        thread = threading.Thread(target=task, args=(index,), daemon=True)
        thread.start()
        return thread

    def _read(self, index: int) -> None:
        for line in self._processes[index].stdout or ():
            sys.stdout.write(f"[{index}] {line.rstrip()}\n")
            sys.stdout.flush()

    def _watch(self, index: int) -> None:
        self._processes[index].wait()
        self._ended.put(index)


def rank(code: int) -> tuple[bool, bool, int]:
    """Orders exit codes by how bad they are: 0, 42, other errors, 43."""
    return code == DIVERGED, code not in (0, SAVED), code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
