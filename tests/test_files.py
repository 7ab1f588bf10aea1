"""Files that are written whole, and files that one process holds."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blindvalm_jax import files
from blindvalm_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
_HOLDS = """
import sys
from pathlib import Path
from blindvalm_jax import files
with files.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("compact", [False, True])
def test_json_has_no_word_for_what_is_not_finite(
    tmp_path: Path, value: float, compact: bool
) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1.5}, compact=compact)
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": [value]}, compact=compact)
    assert files.read_json(path) == {"a": 1.5}
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_is_held_by_one_process_until_that_ends(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDS, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        message = rf"{tmp_path} is in use by process {holder.pid} on \S+, since \d{{4}}-.*: wait"
        with pytest.raises(UserError, match=message), files.held(path):
            pass
        holder.kill()
    with files.held(path), files.held(path):  # this process may hold it already
        assert files.read_object(path)["process"] == os.getpid()
    assert path.read_text() == ""


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.held(tmp_path / "x"):
        pass
    assert capsys.readouterr().err.startswith(f"note: {tmp_path / 'x'} cannot be locked (No locks")
