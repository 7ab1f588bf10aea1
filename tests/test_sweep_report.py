"""The report on a sweep: what is read from its directory, and the command."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from blindvalm_jax import config
from blindvalm_jax.config import Config
from blindvalm_jax.costs import of_settings
from blindvalm_jax.errors import UserError
from blindvalm_jax.scaling import results
from blindvalm_jax.scaling.results import Result, Score
from blindvalm_jax.sweep import collected, plans, report, worker
from blindvalm_jax.sweep.grids import Planned
from blindvalm_jax.sweep.manifest import Manifest
from blindvalm_jax.toyworld import recipes
from blindvalm_jax.toyworld.world import WorldConfig
from tests import small_models, small_tasks, small_text, test_train

ROOT = Path(__file__).resolve().parents[1]
_CONFIG = """
from pathlib import Path
import ml_collections
from tests import test_sweep_report
def get_config():
    return test_sweep_report.sweep(Path({files!r}))
"""


def sweep(files: Path) -> Any:
    """A run of BLIND-VALM, and one of GPT-2 whose text is not there."""
    import ml_collections

    common = {"train__steps": 4, "checkpoint__every_steps": 4, "eval__every_steps": 4}
    tasks = {"eval__tasks": "memory_colors", "eval__tasks_data": str(files / "tasks")}
    tasks |= {"eval__tasks_protocol": "published", "data__cache": str(files / "cache")}
    given = ml_collections.ConfigDict({"runs": {}})
    for name, text, source in (
        ("good", "text.txt", {}),
        ("bad", "none.txt", {"grounding__source": "none", "grounding__tower": ""}),
    ):
        changes: dict[str, Any] = {**common, **tasks, **source}
        given.runs[name] = test_train.settings(files / text, **changes)
    return given


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sweep/ whose runs have ended, and the files it was trained on."""
    directory = tmp_path_factory.mktemp("sweep_report")
    small_text.write_text(directory / "text.txt", small_text.documents(120))
    small_tasks.write(directory / "tasks")
    runs = {name: plan.settings for name, plan in plans.planned(sweep(directory)).items()}
    Manifest(directory / "sweep").plan(runs)
    with small_models.quick_compilation():
        assert worker.work(directory / "sweep", runs, lease_seconds=60) == 1
    return directory


def lines_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_results_are_what_the_runs_wrote(trained: Path) -> None:
    runs = plans.planned(sweep(trained))
    bad, found = collected.read(trained / "sweep", runs)
    assert [one.family for one in (found, bad)] == ["blind", "gpt2"]
    assert (bad.ended, bad.loss, bad.scores, bad.seconds) == ("failed", None, {}, None)
    assert "none.txt" in bad.unusable
    directory = trained / "sweep" / "runs" / found.name
    lines = lines_of(directory)
    (loss,) = (line["eval/loss"] for line in lines if "eval/loss" in line)
    assert (found.ended, found.loss, found.unusable) == ("done", loss, "")
    seconds = [line["perf/step_seconds"] for line in lines if "perf/step_seconds" in line]
    assert len(seconds) == 4
    assert found.seconds == pytest.approx(4 * 8 * statistics.median(seconds[1:]))
    assert found.tokens == 4 * 8 * 32
    record = json.loads((directory / "run.json").read_text())
    assert found.flops == pytest.approx(record["flops_per_token"]["total"] * found.tokens)
    tasks = json.loads((directory / "eval" / "results.json").read_text())["tasks"]
    score, entry = found.scores["memory_colors"], tasks["memory_colors"]
    assert (score.accuracy, score.chance) == (entry["score"], entry["random"])
    assert score.questions == entry["clusters"] < entry["questions"]
    first, *others = collected.notes(trained / "sweep", [found, bad])
    assert first == "Trained on 8 x cpu."
    commit = record["commit"]
    assert others == ([f"Code of the runs: {commit}."] if commit else [])


