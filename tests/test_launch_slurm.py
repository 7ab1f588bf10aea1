"""launch/slurm.sbatch under commands that play SLURM, an sbatch that queues again among them."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch_fakes import ROOT, Answer, Fakes

LAUNCH = ROOT / "launch"
TRAIN = ("--config=configs/text.py:small", '--config.note=it\'s "a" \\ $(NAME) $$')
SBATCH = ("--partition=p", "--nodes=2", "launch/slurm.sbatch", *TRAIN)


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path / "bin")


def job(fakes: Fakes, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the batch script as SLURM does: from a copy of its own."""
    copy = fakes.directory / "slurm_script"
    shutil.copy(LAUNCH / "slurm.sbatch", copy)
    return fakes.run(copy, *(words or TRAIN), SLURM_JOB_ID="17", **variables)


def requeued(fakes: Fakes) -> list[list[str]]:
    """The calls that put a job into the queue."""
    calls = [c.words for c in fakes.calls() if c.name == "scontrol"]
    return [words for words in calls if words[0] != "show"]


@pytest.mark.parametrize("code", [0, 1, 42, 43, 134, 137, 139, 143])
def test_a_job_queues_again_where_training_was_preempted_or_killed_and_else_ends_as_it_did(
    fakes: Fakes, code: int
) -> None:
    fakes.add("srun", {"": [Answer(code=code)]})
    fakes.add("scontrol")
    assert job(fakes).returncode == code
    assert requeued(fakes) == ([["requeue", "17"]] if code in (42, 134, 137, 139, 143) else [])


@pytest.mark.parametrize(
    ("said", "code", "ended"),
    [
        ("a: task 0: Exited with exit code 1\nb: tasks 1-3: Exited with exit code 134", 134, 1),
        ("a: task 0: Exited with exit code 43\nb: task 1: Aborted", 134, 43),
        ("a: task 0: Exited with exit code 137\nb: task 1: Exited with exit code 1", 137, 137),
        ("a: tasks 0-1: Exited with exit code 134", 134, 134),
    ],
    ids=["failed", "diverged", "killed", "left"],
)
def test_the_code_of_a_job_is_that_of_the_process_that_others_ended_for(
    fakes: Fakes, said: str, code: int, ended: int
) -> None:
    """By what srun says of each, as it ends with the highest."""
    lines = "".join(f"srun: error: {line}\n" for line in said.splitlines())
    fakes.add("srun", {"": [Answer(code=code, err=lines)]})
    fakes.add("scontrol")
    done = job(fakes)
    assert (done.returncode, done.stderr) == (ended, lines)
    assert bool(requeued(fakes)) == (ended >= 128)


@pytest.mark.parametrize("code", [42, 137])
@pytest.mark.parametrize(
    ("state", "again"),
    [
        ("JobState=COMPLETING Reason=None PreemptTime=None", False),
        ("JobState=COMPLETING Reason=TimeLimit PreemptTime=None", True),
        ("JobState=COMPLETING Reason=None PreemptTime=2026-11-23T01:38:29", True),
        ("JobState=RUNNING Reason=None PreemptTime=None", True),
    ],
    ids=["cancelled", "time limit", "preempted", "running"],
)
def test_what_a_user_cancelled_is_not_queued_again(
    fakes: Fakes, state: str, again: bool, code: int
) -> None:
    fakes.add("srun", {"": [Answer(code=code)]})
    fakes.add("scontrol", {"show job 17": [Answer(f"JobId=17\n   {state}\n")]})
    done = job(fakes)
    assert (done.returncode, done.stderr) == (code, "")
    assert requeued(fakes) == ([["requeue", "17"]] if again else [])
    assert ("cancelled: not queued again" in done.stdout) != again


def test_a_job_that_may_not_queue_again_ends_as_training_did(fakes: Fakes) -> None:
    fakes.add("srun", {"": [Answer(code=42)]})
    fakes.add("scontrol", {"requeue": [Answer(err="presently disabled for job 17\n", code=1)]})
    done = job(fakes)
    assert done.returncode == 42
    assert done.stderr == "presently disabled for job 17\nerror: not queued again: see above\n"


def test_what_is_said_behind_the_signal_is_kept(fakes: Fakes) -> None:
    """scancel sends it to all that the batch shell has started, what copies the errors among it."""
    # the one between the script and this shell is the fake itself
    stop = """
shell=$(ps -o ppid= -p $PPID | tr -d ' ')
tee() { ps -o pid=,comm= --ppid "$shell" | sed -n 's/ tee$//p'; }
for _ in {1..500}; do [ -z "$(tee)" ] || break; sleep 0.01; done
kill -TERM "$shell" $(tee)
for _ in {1..20}; do echo "saving" >&2; sleep 0.01; done
exit 42
"""
    fakes.add("srun", {"": [Answer(script=stop)]})
    fakes.add("scontrol")
    done = job(fakes)
    assert (done.returncode, done.stderr) == (42, "saving\n" * 20)


@pytest.mark.parametrize("code", [42, 134])
def test_a_job_queues_again_so_often_and_no_more(fakes: Fakes, code: int) -> None:
    fakes.add("srun", {"": [Answer(code=code)]})
    fakes.add("scontrol")
    done = job(fakes, SLURM_RESTART_COUNT="3", REQUEUES="3")
    assert done.returncode == code
    assert "queued again 3 times; given up" in done.stderr
    assert requeued(fakes) == []


