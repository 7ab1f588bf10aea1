"""Whose fault it is that a store or a directory here fails, and that it is told in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from blindvalm_jax import addresses, remote
from blindvalm_jax.errors import UserError
from blindvalm_jax.stores import inputs, mirror, places

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = "memory://bucket/run"
_LOGIN = "this machine logged in"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is brought goes to a directory of the test; the store is empty before and after."""
    monkeypatch.setattr(addresses, "STORES", ["gs", "s3", "memory"])
    monkeypatch.setenv(places.VARIABLE, str(tmp_path / "scratch"))
    store = fsspec.filesystem("memory")
    store.store.clear()
    with inputs.released():
        yield
    store.store.clear()


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow beyond a kilobyte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def put(name: str, content: bytes) -> None:
    fsspec.filesystem("memory").pipe_file(f"/bucket/{name}", content)


def write(name: str, content: str = "x") -> Path:
    path = places.of_run(ADDRESS) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def said(error: pytest.ExceptionInfo[UserError]) -> str:
    return str(error.value)


def test_a_run_that_this_machine_has_no_room_for_is_no_matter_of_the_login() -> None:
    put("run/data/tokens", b"x" * 4000)
    store = remote.Store(ADDRESS)
    with full_disk(), pytest.raises(UserError) as error, store.held():
        store.bring()
    place = re.escape(str(store.directory / "data/tokens."))
    told = rf"{ADDRESS} cannot be brought: {place}\S+: File too large; {places.VARIABLE} may name"
    assert re.match(told, said(error))
    assert _LOGIN not in said(error)
    with store.held():
        assert store.bring() == []  # goes on, once there is room
    assert (store.directory / "data/tokens").read_bytes() == b"x" * 4000


def test_an_input_that_this_machine_has_no_room_for_is_no_matter_of_the_login() -> None:
    put("texts/a.txt", b"x" * 4000)
    with full_disk(), pytest.raises(UserError) as error:
        inputs.bring("memory://bucket/texts/*.txt", glob=True)
    assert re.match(r"memory://bucket/texts/\*\.txt cannot be brought to .*large", said(error))
    assert _LOGIN not in said(error)


def test_a_place_here_that_is_something_else_is_named() -> None:
    put("run/metrics.jsonl", b"1")
    store = remote.Store(ADDRESS)
    (store.directory / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"brought: {store.directory}/metrics.jsonl: Is a dir"):
        store.bring()


def test_a_run_whose_place_cannot_be_made_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("file")
    monkeypatch.setenv(places.VARIABLE, str(file))
    told = rf"{ADDRESS} cannot be brought: {file}/memory/bucket.*: Not a directory"
    with pytest.raises(UserError, match=told), remote.Store(ADDRESS).held():
        raise AssertionError("held")


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("Access Denied"),  # as s3fs says it
        OSError(errno.EIO, "We encountered an internal error"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed"),
        FileNotFoundError(errno.ENOENT, "No such file", "/bucket/run/a"),
        KeyError("items"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("way", ["get_file", "put_file"])
def test_what_the_library_says_is_told_of_the_store(
    way: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **more: object) -> None:
        raise error

    put("run/a", b"a")
    store = remote.Store(ADDRESS)
    write("b")
    monkeypatch.setattr(fsspec.filesystem("memory"), way, fails)
    what = "read" if way == "get_file" else "written"
    told = rf"{ADDRESS} cannot be {what}: {type(error).__name__}.*{_LOGIN}"
    with pytest.raises(UserError, match=told):
        store.bring() if way == "get_file" else store.send()


def test_what_cannot_be_sent_of_this_machine_is_a_warning_until_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with remote.kept(ADDRESS, seconds=0.01):
        path = places.of_run(ADDRESS) / "loop"
        path.symlink_to(path)
        told = f"{ADDRESS} cannot be sent: {path}: Too many levels of symbolic links"
        assert told in "".join(until(capsys, told))
        path.unlink()
        path.write_text("file")
    assert fsspec.filesystem("memory").cat_file("/bucket/run/loop") == b"file"
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(UserError) as error:
        remote.Store(ADDRESS).send()
    assert said(error).startswith(told)
    assert "What is here is in" in said(error)
    assert _LOGIN not in said(error)


def test_a_fault_of_the_program_is_raised_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the run goes on its traceback is printed, and sending is tried again."""

    def faulty(directory: Path) -> dict[str, tuple[int, int]]:
        raise TypeError("a fault")

    with monkeypatch.context() as broken, remote.kept(ADDRESS, seconds=0.01):
        broken.setattr(mirror, "contents", faulty)
        printed = "".join(until(capsys, "Traceback", count=2))
        assert "TypeError: a fault" in printed
        broken.undo()
        write("metrics.jsonl")
    assert fsspec.filesystem("memory").exists("/bucket/run/metrics.jsonl")
    monkeypatch.setattr(mirror, "contents", faulty)
    store = remote.Store(ADDRESS)
    for go in (store.bring, store.send):
        with pytest.raises(TypeError, match="a fault"):
            go()


def until(capsys: pytest.CaptureFixture[str], text: str, *, count: int = 1) -> list[str]:
    """What is printed until it holds a text so often, within a minute."""
    deadline, printed = time.monotonic() + 60, [""]
    while "".join(printed).count(text) < count and time.monotonic() < deadline:
        printed += capsys.readouterr()
        time.sleep(0.01)
    return printed


_REFUSING = """
import logging, runpy, fsspec
from fsspec.implementations.memory import MemoryFileSystem

class Refusing(MemoryFileSystem):
    protocol = "gs"
    def glob(self, *args, **more):
        logging.getLogger("google.auth.compute_engine._metadata").warning("no server")
        try:
            raise OSError("Anonymous caller, 401")
        except OSError:
            logging.getLogger("gcsfs").exception("not tried again")
            raise

fsspec.register_implementation("gs", Refusing, clobber=True)
runpy.run_module("blindvalm_jax.prepare", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("words", [[], ["--verbosity=0"]], ids=["", "verbose"])
def test_what_a_library_logs_of_an_error_is_shown_where_it_is_asked_for(
    words: list[str], tmp_path: Path
) -> None:
    """`tests/test_emulated_stores.py` has the libraries themselves."""
    done = subprocess.run(
        [sys.executable, "-c", _REFUSING, "--files=gs://b/*.txt", f"--out={tmp_path}/w", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "error: gs://b/*.txt cannot be read: OSError: Anonymous caller, 401. Is the bucket there"
    )
    assert done.stderr.count("Traceback") == len(words)
    assert words or done.stderr.count("\n") == 1
