"""Runs and inputs in emulations of the stores, through the libraries that users have."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from blindvalm_jax.checkpoints import layout
from tests import small_text
from tests.faults import small_run

ROOT = Path(__file__).resolve().parents[1]
_EMULATORS = {
    "s3": ("s3fs", "moto_server", ["-H", "127.0.0.1", "-p"]),
    "gs": ("gcsfs", "gcp-storage-emulator", ["start", "--host=127.0.0.1", "--in-memory", "--port"]),
}
_INPUTS = """
import glob
import sys
from pathlib import Path
import fsspec
from blindvalm_jax.errors import UserError
from blindvalm_jax.stores import downloads, inputs
scheme = sys.argv[1]
store = fsspec.filesystem(scheme)
store.mkdir("bucket")
downloads._PART = 4

def brought(name, **more):
    place = Path(inputs.bring(f"{scheme}://{name}", **more))
    top = place.parent if more else place
    return {p.relative_to(top).as_posix(): p.read_text() for p in top.rglob("*") if p.is_file()}

def put(name, content):
    store.pipe_file(f"bucket/{name}", content.encode())

put("t/a.txt", "0123456789")
put("t/b.txt", "")
put("t/deep/c.txt", "c")
put("t2/d.txt", "d")
for name in ("t/", "t/deep/") if scheme == "s3" else ():  # as consoles make directories
    store.touch(f"bucket/{name}", truncate=True)
assert brought("bucket/t/*.txt", glob=True) == {"a.txt": "0123456789", "b.txt": ""}
whole = {"a.txt": "0123456789", "b.txt": "", "deep/c.txt": "c"}
assert brought("bucket/t") == whole, brought("bucket/t")
deep = inputs.bring(f"{scheme}://bucket/t/**/*.txt", glob=True)
assert sorted(Path(p).name for p in glob.glob(deep, recursive=True)) == ["a.txt", "b.txt", "c.txt"]
cat, store.cat_file = store.cat_file, None
assert brought("bucket/t") == whole  # nothing travels
store.cat_file = cat
put("t/a.txt", "9876543210")
store.rm_file("bucket/t/b.txt")
assert brought("bucket/t") == {"a.txt": "9876543210", "deep/c.txt": "c"}
assert brought("bucket/t/*.txt", glob=True) == {"a.txt": "9876543210"}
for name in ("bucket/none/*.txt", "other/a.txt", "other/*.txt"):
    try:
        brought(name, glob=True)
    except UserError as error:
        assert "names nothing" in str(error), error
    else:
        raise AssertionError(name)
print("brought")
"""
_ROUND = """
import sys, tempfile
from pathlib import Path
import fsspec
from blindvalm_jax import remote
address, place = sys.argv[1:]
scheme = address[:2]
store = fsspec.filesystem(scheme)
store.mkdir("bucket")
for machine in ("one", "two"):
    tempfile.tempdir = f"{place}/{machine}"
    with remote.kept(address) as directory:
        if machine == "one":
            for name in ("run.json", "checkpoints/2/state/a", "checkpoints/2/_CHECKPOINT_METADATA"):
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                (directory / name).write_text(name)
        else:
            found = {str(p.relative_to(directory)): p.read_text()
                     for p in directory.rglob("*")
                     if p.is_file() and p.name not in (".run.lock", ".sent.json")}
            assert len(found) == 3 and all(k == v for k, v in found.items()), found
            (directory / "run.json").unlink()
            (directory / "metrics.jsonl").write_text("1")
kept = remote.Store(address)
noted = {name: known[0] for name, known in kept._noted().items()}
assert kept._there() == noted and all(noted.values()), (kept._there(), noted)
(kept.directory / "metrics.jsonl").write_text("12")
tempfile.tempdir = f"{place}/one"
with remote.kept(address) as directory:
    (directory / "run.json").write_text("other")
tempfile.tempdir = f"{place}/two"
with remote.kept(address) as directory:
    assert (directory / "run.json").read_text() == "other"
    assert (directory / "metrics.jsonl").read_text() == "1"
    aside, = directory.parent.glob("*.unsent-*")
    assert (aside / "metrics.jsonl").read_text() == "12"
    (directory / "run.json").unlink()
    (directory / "metrics.jsonl").unlink()
