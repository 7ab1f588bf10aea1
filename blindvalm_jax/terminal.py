"""Text that comes from a command line or a terminal, whatever its bytes, and goes to one."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable

from blindvalm_jax.errors import UserError, print_error

_UNREAD = re.compile("[\ud800-\udfff]")  # how Python keeps bytes of an argument that are no text


def take_any_text() -> None:
    """Lets standard input and output go on where a byte or a character is not in their encoding.

    What is read of such bytes is U+FFFD; such characters are written as their numbers.
    """
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def argument(text: str) -> str:
    """An argument of the command line, with U+FFFD for what is no text."""
    return _UNREAD.sub("\ufffd", text)


def each_line(go_on: Callable[[str], None]) -> None:
    """Calls it with every line of standard input; Ctrl-C ends a text, at the prompt the program."""
    try:
        for line in sys.stdin:
            try:
                go_on(line.rstrip("\r\n"))
            except UserError as error:
                print_error(str(error))
            except KeyboardInterrupt:
                print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