def test_the_command_writes_the_report(trained: Path) -> None:
    path = trained / "config.py"
    path.write_text(_CONFIG.format(files=str(trained)))
    command = [sys.executable, "-m", "blindvalm_jax.sweep", "report", f"--config={path}"]
    command += [f"--workdir={trained / 'sweep'}", f"--out={trained / 'out'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "No two families can be compared by their laws" in done.stdout
    assert "left out: bad: failed: " in done.stdout
    assert "left out: blind: a fit needs 6 runs or more, got 1" in done.stdout
    kept = results.from_csv((trained / "out" / "results.csv").read_text())
    assert kept == collected.read(trained / "sweep", plans.planned(sweep(trained)))
    text = (trained / "out" / "report.md").read_text()
    assert "1 of 2 runs are done and used" in text


def planned() -> Planned:
    settings = config.default()
    settings.train.steps = 10
    settings.grounding.source = "none"
    parsed = config.parse(settings)
    return Planned.of(parsed, of_settings.account(parsed), family="gpt2")


def written(
    sweep_: Path,
    metrics: list[dict[str, Any]],
    *,
    name: str = "a",
    settings: Config | None = None,
    **tasks: Any,
) -> Path:
    """A run that is done, as if it had been trained on two devices."""
    directory = sweep_ / "runs" / name
    (directory / "eval").mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in metrics))
    record = {"devices": ["H100", 2], "tokenizer": {"fingerprint": name}, "starts": [{"step": 0}]}
    (directory / "run.json").write_text(json.dumps(record))
    if tasks:
        (directory / "eval" / "results.json").write_text(json.dumps({"tasks": tasks}))
    manifest = Manifest(sweep_)
    manifest.plan({name: settings or planned().settings})
    manifest.add(name, "done")
    return directory


def read(sweep_: Path) -> Result:
    (found,) = collected.read(sweep_, {"a": planned()})
    return found


def test_seconds_are_of_all_updates_and_devices_without_the_start(tmp_path: Path) -> None:
    lines = [{"step": i, "perf/step_seconds": t} for i, t in ((5, 9.0), (6, 1.0), (10, 2.0))]
    written(tmp_path, [*lines, {"step": 5, "eval/loss": 1.0}, {"step": 10, "eval/loss": 3.0}])
    found = read(tmp_path)
    assert (found.seconds, found.loss) == (2.0 * 10 * 2, 3.0)  # one update of 1 s, four of 2 s
    written(tmp_path / "b", [{"step": 10, "perf/step_seconds": 9.0, "eval/loss": 1.0}])
    assert read(tmp_path / "b").seconds is None
    written(tmp_path / "c", [{"step": 5, "perf/step_seconds": 9.0, "eval/loss": 1.0}])
    assert read(tmp_path / "c").unusable == "done, and has no held-out loss of its last update"


def test_seconds_are_of_the_devices_that_updates_were_made_on(tmp_path: Path) -> None:
    """A run went on at step 6 on more of another kind; the line behind that is its start's."""
    seconds = [(2, 9.0), (4, 5.0), (6, 5.0), (8, 8.0), (10, 2.0)]
    timed = [{"step": i, "perf/step_seconds": t} for i, t in seconds]
    directory = written(tmp_path, [*timed, {"step": 10, "eval/loss": 3.0}])
    starts = [{"step": 0, "devices": ["cpu", 1]}, {"step": 6, "devices": ["H100", 4]}]
    record = {"devices": ["H100", 4], "tokenizer": {"fingerprint": ""}, "starts": starts}
    (directory / "run.json").write_text(json.dumps(record))
    found = read(tmp_path)
    assert (found.seconds, found.device) == (2.0 * 10 * 4, "H100")
    record["starts"] = [*starts, {"step": 8, "devices": ["TPU v4", 4]}]
    record["devices"] = ["TPU v4", 4]
    (directory / "run.json").write_text(json.dumps(record))
    found = read(tmp_path)
    assert (found.seconds, found.device) == (None, "")
    assert collected.notes(tmp_path, [found])[0] == "Trained on 4 x H100, 4 x TPU v4, 1 x cpu."
    del starts[0]["devices"]  # begun before starts had them
    record |= {"starts": starts, "devices": ["H100", 4]}
    (directory / "run.json").write_text(json.dumps(record))
    assert read(tmp_path).seconds == 2.0 * 10 * 4