assert sorted(n.rpartition("/")[2] for n in store.find("bucket")) == ["_CHECKPOINT_METADATA", "a"]
print("kept")
"""
_FULL = """
import resource, sys
import fsspec
from blindvalm_jax import remote
from blindvalm_jax.errors import UserError
address = sys.argv[1]
library = fsspec.filesystem(address[:2])
library.mkdir("bucket")
library.pipe_file("bucket/runs/first/tokens", b"x" * 4000)
store = remote.Store(address)
with store.held():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        store.bring()
    except UserError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.bring()
assert (store.directory / "tokens").read_bytes() == b"x" * 4000
(store.directory / "tokens").unlink()
(store.directory / "tokens").symlink_to(store.directory / "tokens")
try:
    store._store.put(store.directory / "tokens", store._root + "/tokens")
except OSError as error:
    print(error.filename)
"""


@contextlib.contextmanager
def emulated(scheme: str) -> Iterator[dict[str, Any]]:
    """An emulation of a store; gives the environment of processes that use it."""
    library, emulator, words = _EMULATORS[scheme]
    pytest.importorskip(library, reason=f"{library} is not installed: make extras")
    command = shutil.which(emulator, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if command is None:
        pytest.skip(f"{emulator} is not installed: make extras")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [command, *words, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        url = f"http://127.0.0.1:{port}"
        yield {
            # Processes of a small run have flags of their own.
            **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
            "PYTHONPATH": str(ROOT),
            **{"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"},
            **{"AWS_DEFAULT_REGION": "us-east-1", "STORAGE_EMULATOR_HOST": url},
            **{"AWS_EC2_METADATA_DISABLED": "true"},
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    finally:
        server.kill()
        server.wait()


def ended(words: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """A process of Python that came to its end."""
    return subprocess.run(
        [sys.executable, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("scheme", _EMULATORS)
def test_the_libraries_of_the_stores_against_an_emulation(scheme: str, tmp_path: Path) -> None:
    with emulated(scheme) as environment:
        address = f"{scheme}://bucket/runs/first"
        done = ended(["-c", _ROUND, address, str(tmp_path)], environment)
    assert done.stdout.endswith("kept\n"), done.stderr


@pytest.mark.parametrize("scheme", _EMULATORS)
def test_inputs_are_brought_by_the_libraries_from_an_emulation(scheme: str, tmp_path: Path) -> None:
    with emulated(scheme) as environment:
        done = ended(["-c", _INPUTS, scheme], {**environment, "BLINDVALM_SCRATCH": str(tmp_path)})
    assert done.stdout.endswith("brought\n"), done.stderr


@pytest.mark.parametrize("scheme", _EMULATORS)
def test_the_libraries_say_which_file_of_this_machine_fails(scheme: str, tmp_path: Path) -> None:
    place = f"{tmp_path}/{scheme}/bucket/runs/first"
    with emulated(scheme) as environment:
        words = ["-c", _FULL, f"{scheme}://bucket/runs/first"]
        done = ended(words, {**environment, "BLINDVALM_SCRATCH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    told = rf"{scheme}://bucket/runs/first cannot be brought: {place}/tokens\.\S+: File too large; "
    assert re.match(told, first)
    assert second == f"{place}/tokens"


_FILL = """
import sys, fsspec
scheme, path = sys.argv[1:]
store = fsspec.filesystem(scheme)
store.mkdir("bucket")
store.put_file(path, "bucket/texts/a.txt")
store.pipe_file("bucket/texts/deep/b.jsonl", b"")
"""
_CONFIG = """
from pathlib import Path
from tests.test_train import settings
def get_config():
    return settings(Path("unused"), grounding__source="none", grounding__tower="", mesh__data=1,
                    eval__every_steps=0, optimizer__schedule="inverse_sqrt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", _EMULATORS)
def test_a_run_is_trained_from_a_store_and_kept_there(scheme: str, tmp_path: Path) -> None:
    """By the command, on two machines."""
    text, values = tmp_path / "a.txt", tmp_path / "values.py"
    small_text.write_text(text, small_text.documents(120))
    values.write_text(_CONFIG)
    workdir, files = f"{scheme}://bucket/runs/first", f"{scheme}://bucket/texts/*.txt"

    def trained(machine: str, *, steps: int) -> subprocess.CompletedProcess[str]:
        (tmp_path / machine).mkdir()
        words = [f"--config={values}", f"--workdir={workdir}", f"--config.data.files={files}"]
        words += [f"--config.train.steps={steps}"]
        there = {**environment, "TMPDIR": str(tmp_path / machine)}
        return ended(["-m", "blindvalm_jax.train", *words], there)

    with emulated(scheme) as environment:
        assert ended(["-c", _FILL, scheme, str(text)], environment).returncode == 0
        first = trained("one", steps=2)
        assert first.returncode == 0, first.stderr
        second = trained("two", steps=4)
        assert second.returncode == 0, second.stderr
        assert "resumed at step 2" in second.stdout
        assert "data.files" not in second.stdout  # it is no other setting on another machine
    assert {path.name for path in (tmp_path / "two/blindvalm").iterdir()} == {scheme, "inputs"}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", _EMULATORS)
