"""Several processes train one run that is kept in an object store, each in a directory of its own.

The store is a directory that all processes reach through fsspec, in the place of gs://.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_collections
import pytest

from blindvalm_jax.checkpoints import layout
from tests.faults import small_run
from tests.faults.small_run import FAILED, LEFT, PREEMPTED, Process, Runs, check_equal

pytestmark = pytest.mark.faults
ADDRESS = "gs://bucket/run"
LAST = "_CHECKPOINT_METADATA"
# Puts the store in place, and sends often.
_STORE = """
import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
class Disk(DirFileSystem):
    protocol = "gs"
    def __init__(self, **options):
        super().__init__(path={directory!r}, fs=LocalFileSystem(auto_mkdir=True), **options)
fsspec.register_implementation("gs", Disk, clobber=True)
from blindvalm_jax import remote
kept = remote.kept
remote.kept = lambda address: kept(address, seconds=0.2)
"""
_COMMAND = """
import sys
{code}
from absl import app
import importlib
from blindvalm_jax.command_line import run_main
name = sys.argv[1]
sys.argv = sys.argv[1:]
module = importlib.import_module("blindvalm_jax." + name)
run_main(module.main, takes_addresses=["argument"])
"""
# Cannot write its part of this step.
_DISK_IS_FULL = """
from orbax.checkpoint._src.serialization import serialization
write = serialization.async_serialize_from_host
async def full(values, spec, *rest, **others):
    if "/{step}.orbax" in spec["kvstore"]["path"]:
        raise OSError(28, "No space left on device")
    return await write(values, spec, *rest, **others)
serialization.async_serialize_from_host = full
"""
# The store takes nothing while a file is there.
_STORE_IS_FULL = """
put = Disk.put_file
def refusing(self, *arguments, **others):
    import os
    if os.path.exists({flag!r}):
        raise OSError("quota exceeded")
    return put(self, *arguments, **others)
Disk.put_file = refusing
"""
_STORE_IS_SHUT = """
def shut(self, *arguments, **others):
    raise PermissionError("403 Forbidden")
Disk.find = shut
"""
# Sends nothing of its part of steps behind this one.
_WITHHOLDS = """
from blindvalm_jax.stores import parts, steps
put = parts.Other._put
def withholding(self, here):
    held = [n for n in here if steps.is_piece(n) and int(steps.step_of(n)) > {step}]
    put(self, {{n: kind for n, kind in here.items() if n not in held}})
parts.Other._put = withholding
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_text(tmp_path_factory.mktemp("text"))


class Machines:
    """Starts trainings at the address, each on machines of a name: what they brought is theirs."""

    def __init__(self, directory: Path, runs: Runs) -> None:
        self._directory, self._runs = directory, runs
        self.code = _STORE.format(directory=str(directory / "store"))
        (directory / "store").mkdir()

    def train(
        self,
        name: str,
        values: ml_collections.ConfigDict,
        *,
        processes: int,
        codes: dict[int, str] | None = None,
    ) -> list[Process]:
        """Starts processes of two devices in all."""
        own = {x: self.code + (codes or {}).get(x, "") for x in range(processes)}
        place = str(self._directory / name)
        if processes == 1:
            return [
                self._runs.start(values, ADDRESS, code=own[0], devices=2, BLINDVALM_SCRATCH=place)
            ]
        return self._runs.several(
            processes,
            values,
            ADDRESS,
            codes=own,
            devices=2 // processes,
            BLINDVALM_SCRATCH=place,
            TF_CPP_MIN_LOG_LEVEL="0",
        )

    def run(self, name: str, *arguments: str) -> str:
        """What a command says, on machines of this name."""
        process = Process(
            [sys.executable, "-c", _COMMAND.format(code=self.code), *arguments],
            BLINDVALM_SCRATCH=str(self._directory / name),
        )
        return process.ends()

    def directory(self, name: str) -> Path:
        """Where the first process of machines works."""
        return self._directory / name / "gs/bucket/run"

    @property
    def store(self) -> Path:
        """What the store holds of the run."""
        return self._directory / "store/bucket/run"

    def whole(self) -> list[int]:
        """Steps that are whole in the store."""
        return sorted(int(p.parent.name) for p in self.store.glob(f"checkpoints/*/{LAST}"))

    def newest(self) -> int:
        """The newest of them; nothing lacks in any."""
        for step in self.whole():
            assert layout.fault(self._step(step)) is None
        return self.whole()[-1]

    def _step(self, step: int) -> Path:
        return self.store / "checkpoints" / str(step)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    with small_run.runs(tmp_path) as found:
        yield found


