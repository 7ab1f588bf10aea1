"""The files of launch/: well-formed, as recorded, and what schedulers see of the exit codes."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from absl import flags
from ml_collections import config_flags

from blindvalm_jax import config
from blindvalm_jax.objectives.shapes import without_data
from tests import make_golden_launch
from tests.launch_fakes import ROOT, Answer, Fakes, run_script

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
POD = ("--name=first", "--image=example.org/a:1", "--claim=runs")
TPU = (*POD, "--tpu=tpu-v5-lite-podslice", "--topology=4x4", "--hosts=4")
GPU = (*POD, "--gpu=nvidia-h100-80gb", "--hosts=2", "--chips=8")
XPK = (*POD[:2], "--project=p", "--zone=z", "--cluster=c", "--type=v5litepod-16", "--storage=s")
TRAIN = ("--config=configs/text.py:small", '--config.note=it\'s "a" \\ $(NAME) $$')


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path / "bin")


def shellcheck(*words: str, text: str | None = None) -> None:
    """Fails with what shellcheck finds."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = shutil.which("shellcheck", path=path)
    if command is None:
        pytest.skip("shellcheck is not installed: pip install -e '.[test]'")
    done = subprocess.run(
        [command, "--shell=bash", *words], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------- all


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    assert len(SCRIPTS) >= 4
    shellcheck(*map(str, SCRIPTS))


@pytest.mark.parametrize("name", make_golden_launch.CASES)
def test_a_dry_run_prints_what_is_recorded(name: str) -> None:
    golden = make_golden_launch.GOLDEN / f"{name}.txt"
    assert make_golden_launch.dry_run(name) == golden.read_text(), (
        "python -m tests.make_golden_launch records it anew"
    )


def test_every_record_is_of_a_case() -> None:
    files = {path.stem for path in make_golden_launch.GOLDEN.iterdir()}
    assert files == set(make_golden_launch.CASES)


@pytest.mark.parametrize("name", sorted(set(make_golden_launch.CASES) - {"local"}))
def test_a_dry_run_runs_nothing(name: str, fakes: Fakes) -> None:
    script, *words = make_golden_launch.CASES[name]
    for command in ("gcloud", "kubectl", "xpk", "sky", "docker", "srun", "scontrol", "sleep"):
        fakes.add(command)
    words.insert(1 if script.endswith(".sh") else 0, "--dry-run")
    variables = make_golden_launch.VARIABLES.get(name, {})
    assert fakes.run(script, *words, **variables).returncode == 0
    assert fakes.calls() == []


@pytest.mark.parametrize(
    "script", ["tpu_vm.sh", "gke.sh", "sky.sh", "container.sh", "slurm.sbatch", "local.py"]
)
def test_help_says_how_each_is_used(script: str) -> None:
    command = [sys.executable if script.endswith(".py") else "bash", f"launch/{script}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"launch/{script}" in done.stdout
    assert "--dry-run" in done.stdout


def test_nothing_names_a_project_a_zone_or_a_bucket() -> None:
    for path in LAUNCH.iterdir():
        text = path.read_text()
        for found in re.findall(r"(?:gs|s3)://[\w.$-]*", text):
            bucket = found.partition("://")[2].strip(".")
            assert bucket == "" or bucket.isupper(), f"{path.name}: {found}"
        found = re.findall(r"(?<!such as )\b(?:us|europe|asia)-[a-z]+\d-[a-z]\b", text)
        assert not found, f"{path.name}: {found}"


def _commands() -> list[list[str]]:
    """The commands of the table in launch/README.md."""
    rows = (LAUNCH / "README.md").read_text().splitlines()
    found = [re.fullmatch(r"\|[^|]*\| `(.*)` \|", row) for row in rows]
    return [shlex.split(row[1]) for row in found if row]


def test_the_page_has_a_command_for_every_file() -> None:
    """Of its own, or by the script that reads it."""
    named = {Path(word).name for words in _commands() for word in words if "launch/" in word}
    read = {found for name in named for found in _READS.findall((LAUNCH / name).read_text())}
    files = {path.name for path in LAUNCH.iterdir() if path.is_file()}
    assert named | read == files - {"README.md", "commands.sh", "Dockerfile.dockerignore"}


_READS = re.compile(r"=\S*launch/(\w+(?:\.yaml)?)\b")
# ml_collections reads config files so.
_LOADS = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def _train_words(text: str) -> list[str] | None:
    """The arguments of the first train command that a script prints, also in quotes of quotes."""
    if found := re.search(r"^apiVersion.*?(?=\n\+ )", text, re.MULTILINE | re.DOTALL):
        jobset = yaml.safe_load(found[0])
        return [word.replace("$$", "$") for word in pod(jobset)["containers"][0]["args"]]
    if "+ sky " in text:
        return _sky_words(text)
    if "\n+ docker run " in text:
        words = shlex.split(text.rpartition("\n+ docker run ")[2])
        return words[words.index("blindvalm") + 1 :]
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words = list(lexer)
    if "blindvalm_jax.train" in words:
        own = words[words.index("blindvalm_jax.train") + 1 :]
        return list(itertools.takewhile(lambda word: word not in (";", "+"), own))
    inside = (_train_words(word) for word in words if "blindvalm_jax.train" in word)
    return next((found for found in inside if found), None)


def _sky_words(text: str) -> list[str]:
    """The arguments of train in what sky.sh shows."""
    words = shlex.split(text.rpartition("\n+ sky ")[2] or text)
    (train,) = (word.removeprefix("TRAIN=") for word in words if word.startswith("TRAIN="))
    return shlex.split(train)


def _settings(words: list[str]) -> config.Config:
    """What the flags of train say."""
    own = flags.FlagValues()
    argv = ["train", *words]
    config_flags.DEFINE_config_file("config", flag_values=own, sys_argv=argv)
    own(argv, known_only=True)
    return config.parse(own.config)


@_LOADS
@pytest.mark.parametrize("words", _commands())
def test_the_pages_commands_are_right(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are understood, and what they train has data."""
    at = next(i for i, word in enumerate(words) if word.startswith("launch/"))
    start = [sys.executable] if words[at].endswith(".py") else ["bash"]
    behind = at + 2 if words[at].endswith(".sh") else at + 1  # the scripts have subcommands
    command = [*start, *words[at:behind], "--dry-run", *words[behind:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    train = _train_words(done.stdout)
    assert train is not None
    monkeypatch.chdir(ROOT)
    assert not without_data(_settings(train))


@_LOADS
@pytest.mark.parametrize("file", ["Dockerfile", "sky_tpu.yaml", "sky_gpu.yaml", "slurm.sbatch"])
def test_what_a_file_gives_as_an_example_has_data(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (LAUNCH / file).read_text()
    comment = "\n".join(re.findall(r"^# ?(.*)", text, re.MULTILINE)).replace("\\\n", " ")
    example = re.findall(r"^  ((?:docker run|sky|sbatch) .*--config.*)$", comment, re.MULTILINE)
    (words,) = map(shlex.split, example)
    if words[0] == "sky":
        words = next(shlex.split(w.partition("=")[2]) for w in words if w.startswith("TRAIN="))
    train = [word for word in words if word.startswith(("--config", "--workdir"))]
    assert any(word.startswith("--workdir=") for word in train)
    monkeypatch.chdir(ROOT)
    assert not without_data(_settings(train))


# ---------------------------------------------------------------- GKE


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


# ---------------------------------------------------------------- SLURM


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


# ---------------------------------------------------------------- SkyPilot, container


@pytest.mark.parametrize("name", ["sky_tpu", "sky_gpu"])
def test_a_sky_job_recovers_where_docs_advise_it_and_needs_its_variables(name: str) -> None:
    task = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    # not from 137: SkyPilot gives it to the machines that it stops because one has failed
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [42, 134]}
    needed = {variable for variable, value in task["envs"].items() if value is None}
    assert needed == {"BUCKET", "TRAIN"}
    assert task["file_mounts"]["/runs"]["source"] == "${BUCKET}"
    for part in ("setup", "run"):
        shellcheck("--exclude=SC2154", "-", text=task[part])  # SkyPilot sets the variables


@pytest.mark.parametrize(
    ("name", "given", "package"),
    [
        ("sky_tpu", None, ".[tpu,gs]"),
        ("sky_gpu", None, ".[cuda,gs,s3]"),
        ("sky_gpu", "cuda,s3,wandb", ".[cuda,s3,wandb]"),
        ("sky_gpu", "", "."),
    ],
)
def test_a_sky_job_installs_the_extras_that_are_asked_for(
    name: str, given: str | None, package: str, fakes: Fakes
) -> None:
    task = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())
    for command in ("python3", "uv"):
        fakes.add(command)
    extras = task["envs"]["EXTRAS"] if given is None else given
    assert fakes.run("-c", task["setup"], EXTRAS=extras).returncode == 0
    assert fakes.calls()[-1].words[-1] == package
    names = set(re.findall(r"[a-z0-9]+", package))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert names <= project["optional-dependencies"].keys()


def sky_words(task: Any, home: Path, nodes: int, train: str) -> list[str]:
    """What a sky job gives to python on the last of its machines."""
    python = home / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nfor w in "$@"; do echo "$w"; done\nexit 42\n')
    python.chmod(0o755)
    variables = {
        **{"HOME": str(home), "SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_RANK": "1"},
        **{"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "TRAIN": train},
    }
    done = run_script("-c", task["run"], **variables)
    assert done.returncode == 42  # SkyPilot sees it
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("machines", "nodes", "meet"),
    [
        (("--tpu=tpu-v5litepod-16",), 1, ["--distributed=auto"]),
        (("--gpu=H100:8",), 1, []),
        (
            ("--gpu=H100:8", "--nodes=2"),
            2,
            ["--distributed=10.0.0.1:12321", "--processes=2", "--process=1"],
        ),
    ],
)
@pytest.mark.parametrize("workdir", ["/runs/it's a; b", "s3://b/$HOME*"])
def test_a_sky_job_trains_as_was_asked_and_has_a_mount_for_a_path_alone(
    machines: tuple[str, ...],
    nodes: int,
    meet: list[str],
    workdir: str,
    fakes: Fakes,
    tmp_path: Path,
) -> None:
    taken = tmp_path / "task.yaml"  # the last word of the call, as it is while sky runs
    fakes.add("sky", {"jobs launch": [Answer(script=f'cp "${{@: -1}}" {shlex.quote(str(taken))}')]})
    train = (f"--workdir={workdir}", *TRAIN)
    bucket = () if "://" in workdir else ("--bucket=gs://b",)
    words = ("launch", "--name=first", *machines, *bucket, "--env=A=b c", "--", *train)
    done = fakes.run("launch/sky.sh", *words)
    assert (done.returncode, done.stderr) == (0, "")
    (call,) = fakes.calls()
    kind = machines[0][2:5]
    task, whole = (yaml.safe_load(p.read_text()) for p in (taken, LAUNCH / f"sky_{kind}.yaml"))
    given = dict(w.split("=", 1) for f, w in itertools.pairwise(call.words) if f == "--env")
    assert given.keys() >= {name for name, value in task["envs"].items() if value is None}
    assert given["A"] == "b c"
    mounts = whole.pop("file_mounts")
    assert task.pop("file_mounts", None) == (mounts if bucket else None)
    assert mounts["/runs"]["source"] == "${BUCKET}"
    assert given["BUCKET"] == ("gs://b" if bucket else "")
    assert task == whole
    flags = dict(itertools.pairwise(call.words))
    assert flags["--gpus"] == machines[0].partition("=")[2]
    assert flags.get("--num-nodes", "1") == str(nodes)
    expected = ["-m", "blindvalm_jax.train", *meet, *train]
    assert sky_words(task, tmp_path, nodes, given["TRAIN"]) == expected
    assert not Path(call.words[-1]).is_absolute() or not Path(call.words[-1]).exists()


def test_a_secret_is_named_and_never_shown(fakes: Fakes) -> None:
    fakes.add("sky")
    words = ("launch", "--name=a", "--gpu=H100:8", "--secret=KEY", "--", "--workdir=gs://b/r")
    done = fakes.run("launch/sky.sh", *words, KEY="hidden")
    assert done.returncode == 0, done.stderr
    (call,) = fakes.calls()
    assert dict(itertools.pairwise(call.words))["--secret"] == "KEY"
    assert "hidden" not in done.stdout + " ".join(call.words)


@pytest.mark.parametrize(("command", "code"), [("launch", 7), ("logs", 1), ("delete", 1)])
def test_what_sky_ends_with_is_what_its_script_ends_with(
    command: str, code: int, fakes: Fakes
) -> None:
    fakes.add("sky", {"jobs": [Answer(code=code)]})
    train = ("--gpu=H100:8", "--", "--workdir=gs://b/r") if command == "launch" else ()
    assert fakes.run("launch/sky.sh", command, "--name=a", *train).returncode == code


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("start",), "a command is needed"),
        (("logs",), "--name=... or the variable SKY_NAME"),
        (("launch", "--name=a", "--gpu=A"), "arguments of train are needed"),
        (("launch", "--name=a", "--", "--x"), "--tpu=... or --gpu=... is needed"),
        (("launch", "--name=a", "--gpu=A", "--tpu=b", "--", "--x"), "two ways: give one"),
        (("launch", "--name=a", "--gpu=A", "--", "--workdir=/runs/a"), "--bucket=... or the var"),
        (("launch", "--name=a", "--gpu=A", "--bucket=runs", "--", "--x"), "must be gs://... or"),
        (("launch", "--name=a", "--tpu=A", "--nodes=2", "--", "--x"), "--nodes are for GPUs"),
        (("launch", "--name=a", "--gpu=A", "--nodes=0", "--", "--x"), "--nodes must be a whole"),
        (("launch", "--name=a", "--gpu=A", "--extras=a b", "--", "--x"), "--extras must be names"),
        (
            ("launch", "--name=a", "--gpu=A", "--env=TRAIN=secret", "--", "--workdir=gs://b/r"),
            "TRAIN is a variable of the task itself",
        ),
    ],
)
def test_bad_usage_of_sky_is_one_line_and_2(
    words: tuple[str, ...], told: str, fakes: Fakes
) -> None:
    fakes.add("sky")
    done = fakes.run("launch/sky.sh", *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert "secret" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert fakes.calls() == []


CONTAINER = ("launch/container.sh", "run", "--runs=runs/mine", "--data=/texts")


def test_a_container_has_its_directories_and_ends_as_training_does(fakes: Fakes) -> None:
    # who started docker: with the script in between, signals would end there
    started = 'ps -o ppid= -p $PPID | tr -d " "; exit 42'
    fakes.add("docker", {"run": [Answer(script=started)]})
    done = fakes.run(*CONTAINER, "--gpus", "--extras=cuda", "--env=A=b c", "--", *TRAIN)
    assert (done.returncode, done.stderr) == (42, "")
    assert done.stdout.splitlines()[-1] == str(os.getpid())
    build, run = (call.words for call in fakes.calls())
    assert build[0] == "build"
    assert build[-1] == str(ROOT)
    assert "--build-arg=EXTRAS=cuda" in build
    assert f"--file={ROOT / 'launch/Dockerfile'}" in build
    assert "--tag=blindvalm" in build
    image = run.index("blindvalm")
    assert run[image + 1 :] == list(TRAIN)
    assert run[0] == "run"
    assert {"--init", "--gpus=all", "--stop-timeout=300", "--env=A=b c"} <= set(run[:image])
    assert [word for word in run if word.startswith("--mount")] == [
        f"--mount=type=bind,src={ROOT}/runs/mine,dst=/runs",
        "--mount=type=bind,src=/texts,dst=/data,readonly",
    ]


def test_nothing_trains_in_an_image_that_was_not_built(fakes: Fakes) -> None:
    fakes.add("docker", {"build": [Answer(code=5)]})
    assert fakes.run(*CONTAINER, "--", *TRAIN).returncode == 5
    assert [call.words[0] for call in fakes.calls()] == ["build"]


def test_a_container_gets_secrets_by_name_and_a_run_at_an_address_needs_no_directory(
    fakes: Fakes,
) -> None:
    fakes.add("docker")
    words = ("launch/container.sh", "run", "--secret=KEY", "--", "--workdir=s3://b/r")
    done = fakes.run(*words, KEY="hidden")
    assert done.returncode == 0, done.stderr
    _, run = (call.words for call in fakes.calls())
    assert "--env=KEY" in run
    assert "hidden" not in done.stdout + " ".join(run)
    assert not [word for word in run if "mount" in word]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "a command is needed: build or run"),
        (("run", "--runs=r"), "arguments of train are needed"),
        (("run", "--", "--workdir=/runs/a"), "--runs=... or the variable CONTAINER_RUNS"),
        (("run", "--runs=a,b", "--", "--x"), "docker takes no , and no"),
        (("build", "--image="), "--image=... or the variable CONTAINER_IMAGE"),
        (("build", "--extras=a b"), "--extras must be names"),
        (("build", "--secret=KEY=hidden"), "--secret must be the NAME of a variable of this"),
        (("build", "--secret=NOT_THERE"), "--secret=NOT_THERE: no such variable is exported"),
        (("build", "--grace=x"), "--grace must be a whole number"),
    ],
)
def test_bad_usage_of_the_container_is_one_line_and_2(
    words: tuple[str, ...], told: str, fakes: Fakes
) -> None:
    fakes.add("docker")
    done = fakes.run("launch/container.sh", *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert "hidden" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert fakes.calls() == []


def test_the_container_copies_what_is_there_and_starts_train_itself() -> None:
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    kept = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in kept
    entry = next(line for line in lines if line.startswith("ENTRYPOINT"))
    words = json.loads(entry.removeprefix("ENTRYPOINT "))  # exec form: signals reach it
    assert words == ["python", "-m", "blindvalm_jax.train"]
    assert "USER trainer" in lines
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {"cuda", "tpu", "tensorboard"} <= extras.keys()