def test_what_is_computed_in_other_ways_is_timed_apart(tmp_path: Path) -> None:
    for name, remat, seconds in (("a", "none", 2.0), ("b", "full", 3.0)):
        timed = [{"step": i, "perf/step_seconds": seconds} for i in (5, 10)]
        directory = written(tmp_path, [*timed, {"step": 10, "eval/loss": 3.0}], name=name)
        start = {"step": 0, "devices": ["H100", 2], "computed": {"remat": remat}}
        record = {"devices": ["H100", 2], "tokenizer": {"fingerprint": ""}, "starts": [start]}
        (directory / "run.json").write_text(json.dumps(record))
    found = collected.read(tmp_path, {"a": planned(), "b": planned()})
    assert [run.seconds for run in found] == [2.0 * 10 * 2, 3.0 * 10 * 2]
    said = (
        'Computed in different ways, which are timed apart: {"remat": "full"}; {"remat": "none"}.'
    )
    assert said in collected.notes(tmp_path, found)


def test_what_was_trained_with_other_settings_is_no_result(tmp_path: Path) -> None:
    """Of N, tokens and FLOPs the config tells, of losses the directory."""
    written(tmp_path, [{"step": 10, "eval/loss": 3.0}])
    one = planned()
    decoder = dataclasses.replace(one.settings.decoder, layers=3)
    other = dataclasses.replace(one, settings=dataclasses.replace(one.settings, decoder=decoder))
    with pytest.raises(UserError, match=r"run a with other settings: decoder\.layers: 12 -> 3"):
        collected.read(tmp_path, {"a": other})
    data = dataclasses.replace(one.settings.data, files="moved.txt")
    moved = dataclasses.replace(one, settings=dataclasses.replace(one.settings, data=data))
    (found,) = collected.read(tmp_path, {"a": moved})
    assert found.loss == 3.0
    Manifest(tmp_path).plan({"b": one.settings})
    said = collected.notes(tmp_path, [found])
    assert "In the directory and not in this config: b." in said


def test_runs_of_one_size_are_timed_together(tmp_path: Path) -> None:
    """A short branch has few updates of its own, or its start alone."""
    timed = [{"step": i, "perf/step_seconds": t} for i, t in ((2, 9.0), (9, 2.0), (10, 7.0))]
    written(tmp_path, [*timed, {"step": 10, "eval/loss": 3.0}])
    one = planned()
    longer = dataclasses.replace(one.settings.train, steps=20)
    settings = dataclasses.replace(one.settings, train=longer)
    start = {"step": 10, "perf/step_seconds": 9.0, "eval/loss": 1.0}
    written(tmp_path, [start], name="b", settings=settings)
    other = Planned.of(settings, one.account, family=one.family)
    found = collected.read(tmp_path, {"a": one, "b": other})
    assert [x.seconds for x in found] == [2.0 * 10 * 2, 2.0 * 20 * 2]
    blind = Planned.of(settings, one.account, family="blind")
    assert collected.read(tmp_path, {"a": one, "b": blind})[1].seconds is None


