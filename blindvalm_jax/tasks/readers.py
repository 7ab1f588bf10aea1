"""The files of the tasks, as their authors publish them, and as the reference's scripts read them.

Nothing is downloaded: the files lie in a directory that the user names, or below it.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from blindvalm_jax.data.file_hashes import file_hashes
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks.questions import Item

_DEEPEST = 3  # directories below the one that is named
_HALF = re.compile("[\ud800-\udfff]")
Read = Callable[[Path], list[Item]]
Row = TypeVar("Row")


def find(data: Path, names: Sequence[str]) -> Path:
    """The file of one of the names in a directory or below it; earlier names are preferred.

    Raises:
      UserError: there is none, or two of a name.
    """
    if not data.is_dir():
        raise UserError(f"--data={data} is no directory: name the one that holds the tasks' files")
    for name in names:
        found = _places(data, name)
        if len(found) > 1:
            raise UserError(
                f"{name} is in {found[0].parent} and in {found[1].parent}: name a directory that "
                "holds one of them"
            )
        if found:
            return found[0]
    raise UserError(f"{' or '.join(names)} is not in {data}, nor up to {_DEEPEST} levels below")


def holds(data: Path, names: Sequence[str]) -> bool:
    """Whether `find` finds any of the names."""
    return any(_places(data, name) for name in names)


def _places(data: Path, name: str) -> list[Path]:
    return [
        path
        for depth in range(_DEEPEST + 1)
        for path in sorted(data.glob("/".join(["*"] * depth + [name])))
        if path.is_file()
    ]


@dataclasses.dataclass(frozen=True)
class File:
    """A file that was read; preferred: what was looked for first, where that is another name."""

    name: str
    sha256: str
    preferred: str = ""

    @property
    def entry(self) -> dict[str, str]:
        """What results.json says of it."""
        return {"name": self.name, "sha256": self.sha256}

    @property
    def notes(self) -> tuple[str, ...]:
        """A note where another file was preferred."""
        if not self.preferred:
            return ()
        return (f"{self.name} was read: {self.preferred} is not there, and may hold other data",)


def read_file(path: Path, names: Sequence[str]) -> File:
    """What to record of a file that `find` found by these names."""
    [found] = file_hashes([path])
    return File(path.name, found.sha256, names[0] if path.name != names[0] else "")


def read_files(paths: Sequence[Path], pattern: str) -> File:
    """What to record of the files of a pattern.

    Several go by the pattern, and by the hash of their hashes, each on a line of its own.
    """
    hashes = [found.sha256 for found in file_hashes(paths)]
    if len(paths) == 1:
        return File(paths[0].name, hashes[0])
    lines = "".join(f"{own}\n" for own in hashes)
    return File(pattern, hashlib.sha256(lines.encode()).hexdigest())


def text_sha256(text: str) -> str:
    """What a text is known by, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def text_of(path: Path) -> str:
    """The text of a file: line feeds end its lines, with or without a return in front.

    A return alone stays in its line, as in training (`corpora`). No byte order mark.

    Raises:
      UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def lines_of(path: Path) -> list[str]:
    """Lines of a file, without blank ones at its end; U+2028 and the like end none.

    Raises:
      UserError: no line holds text, or see `text_of`.
    """
    lines = text_of(path).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return _some(path, lines)


def csv_rows(
    path: Path, columns: Sequence[str], *, may_be_blank: Sequence[str] = ()
) -> list[dict[str, str]]:
    """Rows of a comma-separated file whose first line is `columns`.

    Raises:
      UserError: the first line is another, a row has more or fewer fields or a blank one that may
        not be, or there is none.
    """
    (_, head), *rows = _fields(path) or [(1, [])]
    if head != [*columns]:
        raise UserError(f"{path} begins with {head}, expected the columns {[*columns]}")
    found = [_row(path, number, columns, row) for number, row in rows]
    for (number, _), row in zip(rows, found, strict=True):
        blank = [name for name in columns if not row[name].strip() and name not in may_be_blank]
        if blank:
            raise UserError(f"{path}:{number} has nothing as {blank[0]}: fill it, or drop the row")
    return _some(path, found)


def bare_csv_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a comma-separated file that has no first line with names.

    Raises:
      UserError: a row has more or fewer fields, or there is none.
    """
    rows = _fields(path)
    return _some(path, [_row(path, number, columns, row) for number, row in rows])


def _fields(path: Path) -> list[tuple[int, list[str]]]:
    """Rows that are not blank, and the line each ends in; a field may be as long as the file.

    Here a return alone ends a row too, unless its field stands in quotes.
    """
    text = text_of(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        reader = csv.reader(io.StringIO(text, newline=""))
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as comma-separated values: {error}") from error


def _row(path: Path, number: int, columns: Sequence[str], row: Sequence[str]) -> dict[str, str]:
    if len(row) != len(columns):
        raise UserError(f"{path}:{number} has {len(row)} fields, expected {', '.join(columns)}")
    return dict(zip(columns, row, strict=True))


def split_rows(path: Path) -> list[list[str]]:
    """Lines cut at every comma, the first left out, as the reference's scripts do it."""
    return _some(path, [line.split(",") for line in lines_of(path)[1:]])


def json_rows(
    path: Path,
    texts: Sequence[str],
    others: Sequence[str] = (),
    *,
    may_be_blank: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Objects of a JSON list, or of lines of JSON; texts, others: fields they must have.

    Raises:
      UserError: it is neither, there is no object, or one lacks a field or has no text, or a blank
        one, in one of `texts`.
    """
    text = text_of(path)
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:  # also: a number too long
        raise UserError(f"{path} is neither a JSON list nor lines of JSON: {error}") from error
    for number, row in enumerate(rows, 1):
        wanted = (*texts, *others)
        lacking = [name for name in wanted if not isinstance(row, dict) or name not in row]
        if lacking:
            raise UserError(f"{path}: example {number} lacks {', '.join(lacking)}")
        for name in texts:
            if not _is_text(row[name]):
                raise UserError(
                    f"{path}: example {number} has {json.dumps(row[name])[:40]} as {name}, "
                    "expected a text"
                )
            if not row[name].strip() and name not in may_be_blank:
                raise UserError(
                    f"{path}: example {number} has nothing as {name}: fill it, or drop the example"
                )
    return _some(path, rows)


def _is_text(value: object) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON can name halves of characters."""
    return isinstance(value, str) and not _HALF.search(value)


def _some(path: Path, rows: list[Row]) -> list[Row]:
    if not rows:
        raise UserError(f"{path} holds no rows")
    return rows
