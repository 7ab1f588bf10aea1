"""launch/sky.sh and the tasks that it gives to SkyPilot."""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch_fakes import ROOT, Answer, Fakes, run_script

LAUNCH = ROOT / "launch"
TRAIN = ("--config=configs/text.py:small", '--config.note=it\'s "a" \\ $(NAME) $$')


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path / "bin")


@pytest.mark.parametrize("name", ["sky_tpu", "sky_gpu"])
def test_a_sky_job_recovers_where_docs_advise_it_and_needs_its_variables(name: str) -> None:
    task = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    # not from 137: SkyPilot gives it to the machines that it stops because one has failed
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [42, 134]}
    needed = {variable for variable, value in task["envs"].items() if value is None}
    assert needed == {"BUCKET", "TRAIN"}
    assert task["file_mounts"]["/runs"]["source"] == "${BUCKET}"


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
