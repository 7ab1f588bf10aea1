"""Addresses of object stores, which are no paths.

As a path "gs://bucket/run" would quietly be a directory of this machine, "gs:".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# also as pathlib writes it, with one slash; in a list, or behind a name
_ADDRESS = re.compile(r"(?:^|[,=])\s*((?:gs|gcs|s3|az|abfss?|hdfs|https?|memory):/[^,]*)")


def refusal(values: Mapping[str, Any]) -> str | None:
    """What is wrong with the first value that is an address or a list with one, or None.

    values: by the name of their flag or setting; only texts and lists of them are looked at.
    """
    for name, value in values.items():
        texts: Iterable[Any] = [value] if isinstance(value, str) else ()
        if isinstance(value, list | tuple):
            texts = value
        for text in texts:
            found = _ADDRESS.search(text) if isinstance(text, str) else None
            if found:
                return (
                    f"{name}: {found[1]} is an address, and here files are read and written by "
                    "paths: mount the bucket (gcsfuse, mount-s3) and give the path. A run, and it "
                    "alone, may be kept there: train takes it as --workdir, python -m "
                    "blindvalm_jax.remote ADDRESS brings it here"
                )
    return None


def is_address(place: str) -> bool:
    """Whether it is no path."""
    return refusal({"place": place}) is not None
