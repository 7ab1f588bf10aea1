"""What the stores' libraries log of failures that are reported here, in one line each."""

from __future__ import annotations

import logging

from blindvalm_jax.errors import logs_are_wanted

_LIBRARIES = ("gcsfs", "google.auth", "s3fs", "aiobotocore", "botocore")


def quiet() -> None:
    """Drops what they log, tracebacks above all, unless --verbosity or their own variables ask."""
    for name in () if logs_are_wanted() else _LIBRARIES:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:  # GCSFS_DEBUG, say, gives it one
            logger.setLevel(logging.CRITICAL)
