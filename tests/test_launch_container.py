"""launch/container.sh and the Dockerfile."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest

from tests.launch_fakes import ROOT, Answer, Fakes

LAUNCH = ROOT / "launch"
TRAIN = ("--config=configs/text.py:small", '--config.note=it\'s "a" \\ $(NAME) $$')
CONTAINER = ("launch/container.sh", "run", "--runs=runs/mine", "--data=/texts")


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path / "bin")


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
        (("build", "--secret=image"), "--secret=image: no such variable is exported"),
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
