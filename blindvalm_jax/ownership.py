"""Whose the directory of a run is: one for all processes, or, of a run in a store, each its own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from blindvalm_jax import agreement
from blindvalm_jax.console import is_first
from blindvalm_jax.errors import UserError

_apart = False


def apart() -> bool:
    """Whether each of several processes works in a directory of its own."""
    return _apart


def keeps() -> bool:
    """Whether this process renames and deletes in its directory: the first one, or each apart."""
    return _apart or is_first()


@contextlib.contextmanager
def each_its_own() -> Iterator[None]:
    """While it lasts the processes work apart."""
    global _apart
    _apart = True
    try:
        yield
    finally:
        _apart = False


def check_alike(about: Mapping[str, Any]) -> None:
    """Refuses to train on what processes that work apart have prepared differently.

    about: as `runs.write_record` gets it.

    Raises:
      UserError: data, tokenizer, tower or image index differ.
    """
    if not _apart:
        return
    parts = {
        "data": about["data"]["key"],
        "tokenizers": about["tokenizer"],
        "towers": (about.get("tower") or {}).get("sha256"),
        "image indexes": (about.get("images") or {}).get("key"),
    }
    for name, part in parts.items():
        if not agreement.same(json.dumps(part)):
            raise UserError(
                f"the processes have different {name}: give all of them the same files and the "
                "same versions of the libraries"
            )