@pytest.fixture
def machines(tmp_path: Path, runs: Runs) -> Machines:
    return Machines(tmp_path, runs)


def settings(text: Path, *, until: int) -> ml_collections.ConfigDict:
    """Parameters are cut over both processes, so that each has pieces of them."""
    values = small_run.settings(text, train__steps=until, checkpoint__every_steps=2)
    values.optimizer.schedule = "inverse_sqrt"  # may be gone on with for longer
    values.mesh.fsdp, values.mesh.data = 2, -1
    return values


def test_another_machine_with_one_process_goes_on_and_two_after_it(
    text: Path, tmp_path: Path, runs: Runs, machines: Machines
) -> None:
    runs.start(settings(text, until=9), tmp_path / "plain", devices=2).ends()
    for process in machines.train("first", settings(text, until=4), processes=2):
        process.ends()
    pieces = [p.name for p in (machines.store / "checkpoints/4/state").rglob("[0-9]*")]
    assert "0.0" in pieces
    assert {"1.0", "0.1"} & set(pieces)  # of the second process
    assert machines.newest() == 4
    assert (machines.store / "logs/process-1.txt").exists()
    place = machines.run("reader", "remote", ADDRESS).splitlines()[-1]
    assert "step 4: sound" in machines.run("reader", "checkpoint", "verify", place)
    same = machines.run("reader", "checkpoint", "diff", f"{place}@4", f"{place}@4")
    assert "0 settings and 0 arrays differ" in same
    mean = ("average", f"{place}@2", f"{place}@4", f"--out={tmp_path / 'mean'}")
    machines.run("reader", "checkpoint", *mean)
    [one] = machines.train("second", settings(text, until=6), processes=1)
    assert "resumed at step 4" in one.ends()
    both = machines.train("third", settings(text, until=9), processes=2)
    assert "resumed at step 6" in both[0].ends()
    both[1].ends()
    assert machines.newest() == 9
    check_equal(tmp_path / "plain", machines.directory("third"))


def test_sigterm_ends_both_with_all_that_was_done_in_the_store(
    text: Path, tmp_path: Path, runs: Runs, machines: Machines
) -> None:
    values = settings(text, until=8)
    runs.start(values, tmp_path / "plain", devices=2).ends()
    go = tmp_path / "go"
    pause = small_run.PAUSES.format(batch=4, flag=str(go))
    both = machines.train("first", values, processes=2, codes={1: pause})
    both[1].until("^waiting")
    both[1].send()
    for process in both:
        process.until("Preemption sync counter is set")
    go.touch()
    for process in both:
        said = process.ends(PREEMPTED)
        assert "is not whole" not in said
    stopped = machines.newest()
    assert 3 <= stopped < 8
    both = machines.train("second", values, processes=2)
    assert f"resumed at step {stopped}" in both[0].ends()
    both[1].ends()
    check_equal(tmp_path / "plain", machines.directory("second"))


@pytest.mark.parametrize("machine", ["first", "second"])
def test_a_step_of_which_a_part_was_not_sent_is_none(
    machine: str, text: Path, tmp_path: Path, runs: Runs, machines: Machines
) -> None:
    """One process is killed; the same machines, or others, go on from what is whole."""
    values = settings(text, until=8)
    pause = small_run.PAUSES.format(batch=6, flag=str(tmp_path / "never"))
    both = machines.train(
        "first", values, processes=2, codes={1: pause + _WITHHOLDS.format(step=2)}
    )
    both[1].until("^waiting")
    state = machines.store / "checkpoints/4/state"
    small_run.wait_for(lambda: state.exists() and machines.whole() == [2])
    both[1].send(signal.SIGKILL)
    both[1].ends(-signal.SIGKILL)
    both[0].ends(*LEFT, within=30.0)
    assert machines.newest() == 2
    again = machines.train(machine, values, processes=2)
    said = again[0].ends()
    again[1].ends()
    assert "resumed at step 2" in said
    assert "was written by another machine" not in said
    assert machines.newest() == 8
    runs.start(values, tmp_path / "plain", devices=2).ends()
    check_equal(tmp_path / "plain", machines.directory(machine))
    left = {int(p.parts[-3]) for p in machines.store.glob("checkpoints/*/*/*") if p.is_file()}
    assert left == set(machines.whole())  # directories of the store stay, files do not


