"""How a command begins and ends: what is wrong is one line and an exit code, no traceback."""

from __future__ import annotations

import errno
import os
import re
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from absl import app, flags, logging

from blindvalm_jax import addresses, process_log
from blindvalm_jax.errors import PREEMPTED, Preempted, UserError, first_line, logs_are_wanted
from blindvalm_jax.stores import places, settings

_BROKEN_PIPE = 141  # what a shell reports of a command that such a pipe ended
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TEXT = ("prompt", "candidates", "stop")  # flags whose value may hold any text


def run_main(
    main: Callable[[Sequence[str]], int | None],
    *,
    failure: int = 1,
    interrupted: str = "the same command goes on from what is on disk",
    takes_addresses: Sequence[str] = (),
    inputs: Mapping[str, str] | None = None,
) -> None:
    """Runs an absl entry point; a `UserError` becomes one line on stderr and exit code `failure`.

    interrupted: what is said behind "interrupted; " on Ctrl-C: what becomes of the work done.
    takes_addresses: flags, or "argument", that may be an address of an object store. inputs: flags
    that may name an input in one, by the setting that they stand for (`stores.settings`).
    `--verbosity=0` shows what libraries log.
    """

    def fail(message: str) -> NoReturn:
        _fail(message, failure)

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return flags.FLAGS(list(argv))
        except (flags.Error, UserError) as error:
            fail(_cause(str(error)))
        except SyntaxError as error:
            fail(f"{error.filename}, line {error.lineno}, is no Python: {error.msg}")
        except (AttributeError, KeyError) as error:
            if "has no attribute 'get_config'" in str(error):
                fail("the config file defines no get_config()")
            # What ml_collections raises; an error of the config file's own keeps its traceback.
            given = _setting_named(error, argv)
            if given is None:
                raise
            fail(f"unknown setting {given}; `python -m blindvalm_jax.config` lists all of them")

    def guarded(argv: Sequence[str]) -> None:
        if not logs_are_wanted():
            logging.set_verbosity(logging.WARNING)  # libraries report every file they write
        free = (*_TEXT, *takes_addresses, *(inputs or ()))
        given: dict[str, object] = {
            f"--{flag.name}": flag.value
            for flag in _given()
            # settings are looked at where they are read
            if flag.name not in free and not flag.name.startswith("config.")
        }
        if "argument" not in free:
            given["argument"] = list(argv[1:])
        if wrong := addresses.refusal(given):
            fail(wrong)

        def with_inputs() -> int | None:
            if inputs:
                settings.bring_flags(inputs)
            return main(argv)

        exit_after(with_inputs, failure=failure, interrupted=interrupted)

    app.run(guarded, flags_parser=parse)


def exit_after(main: Callable[[], int | None], *, failure: int = 1, interrupted: str) -> NoReturn:
    """Ends the process with what `main` returns, or with one line on stderr; see `run_main`.

    What SIGTERM ended ends with `PREEMPTED`.
    """
    try:
        code = main() or 0
        if sys.stdout is not None:  # it is where a shell closed it
            sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        _fail(str(error), failure)
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        sys.exit(_BROKEN_PIPE)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _flush_or_drop()
        place = error.filename or "where standard output or a file goes"
        _fail(f"{place}: {error.strerror}; free some and start again", failure)
    except KeyboardInterrupt:
        _fail(f"interrupted; {interrupted}", failure)
    except Preempted as stop:
        print_stop(str(stop))
        sys.exit(PREEMPTED)
    except Exception as error:
        # Known by its name: whoever needs no device need not wait for JAX to be imported.
        if type(error).__name__ != "JaxRuntimeError" or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if any(os.strerror(full) in str(error) for full in _FULL):  # XLA's word for a disk as well
            _fail(f"{first_line(error)}; free some and start again", failure)
        _fail(
            "out of device memory; training: more train.microbatches, for language models "
            "train.remat=full or train.loss_chunk, or a larger mesh.fsdp need less, and "
            "--dry_run tells how much; index: a smaller --batch_size; generation: fewer "
            "samples or --max_new_tokens; evaluation too: --dtype=bfloat16; the harness: "
            "--model_args with dtype=bfloat16 or a smaller tokens_at_once",
            failure,
        )


def _given() -> list[flags.Flag]:
    """Flags of the command line."""
    every = (flags.FLAGS[name] for name in flags.FLAGS)
    return [flag for flag in every if flag.present]


def _fail(message: str, code: int) -> NoReturn:
    print_error(message)
    sys.exit(code)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader is gone; what it still holds is then dropped.

    Of another pipe, such as one to a process of our own, this is False.
    """
    poll = select.poll()
    poll.register(sys.stdout, 0)
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
        return False
    _drop_output()
    return True


def _flush_or_drop() -> None:
    """Writes what standard output still holds, unless that is what has no room."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _drop_output()


def _drop_output() -> None:
    """Drops what standard output still holds: the interpreter flushes it at its end."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_error(message: str) -> None:
    """Prints an error as one line on stderr; inputs that were brought go by their addresses."""
    _print_and_log(places.as_given(f"error: {' '.join(message.split())}"))


def print_stop(message: str) -> None:
    """Prints on stderr that SIGTERM ends this process, and what is saved."""
    _print_and_log(f"stopped by SIGTERM: {message}")


def _print_and_log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
    process_log.write_last(line)


def _setting_named(error: Exception, argv: Sequence[str]) -> str | None:
    """The argument whose setting an error is about."""
    word = re.search(r"\w+", str(error))
    if word is None:
        return None
    return next((arg for arg in argv if f".{word[0]}" in arg.split("=")[0]), None)


def _cause(message: str) -> str:
    """What a config file's own error says, without the traceback that absl prints around it."""
    own = re.search(r"UserError: (.*)", message)
    if own:
        return own[1]
    if re.search(r"get_config\(\) takes 0 positional arguments", message):
        return "this config file takes no argument after a colon"
    return message
