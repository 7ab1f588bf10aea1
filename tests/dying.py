"""Code in a process of its own, killed at a chosen moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MANY = 1_000_000
_BEFORE = """
import os, signal, sys
from pathlib import Path
from blindvalm_jax.data import output
left = int(sys.argv.pop(1))
def dying(function):
    def call(*args, **keywords):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **keywords)
    return call
os.replace = dying(os.replace)
Path.write_bytes = dying(Path.write_bytes)
output.remove_work = dying(output.remove_work)
"""
_AFTER = "\nprint(left)\n"


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, with its arguments in sys.argv[1:]."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def moments(code: str, *arguments: object) -> int:
    """Runs code to its end; how often `kill` can end it.

    A moment is before a rename, a write of bytes, the removal of a work directory, or a call of
    what the code wraps in `dying`.
    """
    lived = run_python(_BEFORE + code + _AFTER, MANY, *arguments)
    assert lived.returncode == 0, lived.stderr
    return MANY - int(lived.stdout)


def kill(moment: int, code: str, *arguments: object) -> None:
    """Runs code until that moment, counted from 0, and kills it there."""
    died = run_python(_BEFORE + code + _AFTER, moment, *arguments)
    assert died.returncode == -signal.SIGKILL, died.stderr
