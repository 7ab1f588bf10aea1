"""Checkpoints that processes write apart, and in which order their parts come to a store."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from jax._src import distributed
from jax.sharding import NamedSharding, PartitionSpec
from jaxlib import _jax

from blindvalm_jax import addresses, config, ownership, partitioning, remote
from blindvalm_jax.checkpoints import layout, quarantine, verifying
from blindvalm_jax.checkpoints.manager import Checkpoints
from blindvalm_jax.errors import UserError
from blindvalm_jax.step import TrainState
from blindvalm_jax.stores import parts, places
from blindvalm_jax.stores.steps import is_last

ADDRESS = "memory://bucket/runs/first"
LAST = "_CHECKPOINT_METADATA"
KEEP = config.CheckpointConfig(keep=3)


def state(step: int, *, fsdp: int) -> TrainState:
    """Other values at each step, cut into so many pieces."""
    mesh = partitioning.make_mesh(config.MeshConfig(data=8 // fsdp, fsdp=fsdp))
    values = np.random.default_rng(step).standard_normal((16, 3)).astype(np.float32)
    params = {
        "kernel": jax.device_put(values, NamedSharding(mesh, PartitionSpec("fsdp"))),
        "zeros": jax.device_put(np.zeros(3, np.float32), partitioning.replicated(mesh)),
    }
    count = jax.device_put(np.asarray(step, np.int32), partitioning.replicated(mesh))
    return TrainState(count, params, {})


def save(run: Path, *steps: int, fsdp: int = 4) -> None:
    with Checkpoints(run, KEEP) as checkpoints:
        for step in steps:
            checkpoints.save(state(step, fsdp=fsdp), step=step, config=config.Config())
        checkpoints.finish()


def restored(run: Path, *, fsdp: int) -> int:
    """The step that is restored, with the values that were saved."""
    with Checkpoints(run, KEEP) as checkpoints:
        found = checkpoints.restore(state(0, fsdp=fsdp), seed=0)
    expected = state(int(found.step), fsdp=fsdp)
    np.testing.assert_array_equal(found.params["kernel"], expected.params["kernel"])
    return int(found.step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("saved")
    with ownership.each_its_own():
        save(run, 1, 2)
    return run


def test_what_was_written_apart_is_gone_on_with_together_and_the_other_way_round(
    saved: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    assert [verifying.verify(layout.directory(run) / x).bad for x in ("1", "2")] == [[], []]
    assert sorted(p.name for p in run.glob("checkpoints/2/state/params.kernel/[0-9]*")) == [
        f"{piece}.0" for piece in range(4)
    ]
    assert layout.is_apart(run / "checkpoints/2")
    assert restored(run, fsdp=2) == 2
    save(run, 3, fsdp=2)
    assert not layout.is_apart(run / "checkpoints/3")
    with ownership.each_its_own():
        assert restored(run, fsdp=8) == 3
        save(run, 4)
    assert layout.steps(run) == [2, 3, 4]


@pytest.mark.parametrize(
    "gone",
    [
        *("_METADATA", "params.kernel", "params.kernel/.zarray", "params.kernel/3.0"),
        *("params.zeros/0", "step/0"),
    ],
)
def test_a_file_that_lacks_of_what_was_written_apart_is_seen(
    gone: str, saved: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    checkpoint = run / "checkpoints/2"
    assert layout.fault(checkpoint) is None
    path = checkpoint / "state" / gone
    if path.is_dir():
        shutil.rmtree(path)
        gone += "/.zarray"
    else:
        path.unlink()
    assert layout.fault(checkpoint) == f"its state/{gone} is missing"
    assert restored(run, fsdp=2) == 1
    assert "is missing" in quarantine.moved(run)["2"]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A coordination service, and this process in the place of the first of two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    service = _jax.get_distributed_runtime_service(place, 1)
    client = _jax.get_distributed_runtime_client(place, 0)
    client.connect()
    with monkeypatch.context() as patched:
        patched.setattr(distributed.global_state, "client", client)
        patched.setattr(jax, "process_count", lambda: 2)
        yield
    client.shutdown()
    service.shutdown()


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(addresses, "STORES", ["gs", "s3", "memory"])
    monkeypatch.setenv(places.VARIABLE, str(tmp_path / "scratch"))
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield
    memory.store.clear()


def there() -> set[str]:
    """What the store holds of the run."""
    root = "/bucket/runs/first/"
    return {name.removeprefix(root) for name in fsspec.filesystem("memory").find(root)}


def steps_there() -> list[str]:
    return sorted(n.split("/")[1] for n in there() if is_last(n))


def part(saved: Path, directory: Path, step: int, *, process: int) -> None:
    """What a process writes of a step: two of four pieces, the others' are not there."""
    place = directory / "checkpoints" / str(step)
    shutil.copytree(saved / "checkpoints" / str(2), place)
    for piece in (2, 3) if process == 0 else (0, 1):
        (place / f"state/params.kernel/{piece}.0").unlink()
    if process:
        (place / "state/step/0").unlink()


