"""What a user sees when something is wrong: one line, a non-zero exit code, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, expected and got, what to do."""


def run_main(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs an absl entry point; a `UserError` becomes one line on stderr and exit code 1.

    `--verbosity=0` shows what libraries log.
    """

    def guarded(argv: Sequence[str]) -> None:
        if flags.FLAGS["verbosity"].using_default_value:
            logging.set_verbosity(logging.WARNING)  # libraries report every file they write
        try:
            sys.exit(main(argv) or 0)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)

    app.run(guarded)
