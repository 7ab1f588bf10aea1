"""Flags of runs with several processes (such runs themselves: tests/faults)."""

from __future__ import annotations

import errno
import socket

import pytest
from jax.errors import JaxRuntimeError

from blindvalm_jax import distributed, meeting
from blindvalm_jax.errors import UserError
from tests.dying import run_python

_JOINS = """
import sys
from blindvalm_jax import distributed
where, process = sys.argv[1:]
with distributed.joined(
    where, processes=2, process=int(process), heartbeat_seconds=5, wait_seconds=2
):
    pass
"""
_ALONE = """
import sys
from blindvalm_jax import distributed
from blindvalm_jax.command_line import exit_after
def main():
    with distributed.joined(
        sys.argv[1], processes=1, process=0, heartbeat_seconds=5, wait_seconds=10
    ):
        exec(sys.argv[2])
exit_after(main, interrupted="")
"""


@pytest.mark.parametrize(
    ("where", "processes", "process", "message"),
    [
        ("", 2, None, "--processes goes with --distributed=HOST:PORT, got --distributed=:"),
        ("auto", None, 1, "--process goes with --distributed=HOST:PORT, got --distributed=auto"),
        ("here", 2, 0, "--distributed must be auto or HOST:PORT of the first process, got 'here'"),
        (":80", 2, 0, "must be auto or HOST:PORT"),
        ("here:", 2, 0, "must be auto or HOST:PORT"),
        ("here:65536", 2, 0, "must be auto or HOST:PORT"),
        ("here:80", None, 0, "--processes is missing: --distributed=HOST:PORT needs both"),
        ("here:80", 2, None, "--process is missing"),
        ("here:80", 2, 2, "--process=2 is none of --processes=2: the first one is 0"),
    ],
)
def test_flags_that_name_no_processes_are_one_line(
    where: str, processes: int | None, process: int | None, message: str
) -> None:
    with (
        pytest.raises(UserError, match=message) as caught,
        distributed.joined(
            where, processes=processes, process=process, heartbeat_seconds=1, wait_seconds=1
        ),
    ):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["", "auto", "here:1", "10.0.0.1:8476", "[::1]:8476"])
def test_flags_that_name_them(where: str) -> None:
    number = {"processes": 2, "process": 1} if ":" in where else {}
    distributed.check(where, **{"processes": None, "process": None, **number})


@pytest.mark.parametrize("process", [0, 1])
def test_processes_that_do_not_meet_say_so_and_end(process: int) -> None:
    """The first one waits for the other, or the other for the first."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    done = run_python(_JOINS, f"localhost:{port}", process)
    assert done.returncode == 1, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"of --distributed=localhost:{port} have not met within 2 seconds" in line
    assert "Check failure" not in done.stderr


@pytest.mark.parametrize("taken", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_taken_is_one_line_and_1(taken: str) -> None:
    with socket.socket() as other:
        other.bind((taken, 0))
        other.listen()
        port = other.getsockname()[1]
        done = run_python(_ALONE, f"localhost:{port}", "print(1)")
    assert done.returncode == 1, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: --distributed=localhost:{port}: port {port} of this machine")
    assert "in use" in line
    assert done.stdout == ""


def test_a_port_of_connections_that_have_just_ended_is_not_taken() -> None:
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as JAX's own has it
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            served, _ = listening.accept()
            served.close()  # who closes first keeps the port for a minute
            assert client.recv(1) == b""
    with socket.socket() as strict, pytest.raises(OSError, match="in use"):
        strict.bind(("127.0.0.1", port))
    meeting.check_port(f"localhost:{port}", process=0)


def test_only_the_first_process_asks_for_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number, or by the variables of TPU pods on GKE."""
    for name in ("JAX_COORDINATOR_BIND_ADDRESS", "MEGASCALE_SLICE_ID", "TPU_WORKER_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("JAX_COORDINATOR_PORT", str(port))
        meeting.check_port(f"localhost:{port}", process=1)
        meeting.check_port("auto", process=None)
        monkeypatch.setenv("TPU_WORKER_ID", "1")
        meeting.check_port("auto", process=None)
        monkeypatch.setenv("TPU_WORKER_ID", "0")
        with pytest.raises(UserError, match=f"port {port} .* JAX_COORDINATOR_PORT=ANOTHER to all"):
            meeting.check_port("auto", process=None)
        monkeypatch.setenv("MEGASCALE_SLICE_ID", "1")
        meeting.check_port("auto", process=None)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (JaxRuntimeError("UNAVAILABLE: The following tasks are unhealthy"), True),
        (JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: x::0."), True),
        (JaxRuntimeError("INTERNAL: Barrier failed: UNAVAILABLE: Task 1 heartbeat timeout"), True),
        (
            ValueError("UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer"),
            True,
        ),
        (
            JaxRuntimeError("INTERNAL: NCCL: remote process exited or there was a network error"),
            True,
        ),
        (JaxRuntimeError("INTERNAL: NCCL operation failed: unhandled system error"), False),
        (JaxRuntimeError("INTERNAL: Gloo: op.preamble.length <= op.nbytes"), False),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (RuntimeError("Unable to initialize backend 'tpu': UNAVAILABLE: no device"), False),
        (ValueError("a heartbeat of 0 is none"), False),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), False),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), False),
    ],
)
def test_what_says_that_another_process_is_gone(error: Exception, lost: bool) -> None:
    assert distributed.says_lost(error) == lost
    wrapped = RuntimeError("the checkpoint cannot be saved")
    wrapped.__cause__ = error
    assert distributed.says_lost(wrapped) == lost


@pytest.mark.parametrize(
    ("raised", "code"),
    [("BrokenPipeError(32, 'Broken pipe')", 1), ("ValueError('UNKNOWN: closed by peer')", 134)],
)
def test_an_error_that_no_restart_mends_does_not_ask_for_one(raised: str, code: int) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    done = run_python(_ALONE, f"localhost:{port}", f"raise {raised}")
    assert done.returncode == code, done.stderr
    assert ("another process of the run is gone" in done.stderr) == (code == 134)
