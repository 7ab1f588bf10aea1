"""Runs whose disk is full for a while, or for good (row 10)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import ml_collections
import pytest

from blindvalm_jax import events
from blindvalm_jax.checkpoints import layout, verifying
from tests.faults import small_run
from tests.faults.small_run import FAILED, Runs, steps

pytestmark = pytest.mark.faults
SIZE = 8 * 2**20  # bytes of the small disk: no less than a run and its checkpoints need
# Before a batch is read, counted from 1, and behind the save of step 4, the disk fills up; before
# another batch there is room again.
_FILLS = """
import resource, time
from pathlib import Path
from blindvalm_jax.data import pipeline
ballast, saved = Path({place!r}) / "ballast", Path({place!r}) / "run" / "checkpoints" / "4"
real = pipeline.Batches.__next__
count = 0
def fills(self):
    global count
    count += 1
    if count == {full}:
        while not saved.exists():
            time.sleep(0.05)
        {fill}
    if count == {free}:
        {release}
    return real(self)
def fill():
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
pipeline.Batches.__next__ = fills
"""
_LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, resource.RLIM_INFINITY))"


@pytest.fixture(params=["no file may grow", "a small disk"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str, str]]:
    """A directory, and the code that leaves no room in it and makes room again."""
    place = tmp_path / "disk"
    place.mkdir()
    if request.param == "no file may grow":
        yield place, _LIMIT.format(20_000), _LIMIT.format("resource.RLIM_INFINITY")
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield place, "fill()", "ballast.unlink()"
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def code(disk: tuple[Path, str, str], *, full: int, free: int = 0) -> str:
    place, fill, release = disk
    return _FILLS.format(place=str(place), full=full, free=free, fill=fill, release=release)


@pytest.fixture(scope="module")
def values(text: Path) -> ml_collections.ConfigDict:
    values = small_run.settings(text, train__steps=12, checkpoint__every_steps=2)
    values.checkpoint.failures = 3
    return values


@pytest.fixture(scope="module")
def whole(values: ml_collections.ConfigDict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that always had room."""
    directory = tmp_path_factory.mktemp("whole")
    with small_run.runs(directory) as found:
        found.start(values, directory / "run").ends()
    return directory / "run"


def check_same_state(one: Path, other: Path) -> None:
    """To the last bit, at the end."""
    found = [layout.read_digests(run / "checkpoints" / "12") for run in (one, other)]
    leaves = [None if digests is None else digests.leaves for digests in found]
    assert leaves[0]
    assert leaves[0] == leaves[1]


def test_a_run_goes_on_while_its_disk_is_full(
    values: ml_collections.ConfigDict, whole: Path, disk: tuple[Path, str, str], runs: Runs
) -> None:
    run = disk[0] / "run"
    # the save of step 6 finds no room, and perhaps that of step 8
    said = runs.start(values, run, code=code(disk, full=6, free=10)).ends()
    assert "warning: the checkpoint of step 6 cannot be written to" in said
    assert "training goes on" in said
    assert steps(run)[-1] == 12
    failed = [event for event in events.read(run) if event["event"] == "save_failed"]
    assert {event["step"] for event in failed} <= {6, 8}
    check_same_state(whole, run)


def test_a_run_whose_disk_stays_full_ends_and_is_gone_on_with(
    values: ml_collections.ConfigDict, whole: Path, disk: tuple[Path, str, str], runs: Runs
) -> None:
    run = disk[0] / "run"
    said = runs.start(values, run, code=code(disk, full=6)).ends(FAILED)
    assert "3 in a row failed (checkpoint.failures), the newest is that of step 4" in said
    assert "Free some space and give the same command again" in said
    assert steps(run)[-1] == 4
    (disk[0] / "ballast").unlink(missing_ok=True)
    assert "resumed at step 4" in runs.start(values, run).ends()
    check_same_state(whole, run)


def test_processes_go_on_while_one_of_them_cannot_write_its_part(
    values: ml_collections.ConfigDict, whole: Path, tmp_path: Path, runs: Runs
) -> None:
    """All of them count the save as failed, and those before and behind it are whole."""
    values = values.copy_and_resolve_references()
    values.mesh.data, values.mesh.fsdp = 1, 2  # so that the second has a part
    run = tmp_path / "run"
    no_room = (tmp_path, _LIMIT.format(4_000), _LIMIT.format("resource.RLIM_INFINITY"))
    values.checkpoint.timeout_seconds = 15  # for which they wait for the part
    codes = {1: code(no_room, full=6, free=10)}
    first, second = runs.several(2, values, run, codes=codes)
    warning = "warning: the checkpoint of step 6 cannot be written to"
    said = first.ends()
    assert warning in said
    assert "another process did not write its part in time" in said
    second.ends()
    log = (run / "logs" / "process-1.txt").read_text()
    assert warning in log
    assert "File too large" in log
    failed = [event["step"] for event in events.read(run) if event["event"] == "save_failed"]
    assert failed in ([6], [6, 8])
    assert steps(run)[-1] == 12
    assert not {*failed} & {*steps(run)}
    for step in steps(run):
        assert verifying.verify(layout.directory(run) / str(step)).bad == []
    small_run.check_equal(whole, run)
