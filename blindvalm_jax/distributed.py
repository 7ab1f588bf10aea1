"""Several processes that train one run: how they find each other, take turns and leave.

Each process has devices of its own, and reads its own rows of every batch. They share the
directory of the run and the data on one file system, or each has copies of its own of a run that is
kept in a store (`ownership`). The first one writes and prints.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
from orbax.checkpoint import multihost

from blindvalm_jax import agreement, meeting, process_log
from blindvalm_jax.command_line import print_error, print_stop
from blindvalm_jax.console import is_first
from blindvalm_jax.errors import LEFT, PREEMPTED, Preempted, UserError, first_line

Found = TypeVar("Found")
AUTO = "auto"
_PATIENCE = 10.0  # seconds that a process which fails waits for the others to end with it
_TURN_MS = 7 * 24 * 3600 * 1000  # the first process may prepare data for days
_turns = itertools.count()
_LOST_STATUSES = ("UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED")
_LOST = (
    *("closed by peer", "reset by peer", "broken pipe", "socket closed", "timed out waiting"),
    *("heartbeat", "coordination service", "remote process exited"),  # the last is NCCL's
)


def check(where: str, *, processes: int | None, process: int | None) -> None:
    """Refuses flags that name no processes, before anything begins.

    Raises:
      UserError: what is wrong with them.
    """
    numbers = {"--processes": processes, "--process": process}
    given = [name for name, value in numbers.items() if value is not None]
    if where in ("", AUTO):
        if given:
            raise UserError(
                f"{given[0]} goes with --distributed=HOST:PORT, got --distributed={where}: "
                f"{AUTO} finds the numbers itself"
            )
        return
    host, _, port = where.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--distributed must be {AUTO} or HOST:PORT of the first process, got {where!r}"
        )
    if processes is None or process is None:
        lacking = next(name for name, value in numbers.items() if value is None)
        raise UserError(f"{lacking} is missing: --distributed=HOST:PORT needs both numbers")
    if not 0 <= process < processes:
        raise UserError(
            f"--process={process} is none of --processes={processes}: the first one is 0"
        )


@contextlib.contextmanager
def joined(
    where: str,
    *,
    processes: int | None = None,
    process: int | None = None,
    heartbeat_seconds: int,
    wait_seconds: int,
) -> Iterator[None]:
    """Joins the processes of a run, before any device is used, and leaves with them.

    where: "" for a run of one process; `auto` for what JAX knows by itself (Cloud TPU, TPUs of GKE,
    SLURM, Open MPI); or HOST:PORT of the first process, with both numbers. A process that does not
    answer for `heartbeat_seconds` is taken for dead, and ends the others; `wait_seconds`: to begin
    with.

    Raises:
      UserError: the flags do not fit, the port is taken, or the others cannot be found.
      SystemExit: in place of an error inside, which is printed.
    """
    check(where, processes=processes, process=process)
    if not where:
        yield
        return
    meeting.check_port(where, process=process)
    # Both concern CPUs alone, where several processes compute over TCP and in order.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    patience = threading.Timer(wait_seconds, _give_up, (where, wait_seconds))
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            **({} if where == AUTO else _numbers(where, processes, process)),
            # JAX aborts the process when its own time is over, with a stack of C++.
            initialization_timeout=2 * wait_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(_why(error, where)) from error
    finally:
        patience.cancel()
    try:
        yield
    except UserError as error:  # said first: JAX may abort this process when another one ends
        print_error(f"{error}" if is_first() else f"process {jax.process_index()}: {error}")
        _leave_soon(1)
        raise SystemExit(1) from error
    except Preempted as stop:
        print_stop(str(stop))
        _leave_soon(PREEMPTED)
        raise SystemExit(PREEMPTED) from stop
    except BaseException as error:
        _end_if_lost(error)
        process_log.write("".join(traceback.format_exception(error)))
        _leave_soon(1)
        raise
    jax.distributed.shutdown()


def _numbers(where: str, processes: int | None, process: int | None) -> dict[str, Any]:
    return {
        "coordinator_address": where,
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",  # else devices are handed out by it
    }


def _why(error: Exception, where: str) -> str:
    """Why this process cannot join the others, and what to do."""
    if where == AUTO and "should be defined" in str(error):
        return (
            "--distributed=auto finds no processes: JAX knows Cloud TPU, TPU pods of GKE, SLURM "
            "and Open MPI; elsewhere give --distributed=HOST:PORT --processes=N --process=I"
        )
    return f"--distributed={where}: the processes cannot be joined: {first_line(error)}"


def _give_up(where: str, wait_seconds: int) -> NoReturn:
    port = (
        "; on Cloud TPU set JAX_COORDINATOR_PORT=8476, which its firewall lets through: "
        "--env=JAX_COORDINATOR_PORT=8476 of launch/tpu_vm.sh and launch/gke.sh"
    )
    print_error(
        f"the processes of --distributed={where} have not met within {wait_seconds} seconds: start "
        "all of them, each with a number of its own and the same address, which all must reach"
        f"{port if where == AUTO else ''}"
    )
    _end(1)


def _leave_soon(code: int) -> None:
    """Leaves with the others if they end too, as all do that meet the same error.

    Else this process will end without them: each would wait for the other.
    """
    leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    leaving.start()
    leaving.join(_PATIENCE)
    if leaving.is_alive():
        atexit.register(_end, code)  # behind the message, and before JAX waits


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends this process at once where another one is gone: nothing here could go on or be saved."""
    try:
        yield
    except Exception as error:
        _end_if_lost(error)
        raise


