"""What a process other than the first says of itself: logs/process-K.txt in the run's directory.

The first process prints, and keeps none. The file is opened for each line: it may be removed or
moved while the run goes on, and nothing of it is lost where the process is killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path

DIRECTORY = "logs"
_PATIENCE = 2.0  # seconds
_path: Path | None = None
_complained = False


def name(process: int) -> str:
    """The file of a process, in the directory of the run."""
    return f"{DIRECTORY}/process-{process}.txt"


def begin(workdir: Path, *, process: int, processes: int) -> None:
    """Keeps lines from now on, behind those of starts before."""
    global _path, _complained
    _path, _complained = workdir / name(process), False
    write(f"process {process} of {processes} begins: {os.getpid()} on {socket.gethostname()}")


def write(text: str) -> None:
    """Appends a line with its time, if this process keeps a log; further lines are indented.

    A log that cannot be written is said once on stderr: it is no reason to end a run.
    """
    _append(_line(text))


def write_last(text: str) -> None:
    """As `write`, where the process must end also if its file system hangs."""
    _append_soon(_line(text))


def write_stacks() -> None:
    """Appends what each thread of this process does; waits as `write_last` does."""
    _append_soon(None)


def _line(text: str) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text.rstrip()}".replace("\n", "\n    ")


def _append_soon(line: str | None) -> None:
    if _path is None:
        return
    writing = threading.Thread(target=_append, args=(line,), daemon=True)
    with contextlib.suppress(RuntimeError):  # the interpreter is ending
        writing.start()
        writing.join(_PATIENCE)


def _append(line: str | None) -> None:
    global _complained
    if _path is None:
        return
    try:
        _path.parent.mkdir(exist_ok=True)
        with _path.open("ab", buffering=0) as file:
            if line is None:
                faulthandler.dump_traceback(file)
            else:
                file.write(f"{line}\n".encode(errors="backslashreplace"))
    except OSError as error:
        if not _complained:
            reason = error.strerror or error
            print(f"warning: {_path} cannot be written: {reason}", file=sys.stderr, flush=True)
        _complained = True
