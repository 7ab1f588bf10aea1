"""The files of the tasks, as their authors publish them, and as the reference's scripts read them.

Nothing is downloaded: the files lie in a directory that the user names, or below it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks.questions import Item

_DEEPEST = 3  # directories below the one that is named
Read = Callable[[Path], list[Item]]


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


def text_of(path: Path) -> str:
    """The text of a file.

    Raises:
      UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def csv_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a comma-separated file whose first line is `columns`.

    Raises:
      UserError: the first line is another, or a row has more or fewer fields.
    """
    reader = csv.reader(io.StringIO(text_of(path), newline=""))
    head = next(reader, [])
    if head != [*columns]:
        raise UserError(f"{path} begins with {head}, expected the columns {[*columns]}")
    return [_row(path, number, columns, row) for number, row in enumerate(reader, 2) if row]


def bare_csv_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a comma-separated file that has no first line with names."""
    reader = csv.reader(io.StringIO(text_of(path), newline=""))
    return [_row(path, number, columns, row) for number, row in enumerate(reader, 1) if row]


def _row(path: Path, number: int, columns: Sequence[str], row: Sequence[str]) -> dict[str, str]:
    if len(row) != len(columns):
        raise UserError(f"{path}:{number} has {len(row)} fields, expected {', '.join(columns)}")
    return dict(zip(columns, row, strict=True))


def split_rows(path: Path) -> list[list[str]]:
    """Lines cut at every comma, the first left out, as the reference's scripts do it."""
    return [line.split(",") for line in text_of(path).splitlines()[1:]]


def json_rows(path: Path, columns: Iterable[str]) -> list[dict[str, Any]]:
    """Objects of a JSON list, or of lines of JSON.

    Raises:
      UserError: it is neither, or an object lacks one of the columns.
    """
    text = text_of(path)
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is neither a JSON list nor lines of JSON: {error}") from error
    for number, row in enumerate(rows, 1):
        lacking = [name for name in columns if not isinstance(row, dict) or name not in row]
        if lacking:
            raise UserError(f"{path}: example {number} lacks {', '.join(lacking)}")
    return rows