def _end_if_lost(error: BaseException) -> None:
    """Ends this process if an error says that another one is gone."""
    if not jax.distributed.is_initialized() or isinstance(error, UserError):
        return
    if says_lost(error):
        print_error(
            f"another process of the run is gone, this was process {jax.process_index()} of "
            f"{jax.process_count()}: the same commands go on from the newest checkpoint "
            f"({first_line(error)})"
        )
        _end(LEFT)


def says_lost(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a status of JAX by which another process is gone.

    A library, a pipe or NCCL that is set up wrongly may say similar words of something else, which
    no restart mends.
    """
    # jaxlib raises the status of a transfer as a ValueError
    if isinstance(error, jax.errors.JaxRuntimeError) or type(error) is ValueError:
        status, _, said = str(error).partition(": ")
        if status in _LOST_STATUSES:
            return True
        if re.fullmatch("[A-Z_]+", status) and any(word in said.lower() for word in _LOST):
            return True
    return error.__cause__ is not None and says_lost(error.__cause__)


def first_then_others(work: Callable[[], Found]) -> Found:
    """What `work` gives on each process: the first one does it alone, then the others.

    No computation of several processes may be part of it.

    Raises:
      UserError: what `work` raises; on the others, that the first one has failed.
    """
    if jax.process_count() == 1:
        return work()
    failure = None
    if is_first():
        try:
            found = work()
        except UserError as error:
            failure = error
    multihost.get_barrier_sync_fn()(key=f"turn {next(_turns)}", timeout_ms=_TURN_MS)
    failed = agreement.first_says(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise UserError("the first process cannot begin: see what it says")
    return found if is_first() else work()


def processes() -> dict[str, int]:
    """Which process this is, of how many: what a pipeline asks."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def all_or_none(work: Callable[[], Found]) -> Found:
    """What `work` gives on each process, once all of them have done it.

    Raises:
      UserError: what `work` raises; elsewhere, that another one has failed.
    """
    failure = None
    try:
        found = work()
    except UserError as error:
        failure = error
    multihost.get_barrier_sync_fn()(key=f"turn {next(_turns)}", timeout_ms=_TURN_MS)
    if agreement.any_of(failure is not None):
        raise failure or UserError("another process cannot begin: see what it says")
    return found
