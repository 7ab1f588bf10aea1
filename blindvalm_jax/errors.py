"""What a user sees when something is wrong: one line, a non-zero exit code, no traceback."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
from absl import app, flags, logging


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, expected and got, what to do."""


def run_main(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs an absl entry point; a `UserError` becomes one line on stderr and exit code 1.

    `--verbosity=0` shows what libraries log.
    """

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # libraries report every file they write
        try:
            sys.exit(main(argv) or 0)
        except UserError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            _fail("interrupted; the same command goes on from what is on disk")
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            _fail(
                "out of device memory; more train.microbatches, train.remat=full, train.loss_chunk "
                "or a larger mesh.fsdp need less, and --dry_run tells how much"
            )

    app.run(guarded, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    """Reads the command line; what absl and ml_collections raise becomes one line too."""
    try:
        return flags.FLAGS(list(argv))
    except (flags.Error, UserError) as error:
        _fail(_cause(str(error)))
    except (AttributeError, KeyError) as error:
        word = re.search(r"\w+", str(error))
        name = f".{word[0]}" if word else ""
        given = next((a for a in argv if name and name in a.split("=")[0]), None)
        if given is None:
            raise  # an error of the config file itself: its traceback says where
        _fail(f"unknown setting {given}; `python -m blindvalm_jax.config` lists all of them")


def _cause(message: str) -> str:
    """What a config file's own error says, without the traceback that absl prints around it."""
    own = re.search(r"UserError: (.*)", message)
    if own:
        return own[1]
    if re.search(r"get_config\(\) takes 0 positional arguments", message):
        return "this config file takes no argument after a colon"
    return message


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(1)