@contextlib.contextmanager
def two() -> Iterator[tuple[parts.First, parts.Other]]:
    """The processes, which have begun."""
    first, other = parts.First(ADDRESS), parts.Other(ADDRESS, process=1)
    with first.held(), other.held():
        first.begin()
        other.begin()
        yield first, other


def test_a_step_is_whole_there_once_all_have_sent_their_part(saved: Path, service: None) -> None:
    with two() as (first, other):
        assert first.directory != other.directory
        (first.directory / "run.json").write_text("{}")
        (first.directory / "saved.json").write_text("{}")
        (other.directory / "logs").mkdir()
        (other.directory / "logs/process-1.txt").write_text("one\n")
        (other.directory / "metrics.jsonl").write_text("is the first's to send")
        part(saved, first.directory, 4, process=0)
        first.send()
        assert "checkpoints/4/state/params.kernel/0.0" in there()
        assert "run.json" in there()
        assert {"saved.json", f"checkpoints/4/{LAST}"} & there() == set()
        assert first.pause(60) < 60
        part(saved, other.directory, 4, process=1)
        other.send()
        assert steps_there() == []
        first.send()
        assert steps_there() == ["4"]
        assert "saved.json" in there()
        assert {"logs/process-1.txt"} < there()
        assert "metrics.jsonl" not in there()
        first.send()
        kernel = {f"checkpoints/4/state/params.kernel/{piece}.0" for piece in range(4)}
        assert kernel < there()  # what is not here is not gone: another has sent it
        with (other.directory / "logs/process-1.txt").open("a") as log:
            log.write("two\n")
        other.send()
    again = parts.First(ADDRESS)
    assert again.bring() == []
    assert layout.fault(again.directory / "checkpoints/4") is None
    other = parts.Other(ADDRESS, process=1)
    other.begin()
    assert layout.fault(other.directory / "checkpoints/4") is None
    assert not (other.directory / "metrics.jsonl").exists()
    assert not list(again.directory.parent.glob("*.unsent-*"))


def test_a_step_that_is_kept_no_longer_is_removed_with_all_parts(
    saved: Path, service: None
) -> None:
    with two() as (first, other):
        for step in (2, 4, 6):  # of step 2 the other one's part alone comes
            part(saved, other.directory, step, process=1)
            other.send()
        part(saved, first.directory, 4, process=0)
        part(saved, first.directory, 6, process=0)
        first.send()
        assert steps_there() == ["4", "6"]
        shutil.rmtree(first.directory / "checkpoints/4")
        first.send()
    assert {n.split("/")[1] for n in there() if n.startswith("checkpoints/")} == {"6"}


