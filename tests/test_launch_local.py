"""launch/local.py with real processes: output, signals, exit codes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch_fakes import ROOT

# A train that does what --do=PROCESS:WORD says of its process.
_TRAIN = """
import os, signal, sys, time
words = dict(w.removeprefix("--").split("=", 1) for w in sys.argv[1:])
process = words["process"]
do = dict(d.split(":") for d in words["do"].split(","))[process]
def end(number, frame):
    os.write(1, b"asked to end\\n")  # print may be what it interrupts
    os._exit(int(do.removeprefix("wait")))
if do.startswith("wait"):
    signal.signal(signal.SIGTERM, end)
if do == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if do.startswith(("wait", "stubborn")):
    print("ready", flush=True)
    with open(words["ready"] + process, "w") as ready:
        ready.write(str(os.getpid()))
    while True:
        time.sleep(60)
if "ready" in words:  # ends once the others are there
    while len(os.listdir(os.path.dirname(words["ready"]))) < int(words["processes"]) - 1:
        time.sleep(0.01)
print(f"{words['distributed']} {words['processes']} {os.environ.get('JAX_NUM_CPU_DEVICES')}")
print("to stderr", file=sys.stderr)
sys.stdout.flush()
if do == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(do))
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """The launcher, with that train."""
    train = tmp_path / "train.py"
    train.write_text(_TRAIN)
    (tmp_path / "ready").mkdir()
    fake = shlex.join([sys.executable, "-IS", str(train)])
    return [sys.executable, "launch/local.py", f"--command={fake}"]


def launch(command: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_lines_name_their_process_and_each_knows_its_place(command: list[str]) -> None:
    done = launch(command, "--processes=3", "--devices=2", "--port=12321", "--", "--do=0:0,1:0,2:0")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("+ ")]
    expected = [f"[{i}] {line}" for i in range(3) for line in ("localhost:12321 3 2", "to stderr")]
    assert sorted(lines) == sorted(expected)


@pytest.mark.parametrize(
    ("do", "code"),
    [("0:0,1:42", 42), ("0:42,1:42", 42), ("0:1,1:0", 1), ("0:43,1:43", 43), ("0:0,1:killed", 137)],
)
def test_the_worst_exit_code_is_the_launchers(command: list[str], do: str, code: int) -> None:
    assert launch(command, "--processes=2", "--", f"--do={do}").returncode == code


@pytest.mark.parametrize(("dies", "code"), [("1", 1), ("43", 43), ("killed", 137)])
def test_when_one_dies_the_others_are_ended(
    command: list[str], tmp_path: Path, dies: str, code: int
) -> None:
    do = f"0:wait42,1:{dies},2:wait42"
    done = launch(command, "--processes=3", "--", f"--do={do}", f"--ready={tmp_path}/ready/")
    assert done.returncode == code
    assert f"[1] ended with exit code {code}" in done.stdout
    assert "[0] asked to end" in done.stdout
    assert "[2] asked to end" in done.stdout


def test_a_worse_end_of_one_that_was_asked_to_end_counts(
    command: list[str], tmp_path: Path
) -> None:
    words = ("--do=0:wait43,1:44", f"--ready={tmp_path}/ready/")
    assert launch(command, "--processes=2", "--", *words).returncode == 43


def test_workers_of_a_sweep_have_gpus_of_their_own_and_end_alone(tmp_path: Path) -> None:
    program = tmp_path / "worker.py"
    program.write_text(
        "import os, sys\n"
        "gpus = os.environ['CUDA_VISIBLE_DEVICES']\n"
        "print(gpus, *sys.argv[1:])\n"
        "sys.exit(gpus == '0,1')\n"
    )
    fake = shlex.join([sys.executable, "-IS", str(program)])
    words = (
        "--processes=3",
        "--gpus=2",
        f"--command={fake}",
        "--",
        "sweep",
        "run",
        "--workdir=a b",
    )
    done = launch([sys.executable, "launch/local.py"], *words)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("+ ")]
    expected = [f"[{i}] {2 * i},{2 * i + 1} run --workdir=a b" for i in range(3)]
    assert sorted(lines) == expected  # and no line that says that others are ended
    assert done.returncode == 1


def test_one_that_does_not_end_when_asked_is_killed(command: list[str], tmp_path: Path) -> None:
    words = ("--do=0:stubborn,1:1", f"--ready={tmp_path}/ready/")
    done = launch(command, "--processes=2", "--grace=0.2", "--", *words)
    assert done.returncode == 1
    assert "still there after 0.2 s: killed" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_and_the_launcher_waits_for_them(
    command: list[str], tmp_path: Path, number: int
) -> None:
    words = ("--do=0:wait42,1:wait42", f"--ready={tmp_path}/ready/")
    with subprocess.Popen(
        [*command, "--processes=2", "--", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        seen = [process.stdout.readline() for _ in range(4)]
        assert sorted(seen)[-2:] == ["[0] ready\n", "[1] ready\n"]
        os.kill(process.pid, number)
        left, _ = process.communicate(timeout=60)
    assert sorted(left.splitlines()) == ["[0] asked to end", "[1] asked to end"]
    assert process.returncode == 42


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_that_ignores_a_signal_to_the_launcher_is_killed(
    command: list[str], tmp_path: Path, number: int
) -> None:
    words = ("--do=0:stubborn,1:stubborn", f"--ready={tmp_path}/ready/")
    with subprocess.Popen(
        [*command, "--processes=2", "--grace=0.2", "--", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for _ in range(4):
            process.stdout.readline()
        os.kill(process.pid, number)
        try:
            left, _ = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            for name in ("0", "1"):
                os.kill(int((tmp_path / "ready" / name).read_text()), signal.SIGKILL)
            raise
    assert left.splitlines() == ["still there after 0.2 s: killed"]
    assert process.returncode == 128 + signal.SIGKILL  # it has not saved


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--processes=0"], "--processes must be at least 1, got 0"),
        (["--processes=1", "--devices=0"], "--devices must be at least 1, got 0"),
        (["--processes=1", "--devices=-1"], "--devices must be at least 1, got -1"),
        (["--processes=1", "--gpus=0"], "--gpus must be at least 1, got 0"),
        (["--processes=1", "--grace=-1"], "--grace must be at least 0, got -1"),
        (["--processes=1", "--port=0"], "--port must be from 1 to 65535, got 0"),
        (["--processes=1", "--port=65536"], "--port must be from 1 to 65535, got 65536"),
        (
            ["--processes=1", "--command=is-not-there -x"],
            "is-not-there -x: there is no such program",
        ),
        (["--processes=1", "--command="], "--command=: there is no such program"),
        (["--processes=1", "--command=true '"], "--command=true ': there is no such program"),
    ],
)
def test_bad_usage_is_one_line_and_2(command: list[str], words: list[str], told: str) -> None:
    done = launch(command, *words)
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
