"""Hashes of files that are kept: whatever ends the reading, none is computed twice."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from blindvalm_jax.data import file_hashes
from blindvalm_jax.errors import UserError


def write(directory: Path, count: int) -> list[Path]:
    paths = [directory / f"{number}.txt" for number in range(count)]
    for path in paths:
        path.write_text(path.name)
    return paths


def kept(known: Path) -> set[str]:
    return {Path(name).name for name in json.loads(known.read_bytes())}


def test_hashes_before_an_error_are_kept_and_not_computed_again(tmp_path: Path) -> None:
    paths, known = write(tmp_path, 4), tmp_path / "kept" / "hashes.json"
    paths[2].unlink()
    with pytest.raises(UserError, match="2.txt cannot be read"):
        file_hashes.file_hashes(paths, known=known)
    assert kept(known) == {"0.txt", "1.txt"}
    paths[2].write_text("")
    state = paths[0].stat()
    paths[0].write_text("o.txt")  # of the same size and time: only its kept hash says what it was
    os.utime(paths[0], ns=(state.st_mtime_ns, state.st_mtime_ns))
    found = file_hashes.file_hashes(paths, known=known)
    texts = ["0.txt", "1.txt", "", "3.txt"]
    assert [entry.sha256 for entry in found] == [
        hashlib.sha256(text.encode()).hexdigest() for text in texts
    ]
    assert [entry.bytes for entry in found] == [len(text) for text in texts]
    assert kept(known) == {path.name for path in paths}


def test_hashes_are_kept_while_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a process that is killed has not read for nothing."""
    paths, known = write(tmp_path, 4), tmp_path / "hashes.json"
    monkeypatch.setattr(file_hashes, "_BYTES_BETWEEN_SAVES", 8)
    seen = []
    write_json = file_hashes.files.write_json

    def watch(path: Path, value: object, **layout: bool) -> None:
        write_json(path, value, **layout)
        seen.append(len(kept(known)))

    monkeypatch.setattr(file_hashes.files, "write_json", watch)
    file_hashes.file_hashes(paths, known=known)
    assert seen == [2, 4]
    file_hashes.file_hashes(paths, known=known)
    assert seen == [2, 4], "written again with nothing new in it"


def test_hashes_are_kept_without_spaces_and_indented_ones_are_read(tmp_path: Path) -> None:
    """Spaces make writing millions of them take twice as long."""
    paths, known = write(tmp_path, 3), tmp_path / "hashes.json"
    first = file_hashes.file_hashes(paths[:1], known=known)
    values = json.loads(known.read_bytes())
    assert known.read_text() == json.dumps(values, separators=(",", ":")) + "\n"
    ((name, (size, time, _)),) = values.items()
    known.write_text(json.dumps({name: [size, time, "f" * 64]}, indent=1))
    found = file_hashes.file_hashes(paths, known=known)
    assert found[0] == file_hashes.FileHash(bytes=first[0].bytes, sha256="f" * 64)
    assert len(kept(known)) == 3
