"""Text that comes from a command line or a terminal, whatever its bytes, and goes to one."""

from __future__ import annotations

import io
import re
import signal
import sys
from collections.abc import Callable

from blindvalm_jax.command_line import print_error
from blindvalm_jax.errors import UserError

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


def each_line(go_on: Callable[[str, Callable[[], None]], None]) -> None:
    """Calls it with every line of standard input, and with what it is to call now and then.

    That raises KeyboardInterrupt once Ctrl-C was pressed, which ends the work on this line; pressed
    at the prompt, Ctrl-C ends all. Raised wherever the interpreter is, it could be lost: what is
    raised while an object is torn down goes nowhere. A second Ctrl-C on one line does not wait.
    """
    waiting = pressed = False

    def press(number: int, frame: object) -> None:
        nonlocal pressed
        again, pressed = pressed, True
        if waiting or again:
            raise KeyboardInterrupt

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        while True:
            waiting = True
            check()
            line = sys.stdin.readline()
            waiting = False
            if not line:
                return
            try:
                go_on(line.rstrip("\r\n"), check)
            except UserError as error:
                print_error(str(error))
            except KeyboardInterrupt:
                pressed = False
                print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
