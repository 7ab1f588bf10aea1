"""A run whose directory is in an object store: worked on here, kept there.

    python -m blindvalm_jax.remote gs://BUCKET/RUN    # brings it, prints where it is then

fsspec knows the stores. Orbax, locks, renames and appended lines need a file system, so the run is
a directory of this machine that is brought first, and sent while it is trained and at its end. Of
several processes each has such a directory (`stores.parts`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from blindvalm_jax import distributed, ownership
from blindvalm_jax.command_line import run_main
from blindvalm_jax.console import say, say_here
from blindvalm_jax.errors import UserError, first_line
from blindvalm_jax.stores import parts
from blindvalm_jax.stores.mirror import Store
from blindvalm_jax.survival import preemption

_SECONDS = 60.0  # between two sendings


@contextlib.contextmanager
def kept(address: str, *, seconds: float = _SECONDS) -> Iterator[Path]:
    """Brings a run here, sends what becomes of it every so often, and at the end.

    Nothing keeps a second machine from the same address.

    Raises:
      UserError: the store cannot be reached, read or written.
    """
    if jax.process_count() > 1:
        with _kept_by_several(address, seconds) as directory:
            yield directory
        return
    store = Store(address)
    with store.held():
        if store.bring():
            print(f"what was not sent of {store.directory} is sent first", flush=True)
            with preemption.kept():
                store.send()
        print(f"{address} is worked on in {store.directory}", flush=True)
        with _sending(store, seconds):
            yield store.directory


@contextlib.contextmanager
def _kept_by_several(address: str, seconds: float) -> Iterator[Path]:
    """As `kept`; each process brings all of the run, and sends its part of it."""
    with contextlib.ExitStack() as stack:

        def begin() -> parts.First | parts.Other:
            store = parts.of_this_process(address)
            stack.enter_context(store.held())
            store.begin()
            return store

        store = distributed.all_or_none(lambda: distributed.first_then_others(begin))
        say(f"{address} is worked on in {store.directory}, and by each process in its own")
        stack.enter_context(ownership.each_its_own())
        ended = False
        try:
            with _sending(store, seconds):
                yield store.directory
            ended = True
        finally:
            # Where this process ends alone the others may wait for it to be gone.
            with preemption.kept(), _outdone(ended):
                store.finish(ended=ended, together=ended or preemption.stopping())


@contextlib.contextmanager
def _outdone(ended: bool) -> Iterator[None]:
    """What fails behind another error does not take its place."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if ended:
            raise
        say_here(f"warning: {first_line(error)}")


@contextlib.contextmanager
def _sending(store: Store, seconds: float) -> Iterator[None]:
    """Sends every so often, and at the end, however that comes."""
    stop = threading.Event()

    def send_now_and_then() -> None:
        failed = False
        while not stop.wait(seconds if failed else store.pause(seconds)):
            failed = True
            try:
                store.send()
                failed = False
            except UserError as error:  # it may come back: what is here is sent then
                say_here(f"warning: {error}; tried again in {seconds:g} s")
            except jax.errors.JaxRuntimeError as error:  # another process is gone, or will say more
                say_here(f"warning: {first_line(error)}; tried again in {seconds:g} s")
            except Exception:  # a fault of the program: said as it is, and raised by the last try
                traceback.print_exc()

    sender = threading.Thread(target=send_now_and_then, daemon=True)
    sender.start()
    try:
        yield
    finally:
        with preemption.kept():
            stop.set()
            sender.join()
            store.send()


def main(argv: Sequence[str]) -> int:
    """Brings the run that the command line names."""
    if len(argv) != 2:
        raise UserError(f"one address is needed, gs://... or s3://..., got {len(argv) - 1}")
    store = Store(argv[1])
    with store.held():
        unsent = store.bring()
        try:
            store.add(unsent)
        except UserError as error:  # reading alone may be allowed
            print(f"warning: {error}", file=sys.stderr, flush=True)
    if not (store.directory / "run.json").exists():
        raise UserError(f"{argv[1]} holds no run: there is no run.json")
    print(store.directory)
    return 0


if __name__ == "__main__":
    run_main(main, takes_addresses=["argument"])
