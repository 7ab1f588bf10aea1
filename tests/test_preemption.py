"""SIGTERM while a run is sent to where it is kept, and after its loop has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A loop that SIGTERM ends, and what comes after it and takes longer than a process that nothing
# keeps is given.
_LOOP = """
import os, signal, sys, tempfile, time
from pathlib import Path
import fsspec
from blindvalm_jax import addresses, remote
from blindvalm_jax.command_line import exit_after
from blindvalm_jax.errors import Preempted
from blindvalm_jax.survival import preemption

preemption._GRACE = 0.2
addresses.STORES.append("memory")
tempfile.tempdir = sys.argv[2]
memory = fsspec.filesystem("memory")
put = memory.put_file

def slow(*paths):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    put(*paths)

memory.put_file = slow

def loop():
    with preemption.noticed() as notice, notice.kept():
        os.kill(os.getpid(), signal.SIGTERM)
        while not notice.stops(0):
            time.sleep(0.01)
    raise Preempted("step 4 is saved")

def sent():
    try:
        with preemption.noticed(), remote.kept("memory://bucket/run") as directory:
            (directory / "run.json").write_text("4")
            loop()
    finally:
        print("there:", memory.cat_file("/bucket/run/run.json").decode(), flush=True)

def unkept():
    with preemption.noticed():
        try:
            loop()
        finally:
            time.sleep(1)
            print("cleaned up", flush=True)

exit_after({"sent": sent, "unkept": unkept}[sys.argv[1]], interrupted="")
"""


@pytest.mark.parametrize(("after", "printed"), [("sent", "there: 4"), ("unkept", "cleaned up")])
def test_what_comes_after_a_loop_that_sigterm_ended_is_done_to_the_end(
    after: str, printed: str, tmp_path: Path
) -> None:
    """A second SIGTERM comes in the middle of the sending."""
    done = subprocess.run(
        [sys.executable, "-c", _LOOP, after, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.endswith(f"{printed}\n"), done.stderr
    assert done.stderr.endswith("stopped by SIGTERM: step 4 is saved\n")
    assert done.returncode == 42
