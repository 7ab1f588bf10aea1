"""What a run tells of itself besides its losses: events, lost time, norms of layers, a trace."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blindvalm_jax import config, events, files, lifetime, loop, metrics, reporter, trainer, trees
from blindvalm_jax.errors import UserError
from blindvalm_jax.goodput import Goodput
from blindvalm_jax.layer_norms import layer_norms
from blindvalm_jax.profiling import Profile
from blindvalm_jax.sinks import MetricsFile
from tests import small_models, small_text
from tests.test_guard import small
from tests.test_train import read_metrics


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that may be asked for."""
    directory = tmp_path_factory.mktemp("reported")
    small_text.write_text(directory / "text.txt", small_text.documents(60))
    asked: dict[str, Any] = {"log__layer_norms": True, "log__profile_steps": (3, 4)}
    asked |= {"eval__every_steps": 3, "log__every_steps": 2, "log__peak_tflops": 0.25}
    shape: dict[str, Any] = {"decoder__layers": 3, "train__steps": 8}
    values = small(directory / "text.txt", **shape, **asked)
    assert trainer.train(values, directory / "run") == 0
    return directory / "run"


def test_events_stay_also_those_of_updates_that_are_done_again(tmp_path: Path) -> None:
    events.record(tmp_path, "start", step=0)
    events.record(tmp_path, "skipped", step=7, loss=float("nan"), reason="not finite")
    with (tmp_path / events.FILE).open("a") as file:
        file.write('{"time": "2026-01-01T00:00')  # killed while it wrote
    events.record(tmp_path, "resume", step=4)
    found = events.read(tmp_path)
    assert [(e["event"], e["step"]) for e in found] == [("start", 0), ("skipped", 7), ("resume", 4)]
    assert found[1]["loss"] is None
    assert time.strptime(found[0]["time"], "%Y-%m-%dT%H:%M:%S%z")
    for line in (tmp_path / events.FILE).read_text().splitlines()[:2]:
        json.loads(line, parse_constant=pytest.fail)


def test_events_that_cannot_be_written_end_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / events.FILE).mkdir()
    events.record(tmp_path, "saved", step=3)
    assert f"note: {tmp_path / events.FILE} cannot be written" in capsys.readouterr().out


def test_time_is_updates_or_lost_to_something() -> None:
    begin = time.perf_counter()
    goodput = Goodput()
    with goodput.lost_to("compile"):
        before_compile = time.perf_counter()
        while time.perf_counter() - before_compile < 0.02:
            pass
    goodput.loop_begins()
    with pytest.raises(UserError), goodput.lost_to("checkpoint"):
        raise UserError("no room")
    goodput.waited(0.001)
    found = goodput.metrics()
    total = time.perf_counter() - begin
    lost = {name: x for name, x in found.items() if name != "perf/goodput"}
    assert lost["perf/lost_compile_seconds"] >= 0.02
    assert lost["perf/lost_data_seconds"] == 0.001
    assert 0 <= lost["perf/lost_start_seconds"] < total - 0.02
    assert lost["perf/lost_checkpoint_seconds"] > 0
    # all of the time, but for the last instructions of the measurement itself
    assert found["perf/goodput"] * total + sum(lost.values()) == pytest.approx(total, abs=0.01)


def test_a_run_says_what_time_it_lost(reported: Path) -> None:
    metrics = read_metrics(reported)
    for name in ("start", "compile", "data", "evaluation", "checkpoint", "profile"):
        seconds = metrics[f"perf/lost_{name}_seconds"]
        assert seconds[8] > 0, name
        assert seconds[2] <= seconds[8], name
    assert metrics["perf/lost_tasks_seconds"][8] == 0
    assert metrics["perf/lost_evaluation_seconds"][2] == 0  # the first is at step 3
    assert 0 < metrics["perf/goodput"][8] < 1


def test_speeds_of_a_run_are_those_of_its_seconds(reported: Path) -> None:
    found = read_metrics(reported)
    settings = json.loads((reported / "config.json").read_text())
    tokens = settings["train"]["batch_size"] * settings["data"]["sequence_length"]
    cost = json.loads((reported / "run.json").read_text())["flops_per_token"]["total"]
    timed = found["perf/step_seconds"]
    assert sorted(timed) == [2, 6, 8]  # between 2 and 4 steps were traced
    for step, seconds in timed.items():
        rate = tokens / seconds
        assert found["perf/tokens_per_second"][step] == pytest.approx(rate)
        assert found["perf/tokens_per_second_per_device"][step] == pytest.approx(rate / 8)
        assert found["perf/mfu"][step] == pytest.approx(rate / 8 * cost / 0.25e12)