def test_the_batch_shell_outlives_the_signal_and_queues_the_job_again(fakes: Fakes) -> None:
    # the one between the script and this shell is the fake itself
    stop = 'kill -TERM "$(ps -o ppid= -p $PPID)"; exit 42'
    fakes.add("srun", {"": [Answer(script=stop)]})
    fakes.add("scontrol")
    done = job(fakes)
    assert "SIGTERM: waiting" in done.stdout
    assert done.returncode == 42
    assert fakes.calls()[-1].words == ["requeue", "17"]


def test_the_only_process_of_a_node_has_all_of_its_gpus(fakes: Fakes) -> None:
    fakes.add("srun", {"": [Answer(script='echo "devices=$JAX_LOCAL_DEVICE_IDS"')]})
    assert "devices=0,1,2,3\n" in job(fakes, SLURM_GPUS_ON_NODE="4").stdout
    several = job(fakes, SLURM_GPUS_ON_NODE="4", SLURM_NTASKS_PER_NODE="4")
    assert "devices=\n" in several.stdout  # JAX divides them, and each has to see all
    assert "devices=\n" in job(fakes).stdout
    bound = ["--gpu-bind=none" in call.words for call in fakes.calls()]
    assert bound == [True, True, False]
    for call in fakes.calls():
        assert call.words[-len(TRAIN) :] == list(TRAIN)


def test_sbatch_reads_signal_and_requeue_and_no_place() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = re.findall(r"^#SBATCH (\S+)$", text, re.MULTILINE)
    assert {"--signal=TERM@120", "--requeue", "--open-mode=append"} <= set(options)
    assert not [o for o in options if re.match("--(partition|account|qos|nodelist)", o)]
    # SLURM stops reading options at the first command
    assert text.index("#SBATCH --output") < text.index("set -euo pipefail")


# ---------------------------------------------------------------- sbatch

# Runs a copy of the batch script, as SLURM does, and again when it was put into the queue.
_SBATCH = """
while [[ $1 == --* ]]; do shift; done
cp "$1" "$SPOOL/slurm_script"
shift
export SLURM_JOB_ID=17
for ((count = 0; ; count++)); do
  [ $count = 0 ] || export SLURM_RESTART_COUNT=$count
  rm -f "$SPOOL/queued"
  bash "$SPOOL/slurm_script" "$@"
  code=$?
  [ -e "$SPOOL/queued" ] || exit $code
done
"""
# SLURM refuses what did not ask for it.
_REQUEUE = """
grep -qx '#SBATCH --requeue' "$SPOOL/slurm_script" || exit 1
[ "$2" = 17 ] && touch "$SPOOL/queued"
"""


def slurm(fakes: Fakes, *codes: int, show: str = "JobState=RUNNING Reason=None") -> None:
    """An sbatch that waits for its job, whose processes end with these codes, one a start."""
    fakes.add("sbatch", {"": [Answer(script=_SBATCH)]})
    told = 'echo "started again ${SLURM_RESTART_COUNT:-0} times: ${*@Q}"; exit'
    fakes.add("srun", {"": [Answer(script=f"{told} {code}") for code in codes]})
    fakes.add("scontrol", {"show job 17": [Answer(show)], "requeue": [Answer(script=_REQUEUE)]})


def submit(fakes: Fakes, **variables: str) -> tuple[int, list[str], int]:
    """What the job ends with, what was said at each start, how often it was queued again."""
    command = shlex.join(["sbatch", *SBATCH])
    done = fakes.run("-c", command, SPOOL=str(fakes.directory), **variables)
    starts = [line for line in done.stdout.splitlines() if line.startswith("started again")]
    queued = [call.words for call in fakes.calls() if call.words[:1] == ["requeue"]]
    assert all(words == ["requeue", "17"] for words in queued)
    return done.returncode, starts, len(queued)


def test_a_job_goes_on_through_a_preemption_and_a_kill_until_it_is_done(fakes: Fakes) -> None:
    slurm(fakes, 42, 137, 0)
    code, starts, queued = submit(fakes)
    assert (code, queued) == (0, 2)
    assert [start[:21] for start in starts] == [f"started again {n} times" for n in range(3)]
    first, *others = (start.partition(": ")[2] for start in starts)
    assert others == [first] * 2  # the same command resumes
    assert shlex.split(first)[-2:] == list(TRAIN)


@pytest.mark.parametrize("codes", [(1,), (43,), (0,), (42, 1), (137, 43)])
def test_a_job_that_failed_is_not_queued_again(fakes: Fakes, codes: tuple[int, ...]) -> None:
    slurm(fakes, *codes)
    code, starts, queued = submit(fakes)
    assert (code, len(starts), queued) == (codes[-1], len(codes), len(codes) - 1)


def test_a_job_that_is_preempted_for_ever_is_given_up(fakes: Fakes) -> None:
    slurm(fakes, 42)
    code, starts, queued = submit(fakes, REQUEUES="3")
    assert (code, len(starts), queued) == (42, 4, 3)


def test_a_job_that_somebody_cancels_is_not_queued_again(fakes: Fakes) -> None:
    slurm(fakes, 42, show="JobState=COMPLETING Reason=None PreemptTime=None")
    code, starts, queued = submit(fakes)
    assert (code, len(starts), queued) == (42, 1, 0)
