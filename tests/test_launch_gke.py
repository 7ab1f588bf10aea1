"""launch/gke.sh: JobSets, and a kubectl that plays what becomes of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch_fakes import ROOT, Answer, Fakes, run_script

LAUNCH = ROOT / "launch"
POD = ("--name=first", "--image=example.org/a:1", "--claim=runs")
TPU = (*POD, "--tpu=tpu-v5-lite-podslice", "--topology=4x4", "--hosts=4")
GPU = (*POD, "--gpu=nvidia-h100-80gb", "--hosts=2", "--chips=8")
XPK = (*POD[:2], "--project=p", "--zone=z", "--cluster=c", "--type=v5litepod-16", "--storage=s")
TRAIN = ("--config=configs/text.py:small", '--config.note=it\'s "a" \\ $(NAME) $$')
BABYSIT = ("launch/gke.sh", "babysit", *GPU, "--poll=0", "--", "--workdir=gs://b/r")


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path / "bin")


def manifest(*words: str, train: Sequence[str] = TRAIN) -> Any:
    """The JobSet that gke.sh prints, read."""
    done = run_script("launch/gke.sh", "manifest", *words, "--", *train)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def pod(jobset: Any) -> Any:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("machines", [TPU, GPU])
def test_a_jobset_restarts_what_was_preempted_and_fails_with_what_failed(
    machines: tuple[str, ...],
) -> None:
    spec = manifest(*machines, "--restarts=7", "--grace=120")["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0
    assert pod({"spec": spec})["restartPolicy"] == "Never"
    count, fail = job["podFailurePolicy"]["rules"]
    # an evicted pod counts as such, whatever it ends with: the first rule that fits decides
    assert count == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert fail["action"] == "FailJob"
    assert fail["onExitCodes"]["operator"] == "In"
    assert fail["onExitCodes"]["values"] == [1, 43]
    assert fail["onExitCodes"]["containerName"] == pod({"spec": spec})["containers"][0]["name"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert spec["failurePolicy"]["maxRestarts"] == 7
    assert pod({"spec": spec})["terminationGracePeriodSeconds"] == 120


def test_a_pod_gets_the_words_of_train_as_they_are() -> None:
    *_, config, note = pod(manifest(*TPU))["containers"][0]["args"]
    assert config == TRAIN[0]
    assert note.replace("$$", "$") == TRAIN[1]  # Kubernetes reads $$ as $


@pytest.mark.parametrize("machines", [TPU, GPU])
def test_a_pod_gets_the_variables_as_they_are(machines: tuple[str, ...]) -> None:
    given = {"JAX_COORDINATOR_PORT": "8476", "NO": 'it\'s "a" \\ $(NAME) $$ #: ', "EMPTY": ""}
    flags = [f"--env={name}={value}" for name, value in given.items()]
    env = pod(manifest(*machines, *flags))["containers"][0]["env"]
    told = {variable["name"]: variable["value"] for variable in env if "value" in variable}
    # Kubernetes reads $$ as $
    assert {name: value.replace("$$", "$") for name, value in told.items()} == given
    assert "$$(NAME) $$$$" in told["NO"]


@pytest.mark.parametrize("machines", [TPU, GPU])
def test_a_claim_is_mounted_so_that_the_image_s_user_may_write(machines: tuple[str, ...]) -> None:
    spec = pod(manifest(*machines))
    (volume,) = spec["volumes"]
    assert volume["persistentVolumeClaim"] == {"claimName": "runs"}
    assert spec["containers"][0]["volumeMounts"] == [{"name": volume["name"], "mountPath": "/runs"}]
    (user,) = re.findall(r"useradd .*--uid (\d+) trainer", (LAUNCH / "Dockerfile").read_text())
    assert spec["securityContext"]["fsGroup"] == int(user)


@pytest.mark.parametrize("machines", [TPU, GPU])
@pytest.mark.parametrize("words", [("--workdir=s3://b/r",), ("--workdir", "gs://b/r")])
def test_a_run_at_an_address_needs_no_volume(
    machines: tuple[str, ...], words: tuple[str, ...]
) -> None:
    unmounted = [word for word in machines if "--claim" not in word]
    spec = pod(manifest(*unmounted, train=words))
    assert not {"volumes", "securityContext"} & spec.keys()
    assert "volumeMounts" not in spec["containers"][0]
    assert spec["containers"][0]["args"][-len(words) :] == list(words)
    mounted = pod(manifest(*machines, train=words))  # for data, say
    assert "volumes" in mounted
    assert "volumeMounts" in mounted["containers"][0]


def test_pods_of_a_mounted_bucket_have_what_mounts_it_and_an_account_that_may() -> None:
    def template(*words: str) -> Any:
        job = manifest(*TPU, *words)["spec"]["replicatedJobs"][0]["template"]["spec"]
        return job["template"]

    bucket = template("--gcsfuse", "--service-account=trainer")
    assert bucket["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert bucket["spec"]["serviceAccountName"] == "trainer"
    other = template()  # a file server needs neither
    assert "metadata" not in other
    assert "serviceAccountName" not in other["spec"]


def test_a_slice_is_a_job_on_one_pool_of_nodes() -> None:
    jobset = manifest(*TPU, "--slices=2", "--spot")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    topology = jobset["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert topology == "cloud.google.com/gke-nodepool"
    assert pod(jobset)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    container = pod(jobset)["containers"][0]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["args"][0] == "--distributed=auto"


def test_gpu_pods_meet_at_the_first_by_its_name_in_the_network() -> None:
    jobset = manifest(*GPU)
    spec, container = jobset["spec"], pod(jobset)["containers"][0]
    name, job = jobset["metadata"]["name"], spec["replicatedJobs"][0]["name"]
    assert spec["network"]["enableDNSHostnames"] is True
    address, processes, process = container["args"][:3]
    host = f"{name}-{job}-0-0.{spec['network']['subdomain']}"
    assert re.fullmatch(rf"--distributed={re.escape(host)}:\d+", address)
    assert (processes, process) == ("--processes=2", "--process=$(PROCESS)")
    (variable,) = container["env"]
    assert variable["name"] == "PROCESS"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert variable["valueFrom"]["fieldRef"]["fieldPath"] == index
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_kubectl_creates_what_manifest_prints(fakes: Fakes) -> None:
    fakes.add("kubectl", {"create": [Answer(), Answer(code=1)]})
    words = ("launch/gke.sh", "create", *GPU, "--namespace=n", "--", *TRAIN)
    assert fakes.run(*words).returncode == 0
    (call,) = fakes.calls()
    assert call.words == ["--namespace=n", "create", "-f", "-"]
    assert yaml.safe_load(call.input) == manifest(*GPU)
    assert fakes.run(*words).returncode == 1  # what kubectl ends with


def test_xpk_restarts_on_42_and_leaves_time_to_save(fakes: Fakes) -> None:
    fakes.add("xpk")
    given = (*XPK, "--grace=90", "--env=A=1 2", "--env=B=")
    done = fakes.run("launch/gke.sh", "xpk", *given, "--", "--x=a b")
    assert done.returncode == 0, done.stderr
    (call,) = fakes.calls()
    assert call.words[:2] == ["workload", "create"]
    assert "--restart-on-exit-codes=42" in call.words
    assert [word for word in call.words if "--env" in word] == ["--env=A=1 2", "--env=B="]
    assert "--termination-grace-period-seconds=90" in call.words
    train = "python -m blindvalm_jax.train --distributed=auto '--x=a b'"
    assert call.value("--command") == train


def test_xpk_attaches_no_storage_for_a_run_at_an_address(fakes: Fakes) -> None:
    fakes.add("xpk")
    done = fakes.run("launch/gke.sh", "xpk", *XPK[:-1], "--", "--workdir=gs://b/r")
    assert done.returncode == 0, done.stderr
    (call,) = fakes.calls()
    assert not [word for word in call.words if "storage" in word]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("manifest", *POD, "--", "--x"), "--tpu=... or --gpu=... is needed"),
        (("manifest", *POD[:2], "--", "--x"), "--claim=... or the variable GKE_CLAIM"),
        (("manifest", *POD[:2], "--", "--workdir=/runs/a"), "--claim=... or the variable GKE"),
        (
            ("manifest", *POD[:2], "--", "--workdir=gs://b/r", "--workdir", "/runs/a"),
            "--claim=... or the variable GKE_CLAIM",
        ),
        (
            ("manifest", *POD[:2], "--gcsfuse", "--", "--workdir=gs://b/r"),
            "--claim=... or the variable GKE_CLAIM",
        ),
        (("xpk", *XPK[:-1], "--", "--workdir=/runs/a"), "--storage=... or the variable GKE_STO"),
        (("manifest", *TPU, "--gpu=g", "--", "--x"), "--tpu and --gpu are two ways"),
        (("manifest", *POD, "--tpu=t", "--", "--x"), "--topology=... or the variable"),
        (("manifest", *GPU, "--slices=2", "--", "--x"), "--slices are for TPUs"),
        (("manifest", *GPU, "--hosts=two", "--", "--x"), "--hosts must be a whole number from 1"),
        (("manifest", *GPU, "--hosts=0", "--", "--x"), "--hosts must be a whole number from 1"),
        (("manifest", *GPU, "--chips=", "--", "--x"), "--chips must be a whole number from 1"),
        (("manifest", *GPU, f"--name={'a' * 48}", "--", "--x"), " is 1 characters too long: aaaa"),
        (("manifest", *TPU, f"--name={'a' * 47}", "--slices=11", "--", "--x"), "is 1 characters"),
        (("manifest", *GPU, "--env=PROCESS=1", "--", "--x"), "on GPUs it is the number of a pod"),
        (("manifest", *GPU, "--env=A.B=secret", "--", "--x"), "digits and _, got 'A.B'"),
        (("manifest", *GPU), "arguments of train are needed"),
        (("babysit", *GPU), "arguments of train are needed"),
        (("babysit", *GPU, "--poll=", "--", "--x"), "--poll must be a whole number from 0"),
        (("babysit", *POD, "--", "--x"), "--tpu=... or --gpu=... is needed"),
        (("delete", "--name=A_b"), "is no name of Kubernetes"),
        (("xpk", *XPK, '--env=A=secret"', "--", "--x"), "--env=A=...: xpk spoils"),
        (("xpk", *XPK, "--service-account=a", "--", "--x"), "xpk has no --service-account"),
        (("xpk", *XPK, f"--name={'a' * 41}", "--", "--x"), "is 1 characters too long: "),
        (("xpk", *POD[:2], "--", "--x"), "--project=... or the variable GKE_PROJECT"),
    ],
)
def test_bad_usage_of_gke_is_one_line_and_2(words: tuple[str, ...], told: str) -> None:
    done = run_script("launch/gke.sh", *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert "secret" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


# ---------------------------------------------------------------- babysit


def kubectl(
    fakes: Fakes,
    *states: str | Answer,
    codes: Sequence[Answer] = (Answer(),),
    create: Sequence[Answer] = (Answer(),),
) -> None:
    """A kubectl with states of the JobSet ("" where there is none) and codes of its pods."""
    told = [Answer(state) if isinstance(state, str) else state for state in states]
    fakes.add("kubectl", {"get jobset": told, "get pods": codes, "create": create})


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
    away = Answer(code=1)  # asked again
    kubectl(fakes, "", ACTIVE, failed, codes=[away, Answer(codes)])
    done = fakes.run(*BABYSIT)
    assert done.returncode == ends
    assert "kubectl does not tell how the pods of first ended" in done.stdout
    assert f"training ended with exit code {ends}," in done.stdout
    assert created(fakes) == 1


def test_a_jobset_that_was_started_again_too_often_is_given_up(fakes: Fakes) -> None:
    kubectl(
        fakes,
        ACTIVE,
        state("Failed", restarts=50, reason="ReachedMaxRestarts"),
        codes=[Answer("42 42")],
    )
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
