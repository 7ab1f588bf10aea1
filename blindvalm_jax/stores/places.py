"""Where on this machine lies what is kept in a store: a place that follows from the address.

BLINDVALM_SCRATCH names the directory of all of it; without it that is TMPDIR/blindvalm.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blindvalm_jax import addresses
from blindvalm_jax.errors import UserError

VARIABLE = "BLINDVALM_SCRATCH"
_DIGITS = 12  # of the hash of an address


def root() -> Path:
    """The directory of all that is brought from stores."""
    named = os.environ.get(VARIABLE)
    found = Path(named).expanduser() if named else Path(tempfile.gettempdir()) / "blindvalm"
    return found.resolve()


def of_run(address: str, *, process: int = 0) -> Path:
    """Where the run of an address is worked on by a process: apart also from others of its machine.

    Raises:
      UserError: it is no directory of a store that is known.
    """
    if not addresses.is_of_store(address):
        raise UserError(
            f"--workdir={address}: expected gs://BUCKET/DIRECTORY, s3://BUCKET/DIRECTORY or a path"
        )
    scheme, _, place = address.partition("://")
    top = root() / f"process-{process}" if process else root()
    return top / scheme / place.strip("/")


def of_input(address: str) -> tuple[Path, str]:
    """A directory for an input alone, and the input's name in it, a glob if the address is one.

    Raises:
      UserError: the directory would be read as a list or a glob where names of files are.
    """
    if re.search(r"[,*?\[]", str(root())):
        raise UserError(
            f"what lies in stores would be brought to {root()}: name a place without a comma, *, ? "
            f"and [ with {VARIABLE}"
        )
    digest = hashlib.sha256(address.encode()).hexdigest()[:_DIGITS]
    scheme, _, place = address.partition("://")
    return root() / "inputs" / digest, f"{scheme}/{place.strip('/')}"


def as_given(value: Any) -> Any:
    """A value with the address in the place of each path that `of_input` made of one.

    value: what JSON can hold; what is within its lists and tables too.
    """
    if isinstance(value, str):
        brought = rf"{re.escape(str(root() / 'inputs'))}/[0-9a-f]{{{_DIGITS}}}/([a-z0-9]+)/"
        return re.sub(brought, r"\1://", value)
    if isinstance(value, Mapping):
        return {key: as_given(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [as_given(x) for x in value]
    return value
