"""`sweep launch`: each scheduler's script takes the printed commands and starts workers."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from blindvalm_jax import config
from blindvalm_jax.config import Config
from blindvalm_jax.errors import UserError
from blindvalm_jax.sweep import launching
from blindvalm_jax.sweep.manifest import Manifest
from tests.faults import small_run, small_sweep
from tests.launch_fakes import ROOT, Answer, Call, Fakes, run_script

NAMES = ("a", "b", "branch", "leaf", "trunk")
WORKER = ("--config=configs/it's.py", "--workdir=/runs/my sweep", "--config.note=$HOME; `x` *")
STARTED = ["-m", "blindvalm_jax.sweep", "run", *WORKER]


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path / "bin")


def runs() -> dict[str, Config]:
    """A leaf that branches from a branch, of a trunk that stands last."""

    def settings(branch_from: str = "") -> Config:
        values = config.default()
        values.train.branch_from = branch_from
        return config.parse(values)

    branches = {"branch": "run:trunk@4", "leaf": "run:branch@6"}
    return {name: settings(branches.get(name, "")) for name in NAMES}


def launched(scheduler: str, *given: str, workers: int | None = None) -> str:
    """What is printed."""
    lines = launching.commands(
        runs(), scheduler=scheduler, workers=workers, worker=WORKER, given=given
    )
    return "\n".join(lines)


# Runs the batch script as each task of the array.
_SBATCH = """
while [[ $1 == --* ]]; do
  case $1 in --array=*) array=${1#*=} ;; --parsable) parsable=1 ;; esac
  shift
done
cp "$1" "$SPOOL/slurm_script"
shift
for range in $(tr , ' ' <<<"${array%\\%*}"); do
  for task in $(seq "${range%-*}" "${range#*-}"); do
    SLURM_JOB_ID=99 SLURM_ARRAY_JOB_ID=17 SLURM_ARRAY_TASK_ID=$task SLURM_NTASKS=1 \\
      bash "$SPOOL/slurm_script" "$@" >&2 || exit 0
  done
done
[ -z "$parsable" ] || echo "17;cluster"
"""


def arrays(fakes: Fakes, *given: str, workers: int | None = None, code: int = 0) -> list[Call]:
    """The calls that the printed commands make of SLURM; code: of each task."""
    fakes.add("sbatch", {"": [Answer(script=_SBATCH)]})
    fakes.add("srun", {"": [Answer(code=code)]})
    fakes.add("scontrol")
    text = launched("slurm", *given, workers=workers)
    done = fakes.run("-c", text, SPOOL=str(fakes.directory))
    assert done.returncode == 0, done.stderr
    return fakes.calls()


def test_an_array_has_a_task_for_each_run_and_branches_come_behind_their_trunks(
    fakes: Fakes,
) -> None:
    calls = arrays(fakes, "--partition=p", "--comment=it's mine", workers=2)
    submitted = [call.words for call in calls if call.name == "sbatch"]
    assert [words[:3] for words in submitted] == [
        ["--partition=p", "--comment=it's mine", array]
        for array in ("--array=0-1,4%2", "--array=2%2", "--array=3%2")
    ]
    after = [[word for word in words if "depend" in word] for words in submitted]
    assert after == [[], ["--dependency=afterany:17"], ["--dependency=afterany:17"]]
    tasks = [call.words for call in calls if call.name == "srun"]
    assert tasks == [
        ["--kill-on-bad-exit=0", "python", *STARTED, f"--index={index}"]
        for index in (0, 1, 4, 2, 3)
    ]


def test_a_task_that_was_preempted_is_queued_again_alone(fakes: Fakes) -> None:
    """The number of its job would be that of the whole array, for one of the tasks."""
    calls = arrays(fakes, code=42)
    asked = [call.words for call in calls if call.name == "scontrol"]
    assert asked[:2] == [["show", "job", "17_0"], ["requeue", "17_0"]]


def test_an_array_without_a_limit_or_branches_is_one_line() -> None:
    plain = {name: one for name, one in runs().items() if not one.train.branch_from}
    given: dict[str, Any] = {"worker": WORKER, "given": [], "scheduler": "slurm"}
    (line,) = launching.commands(plain, workers=None, **given)
    assert shlex.split(line)[:3] == ["sbatch", "--array=0-2", "launch/slurm.sbatch"]


@pytest.mark.parametrize("nodes", [{"SLURM_NTASKS": "8"}, {"SLURM_JOB_NUM_NODES": "2"}])
def test_a_worker_is_not_started_several_times_in_a_job(nodes: dict[str, str]) -> None:
    done = run_script("launch/slurm.sbatch", "sweep", "run", *WORKER, **nodes)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: a worker of a sweep is one process: give one node and one task\n"


_POD = ("--name=first", "--image=example.org/a:1", "--claim=runs", "--gpu=nvidia-h100-80gb")


def test_kubernetes_is_given_a_jobset_for_each_worker(fakes: Fakes) -> None:
    fakes.add("kubectl")
    done = fakes.run("-c", launched("gke", *_POD, "--chips=8", workers=2))
    assert done.returncode == 0, done.stderr
    sets = [yaml.safe_load(call.input) for call in fakes.calls()]
    assert [one["metadata"]["name"] for one in sets] == ["first-0", "first-1"]
    for one in sets:
        (job,) = one["spec"]["replicatedJobs"]
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        words = [*container["command"], *container["args"]]
        assert [word.replace("$$", "$") for word in words] == ["python", *STARTED]


@pytest.mark.parametrize(
    "words",
    [
        ("launch/gke.sh", "create", *_POD, "--hosts=2"),
        ("launch/gke.sh", "create", *_POD[:3], "--tpu=t", "--topology=2x2", "--slices=2"),
        ("launch/sky.sh", "launch", "--name=n", "--gpu=H100:8", "--nodes=2", "--bucket=gs://b"),
    ],
)
def test_scripts_refuse_workers_of_several_processes(words: tuple[str, ...]) -> None:
    done = run_script(*words, "--", "sweep", "run", *WORKER)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: a worker of a sweep is one process: ")


def test_xpk_is_given_a_worker(fakes: Fakes) -> None:
    fakes.add("xpk")
    flags = (*_POD[:2], "--project=p", "--zone=z", "--cluster=c", "--type=v5litepod-4")
    script = ("launch/gke.sh", "xpk", *flags, "--storage=s", "--", "sweep", "run", *WORKER)
    assert fakes.run(*script).returncode == 0
    (call,) = fakes.calls()
    assert shlex.split(call.value("--command")) == ["python", *STARTED]


def test_each_worker_of_cloud_tpus_has_a_tpu_that_is_looked_after() -> None:
    tpu = ("--project=p", "--zone=z", "--type=v5litepod-4", "--version=v", "--source=git+https://x")
    given = (*tpu, "--setup=mount 'it'")
    *each, last = launched("tpu_vm", *given, workers=2).splitlines()
    assert last == "wait"
    for number, line in enumerate(each):
        assert line.endswith(" &")
        words = shlex.split(line.removesuffix(" &"))
        assert words[1:3] == ["babysit", f"--name=sweep-{number}"]
        done = run_script(words[0], "babysit", "--dry-run", *words[2:])
        assert done.returncode == 0, done.stderr
        scripts = [x for x in shlex.split(done.stdout) if x.startswith("--command=set -e")]
        begun = [x for x in map(shlex.split, scripts) if "nohup" in x]
        assert begun
        for script in begun:
            inner = shlex.split(script[script.index("nohup") + 3].partition("; echo $?")[0])
            assert inner == ["venv/bin/python", *STARTED]


@pytest.mark.parametrize(("machines", "name"), [("--gpu=H100:8", "gpu"), ("--tpu=t-4", "tpu")])
def test_skypilot_is_given_one_worker(
    machines: str, name: str, fakes: Fakes, tmp_path: Path
) -> None:
    fakes.add("sky")
    done = fakes.run("-c", launched("sky", machines, "--bucket=gs://b", "--name=mine"))
    assert done.returncode == 0, done.stderr
    (call,) = fakes.calls()
    words = [word for word in call.words if word.startswith("TRAIN=")]
    assert call.words[-1] == f"launch/sky_{name}.yaml"
    task = yaml.safe_load((ROOT / call.words[-1]).read_text())
    python = tmp_path / "home/venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nfor w in "$@"; do echo "$w"; done\n')
    python.chmod(0o755)
    variables = {"HOME": str(tmp_path / "home"), "SKYPILOT_NUM_NODES": "1"}
    ran = run_script("-c", task["run"], TRAIN=words[0].removeprefix("TRAIN="), **variables)
    assert ran.stdout.splitlines() == STARTED


@pytest.mark.parametrize(
    ("scheduler", "workers", "given", "message"),
    [
        ("sky", 2, (), "starts one worker: a bucket"),
        ("local", 0, (), "--workers must be at least 1, got 0"),
        ("slurm", None, ("--array=0-3",), "which tasks there are follows from the sweep"),
        ("slurm", None, ("-a0-3",), "which tasks there are follows from the sweep"),
    ],
)
def test_what_a_script_could_not_do_is_refused(
    scheduler: str, workers: int | None, given: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        launched(scheduler, *given, workers=workers)


def test_workers_get_the_flags_of_the_command_line_but_those_of_launch() -> None:
    words = ["--config", "x.py", "launch", "--workers", "3", "-scheduler=slurm", "--retry"]
    words += ["--config.runs.a.seed=1", "--", "--workers=9"]
    found = launching.flags_of_worker(words, without=("scheduler", "workers"))
    assert found == ["--config", "x.py", "--retry", "--config.runs.a.seed=1"]


def sweep(*words: str) -> subprocess.CompletedProcess[str]:
    """The command."""
    return subprocess.run(
        [sys.executable, "-m", "blindvalm_jax.sweep", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command_says_what_it_lacks(tmp_path: Path) -> None:
    given = small_sweep.write_config(tmp_path, small_sweep.six_runs(tmp_path))
    done = sweep("launch", f"--config={given}", f"--workdir={tmp_path}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: launch needs --workdir=DIR and --scheduler=NAME\n"


def test_printed_commands_train_on_this_machine(tmp_path: Path) -> None:
    six = small_sweep.six_runs(tmp_path)
    for values in six.values():
        values.train.steps, values.eval.every_steps = 4, 0
    given = small_sweep.write_config(tmp_path, {name: six[name] for name in ("blind", "trunk")})
    words = (f"--config={given}", f"--workdir={tmp_path}/my sweep", "--config.runs.blind.seed=7")
    printed = sweep(
        "launch", *words, "--scheduler=local", "--workers=2", "--", "--devices=1", "--grace=5"
    )
    assert printed.returncode == 0, printed.stderr
    quickly = small_run.quickly(tmp_path, devices=1)
    environment = {**os.environ, **quickly, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        ["bash", "-c", f"exec {printed.stdout}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launcher:
        try:
            said, _ = launcher.communicate(timeout=small_sweep.DEADLINE)
        except subprocess.TimeoutExpired:
            launcher.send_signal(signal.SIGTERM)  # which ends its workers
            raise
    assert launcher.returncode == 0, said
    assert "[0] 2 of 2 runs are done" in said
    assert "[1] 2 of 2 runs are done" in said
    contents = Manifest(tmp_path / "my sweep").contents()
    assert [about["ended"] for about in contents.values()] == ["done", "done"]
    assert contents["blind"]["settings"]["seed"] == 7
