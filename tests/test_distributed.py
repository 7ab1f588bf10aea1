"""Flags of runs with several processes (such runs themselves: tests/faults)."""

from __future__ import annotations

import socket

import pytest

from blindvalm_jax import distributed
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