def test_what_one_process_cannot_begin_none_begins(
    text: Path, tmp_path: Path, machines: Machines
) -> None:
    """One cannot read the store; of one the files hold another text."""
    values = settings(text, until=4)
    both = machines.train("first", values, processes=2, codes={1: _STORE_IS_SHUT})
    assert "error: another process cannot begin: see what it says" in both[0].ends(FAILED)
    assert "gs://bucket/run cannot be read: PermissionError: 403" in both[1].ends(FAILED)
    assert not machines.store.exists()
    (tmp_path / "other").mkdir()
    other = small_run.write_text(tmp_path / "other")
    other.write_text(other.read_text() * 2)
    reads_other = f"sys.argv.append('--config.data.files={other}')"
    both = machines.train("first", values, processes=2, codes={1: reads_other})
    for process in both:
        assert "the processes have different data" in process.ends(FAILED)


def test_a_step_that_one_cannot_write_is_none_and_training_goes_on(
    text: Path, tmp_path: Path, runs: Runs, machines: Machines
) -> None:
    values = settings(text, until=8)
    values.checkpoint.timeout_seconds = 5
    both = machines.train("first", values, processes=2, codes={1: _DISK_IS_FULL.format(step=4)})
    said = both[0].ends()
    both[1].ends()
    assert "the checkpoint of step 4 cannot be written" in said
    assert "another process did not write its part in time" in said
    log = (machines.store / "logs/process-1.txt").read_text()
    assert "step 4 cannot be written" in log
    assert "No space left on device" in log
    assert machines.newest() == 8
    assert 4 not in machines.whole()
    runs.start(values, tmp_path / "plain", devices=2).ends()
    check_equal(tmp_path / "plain", machines.directory("first"))


def test_what_a_store_does_not_take_in_the_end_is_sent_by_the_next_command(
    text: Path, tmp_path: Path, machines: Machines
) -> None:
    full = tmp_path / "full"
    pause = small_run.PAUSES.format(batch=4, flag=str(tmp_path / "go"))
    codes = {x: _STORE_IS_FULL.format(flag=str(full)) for x in range(2)}
    both = machines.train(
        "first", settings(text, until=4), processes=2, codes={**codes, 0: codes[0] + pause}
    )
    both[0].until("^waiting")
    small_run.wait_for(lambda: machines.whole() == [2])
    full.touch()
    (tmp_path / "go").touch()
    for process in both:
        assert "cannot be written: OSError: quota exceeded" in process.ends(FAILED)
    assert machines.whole() == [2]
    full.unlink()
    for process in machines.train("first", settings(text, until=4), processes=2, codes=codes):
        process.ends()
    assert machines.newest() == 4


def test_the_first_process_is_killed(
    text: Path, tmp_path: Path, runs: Runs, machines: Machines
) -> None:
    values = settings(text, until=8)
    pause = small_run.PAUSES.format(batch=6, flag=str(tmp_path / "never"))
    both = machines.train("first", values, processes=2, codes={0: pause})
    both[0].until("^waiting")
    small_run.wait_for(lambda: 4 in machines.whole())
    both[0].send(signal.SIGKILL)
    both[0].ends(-signal.SIGKILL)
    both[1].ends(*LEFT, within=30.0)
    both = machines.train("first", values, processes=2)
    assert "resumed at step 4" in both[0].ends()
    both[1].ends()
    assert machines.newest() == 8
    runs.start(values, tmp_path / "plain", devices=2).ends()
    check_equal(tmp_path / "plain", machines.directory("first"))