def test_memory_of_a_run_is_the_most_its_process_has_used(reported: Path) -> None:
    found = read_metrics(reported)["perf/peak_memory_mib"]
    peaks = [found[step] for step in sorted(found)]
    assert peaks == sorted(peaks)
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("/proc/self/status is Linux's")
    high = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
    assert 64 < peaks[0] <= peaks[-1] <= reporter.peak_memory_mib()
    assert reporter.peak_memory_mib() == pytest.approx(int(high.split()[1]) / 1024, rel=0.1)


def test_time_lost_to_restarts_is_that_since_the_checkpoint(tmp_path: Path) -> None:
    """A start at 0:00:00 saves step 5 between two lines and is killed; the next begins at 0:02."""
    starts: list[dict[str, Any]] = [{"began": "2026-01-01T00:00:00.000+00:00"}]
    files.write_json(tmp_path / "run.json", {"starts": starts})
    assert lifetime.before(tmp_path, step=0) == lifetime.Before(0, 0, 0)
    starts.append({"began": "2026-01-01T01:02:00.000+01:00"})
    files.write_json(tmp_path / "run.json", {"starts": starts})
    # killed before its first line: all is lost
    assert lifetime.before(tmp_path, step=0) == lifetime.Before(120, 0, 120)
    goodput = {"perf/run_goodput": 0.5, "perf/lost_restart_seconds": 10.0}
    lines = [
        {"step": 4, "perf/step_seconds": 3.0, "perf/run_seconds": 60.0, **goodput},
        {"step": 4, "eval/loss": 1.0},
        {"step": 8, "perf/step_seconds": 2.0, "perf/run_seconds": 70.0, **goodput},
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    # 60 s until step 4, of which 30 are updates, and 2 s of step 5; then 58 s that are lost
    assert lifetime.before(tmp_path, step=5) == lifetime.Before(120, 32, 68)
    # stopped at step 5: there is no later line
    (tmp_path / "metrics.jsonl").write_text("".join(text.splitlines(keepends=True)[:2]))
    assert lifetime.before(tmp_path, step=5) == lifetime.Before(120, 33, 67)
    # by a clock that is behind nothing is gained
    starts[1] = {"began": "2026-01-01T00:00:30.000+00:00"}
    files.write_json(tmp_path / "run.json", {"starts": starts})
    assert lifetime.before(tmp_path, step=5) == lifetime.Before(60, 30, 10)
    files.write_json(tmp_path / "run.json", {"starts": [{"time": "2026-01-01"}, starts[0]]})
    assert lifetime.before(tmp_path, step=5) is None


def test_a_run_that_was_started_again_says_what_that_lost(
    reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended before its first checkpoint, then behind its last: no start is forgotten."""
    run, text = tmp_path / "run", reported.parent / "text.txt"
    values = small(text, train__steps=4, checkpoint__every_steps=2, eval__every_steps=0)

    def ends(*args: Any, **more: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "run", ends)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(values, run)
    assert trainer.train(values, run) == 0
    first = read_metrics(run)
    shutil.rmtree(run / "checkpoints" / "4")
    assert trainer.train(values, run) == 0
    again = read_metrics(run)
    assert [start["step"] for start in files.read_object(run / "run.json")["starts"]] == [0, 0, 2]
    for found in (first, again):
        lost, seconds = found["perf/lost_restart_seconds"], found["perf/run_seconds"]
        assert 0 < lost[4] < seconds[4]
        assert found["perf/run_goodput"][4] < found["perf/goodput"][4]
    lost = again["perf/lost_restart_seconds"]
    assert lost[2] == first["perf/lost_restart_seconds"][2]
    # steps 3 and 4 of the second start are done again
    seconds = first["perf/run_seconds"]
    assert lost[4] > first["perf/lost_restart_seconds"][4] + seconds[4] - seconds[2]
    whole = read_metrics(reported)
    assert whole["perf/lost_restart_seconds"][8] == 0
    assert whole["perf/run_goodput"][8] == pytest.approx(whole["perf/goodput"][8], abs=1e-3)


def test_traced_steps_are_left_out_of_the_timings(reported: Path) -> None:
    """Steps 3 and 4 are traced: the line of step 4 has no speed; all others have."""
    assert sorted(read_metrics(reported)["perf/step_seconds"]) == [2, 6, 8]
    assert sorted(read_metrics(reported)["train/loss"]) == [2, 4, 6, 8]
    assert list((reported / "profile").rglob("*.xplane.pb"))


def test_a_trace_that_cannot_be_written_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither written nor, while JAX still holds what could not be written, begun."""
    place = tmp_path / "profile"
    place.write_text("no directory")
    profile = Profile(place, (3, 9))
    for step in (3, 4):
        profile.before(step)
    jnp.ones(3).sum().block_until_ready()
    try:
        profile.close()
        for later in (profile, Profile(place, (5, 9))):
            later.before(5)
            assert not later.ends_at(9)
            later.close()
    finally:
        place.unlink()
        jax.profiler.stop_trace()
    said = capsys.readouterr()
    line, begun = said.err.splitlines()
    assert begun.endswith("no profile from step 5 on")
    assert line.startswith(f"warning: {place} cannot be written (FAILED_PRECONDITION")
    assert line.endswith("no profile of steps 3 to 4, and what stands there of it is not whole")
    assert said.out == ""


def test_a_run_has_norms_of_each_of_its_layers(reported: Path) -> None:
    metrics = read_metrics(reported)
    layers = {
        name.removeprefix("layers/").rpartition("/")[0] for name in metrics if "layers/" in name
    }
    assert layers == {"h/0", "h/1", "h/2", "ln_f", "wte"}
    for kind in ("grad", "update", "param"):
        for step in (2, 8):
            parts = [metrics[f"layers/{name}/{kind}_norm"][step] for name in layers]
            whole = metrics[f"train/{kind}_norm"][step]
            assert whole == pytest.approx(np.sqrt(np.square(parts).sum()), rel=1e-5)


def test_norms_tell_stacked_layers_apart_and_find_fusion_layers() -> None:
    params = small_models.decoder_params(small_models.blind_model().decoder)
    both = {"text": {"h": params["h"]}, "logit_scale": jnp.ones(())}
    found = jax.jit(lambda tree: layer_norms("param", tree))(both)
    assert set(found) == {
        f"layers/{name}/param_norm" for name in ("text/h/0", "text/h/1", "text/h/2", "logit_scale")
    }
    for name, branch in (("0", "blocks_0_0"), ("1", "fusion_1"), ("2", "blocks_2_2")):
        expected = optax.tree.norm(params["h"][branch])
        assert float(found[f"layers/text/h/{name}/param_norm"]) == pytest.approx(float(expected))
    plain = small_models.decoder_params(small_models.decoder())
    stack = trees.flatten(plain["h"]["blocks_0_2"])
    found = layer_norms("grad", plain)
    expected = np.sqrt(sum(np.square(x[1]).sum() for x in stack.values()))
    assert float(found["layers/h/1/grad_norm"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("steps", [(3,), (4, 3), (0, 2), (1.5, 2), (1, 2, 3)])
def test_steps_to_trace_are_a_first_and_a_last(steps: tuple[Any, ...]) -> None:
    values = config.default()
    values.log.profile_steps = steps
    with pytest.raises(UserError, match=r"log\.profile_steps must be a first and a last step"):
        config.parse(values)


def test_a_full_disk_leaves_lines_out_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed goes to no file here: the limit is on all of them."""
    writer = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    writer.write(1, {"train/loss": 4.0})
    with full_disk(tmp_path / "metrics.jsonl"):
        for step in (2, 3):
            writer.write(step, {"train/loss": 3.0})
    writer.write(4, {"train/loss": 2.0})
    writer.close()
    lines = metrics.records(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 4.0), (4, 2.0)]
    said = capsys.readouterr().err
    assert said.count("warning: metrics.jsonl cannot be written") == 1
    assert "lacks lines from step 2 on" in said


@contextlib.contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """The file may have half a line more, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
