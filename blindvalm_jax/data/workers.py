"""Work spread over processes with results in order, and a report of how far it is."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from blindvalm_jax.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
_SECONDS_BETWEEN_LINES = 10.0
_FEWEST_JOBS = 3  # for fewer, processes take longer to start than the work
_state: Any = None


class Workers:
    """`count` processes (0: one per core) that share a read-only `state`; 1 works in this process.

    Use as a context manager. Functions and `state` must pickle.
    """

    def __init__(self, count: int, state: Any) -> None:
        """Starts nothing yet: processes start with the first job."""
        self.count = count or usable_cores()
        self._state = state
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the processes; jobs not begun are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Any, Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Yields function(state, job) in the order of the jobs, few jobs ahead of the caller.

        Raises:
          UserError: a process died; whatever `function` raises.
        """
        jobs = iter(jobs)
        first = list(itertools.islice(jobs, _FEWEST_JOBS))
        jobs = itertools.chain(first, jobs)
        if self.count == 1 or len(first) < _FEWEST_JOBS:
            for job in jobs:
                yield function(self._state, job)
            return
        if self._pool is None:
            # Spawned, not forked: the caller may hold threads and an accelerator.
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.count,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(self._state,),
            )
        waiting: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
        try:
            for job in jobs:
                waiting.append(self._pool.submit(_call, function, job))
                if len(waiting) > 2 * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                f"one of {self.count} worker processes died, perhaps for lack of memory: run the "
                "same command with fewer workers, it goes on where it stopped"
            ) from error


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Progress:
    """How much is done, its rate and the time left: a bar on a terminal, else a line now and then.

    Use as a context manager; `advance` takes what was done since the last call, of `total`.
    """

    def __init__(self, title: str, *, total: int, unit: str) -> None:
        """Begins at 0 of `total`, counted in `unit`."""
        self._title, self._unit, self._total = title, unit, total
        bar = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=title, unit=unit, unit_scale=True) if bar else None
        self._done = 0
        self._begin = self._last = time.monotonic()

    def __enter__(self) -> Progress:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Reports the end, unless it is an error, which then speaks for itself."""
        if self._bar is not None:
            self._bar.close()
        elif self._done and kind is None:
            self._line()

    def advance(self, count: int) -> None:
        """Reports `count` more."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        elapsed = self._last - self._begin
        meter = tqdm.format_meter(
            self._done, self._total, elapsed, unit=self._unit, unit_scale=True, ncols=0
        )
        print(f"{self._title}: {meter}", file=sys.stderr, flush=True)


def _start(state: Any) -> None:
    global _state
    _state = state
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    # A killed caller would leave its workers waiting for jobs for ever.
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(function: Callable[[Any, Job], Result], job: Job) -> Result:
    return function(_state, job)
