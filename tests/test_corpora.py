"""Documents from files and TFDS: the same text however it is stored, one clear line when not."""

from __future__ import annotations

import dataclasses
import gzip
import json
import lzma
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
import zstandard

from blindvalm_jax.data import corpora
from blindvalm_jax.errors import UserError

TEXTS = ["first line\nsecond line", "Füße naïve 漢字 🙂", "third " * 40_000 + "end"]
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def txt(texts: list[str]) -> bytes:
    return ("\n\n".join(texts) + "\n").encode()


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"body": text, "n": 1}) + "\n" for text in texts).encode()


def read(*patterns: str | Path, field: str = "body") -> list[str]:
    found = corpora.documents([str(pattern) for pattern in patterns], text_field=field)
    return list(found)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(("kind", "write"), [(".txt", txt), (".jsonl", jsonl)])
def test_every_format_gives_the_same_documents(
    tmp_path: Path, kind: str, write: Callable[[list[str]], bytes], compression: str
) -> None:
    path = tmp_path / f"text{kind}{compression}"
    path.write_bytes(COMPRESSIONS[compression](write(TEXTS)))
    assert read(path) == TEXTS


def test_two_zstd_frames_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"one\n\ntw") + zstandard.compress(b"o\n\nthree\n"))
    assert read(path) == ["one", "two", "three"]


def test_blank_lines_separate_and_line_ends_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf\r\n \t\r\none\r\nmore\r\n\r\n\n\ntwo")
    assert read(path) == ["one\nmore", "two"]


