"""launch/tpu_vm.sh against a gcloud that plays TPUs: made, preempted, made again."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launch_fakes import Answer, Call, Fakes

WHERE = ("--name=mine", "--project=p", "--zone=z")
MADE = ("--type=v5litepod-16", "--version=v2", "--source=git+https://example.org/a@b")
TRAIN = ("--", "--config=configs/text.py:small", "--workdir=/runs/a b")
BABYSIT = ("launch/tpu_vm.sh", "babysit", *WHERE, *MADE, "--poll=0")
ABSENT = Answer(code=1, err="ERROR: (gcloud) NOT_FOUND: Resource 'mine' was not found\n")


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path / "bin")


def gcloud(
    fakes: Fakes, *, states: Sequence[str], training: Sequence[str], **answers: Answer
) -> None:
    """A gcloud with states of the TPU ("" where there is none) and what the workers tell, in turn.

    training: codes of all workers with a comma between them.
    """
    told = [ABSENT if state == "" else Answer(f"{state}\n") for state in states]
    codes = [Answer("".join(f"training={code}\n" for code in look.split(","))) for look in training]
    fakes.add(
        "gcloud",
        {
            "echo training=": codes,
            "describe": told,
            **{verb: [answer] for verb, answer in answers.items()},
        },
    )


def verb(call: Call) -> str:
    """What a call of gcloud does."""
    if "ssh" in call.words:
        command = call.value("--command")
        for part, name in (("echo training=", "look"), ("nohup", "run"), ("uv ", "install")):
            if part in command:
                return name
        return "mkdir" if command.startswith("mkdir") else "setup"
    return next(w for w in call.words if w in ("create", "delete", "describe", "scp"))


def acted(fakes: Fakes) -> list[str]:
    """What gcloud was called for, without the looks."""
    verbs = [verb(call) for call in fakes.calls() if call.name == "gcloud"]
    return [v for v in verbs if v not in ("describe", "look")]


NEW = ["mkdir", "scp", "install", "run"]


def test_babysit_brings_a_preempted_tpu_and_its_training_back(fakes: Fakes) -> None:
    states = ["", "CREATING", "READY", "READY", "PREEMPTED", "DELETING", "", "READY"]
    gcloud(fakes, states=states, training=["none", "running", "none", "running", "0"])
    done = fakes.run(*BABYSIT, "--spot", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert acted(fakes) == ["create", *NEW, "delete", "create", *NEW]
    first, second = (c.value("--command") for c in fakes.calls() if verb(c) == "run")
    assert first == second  # the same command resumes
    assert "'--workdir=/runs/a b'" in first.replace("'\\''", "'")
    assert all("--spot" in c.words for c in fakes.calls() if verb(c) == "create")
    for call in fakes.calls():  # every one is printed
        assert f"+ gcloud {' '.join(call.words[:4])}" in done.stdout


def test_a_queued_resource_is_asked_for_waited_for_and_deleted_with_its_tpu(fakes: Fakes) -> None:
    states = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "SUSPENDED", "", "ACTIVE"]
    gcloud(fakes, states=states, training=["none", "none", "0"])
    done = fakes.run(*BABYSIT, "--queued", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert acted(fakes) == ["create", *NEW, "delete", "create", *NEW]
    for call in fakes.calls():
        if verb(call) in ("create", "delete", "describe"):
            assert call.words[2] == "queued-resources"
        if verb(call) == "delete":
            assert "--force" in call.words


@pytest.mark.parametrize(
    ("codes", "ends"),
    [
        ("0,0", 0),
        ("1,1", 1),
        ("43,43", 43),
        ("43,42", 43),
        ("0,1", 1),
        ("134,1", 1),
        ("43,134", 43),
    ],
)
def test_what_no_restart_mends_ends_babysit_with_the_same_code(
    fakes: Fakes, codes: str, ends: int
) -> None:
    gcloud(fakes, states=["READY"], training=["none", "running,running", codes])
    assert fakes.run(*BABYSIT, *TRAIN).returncode == ends
    assert acted(fakes) == NEW


@pytest.mark.parametrize(
    "codes", ["42,42", "137,1", "137,134,1", "134,lost", "134,0", "lost,0", "42,1"]
)
def test_training_that_was_saved_or_killed_is_started_again(fakes: Fakes, codes: str) -> None:
    gcloud(fakes, states=["READY"], training=["none", codes, "running,running", "0,0"])
    assert fakes.run(*BABYSIT, *TRAIN).returncode == 0
    assert acted(fakes) == [*NEW, "run"]  # nothing is installed again


@pytest.mark.parametrize("codes", ["lost,lost", "lost,42", "42,42"])
def test_what_a_reboot_unmounted_is_mounted_before_training_starts_again(
    fakes: Fakes, codes: str
) -> None:
    """Also behind 42, which a reboot leaves that gave time to save."""
    gcloud(fakes, states=["READY"], training=["none", codes, "running", "0"])
    setup = "mountpoint -q /runs || gcsfuse mine /runs"
    assert fakes.run(*BABYSIT, f"--setup={setup}", *TRAIN).returncode == 0
    assert acted(fakes) == [*NEW[:-1], "setup", "run", "setup", "run"]
    again = [c.value("--command") for c in fakes.calls() if verb(c) == "setup"]
    assert again == [setup, setup]


def test_a_babysit_that_finds_a_rebooted_vm_sets_it_up_too(fakes: Fakes) -> None:
    gcloud(fakes, states=["READY"], training=["lost", "running", "0"])
    assert fakes.run(*BABYSIT, "--setup=true", *TRAIN).returncode == 0
    assert acted(fakes) == ["setup", "run"]


def test_training_is_not_started_where_the_setup_failed(fakes: Fakes) -> None:
    looks = [Answer(f"training={word}\n") for word in ("lost", "lost", "running", "0")]
    plan = {
        "echo training=": looks,
        "mountpoint": [Answer(code=1), Answer()],
        "describe": [Answer("READY\n")],
    }
    fakes.add("gcloud", plan)
    assert fakes.run(*BABYSIT, "--setup=mountpoint -q /runs", *TRAIN).returncode == 0
    assert acted(fakes) == ["setup", "setup", "run"]


def test_nothing_is_started_beside_a_worker_that_still_runs(fakes: Fakes) -> None:
    gcloud(fakes, states=["READY"], training=["running,42", "137,running", "0,0"])
    assert fakes.run(*BABYSIT, *TRAIN).returncode == 0
    assert acted(fakes) == []


def test_what_ended_before_babysit_came_is_started_again(fakes: Fakes) -> None:
    gcloud(fakes, states=["READY"], training=["1", "running", "0"])
    assert fakes.run(*BABYSIT, *TRAIN).returncode == 0
    assert acted(fakes) == ["run"]


def test_restarts_are_bounded(fakes: Fakes) -> None:
    gcloud(fakes, states=["READY"], training=["none", "42"])
    done = fakes.run(*BABYSIT, "--restarts=2", *TRAIN)
    assert done.returncode == 3
    assert acted(fakes) == [*NEW, "run", "run"]
    assert "started again 2 times; given up" in done.stderr


def test_a_tpu_that_cannot_be_made_is_given_up_after_longer_and_longer_waits(fakes: Fakes) -> None:
    gcloud(fakes, states=[""], training=["none"], create=Answer(code=1, err="no capacity\n"))
    fakes.add("sleep")
    done = fakes.run(*BABYSIT[:-1], "--poll=100", *TRAIN)
    assert done.returncode == 3
    assert "mine cannot be made, 10 times in a row" in done.stderr
    waits = [int(c.words[0]) for c in fakes.calls() if c.name == "sleep"]
    assert waits == [100, 200, 400, 800, *[900] * 6]
    assert acted(fakes) == ["create"] * 11


def test_a_gcloud_that_fails_for_another_reason_makes_no_second_tpu(fakes: Fakes) -> None:
    failing = [Answer(code=1, err="ERROR: no network\n"), Answer("READY\n")]
    looks = [Answer("training=running\n"), Answer("training=0\n")]
    fakes.add("gcloud", {"echo training=": looks, "describe": failing})
    done = fakes.run(*BABYSIT, *TRAIN)
    assert done.returncode == 0
    assert acted(fakes) == []
    assert "no network" in done.stderr


def test_training_is_not_started_where_the_installation_failed(fakes: Fakes) -> None:
    plan = {
        "echo training=": [*[Answer("training=none\n")] * 2, Answer("training=0\n")],
        "uv pip": [Answer(code=1), Answer()],
        "describe": [Answer("READY\n")],
    }
    fakes.add("gcloud", plan)
    assert fakes.run(*BABYSIT, "--setup=true", *TRAIN).returncode == 0
    assert acted(fakes) == ["mkdir", "scp", "install", "mkdir", "scp", "install", "setup", "run"]


@pytest.mark.parametrize("file", ["blindvalm_jax-0.1.0-py3-none-any.whl", "blindvalm_jax.tar.gz"])
def test_a_local_package_is_copied_with_configs_and_versions(
    fakes: Fakes, tmp_path: Path, file: str
) -> None:
    fakes.add("gcloud")
    (tmp_path / file).touch()
    done = fakes.run("launch/tpu_vm.sh", "install", *WHERE, f"--source={tmp_path / file}")
    assert done.returncode == 0, done.stderr
    copy = next(c for c in fakes.calls() if "scp" in c.words)
    sources = [Path(w).name for w in copy.words if w.startswith("/")]
    assert sources == ["configs", "constraints.txt", file]
    command = fakes.calls()[-1].value("--command")
    assert f'"blindvalm_jax[tpu,gs] @ file://$HOME/blindvalm/{file}"' in command


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        ((), "blindvalm_jax[tpu,gs] @"),
        (("--extras=tpu,gs,wandb",), "blindvalm_jax[tpu,gs,wandb] @"),
        (("--extras=",), "blindvalm_jax @"),
    ],
)
def test_extras_are_those_that_are_asked_for(
    fakes: Fakes, flags: tuple[str, ...], package: str
) -> None:
    fakes.add("gcloud")
    words = ("install", *WHERE, "--source=git+https://example.org/a@b", *flags)
    assert fakes.run("launch/tpu_vm.sh", *words).returncode == 0
    assert f'"{package} git+https' in fakes.calls()[-1].value("--command")


def test_workers_keep_the_exit_code_and_the_words_of_the_command(
    fakes: Fakes, tmp_path: Path
) -> None:
    """What is sent to the workers is run here, in a home of its own, with a script as train."""
    home = tmp_path / "home"
    python = home / "blindvalm/venv/bin/python"
    python.parent.mkdir(parents=True)
    # ends when the test has opened the other end of the pipe
    python.write_text(
        '#!/bin/sh\nfor w in "$NOTE" "$@"; do echo "<$w>"; done\nread go < gate\nexit 42\n'
    )
    python.chmod(0o755)
    gate = home / "blindvalm/gate"
    os.mkfifo(gate)
    script = 'for w in "$@"; do case $w in --command=*) cd "$HOME"; bash -c "${w#*=}";; esac; done'
    fakes.add("gcloud", {"ssh": [Answer(script=script)]})

    def workers() -> str:
        done = fakes.run("launch/tpu_vm.sh", "status", *WHERE, HOME=str(home))
        return done.stdout.splitlines()[-1]

    assert workers() == "training=none"
    words = ("--workdir=/runs/a b", '--config.x=it\'s $HOME; "x"')
    note = "it's $HOME; \\"
    given = (*WHERE, "--env=PORT=8476", f"--env=NOTE={note}", "--", *words)
    assert fakes.run("launch/tpu_vm.sh", "run", *given, HOME=str(home)).returncode == 0
    assert workers() == "training=running"
    gate.write_text("go\n")  # returns once it is read
    deadline = time.monotonic() + 60
    while workers() == "training=running" and time.monotonic() < deadline:
        pass
    assert workers() == "training=42"
    log = (home / "blindvalm/train.log").read_text().splitlines()
    assert log == [
        f"<{note}>",
        "<-m>",
        "<blindvalm_jax.train>",
        "<--distributed=auto>",
        *(f"<{w}>" for w in words),
    ]
    # the machine started anew: no exit code, and nobody has the process's number
    (home / "blindvalm/exit_code").unlink()
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    (home / "blindvalm/pid").write_text(f"{ended.pid}\n")
    assert workers() == "training=lost"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "a command is needed"),
        (("babysit",), "--name=... or the variable TPU_NAME is needed"),
        (("create", "--name=a", "--project=p"), "--zone=... or the variable TPU_ZONE"),
        (("create", *WHERE), "--type=... or the variable TPU_TYPE"),
        (("create", *WHERE, "--type=t", "--zones=z"), "unknown argument --zones=z"),
        (("install", *WHERE, "--source=there/is/no.whl"), "there is no file there/is/no.whl"),
        (("install", *WHERE, "--source=blindvalm"), "no .whl, no .tar.gz and no git+https"),
        (
            ("install", *WHERE, "--source=git+https://a@b", "--extras=a;b"),
            "--extras must be names with commas between them, got 'a;b'",
        ),
        (("run", *WHERE), "arguments of train are needed behind --"),
        ((*BABYSIT[1:], "--restarts=many", *TRAIN), "--restarts must be a whole number"),
        ((*BABYSIT[1:], "--restarts=", *TRAIN), "--restarts must be a whole number"),
        ((*BABYSIT[1:], "--poll=", *TRAIN), "--poll must be a whole number from 0 to 999999, got"),
        ((*BABYSIT[1:], "--poll=08", *TRAIN), "--poll must be a whole number"),
        (("run", *WHERE, "--env=A", *TRAIN), "--env must be NAME=VALUE"),
        (("run", *WHERE, "--env=1A=b", *TRAIN), "letters, digits and _, got '1A'"),
        (("run", *WHERE, "--env=A-B=secret", *TRAIN), "letters, digits and _, got 'A-B'"),
        (("run", *WHERE, "--env=A=b\nc", *TRAIN), "--env=A=...: the value must be one line"),
    ],
)
def test_bad_usage_is_one_line_and_2(fakes: Fakes, words: tuple[str, ...], told: str) -> None:
    fakes.add("gcloud")
    done = fakes.run("launch/tpu_vm.sh", *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert "secret" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert fakes.calls() == []


def test_variables_stand_for_flags(fakes: Fakes) -> None:
    fakes.add("gcloud")
    variables = {"TPU_NAME": "n", "TPU_PROJECT": "p", "TPU_ZONE": "z", "TPU_QUEUED": "1"}
    assert fakes.run("launch/tpu_vm.sh", "delete", **variables).returncode == 0
    (call,) = fakes.calls()
    words = ["queued-resources", "delete", "n", "--project=p", "--zone=z", "--force", "--quiet"]
    assert call.words == ["compute", "tpus", *words]