def test_two_processes_train_from_a_store_and_keep_their_run_there(
    scheme: str, tmp_path: Path
) -> None:
    """Each on a machine of its own; other machines go on, and one that has all of it."""
    text = small_run.write_text(tmp_path)
    with emulated(scheme) as environment, small_run.runs(tmp_path) as runs:
        assert ended(["-c", _FILL, scheme, str(text)], environment).returncode == 0

        def trained(*machines: str, steps: int) -> str:
            values = small_run.settings(text, train__steps=steps, checkpoint__every_steps=2)
            values.optimizer.schedule = "inverse_sqrt"
            values.mesh.fsdp, values.mesh.data = 2, -1
            values.data.files = f"{scheme}://bucket/texts/*.txt"
            several = len(machines) > 1
            places = {
                x: f"import os; os.environ['BLINDVALM_SCRATCH'] = {str(tmp_path / name)!r}"
                for x, name in enumerate(machines)
            }
            workdir = f"{scheme}://bucket/runs/first"
            processes = (
                runs.several(2, values, workdir, codes=places, **environment)
                if several
                else [runs.start(values, workdir, code=places[0], devices=2, **environment)]
            )
            return [process.ends() for process in processes][0]

        trained("one", "two", steps=4)
        assert "resumed at step 4" in trained("three", "four", steps=6)
        assert "resumed at step 6" in trained("two", steps=8)
    assert layout.steps(tmp_path / "two" / scheme / "bucket/runs/first") == [4, 6, 8]


class _Refusing(http.server.BaseHTTPRequestHandler):
    """Answers 401, as a store does to whoever is not logged in."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        said = b'{"error": {"code": 401, "message": "Anonymous caller has no access"}}'
        self.send_response(401)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said if self.command != "HEAD" else b"")

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *words: object) -> None:
        pass


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """A server that lets nobody in; gives its host and port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


_TINY = f"{ROOT}/configs/text.py:tiny"
_KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}


@pytest.mark.parametrize(
    ("scheme", "command", "login", "cause"),
    [
        ("gs", "prepare", {}, "HttpError: Anonymous caller has no access, 401"),
        ("gs", "train", {}, "HttpError: Anonymous caller has no access, 401"),
        ("s3", "prepare", {}, "NoCredentialsError"),
        ("s3", "prepare", _KEYS, "OSError: .*Unauthorized"),
    ],
    ids=["gs", "gs-train", "s3", "s3-keys"],
)
def test_a_machine_that_is_not_logged_in_says_so_in_one_line(
    scheme: str, command: str, login: dict[str, str], cause: str, tmp_path: Path
) -> None:
    pytest.importorskip(_EMULATORS[scheme][0])
    name, words = {
        "prepare": ("texts/*.txt", [f"--files={scheme}://bucket/texts/*.txt", "--out=w"]),
        "train": ("run", [f"--config={_TINY}", f"--workdir={scheme}://bucket/run"]),
    }[command]
    logins = ("AWS_", "GOOGLE_", "CLOUDSDK_", "GCSFS_", "FSSPEC_")
    with refusing() as server:
        environment = {
            **{name: x for name, x in os.environ.items() if not name.startswith(logins)},
            **{"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
            **{"STORAGE_EMULATOR_HOST": f"http://{server}", "GCE_METADATA_IP": server},
            **{"AWS_ENDPOINT_URL": f"http://{server}", "AWS_EC2_METADATA_DISABLED": "true"},
            **login,
        }
        done = ended(["-m", f"blindvalm_jax.{command}", *words], environment)
    assert done.returncode == 1
    told = rf"error: {scheme}://bucket/{re.escape(name)} cannot be read: {cause}.*"
    assert re.match(rf"{told}Is the bucket there, and this machine logged in", done.stderr)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
