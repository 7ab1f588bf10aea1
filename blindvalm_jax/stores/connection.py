"""An address of an object store, reached through fsspec: what is there, and what it says of it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import fsspec

from blindvalm_jax.errors import UserError, first_line

# By what stores tell one content from another; the first that there is.
_MARKS = ("generation", "ETag", "etag", "mtime", "created")


@dataclasses.dataclass(frozen=True)
class Found:
    """A file of a store: bytes, and what differs as soon as it is written again.

    mark: empty where the store does not say.
    """

    size: int
    mark: str


class Connection:
    """A store's library, and the address that it is to read or write.

    files: the library, by fsspec's interface; root: the address as the library names it.
    """

    def __init__(self, address: str, *, advice: str = "") -> None:
        """Connects; advice: what messages say behind what is wrong.

        Raises:
          UserError: the library of the store or what it needs to log in is missing.
        """
        self.address = address.rstrip("/")
        self._advice = advice
        scheme = self.address.partition(":")[0]
        with self.failing("reached"):
            try:
                self.files: Any = fsspec.filesystem(scheme)
            except ImportError as error:
                raise UserError(
                    f"{scheme}:// needs a library: pip install 'blindvalm_jax[{scheme}]'"
                ) from error
        self.root = str(self.files._strip_protocol(self.address))

    def below(self) -> dict[str, Found]:
        """The files below the address, by their names there; of a file itself, "".

        Raises whatever the store's library does.
        """
        self.files.invalidate_cache()
        found = self.files.find(self.root, detail=True)
        start = len(self.root.strip("/")) + 1
        files = {name.strip("/")[start:]: _found(info) for name, info in found.items()}
        for path in {path for name in files if name for path in PurePosixPath(name).parents}:
            name = "" if path.name == "" else str(path)
            if name in files and not files[name].size:  # it stands for the directory
                del files[name]
        return files

    def mark(self, path: str) -> str:
        """The mark of a file; path: as the library names it."""
        return _mark(self.files.info(path))

    def matching(self) -> dict[str, Found]:
        """The files that the address matches as a glob, by the library's names.

        Raises whatever the store's library does.
        """
        self.files.invalidate_cache()
        found = self.files.glob(self.root, detail=True)
        return {
            name.strip("/"): _found(info)
            for name, info in found.items()
            if info.get("type") == "file" and not name.endswith("/")
        }

    @contextlib.contextmanager
    def failing(self, what: str) -> Iterator[None]:
        """Turns what the store says into one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # each library has its own, down to those of the network
            raise UserError(
                f"{self.address} cannot be {what}: {type(error).__name__}: {first_line(error)}. "
                "Is the bucket there, and this machine logged in (gs: gcloud auth "
                f"application-default login, s3: aws configure)?{self._advice}"
            ) from error


def _found(info: Mapping[str, Any]) -> Found:
    return Found(int(info.get("size") or 0), _mark(info))


def _mark(info: Mapping[str, Any]) -> str:
    key, value = next(((key, info[key]) for key in _MARKS if info.get(key)), ("", ""))
    if isinstance(value, datetime.datetime):  # of one file; in a list the same as a number
        value = value.timestamp()
    return f"{key} {value}" if key else ""
