"""Documents from text files and TFDS text datasets, streamed in a fixed order.

Memory is bounded by the largest document. Documents without any text are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from blindvalm_jax.data.file_hashes import file_hashes, readable
from blindvalm_jax.errors import UserError, first_line
from blindvalm_jax.stores import places

_COMPRESSIONS = (".gz", ".zst", ".xz")
_FORMATS = (".txt", ".jsonl")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_EXAMPLES_AT_ONCE = 1024
Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Text files named by globs; `text_field` is the field of a .jsonl line.

    `digests` is a file that keeps the hashes of files by path, size and time of change, so that
    they are not read for that again.
    """

    patterns: tuple[str, ...]
    text_field: str = "text"
    digests: Path | None = None

    def paths(self) -> list[Path]:
        """The files."""
        return find_files(self.patterns)

    def size(self) -> int:
        """Bytes on disk."""
        return sum(file["bytes"] for file in self.describe())

    def documents(self, advance: Advance | None = None) -> Iterator[str]:
        """All documents in order; `advance` is told of the bytes read from disk."""
        return documents(self.patterns, text_field=self.text_field, advance=advance)

    def describe(self) -> list[dict[str, Any]]:
        """Path, format, size and SHA-256 of every file, as they were when first asked for."""
        return self._description

    @functools.cached_property
    def _description(self) -> list[dict[str, Any]]:
        paths = self.paths()
        hashes = file_hashes(paths, known=self.digests)
        return [
            {"path": places.as_given(str(path)), "format": "".join(_format_of(path)), **vars(found)}
            for path, found in zip(paths, hashes, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A split of a TFDS dataset on this machine's disk.

    name: dataset[/config][:version]; data_dir: "" for TFDS's default; digests: as in `FileSource`.
    """

    name: str
    split: str = "train"
    data_dir: str = ""
    text_field: str = "text"
    digests: Path | None = None

    def paths(self) -> list[Path]:
        """The directory of all datasets, if one is given."""
        return [Path(self.data_dir)] if self.data_dir else []

    def size(self) -> int:
        """Examples."""
        return len(self._open()[1])

    def documents(self, advance: Advance | None = None) -> Iterator[str]:
        """All documents in order; `advance` is told of the examples read."""
        return tfds_documents(
            self.name, self.split, self.data_dir, self.text_field, advance=advance
        )

    def describe(self) -> list[dict[str, Any]]:
        """Name, split, number of examples, and size and SHA-256 of the files that hold them."""
        return self._description

    @functools.cached_property
    def _description(self) -> list[dict[str, Any]]:
        builder, examples = self._open()
        paths = [Path(path) for path in builder.info.splits[self.split].filepaths]
        hashes = file_hashes(paths, known=self.digests)
        about = {"tfds": builder.info.full_name, "split": self.split, "examples": len(examples)}
        return [{**about, "files": [vars(found) for found in hashes]}]

    def _open(self) -> tuple[Any, Any]:
        return open_tfds(self.name, self.split, self.data_dir)


Source = FileSource | TfdsSource


def contents(source: Source) -> list[Any]:
    """What decides the documents of a source: contents in order, and the field, but no paths."""
    files = [{k: v for k, v in file.items() if k != "path"} for file in source.describe()]
    return [source.text_field, files]


def split_patterns(text: str) -> tuple[str, ...]:
    """Reads comma-separated globs."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Files that match any of the globs, each once however it is named, sorted by path.

    Raises:
      UserError: a glob matches no file, or a file is of an unknown kind.
    """
    names: set[str] = set()
    for pattern in map(os.path.expanduser, patterns):
        matches = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
        if not matches and os.path.isdir(pattern):
            raise UserError(
                f"{pattern} is a directory: name the files in it, as in "
                f"{os.path.join(pattern, '*.txt')}"
            )
        if not matches:
            raise UserError(
                f"no file matches {pattern!r}: check the path, relative to {Path.cwd()}"
            )
        names.update(matches)
    found: dict[Path, Path] = {}
    for path in map(Path, sorted(names)):
        found.setdefault(path.resolve(), path)
        _format_of(path)
    return list(found.values())


def documents(
    paths_or_globs: Sequence[str], *, text_field: str = "text", advance: Advance | None = None
) -> Iterator[str]:
    """Documents of .txt (separated by blank lines) and .jsonl files, plain or .gz .zst .xz.

    Files are read in the order of their paths. A byte-order mark at the start of a file is dropped.

    Raises:
      UserError: no file matches a glob, or one cannot be read; unknown extension; damaged
        compression; text that is not UTF-8 (file and byte); a line that is not JSON or lacks the
        field (file and line); no document at all.
    """
    empty = True
    for path in find_files(paths_or_globs):
        with readable(path), path.open("rb") as raw:
            done = 0
            for text in _texts(path, raw, text_field):
                if advance is not None:
                    advance(raw.tell() - done)
                    done = raw.tell()
                if text.strip():
                    empty = False
                    yield text
            if advance is not None:
                advance(path.stat().st_size - done)
    if empty:
        raise UserError(f"no document with text in {', '.join(paths_or_globs)}")


def tfds_documents(
    name: str,
    split: str,
    data_dir: str = "",
    text_field: str = "text",
    *,
    advance: Advance | None = None,
) -> Iterator[str]:
    """Documents of a TFDS dataset kept as ArrayRecord, without TensorFlow.

    Raises:
      UserError: the dataset is neither prepared nor preparable here, or has no such split or field.
    """
    _, examples = open_tfds(name, split, data_dir)
    empty = True
    for index, example in enumerate(_in_order(examples)):
        if text_field not in example:
            raise UserError(
                f"TFDS {name} has no field {text_field!r} (data.text_field); it has "
                f"{', '.join(sorted(example))}"
            )
        value = example[text_field]
        if not isinstance(value, str | bytes):
            raise UserError(
                f"TFDS {name}: field {text_field!r} must be text, got {type(value).__name__}"
            )
        try:
            text = value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            raise UserError(f"TFDS {name}:{index}: not UTF-8 at byte {error.start}") from error
        if advance is not None:
            advance(1)
        if text.strip():
            empty = False
            yield text
    if empty:
        raise UserError(f"no document with text in TFDS {name}, split {split}")


def _in_order(examples: Any) -> Iterator[Mapping[str, Any]]:
    """All examples; many at once, since each read unpacks the records around it too."""
    for first in range(0, len(examples), _EXAMPLES_AT_ONCE):
        last = min(first + _EXAMPLES_AT_ONCE, len(examples))
        yield from examples.__getitems__(range(first, last))


def open_tfds(name: str, split: str, data_dir: str) -> tuple[Any, Any]:
    """Builder and random-access examples of a split kept as ArrayRecord.

    Raises:
      UserError: it is neither prepared nor preparable here, or has no such split.
    """
    # Imported here: it takes seconds, and most runs read files.
    import tensorflow_datasets as tfds

    if name.startswith("toyworld_"):
        from blindvalm_jax.toyworld import builders  # noqa: F401  TFDS knows what is imported

    directory = data_dir or None
    if directory and not Path(directory).is_dir():
        raise UserError(f"there is no directory {directory} of TFDS datasets (data.tfds_dir)")
    try:
        builder = tfds.builder(name, data_dir=directory, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError, OSError, AssertionError) as error:
        stored = _stored_format(tfds, name, directory)
        if stored not in (None, "array_record"):
            raise UserError(
                f"TFDS dataset {name!r} is prepared as {stored}, not array_record: prepare it "
                "with file_format='array_record' in another directory and set data.tfds_dir"
            ) from error
        raise UserError(
            f"TFDS dataset {name!r} cannot be opened as array_record: {first_line(error)}"
        ) from error
    if not builder.is_prepared():
        try:
            builder.download_and_prepare()
        except Exception as error:  # whatever a dataset's own download code raises
            raise UserError(
                f"TFDS dataset {name!r} is not prepared as array_record under {builder.data_dir} "
                f"and could not be: {first_line(error)}; prepare it elsewhere with "
                "file_format='array_record' and set data.tfds_dir"
            ) from error
    try:
        return builder, builder.as_data_source(split=split)
    except (ValueError, KeyError) as error:
        raise UserError(f"TFDS dataset {name!r}, split {split!r}: {first_line(error)}") from error


def _stored_format(tfds: Any, name: str, directory: str | None) -> str | None:
    """Format of a dataset that is prepared; None if it is not, or cannot be opened at all."""
    try:
        builder = tfds.builder(name, data_dir=directory)
        return str(builder.info.file_format.value) if builder.is_prepared() else None
    except (tfds.core.DatasetNotFoundError, ValueError, OSError, AssertionError):
        return None


def _format_of(path: Path) -> tuple[str, str]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSIONS else ""
    kind = suffixes[-1] if suffixes else ""
    if kind not in _FORMATS:
        raise UserError(
            f"{path}: unknown kind of file; expected {' or '.join(_FORMATS)}, plain or with "
            f"{', '.join(_COMPRESSIONS)}"
        )
    return kind, compression


def _texts(path: Path, raw: BinaryIO, text_field: str) -> Iterator[str]:
    kind, compression = _format_of(path)
    lines = _decoded_lines(path, _decompressed(raw, compression))
    return _paragraphs(lines) if kind == ".txt" else _fields(path, lines, text_field)


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)


def _fields(path: Path, lines: Iterator[str], text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # also: numbers too long, lists too deep
            reason = first_line(error)
            raise UserError(f"{path}:{number}: not valid JSON: {reason}") from error
        if not isinstance(value, dict) or text_field not in value:
            has = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise UserError(
                f"{path}:{number}: no field {text_field!r} (data.text_field); it has {has}"
            )
        text = value[text_field]
        if not isinstance(text, str):
            raise UserError(
                f"{path}:{number}: field {text_field!r} must be text, got {type(text).__name__}"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{path}:{number}: half of a surrogate pair is no text") from error
        yield text


def _decoded_lines(path: Path, stream: Any) -> Iterator[str]:
    offset = 0
    lines = iter(stream)
    while True:
        try:
            line = next(lines, None)
        except (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
            raise UserError(f"{path} is damaged or cut short: {first_line(error)}") from error
        if line is None:
            return
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 at byte {offset + error.start} (of the uncompressed text): "
                "convert it first"
            ) from error
        if offset == 0:
            text = text.removeprefix(_BYTE_ORDER_MARK.decode())
        offset += len(line)
        yield text.rstrip("\r\n")


def _decompressed(raw: BinaryIO, compression: str) -> Any:
    if compression == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if compression == ".xz":
        return io.BufferedReader(lzma.LZMAFile(raw))
    if compression == ".zst":
        return io.BufferedReader(_ZstdReader(raw), 1 << 17)
    return raw


def _zstd() -> zstandard.ZstdDecompressor:
    return zstandard.ZstdDecompressor(
        max_window_size=1 << 31
    )  # what `zstd --ultra --long=31` makes


class _ZstdReader(io.RawIOBase):
    """Reads Zstandard frames; unlike the library's own reader it refuses a file cut short."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: Any = None
        self._text = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            if self._frame is not None and self._frame.eof:
                rest, self._frame = self._frame.unused_data, None
            else:
                rest = b""
            rest = rest or self._raw.read(1 << 17)
            if not rest:
                if self._frame is not None:
                    raise EOFError("it ends inside a Zstandard frame")
                return 0
            self._frame = self._frame or _zstd().decompressobj()
            self._text = self._frame.decompress(rest)
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count
