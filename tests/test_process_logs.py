"""What a process other than the first keeps of what it would say."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import jax
import pytest

from blindvalm_jax import command_line, console, events, process_log
from blindvalm_jax.config import TrainConfig
from blindvalm_jax.incidents import Incidents
from tests.test_reporting import full_disk


@pytest.fixture
def second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of this process, which takes itself for the second of two."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(process_log, "_path", None)
    process_log.begin(tmp_path, process=1, processes=2)
    return tmp_path / "logs" / "process-1.txt"


def said(log: Path) -> list[str]:
    """Lines without their times, and without the first, which says who begins."""
    lines = log.read_text().splitlines()
    assert "process 1 of 2 begins: " in lines[0]
    return [re.sub(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} ", "", line) for line in lines[1:]]


def test_it_keeps_what_it_does_not_print_and_what_it_does(
    second: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console.say("compiled")
    console.warn("a save\nfailed")
    console.say_here("mine is damaged")
    command_line.print_error("it ends")
    command_line.print_stop("step 3 is saved")
    process_log.write("Traceback:\n  here\n")
    kept = ["compiled", "warning: a save failed", "mine is damaged", "error: it ends"]
    kept += ["stopped by SIGTERM: step 3 is saved", "Traceback:", "      here"]
    assert said(second) == kept
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == ["process 1: mine is damaged", *kept[3:5]]


def test_the_first_process_keeps_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_log, "_path", None)
    monkeypatch.chdir(tmp_path)
    console.say("compiled")
    process_log.write("step 1")
    process_log.write_stacks()
    assert list(tmp_path.iterdir()) == []


def test_stacks_of_a_hang_are_kept(second: Path) -> None:
    process_log.write_stacks()
    assert "in test_stacks_of_a_hang_are_kept" in second.read_text()


def test_names_that_are_no_text_are_kept(second: Path) -> None:
    console.say_here("a file im\udcff.png is damaged")
    assert said(second) == ["a file im\\udcff.png is damaged"]


def test_an_end_does_not_wait_for_a_file_system_that_hangs(
    second: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody reads what is written there."""
    second.unlink()
    os.mkfifo(second)
    before = set(threading.enumerate())
    ending = threading.Thread(target=lambda: command_line.print_error("it ends"), daemon=True)
    ending.start()
    ending.join(60)
    assert not ending.is_alive()
    assert capfd.readouterr().err == "error: it ends\n"
    waiting = set(threading.enumerate()) - before
    reader = os.open(second, os.O_RDONLY | os.O_NONBLOCK)  # whoever waits there goes on
    for thread in waiting:
        thread.join(60)
    os.close(reader)
    assert waiting
    assert not any(thread.is_alive() for thread in waiting)


def test_a_log_that_cannot_be_written_is_said_once(
    second: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk(second):
        for number in range(20):
            console.say(f"line {number}")
        warned = capsys.readouterr().err.splitlines()
    console.say("there is room again")
    assert [line.startswith(f"warning: {second} cannot be written") for line in warned] == [True]
    assert "there is room again" in said(second)[-1]
    second.unlink()
    second.parent.rmdir()
    second.parent.write_text("no directory")
    process_log.begin(second.parents[1], process=1, processes=2)
    console.say("goes on")
    assert capsys.readouterr().err.startswith(f"warning: {second} cannot be written: ")


def test_all_damaged_records_are_kept_also_those_found_meanwhile(
    second: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Growing(list[str]):
        """One more is found by another thread as soon as somebody has looked."""

        def __getitem__(self, key: slice) -> list[str]:  # type: ignore[override]
            found = super().__getitem__(key)
            self.append(f"record {len(self)}")
            return found

    workdir = second.parents[1]
    incidents, damaged = Incidents(TrainConfig(), workdir, None), Growing()
    for done in range(13):
        incidents.tell_damaged(done, damaged)
    assert [line.split(";")[0] for line in said(second)] == [
        f"note: record {number}" for number in range(12)
    ]
    assert events.read(workdir) == []
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 10
    assert printed[-1].endswith("(10 so far); further ones: logs")
