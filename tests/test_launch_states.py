"""What schedulers do to a job: a kubectl with states of a JobSet, an sbatch that queues again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.launch_fakes import Answer, Fakes

TRAIN = ("--config=configs/text.py:small", "--workdir=gs://b/r")
POD = ("--name=first", "--image=example.org/a:1", "--gpu=nvidia-h100-80gb", "--hosts=2")
BABYSIT = ("launch/gke.sh", "babysit", *POD, "--poll=0", "--", *TRAIN)
SBATCH = ("--partition=p", "--nodes=2", "launch/slurm.sbatch", *TRAIN)


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path / "bin")


# ---------------------------------------------------------------- GKE


def kubectl(
    fakes: Fakes, *states: str | Answer, codes: str = "", create: Sequence[Answer] = (Answer(),)
) -> None:
    """A kubectl with states of the JobSet ("" where there is none) and codes of its pods."""
    told = [Answer(state) if isinstance(state, str) else state for state in states]
    pods = [Answer(codes)]
    fakes.add("kubectl", {"get jobset": told, "get pods": pods, "create": create})


def state(word: str = "", *, restarts: int = 0, ready: int = 1, reason: str = "") -> str:
    """What gke.sh has kubectl print of a JobSet."""
    return f"state={word} restarts={restarts or ''} ready={ready} reason={reason}"


def created(fakes: Fakes) -> int:
    """How often a JobSet was created."""
    return sum("create" in call.words for call in fakes.calls())


ACTIVE, AGAIN = state(), state(restarts=1, ready=0)
COMPLETED = state("Completed", restarts=1, ready=0)


def test_babysit_creates_a_jobset_and_looks_on_through_a_preemption(fakes: Fakes) -> None:
    kubectl(fakes, "", state(ready=0), ACTIVE, ACTIVE, AGAIN, state(restarts=1), COMPLETED)
    done = fakes.run(*BABYSIT)
    assert (done.returncode, done.stderr) == (0, "")
    assert created(fakes) == 1  # its controller is what starts it again
    (call,) = (call for call in fakes.calls() if "create" in call.words)
    assert yaml.safe_load(call.input)["metadata"]["name"] == "first"
    said = [line.partition("JobSet: ")[2] for line in done.stdout.splitlines() if "JobSet:" in line]
    # what stays as it is is said once
    assert said == [state(ready=0), ACTIVE, AGAIN, state(restarts=1), COMPLETED]


def test_a_jobset_that_is_there_is_not_created_again(fakes: Fakes) -> None:
    kubectl(fakes, ACTIVE, COMPLETED)
    assert fakes.run(*BABYSIT).returncode == 0
    assert created(fakes) == 0


@pytest.mark.parametrize(
    ("codes", "ends"), [("1 134", 1), ("134 43", 43), ("43 1", 43), ("137 134", 1), ("", 1)]
)
def test_babysit_ends_with_what_the_pods_of_a_failed_jobset_ended_with(
    fakes: Fakes, codes: str, ends: int
) -> None:
    failed = state("Failed", ready=0, reason="FailJobSetFailurePolicyAction")
    kubectl(fakes, "", ACTIVE, failed, codes=codes)
    done = fakes.run(*BABYSIT)
    assert done.returncode == ends
    assert f"training ended with exit code {ends}," in done.stdout
    assert created(fakes) == 1


def test_a_jobset_that_was_started_again_too_often_is_given_up(fakes: Fakes) -> None:
    kubectl(fakes, ACTIVE, state("Failed", restarts=50, reason="ReachedMaxRestarts"), codes="42 42")
    done = fakes.run(*BABYSIT)
    assert done.returncode == 3
    assert "started again as often as its JobSet may be; given up. `delete` it" in done.stderr


@pytest.mark.parametrize("states", [("", ACTIVE, ""), (ACTIVE, ""), ("", "")])
def test_a_jobset_that_somebody_deletes_is_not_created_again(
    fakes: Fakes, states: tuple[str, ...]
) -> None:
    kubectl(fakes, *states)
    done = fakes.run(*BABYSIT)
    assert (done.returncode, created(fakes)) == (3, int(states[0] == ""))
    assert "somebody has deleted first" in done.stderr


def test_a_kubectl_that_fails_is_asked_again_and_creates_nothing_twice(fakes: Fakes) -> None:
    lost = Answer(code=1, err="no network\n")
    kubectl(fakes, lost, "", lost, ACTIVE, lost, COMPLETED)
    done = fakes.run(*BABYSIT)
    assert (done.returncode, done.stderr) == (0, "no network\n" * 3)
    assert created(fakes) == 1


def test_a_jobset_that_cannot_be_created_is_given_up_after_waits_that_double(fakes: Fakes) -> None:
    kubectl(fakes, "", create=[Answer(code=1, err="no quota\n")])
    fakes.add("sleep")
    done = fakes.run(*(w.replace("--poll=0", "--poll=100") for w in BABYSIT))
    assert done.returncode == 3
    assert "first cannot be created, 10 times in a row" in done.stderr
    waits = [int(call.words[0]) for call in fakes.calls() if call.name == "sleep"]
    assert waits == [100, 200, 400, 800, *[900] * 6]


def test_status_and_logs_tell_what_kubectl_tells(fakes: Fakes) -> None:
    rows = ["NAME TERMINALSTATE RESTARTS\n", "first  0\n", "first  1\n", "first Failed 1\n"]
    gone = Answer(code=1, err='jobsets "first" not found\n')
    plan = {
        "get jobset": [*(Answer(rows[0] + row) for row in rows[1:]), gone],
        "logs": [Answer("step 1\n", code=1, err="no pod is ready\n"), Answer("step 1\nstep 2\n")],
    }
    fakes.add("kubectl", plan)
    status = ("launch/gke.sh", "status", "--name=first")
    assert [row in fakes.run(*status).stdout for row in rows[1:]] == [True] * 3
    done = fakes.run(*status)
    assert (done.returncode, done.stderr) == (1, gone.err)
    logs = ("launch/gke.sh", "logs", "--name=first")
    assert fakes.run(*logs).returncode == 1
    assert fakes.run(*logs).stdout.endswith("step 1\nstep 2\n")


# ---------------------------------------------------------------- SLURM

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
