"""Where the numbers of a run go: each sink holds what metrics.jsonl does, also after a resume."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindvalm_jax import compilation, config, sinks, trainer, weights_and_biases
from blindvalm_jax.config import LogConfig
from blindvalm_jax.errors import UserError
from tests import small_models, small_text
from tests.test_guard import small
from tests.test_reporting import full_disk
from tests.test_train import read_metrics

PLACE = "team/toy"
Metrics = Mapping[str, Mapping[int, float]]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """W&B as it is on a machine without a network, an account, or settings of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        home = tmp_path_factory.mktemp("home")
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
            patch.setenv(name, str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        yield patch


@pytest.fixture
def library(offline: pytest.MonkeyPatch) -> Iterator[Any]:
    """W&B's library, which reads its variables anew."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    yield wandb
    wandb.teardown()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    small_text.write_text(path, small_text.documents(60))
    return path


@pytest.fixture(scope="module")
def resumed(
    text: Path, tmp_path_factory: pytest.TempPathFactory, offline: pytest.MonkeyPatch
) -> Path:
    """A run to all sinks that are installed; what it did after step 4 was lost and done again."""
    there = {name for name in ("tensorboardX", "wandb") if importlib.util.find_spec(name)}
    if not there:
        pytest.skip("neither tensorboardX nor wandb is installed")
    asked: dict[str, Any] = {"eval__every_steps": 3, "log__tensorboard": "tensorboardX" in there}
    asked["log__wandb"] = PLACE if "wandb" in there else ""
    workdir = tmp_path_factory.mktemp("runs") / "a run"
    with small_models.quick_compilation():
        for _ in range(2):
            assert trainer.train(small(text, **asked), workdir) == 0
            if (workdir / "checkpoints" / "6").exists():
                shutil.rmtree(workdir / "checkpoints" / "6")
    return workdir


def computed(metrics: Metrics) -> Metrics:
    """Without what a clock says, which differs where steps are done again."""
    return {name: values for name, values in metrics.items() if not name.startswith("perf/")}


def test_tensorboard_holds_each_step_once(resumed: Path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    files = sorted((resumed / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime)
    assert len(files) == 2
    expected = read_metrics(resumed)
    assert sorted(expected["train/loss"]) == [1, 2, 3, 4, 5, 6]
    assert {
        name: {step: np.float32(value) for step, value in values.items()}
        for name, values in expected.items()
    } == shown(files)


def shown(files: list[Path]) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: a start drops what was written of its first step and later ones."""
    from tensorboardX.proto import event_pb2

    found: dict[str, dict[int, float]] = {}
    for file in files:
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.session_log.status == event_pb2.SessionLog.START:
                for values in found.values():
                    for step in [step for step in values if step >= event.step]:
                        del values[step]
            for value in event.summary.value:
                assert event.step not in found.setdefault(value.tag, {}), value.tag
                found[value.tag][event.step] = value.simple_value
    return found


def records(workdir: Path) -> list[list[dict[str, Any]]]:
    """Of each start what W&B's own reader finds in its file."""
    files = sorted(
        (workdir / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime
    )
    read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    told = [
        subprocess.run([*read, file], capture_output=True, text=True, check=True, timeout=60).stdout
        for file in sorted(files, key=lambda path: path.stat().st_mtime)
    ]
    return [[json.loads(line) for line in lines.splitlines()] for lines in told]


def of(kind: str, found: list[dict[str, Any]]) -> list[Any]:
    """What records of a kind hold."""
    return [record[kind] for record in found if record["type"] == kind]


def codes(found: list[dict[str, Any]]) -> list[int]:
    """Exit codes, of which a start has one."""
    return [ended["exit_code"] for ended in of("exit", found)]


def test_a_resumed_run_is_one_at_weights_and_biases(resumed: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    starts = records(resumed)
    known = json.loads((resumed / weights_and_biases.FILE).read_text())
    first, second = ([run] for run in (of("run", start)[0] for start in starts))
    assert len(starts) == 2
    assert [run["run_id"] for run in first + second] == [known["id"]] * 2
    assert {(run["entity"], run["project"], run["resume"]) for run in first + second} == {
        ("team", "toy", True)
    }
    assert first[0]["display_name"] == "a run"
    assert [codes(start) for start in starts] == [[0], [0]]
    settings = json.loads((resumed / "config.json").read_text())
    for start in starts:
        given: dict[str, Any] = {}
        for update in of("config", start):
            given |= update["update"]
        assert given == settings

    found: dict[str, dict[int, float]] = {}
    for start in starts:
        for row in of("history", start):
            step = row["item"]["_step"]
            for name, value in row["item"].items():
                if not name.startswith("_"):
                    assert step not in found.setdefault(name, {}), f"{name} twice at step {step}"
                    found[name][step] = value
    assert computed(found) == computed(read_metrics(resumed))
    assert found.keys() == read_metrics(resumed).keys()


def make(directory: Path) -> Path:
    """The directory of a run that is about to begin."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"seed": 3}))
    return directory


def test_how_a_run_ends_is_told(library: Any, tmp_path: Path) -> None:
    workdir = make(tmp_path / "run")
    for ending in ("preempted", "failed"):
        weights_and_biases.Run(PLACE, workdir, written=0).close(ending)
    preempted, failed = records(workdir)
    assert (len(of("preempting", preempted)), codes(preempted)) == (1, [42])
    assert (len(of("preempting", failed)), codes(failed)) == (0, [1])


def test_a_run_is_its_own_behind_one_that_failed_and_beside_the_users(
    library: Any, tmp_path: Path
) -> None:
    (tmp_path / "bare").mkdir()  # without the settings that a run is told
    with pytest.raises(UserError, match="config.json"):
        weights_and_biases.Run(PLACE, tmp_path / "bare", written=0)
    users = library.init(project="users", mode="offline", dir=str(tmp_path))
    workdir = make(tmp_path / "run")
    weights_and_biases.Run(PLACE, workdir, written=0).close("done")
    users.log({"still": 1})
    users.finish()
    [start] = records(workdir)
    [run] = of("run", start)
    assert run["run_id"] == json.loads((workdir / weights_and_biases.FILE).read_text())["id"]
    assert run["project"] == "toy"


def test_another_project_and_what_wandb_is_told_by_its_variables(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes to another project is a new one there; a name or id of the user's holds."""
    workdir = make(tmp_path / "run")
    monkeypatch.setenv("WANDB_NAME", "mine")
    for place in ("one", "two", "two"):
        weights_and_biases.Run(place, workdir, written=0).close("done")
    library.teardown()
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    weights_and_biases.Run("two", workdir, written=0).close("done")
    runs = [of("run", start)[0] for start in records(workdir)]
    ids = [run["run_id"] for run in runs]
    assert ids[0] != ids[1] == ids[2]
    assert ids[3] == "chosen"
    assert [run["project"] for run in runs] == ["one", "two", "two", "two"]
    assert [run["display_name"] for run in runs[:2]] == ["mine", "mine"]


def test_without_a_network_the_run_is_kept_here(
    library: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing listens at that port."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    workdir, settings = make(tmp_path / "run"), LogConfig(wandb=PLACE)
    sinks.check(settings, workdir)
    every = sinks.Sinks(settings, workdir, resume_step=0)
    every.write(1, {"train/loss": 2.0})
    every.close("done")
    [start] = records(workdir)
    assert [row["item"]["train/loss"] for row in of("history", start)] == [2.0]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1
    assert "Weights & Biases cannot be reached" in said[0]
    assert f"{workdir / 'wandb'}, from where `wandb sync` sends it" in said[0]


def test_a_sink_that_fails_is_left_out_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that is full for TensorBoard."""
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    workdir = make(tmp_path / "run")
    every = sinks.Sinks(LogConfig(tensorboard=True), workdir, resume_step=0)
    every.write(1, {"train/loss": 4.0, "train/grad_norm": 1.0, "train/learning_rate": 1e-3})
    [events] = (workdir / "tensorboard").iterdir()
    with full_disk(events):
        for step in range(2, 4):
            every.write(step, {"train/loss": 3.0})
    every.write(4, {"train/loss": 3.0})
    every.close("done")
    assert sorted(read_metrics(workdir)["train/loss"]) == [1, 2, 3, 4]
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: TensorBoard fails (OSError: ")
    assert said.endswith("metrics.jsonl alone has what comes from step 2 on")


def refused(text: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, **asked: Any) -> str:
    """What is said where a training is refused before anything is compiled."""
    monkeypatch.setattr(compilation, "compile_step", lambda *_: pytest.fail("compiles"))
    with pytest.raises(UserError) as error:
        trainer.train(small(text, **asked), workdir)
    assert not (workdir / "metrics.jsonl").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("module", "extra", "asked"),
    [
        ("tensorboardX.proto", "tensorboard", {"log__tensorboard": True}),
        ("wandb", "wandb", {"log__wandb": PLACE}),
    ],
)
def test_a_missing_library_is_named_before_compilation(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    extra: str,
    asked: dict[str, Any],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    said = refused(text, tmp_path / "run", monkeypatch, **asked)
    assert f"pip install 'blindvalm_jax[{extra}]'" in said


def test_nobody_logged_in_is_said_before_compilation(
    library: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not asked for: a job of a cluster has no keyboard."""
    monkeypatch.setenv("WANDB_MODE", "online")
    said = refused(text, tmp_path / "run", monkeypatch, log__wandb=PLACE)
    assert "nobody is logged in: run `wandb login` or set WANDB_API_KEY" in said
    library.teardown()
    monkeypatch.setenv("WANDB_MODE", "sideways")
    said = refused(text, tmp_path / "run", monkeypatch, log__wandb=PLACE)
    assert "wandb refuses its variables or files" in said


@pytest.mark.parametrize("place", ["a/b/c", "/toy", "toy/", "a b?", " "])
def test_a_place_is_a_project_or_one_of_an_entity(place: str) -> None:
    values = config.default()
    values.log.wandb = place
    with pytest.raises(UserError, match=r"log\.wandb must be PROJECT or ENTITY/PROJECT"):
        config.parse(values)
