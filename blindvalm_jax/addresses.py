"""Addresses of object stores, which are no paths.

As a path "gs://bucket/run" would quietly be a directory of this machine, "gs:".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

STORES = ["gs", "s3"]  # schemes that are read and written
# also as pathlib writes it, with one slash; in a list, behind a name or a kind of task
_ADDRESS = re.compile(
    r"(?:^|[,=]|(?:text|file):)\s*((?:gs|gcs|s3|az|abfss?|hdfs|https?|memory):/[^,]*)"
)


def refusal(values: Mapping[str, Any]) -> str | None:
    """What is wrong with the first value that is an address or a list with one, or None.

    values: by the name of their flag or setting; only texts and lists of them are looked at.
    """
    for name, value in values.items():
        for text in _texts(value):
            if found := _ADDRESS.search(text):
                return (
                    f"{name}: {found[1]} is an address, and here files are read and written by "
                    "paths: mount the bucket (gcsfuse, mount-s3) and give the path. Inputs of a "
                    "run, such as data.files, and train's --workdir may be gs://... or s3://...; "
                    "python -m blindvalm_jax.remote ADDRESS brings a run here"
                )
    return None


def misfit(values: Mapping[str, Any]) -> str | None:
    """What is wrong with the first address in values that may hold those of a store, or None.

    values: as for `refusal`.
    """
    for name, value in values.items():
        for text in _texts(value):
            for found in _ADDRESS.finditer(text):
                if not is_of_store(address := found[1].rstrip()):
                    return (
                        f"{name}: {address} is an address, expected gs://BUCKET/NAME, "
                        "s3://BUCKET/NAME or a path"
                    )
    return None


def is_of_store(address: str) -> bool:
    """Whether it names something in a bucket of a store that is known."""
    scheme, _, place = address.partition("://")
    known = scheme in STORES and re.fullmatch(r"[^/*?\[]+/+[^/].*", place)
    return bool(known) and ".." not in PurePosixPath(address).parts


def is_address(place: str) -> bool:
    """Whether it is no path."""
    return refusal({"place": place}) is not None


def replaced(text: str, here: Callable[[str], str]) -> str:
    """A text, or list of them with commas, with something else in the place of each address."""

    def put(found: re.Match[str]) -> str:
        return f"{found[0][: found.start(1) - found.start()]}{here(found[1].rstrip())}"

    return _ADDRESS.sub(put, text)


def _texts(value: Any) -> Iterable[str]:
    values: Iterable[Any] = value if isinstance(value, list | tuple) else (value,)
    return (text for text in values if isinstance(text, str))