def test_a_step_of_which_a_part_never_came_is_dropped_and_nothing_else(
    saved: Path, service: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with two() as (first, other):
        for step in (2, 4):
            part(saved, first.directory, step, process=0)
        part(saved, other.directory, 2, process=1)
        other.send()
        first.send()
        part(saved, other.directory, 4, process=1)
        other._put({"checkpoints/4/state/params.kernel/2.0": (1, 1)})  # and was killed
        (first.directory / "metrics.jsonl").write_text("1\n")
    with two() as (first, other):
        assert (first.directory / "metrics.jsonl").read_text() == "1\n"
        assert layout.steps(first.directory) == layout.steps(other.directory) == [2]
        assert layout.fault(other.directory / "checkpoints/2") is None
    assert {n.split("/")[1] for n in there() if n.startswith("checkpoints/")} == {"2"}
    assert "written by another machine" not in capsys.readouterr().err


def test_the_first_says_at_the_end_what_did_not_come(
    saved: Path, service: None, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "step 4 is not whole in memory://bucket/runs/first: process 1 has not sent its part"
    with two() as (first, other):
        part(saved, first.directory, 4, process=0)
        first.send()
        other.finish(ended=False, together=False)  # has nothing
        first.finish(ended=False, together=True)  # and says so: nobody waits
        assert f"warning: {said}" in capsys.readouterr().err
        with pytest.raises(UserError, match=said):  # what is trained to its end is not there
            first.finish(ended=True, together=True)
    assert steps_there() == []


def test_the_store_keeps_a_whole_step_and_machines_their_parts_where_one_sends_nothing(
    saved: Path, service: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with two() as (first, other):
        for store, process in ((other, 1), (first, 0)):
            part(saved, store.directory, 2, process=process)
            store.send()
        assert steps_there() == ["2"]
        for step in (4, 6, 8):
            for store, process in ((other, 1), (first, 0)):
                shutil.rmtree(store.directory / f"checkpoints/{step - 2}")
                part(saved, store.directory, step, process=process)
            first.send()  # the other one's storage does not take it
        assert steps_there() == ["2"]
    with two() as (first, other):
        for store in (first, other):
            assert layout.steps(store.directory) == [2]
            assert layout.fault(store.directory / "checkpoints/2") is None
            aside = store.directory.with_name("first.unsent-part")
            assert [path.name for path in aside.iterdir()] == ["8"]
            shutil.copytree(aside, first.directory / "both", dirs_exist_ok=True)
        assert layout.fault(first.directory / "both/8") is None
    assert capsys.readouterr().out.count("what this process has of it was moved to") == 2
    assert steps_there() == ["2"]


def test_a_run_whose_first_step_lacked_a_part_begins_anew(saved: Path, service: None) -> None:
    """What tells that it has saved goes with the part: it would refuse to begin."""
    with two() as (first, _):
        (first.directory / "run.json").write_text("{}")
        part(saved, first.directory, 2, process=0)
        quarantine.record(first.directory, 2)
        first.send()
    with two() as (first, other):
        assert layout.steps(first.directory) == []
        quarantine.check_not_lost(first.directory)
        for step in (2, 4):
            for store, process in ((other, 1), (first, 0)):
                part(saved, store.directory, step, process=process)
                quarantine.record(first.directory, step)
                store.send()
        part(saved, first.directory, 6, process=0)
        (first.directory.with_name("first.unsent-part") / ".nfs01").touch()  # of a file server
    assert steps_there() == ["2", "4"]
    with two() as (first, _):
        assert (first.directory / "saved.json").exists()
        aside = first.directory.with_name("first.unsent-part")
        assert sorted(path.name for path in aside.iterdir()) == [".nfs01", "2", "6"]


def test_settings_that_may_differ_between_machines_do(saved: Path, service: None) -> None:
    with two() as (first, other):
        part(saved, other.directory, 2, process=1)
        digests = other.directory / "checkpoints/2/digests/metadata"
        found = json.loads(digests.read_text())
        digests.write_text(json.dumps({**found, "config": "0"}))
        other.send()
        part(saved, first.directory, 2, process=0)
        first.send()
        assert steps_there() == ["2"]


def test_what_a_process_said_last_is_sent_by_its_next_start(saved: Path, service: None) -> None:
    with two() as (_, other):
        log = other.directory / "logs/process-1.txt"
        log.parent.mkdir()
        log.write_text("one\n")
        other.send()
        with log.open("a") as file:
            file.write("why it ended\n")
    with two() as (_, other):
        other.send()
    found = fsspec.filesystem("memory").cat_file("/bucket/runs/first/logs/process-1.txt")
    assert found == b"one\nwhy it ended\n"


def test_a_step_that_is_done_again_is_whole_once_its_own_parts_are_there(
    saved: Path, service: None
) -> None:
    """What another process said of it before does not count, nor what the first one removed."""
    with two() as (first, other):
        for store, process in ((other, 1), (first, 0)):
            part(saved, store.directory, 2, process=process)
            store.send()
        for store in (first, other):
            quarantine.move(store.directory, 2, "bad")
        first.send()
        assert steps_there() == []
        part(saved, first.directory, 2, process=0)
        first.send()
        assert steps_there() == []
        part(saved, other.directory, 2, process=1)
        for path in (other.directory / "checkpoints/2").rglob("*.0"):
            os.utime(path)
        other.send()
        first.send()
        assert steps_there() == ["2"]
        assert len([name for name in there() if "checkpoints/2/state/params.kernel/" in name]) == 5


def test_a_word_about_another_save_of_a_step_does_not_count(saved: Path, service: None) -> None:
    with two() as (first, other):
        part(saved, other.directory, 2, process=1)
        digests = other.directory / "checkpoints/2/digests/metadata"
        digests.write_text(digests.read_text().replace("[] ", "[] f"))
        other.send()
        part(saved, first.directory, 2, process=0)
        first.send()
        assert steps_there() == []


def test_one_process_sends_a_step_that_it_has_all_of(saved: Path) -> None:
    with remote.kept(ADDRESS) as directory:
        shutil.copytree(saved / "checkpoints/2", directory / "checkpoints/2")
    shutil.rmtree(directory)
    with remote.kept(ADDRESS) as directory:
        assert layout.fault(directory / "checkpoints/2") is None