def test_order_is_by_path_and_each_file_once(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    sub = tmp_path / "sub"
    sub.mkdir()
    (sub / "d.txt").write_text("d")
    assert read(tmp_path / "[bc].txt", tmp_path / "*.txt") == ["a", "b", "c"]
    assert read(tmp_path / "**/*.txt") == ["a", "b", "c", "d"]


def test_reading_streams(tmp_path: Path) -> None:
    """The first document comes before the damage later in the file is reached."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\n" + b"x\n" * 200_000 + b"\n\xff\n")
    found = corpora.documents([str(path)])
    assert next(found) == "one"
    with pytest.raises(UserError, match="not UTF-8 at byte 400006"):
        list(found)


def test_progress_counts_the_bytes_on_disk(tmp_path: Path) -> None:
    sizes: list[int] = []
    for name in ("a.txt", "b.txt.gz"):
        compress = COMPRESSIONS[Path(name).suffix if name.endswith("gz") else ""]
        (tmp_path / name).write_bytes(compress(txt(TEXTS)))
    source = corpora.FileSource((str(tmp_path / "*"),))
    assert len(list(source.documents(sizes.append))) == 6
    assert sum(sizes) == source.size() == sum(p.stat().st_size for p in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no document with text"),
        ("a.txt", b" \n\n\t\n", "no document with text"),
        ("a.txt", b"good\n\nab\xff", r"a\.txt is not UTF-8 at byte 8"),
        ("a.csv", b"good", "unknown kind of file; expected .txt or .jsonl"),
        ("a.gz", b"good", "unknown kind of file"),
        ("a.jsonl", b'{"body": "x"}\n{"body": \n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"body": "x"}\n{"text": "y"}\n', r"a\.jsonl:2: no field 'body'.*has text"),
        ("a.jsonl", b'["body"]\n', r"a\.jsonl:1: no field 'body'.*has list"),
        ("a.jsonl", b'\n{"body": 3}\n', r"a\.jsonl:2: field 'body' must be text, got int"),
        ("a.jsonl", b'{"body": "\\ud800"}\n', r"a\.jsonl:1: half of a surrogate pair"),
        ("a.jsonl", b'{"body": ' + b"[" * 100_000, r"a\.jsonl:1: not valid JSON: .*recursion"),
        ("a.jsonl", b'{"body": ' + b"9" * 5_000 + b"}", r"a\.jsonl:1: not valid JSON: Exceeds"),
        ("a.txt.gz", b"good", r"a\.txt\.gz is damaged or cut short"),
        ("a.txt.xz", b"good", r"a\.txt\.xz is damaged or cut short"),
        ("a.txt.zst", b"good", r"a\.txt\.zst is damaged or cut short"),
    ],
)
def test_bad_files_are_one_clear_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_a_file_cut_short_is_refused(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.txt{compression}"
    whole = COMPRESSIONS[compression](txt(TEXTS))
    path.write_bytes(whole[: len(whole) - 9])
    with pytest.raises(UserError, match="damaged or cut short"):
        read(path)


def test_a_glob_without_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"no file matches '.*b\*\.txt'"):
        read(tmp_path / "a.txt", tmp_path / "b*.txt")


def test_a_file_is_read_once_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("a.txt", tmp_path / "*.txt", "~/a.txt", "./a.txt") == ["a"]
    assert read("~/b.txt") == ["a"]


def test_a_directory_is_named_as_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a directory: name the files in it, as in .*\*\.txt"):
        read(tmp_path)


def test_zstd_with_a_long_window_is_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "a.txt.zst"
    path.write_bytes(compressor.compress(b"one\n\ntwo") + compressor.flush())
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
    assert read(path) == ["one", "two"]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
@pytest.mark.parametrize("use", ["documents", "describe", "size"])
def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path: Path, use: str) -> None:
    """/proc/self/mem gives an error for its first byte, whoever reads it."""
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")
    source = corpora.FileSource((str(tmp_path / "a.txt"),))
    with pytest.raises(UserError, match=r"a\.txt (cannot be read|is damaged.*): .*Input/output"):
        list(source.documents()) if use == "documents" else getattr(source, use)()


def test_known_hashes_are_not_computed_again(tmp_path: Path) -> None:
    path, kept = tmp_path / "a.txt", tmp_path / "cache" / "hashes.json"

    def digest() -> str:
        return str(corpora.FileSource((str(path),), digests=kept).describe()[0]["sha256"])

    path.write_text("one")
    first, time = digest(), path.stat().st_mtime_ns
    path.write_text("two")
    os.utime(path, ns=(time, time))
    assert digest() == first, "same size and time of change: not read"
    os.utime(path, ns=(time, time + 1))
    assert digest() != first
    for damaged in ("", "[]", '{"x": 1}'):
        kept.write_text(damaged)
        assert digest() == corpora.FileSource((str(path),)).describe()[0]["sha256"]


class TinyText(tfds.core.GeneratorBasedBuilder):
    """Seven short texts, one of them blank."""

    VERSION = tfds.core.Version("1.0.0")
    WORD = "tëxt"

    def _info(self) -> Any:
        features = {"body": tfds.features.Text(), "label": tfds.features.Scalar(np.int32)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), description="tiny"
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(7):
            yield index, {"body": "" if index == 3 else f"{self.WORD} {index}", "label": index}


class UnreachableText(TinyText):
    """A dataset whose text cannot be had here."""

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        raise OSError("no route to its host")


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tfds")
    TinyText(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


def test_tfds_documents_come_without_tensorflow(tfds_dir: Path) -> None:
    source = corpora.TfdsSource("tiny_text", data_dir=str(tfds_dir), text_field="body")
    seen: list[int] = []
    found = list(source.documents(seen.append))
    assert sorted(found) == [f"tëxt {index}" for index in (0, 1, 2, 4, 5, 6)]
    assert sum(seen) == source.size() == 7
    assert found == list(source.documents())
    assert source.describe()[0]["tfds"] == "tiny_text/1.0.0"


def test_tfds_datasets_are_told_apart_by_their_texts(
    tfds_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where name, number and sizes of the texts are the same."""
    shutil.copytree(tfds_dir, tmp_path / "copy")
    monkeypatch.setattr(TinyText, "WORD", "wörd")
    TinyText(data_dir=tmp_path / "other", file_format="array_record").download_and_prepare()
    kept, copied, other = (
        corpora.contents(corpora.TfdsSource("tiny_text", data_dir=str(path), text_field="body"))
        for path in (tfds_dir, tmp_path / "copy", tmp_path / "other")
    )
    assert kept == copied
    assert kept != other
    assert kept[1][0]["examples"] == other[1][0]["examples"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_field": "text"}, "has no field 'text'.*it has body, label"),
        ({"text_field": "label"}, "field 'label' must be text"),
        ({"split": "test"}, "split 'test'"),
        ({"data_dir": "/nowhere"}, "there is no directory /nowhere"),
        ({"name": "unreachable_text"}, "could not be: no route to its host.*data.tfds_dir"),
        ({"name": "tiny_text:2.0.0"}, "cannot be loaded at version 2.0.0, only: 1.0.0"),
        ({"name": "tiny_text/other"}, "BuilderConfig other not found"),
        ({"name": "no_such_dataset"}, "'no_such_dataset' cannot be opened"),
    ],
)
def test_tfds_mistakes_are_one_clear_line(
    tfds_dir: Path, change: dict[str, Any], message: str
) -> None:
    source = corpora.TfdsSource("tiny_text", data_dir=str(tfds_dir), text_field="body")
    with pytest.raises(UserError, match=message) as error:
        list(dataclasses.replace(source, **change).documents())
    assert "\n" not in str(error.value)


def test_tfds_of_another_format_is_named(tfds_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tfds_dir, tmp_path, dirs_exist_ok=True)
    info = tmp_path / "tiny_text" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    source = corpora.TfdsSource("tiny_text", data_dir=str(tmp_path), text_field="body")
    with pytest.raises(UserError, match="is prepared as tfrecord, not array_record") as error:
        source.describe()
    assert "\n" not in str(error.value)