def test_scores_are_accuracies_of_the_last_update(tmp_path: Path) -> None:
    last = {"step": 10, "eval/loss": 3.0, "eval/tasks/colors": 0.5, "eval/tasks/text": 40.0}
    lines = [{"step": 5, "eval/tasks/colors": 0.9}, last]
    colors = {"metric": "accuracy", "n": 40, "clusters": 30, "random": 0.25}
    text = {"metric": "perplexity", "n": 7, "random": None}
    directory = written(tmp_path, lines, colors=colors, text=text)
    assert read(tmp_path).scores == {"colors": Score(0.5, 30, 0.25)}
    (directory / "eval" / "results.json").write_text(json.dumps({"tasks": {"text": text}}))
    with pytest.raises(UserError, match=r"results\.json lacks colors, which metrics\.jsonl has"):
        read(tmp_path)
    for broken in ({}, {"tasks": [1]}, {"tasks": {"colors": {"n": 40}, "text": text}}):
        (directory / "eval" / "results.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"results\.json and metrics\.jsonl do not tell them"):
            read(tmp_path)
    (directory / "eval" / "results.json").unlink()
    with pytest.raises(UserError, match="is missing: it says how many questions"):
        read(tmp_path)


def test_readers_are_told_what_is_not_alike(tmp_path: Path) -> None:
    lines = [{"step": step, "perf/step_seconds": 1.0, "eval/loss": 3.0} for step in (5, 10)]
    other = written(tmp_path, lines, name="b")
    written(tmp_path, lines)
    found = collected.read(tmp_path, {"a": planned(), "b": planned()})
    assert {run.device for run in found} == {"H100"}
    said = collected.notes(tmp_path, found)
    assert said == [
        "Trained on 2 x H100.",
        "Runs have different tokenizers: their losses a token cannot be compared.",
    ]
    record = {"devices": ["A100", 2], "tokenizer": {"fingerprint": "a"}, "starts": [{"step": 0}]}
    (other / "run.json").write_text(json.dumps(record))
    said = collected.notes(tmp_path, found)
    assert said[0] == "Trained on 2 x A100, 2 x H100."
    found = collected.read(tmp_path, {"a": planned(), "b": planned()})
    assert [run.device for run in found] == ["H100", "A100"]
    (other / "run.json").write_text("{}")
    with pytest.raises(UserError, match="lacks starts, devices, tokenizer or"):
        collected.notes(tmp_path, found)


def test_a_clip_stands_in_no_law(tmp_path: Path) -> None:
    """Its loss is that of pairs."""
    parsed = config.parse(recipes.clip(WorldConfig()))
    steps = parsed.train.steps
    written(tmp_path, [{"step": steps, "eval/loss": 3.0}], settings=parsed)
    values = ConfigDict({"runs": {"a": recipes.clip(WorldConfig())}})
    (found,) = collected.read(tmp_path, plans.planned(values))
    assert (found.family, found.loss) == ("clip", None)
    assert "done, and has no held-out loss of its last update: it trains a CLIP" in found.unusable
    assert found.n == of_settings.account(parsed).parameters


def test_runs_that_cost_something_else_than_was_planned_are_told_of(tmp_path: Path) -> None:
    """As where a tokenizer has other entries than its kind has."""
    plan = planned()
    counted = plan.account.of_devices
    for name, recorded in (("a", counted), ("b", 2 * counted)):
        directory = written(tmp_path, [{"step": 10, "eval/loss": 3.0}], name=name)
        record = json.loads((directory / "run.json").read_text())
        record["flops_per_token"] = {"total": recorded}
        (directory / "run.json").write_text(json.dumps(record))
    runs = {"a": plan, "b": plan}
    found = collected.read(tmp_path, runs)
    (said,) = collected.costs_otherwise(tmp_path, runs, found)
    assert f"b {2 * counted:.4g} and not {counted:.4g}: they were trained with another" in said
    assert not collected.costs_otherwise(tmp_path, runs, found[:1])


def test_a_run_nobody_began_and_a_directory_without_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no sweep"):
        collected.read(tmp_path, {})
    Manifest(tmp_path).plan({"a": planned().settings})
    assert read(tmp_path).unusable == "unfinished"


def test_a_branch_of_a_branch_stands_with_its_root() -> None:
    runs = {}
    for name, trunk in (("a", ""), ("b", "run:a@5"), ("c", "run:b@7"), ("d", "run:gone@5")):
        settings = config.default()
        settings.grounding.source, settings.train.branch_from = "none", trunk
        parsed = config.parse(settings)
        runs[name] = Planned.of(parsed, of_settings.account(parsed), family="gpt2")
    assert [collected._root(name, runs) for name in runs] == ["", "a", "a", "gone"]


def test_what_is_done_once_is_told_for_each_family() -> None:
    settings = config.default()
    settings.grounding.source = "images"
    settings.grounding.index, settings.grounding.random.projection = "vectors:1000", 768
    parsed = config.parse(settings)
    account = of_settings.account(parsed)
    plans = {name: Planned.of(parsed, account, family=name) for name in ("valm", "valm_eos")}
    (once,) = report.once(plans)
    assert once.what == "images encoded with vit_l14"
    assert once.families == ("valm", "valm_eos")
    assert once.flops is not None
    assert once.flops > 1e14
    assert once.share == pytest.approx(once.flops / plans["valm"].budget)
