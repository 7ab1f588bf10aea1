"""An address of an object store, reached through fsspec: what is there, and what it says of it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from blindvalm_jax.errors import UserError, first_line
from blindvalm_jax.stores import library_log

# By what stores tell one content from another; the first that there is.
_MARKS = ("generation", "ETag", "etag", "mtime", "created")
# What no store answers: a file of this machine cannot be written.
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ESTALE)


class MissingError(UserError):
    """A store has no such file or bucket."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A file of a store: bytes, and what differs as soon as it is written again.

    mark: empty where the store does not say.
    """

    size: int
    mark: str


class Connection:
    """A store's library, and the address that it is to read or write.

    root: the address as the library names it; so are all paths there. Whatever the library raises
    becomes a `UserError`, and nothing else does.
    """

    def __init__(self, address: str, *, advice: str = "") -> None:
        """Connects; advice: what messages say behind what is wrong.

        Raises:
          UserError: the library of the store or what it needs to log in is missing.
        """
        library_log.quiet()
        self.address = address.rstrip("/")
        self._advice = advice
        scheme = self.address.partition(":")[0]
        with self._failing("reached"):
            try:
                self._files: Any = fsspec.filesystem(scheme)
            except ImportError as error:
                raise UserError(
                    f"{scheme}:// needs a library: pip install 'blindvalm_jax[{scheme}]'"
                ) from error
        self.root = str(self._files._strip_protocol(self.address))

    def below(self) -> dict[str, Found]:
        """The files below the address, by their names there; of a file itself, "".

        Raises:
          UserError: it cannot be read; `MissingError`: there is no such bucket.
        """
        with self._failing("read"):
            self._files.invalidate_cache()
            found = self._files.find(self.root, detail=True)
        start = len(self.root.strip("/")) + 1
        files = {name.strip("/")[start:]: _found(info) for name, info in found.items()}
        for path in {path for name in files if name for path in PurePosixPath(name).parents}:
            name = "" if path.name == "" else str(path)
            if name in files and not files[name].size:  # it stands for the directory
                del files[name]
        return files

    def mark(self, path: str) -> str:
        """The mark of a file; raises as `below`."""
        with self._failing("read"):
            info = self._files.info(path)
        return _mark(info)

    def matching(self) -> dict[str, Found]:
        """The files that the address matches as a glob, by their paths; raises as `below`."""
        with self._failing("read"):
            self._files.invalidate_cache()
            found = self._files.glob(self.root, detail=True)
        return {
            name.strip("/"): _found(info)
            for name, info in found.items()
            if info.get("type") == "file" and not name.endswith("/")
        }

    def is_directory(self) -> bool:
        """Whether files lie below the address; raises as `below`."""
        with self._failing("read"):
            return bool(self._files.isdir(self.root))

    def part(self, path: str, *, start: int, end: int) -> bytes:
        """The bytes of a file from `start` to before `end`; raises as `below`."""
        with self._failing("read"):
            return bytes(self._files.cat_file(path, start=start, end=end))

    def get(self, path: str, file: Path) -> None:
        """Brings a file.

        Raises:
          UserError: it cannot be read there; `MissingError`: there is none.
          OSError: it cannot be written here.
        """
        with self._failing("read", file):
            self._files.get_file(path, str(file))

    def put(self, file: Path, path: str) -> None:
        """Sends a file.

        Raises:
          UserError: it cannot be written there.
          OSError: it cannot be read here.
        """
        with self._failing("written", file):
            self._files.put_file(str(file), path)

    def remove(self, path: str) -> None:
        """Removes a file; raises as `below`."""
        with self._failing("written"):
            self._files.rm_file(path)

    @contextlib.contextmanager
    def _failing(self, what: str, file: Path | None = None) -> Iterator[None]:
        """Turns what the library says into one line, but not an error of the file here."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # each library has its own, down to those of the network
            if file is not None and isinstance(error, OSError) and _is_local(error, file):
                raise OSError(error.errno, error.strerror, error.filename or str(file)) from error
            kind = MissingError if isinstance(error, FileNotFoundError) else UserError
            raise kind(
                f"{self.address} cannot be {what}: {type(error).__name__}: {first_line(error)}. "
                "Is the bucket there, and this machine logged in (gs: gcloud auth "
                f"application-default login, s3: aws configure)?{self._advice}"
            ) from error


def _is_local(error: OSError, file: Path) -> bool:
    """Whether an error of the library is one of the file here, or of its directory."""
    named = error.filename
    return error.errno in _LOCAL or (
        isinstance(named, str) and Path(named).is_relative_to(file.parent)
    )


def _found(info: Mapping[str, Any]) -> Found:
    return Found(int(info.get("size") or 0), _mark(info))


def _mark(info: Mapping[str, Any]) -> str:
    key, value = next(((key, info[key]) for key in _MARKS if info.get(key)), ("", ""))
    if isinstance(value, datetime.datetime):  # of one file; in a list the same as a number
        value = value.timestamp()
    return f"{key} {value}" if key else ""
