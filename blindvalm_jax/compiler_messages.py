"""What XLA says on standard error while it compiles, kept as well as shown."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.monitoring

_REMATERIALIZED = "nvoluntary full remat"
_VARIABLE = "TF_CPP_MIN_LOG_LEVEL"
# What JAX, imported before, goes by: it is read once.
_LEVEL = os.environ.get(_VARIABLE, "")
_CACHED = "/jax/compilation_cache/cache_hits"  # JAX's name of that event
_WARNINGS = 1  # the highest level at which XLA still prints them


def unheard(lines: list[str]) -> str | None:
    """Why XLA's messages are missing in what was heard; None: it could say what it had to."""
    unknown = "whether it gathers tensors whole for want of a better way is not known"
    if _LEVEL.isdecimal() and int(_LEVEL) > _WARNINGS:
        return (
            f"{_VARIABLE}={_LEVEL} turns XLA's messages off: {unknown}; unset it, or set "
            f"{_WARNINGS}"
        )
    if _CACHED in lines:
        return (
            f"the step comes from JAX's compilation cache, so XLA says nothing of it: {unknown}; "
            "JAX_ENABLE_COMPILATION_CACHE=0 compiles it"
        )
    return None


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Collects the lines that anything, C++ too, writes to standard error; filled at the end.

    A program that is read from JAX's compilation cache, of which XLA says nothing, is one more.

    A process of its own passes them on at once: nothing is lost if this one dies, and nobody waits
    for Python to read.
    """
    lines: list[str] = []
    cached: list[str] = []

    def happens(event: str, **about: str | int) -> None:
        if event == _CACHED:
            cached.append(event)

    sys.stderr.flush()
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        kept = Path(directory) / "messages"
        shown = os.dup(2)
        stack.callback(os.close, shown)
        # -i: Ctrl-C is for this process; what it says of it must still be passed on
        tee = subprocess.Popen(["tee", "-i", kept], stdin=subprocess.PIPE, stdout=shown)
        if tee.stdin is None:
            raise RuntimeError("tee has no pipe")
        os.dup2(tee.stdin.fileno(), 2)
        tee.stdin.close()
        jax.monitoring.register_event_listener(happens)
        try:
            yield lines
        finally:
            jax.monitoring.unregister_event_listener(happens)
            sys.stderr.flush()
            os.dup2(shown, 2)
            tee.wait()
            lines += kept.read_text(encoding="utf-8", errors="replace").splitlines()
            lines += cached


def rematerialized(lines: list[str]) -> list[str]:
    """Those that say a tensor is gathered whole because XLA found no way between two shardings."""
    return [line for line in lines if _REMATERIALIZED in line]
