"""What Orbax prints of failures that are reported here, in one line each."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

from absl import logging as absl_logging

from blindvalm_jax.errors import logs_are_wanted


@functools.cache
def quiet() -> None:
    """Drops what Orbax prints of a failure, tracebacks above all, unless --verbosity was given.

    Once one part of a state has failed, the others report to an event loop that is closed, or to
    nobody.
    """
    absl_logging.get_absl_logger().addFilter(_is_wanted)
    logging.getLogger("asyncio").addFilter(_is_wanted)
    sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)


def _is_wanted(record: logging.LogRecord) -> bool:
    return logs_are_wanted() or not ("/orbax/" in record.pathname or "OCDBT" in record.getMessage())


def _unraisable(before: Callable[[Any], Any], found: Any) -> None:
    of_orbax = inspect.iscoroutine(found.object) and "/orbax/" in found.object.cr_code.co_filename
    if logs_are_wanted() or not (of_orbax or "Event loop is closed" in str(found.exc_value)):
        before(found)
