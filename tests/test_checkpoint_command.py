"""`python -m blindvalm_jax.checkpoint`: what it shows, finds, compares and averages."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blindvalm_jax import config, files, runs
from blindvalm_jax.checkpoints import (
    arrays,
    averaging,
    differences,
    layout,
    listing,
    named,
    quarantine,
    verifying,
)
from blindvalm_jax.checkpoints.manager import Checkpoints
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import run_directory, saving, weights
from blindvalm_jax.models.contrastive import ClipConfig
from blindvalm_jax.models.vision import VisionConfig
from blindvalm_jax.step import TrainState
from blindvalm_jax.trees import flatten, unflatten
from tests import small_models

CLIP = ClipConfig(
    text=small_models.TOWER,
    vision=VisionConfig(kind="conv", image_size=8, width=16, projection=24, channels=(4,)),
    temperature_start=10.0,
    temperature_cap=100.0,
)
ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = {"kind": "gpt2", "fingerprint": "f" * 64, "vocab_size": 90, "eos_id": 3}
SETTINGS = config.default()
SETTINGS.data.files = "text.txt"
SETTINGS.grounding.source = "none"
SETTINGS.decoder.layers, SETTINGS.decoder.width, SETTINGS.decoder.heads = 2, 16, 2
SETTINGS.decoder.vocab_multiple = 32
SETTINGS.checkpoint.keep_best = 1
SETTINGS.eval.every_steps = 1


def settings(**changes: Any) -> config.Config:
    values = SETTINGS.copy_and_resolve_references()
    values.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    resolved = config.parse(values)
    if resolved.train.objective == "contrastive":
        return resolved
    return config.resolve(resolved, vocab_size=90, mesh={"data": 1, "fsdp": 1, "tensor": 1})


def write_run(
    run: Path, parsed: config.Config, *, steps: tuple[int, ...] = (1, 2), about: Any = None
) -> Path:
    """A run's directory as training leaves it, with random parameters that tell steps apart."""
    run.mkdir()
    record = {
        "tokenizer": TOKENIZER,
        "data": {"directory": str(run / "windows")},
        "starts": [{"step": 0}],
        **(about or {}),
    }
    files.write_json(run / "run.json", record)
    files.write_json(run / "config.json", json.loads(json.dumps(dataclasses.asdict(parsed))))
    spec = run_directory.spec_of(parsed, files.read_object(run / "run.json"), run / "run.json")
    with Checkpoints(run, parsed.checkpoint) as checkpoints:
        for step in steps:
            state = state_of(spec, step)
            checkpoints.save(state, step=step, config=parsed, loss=1.0 + step)
        checkpoints.finish()
    return run


def state_of(spec: weights.Spec, step: int) -> TrainState:
    rng = np.random.default_rng(step)
    shapes = weights.abstract_params(spec)
    params = unflatten(
        {name: jnp.asarray(rng.standard_normal(x.shape), x.dtype) for name, x in shapes.items()}
    )
    return TrainState(jnp.asarray(step, jnp.int32), params, optax.sgd(0.1, 0.9).init(params))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("made") / "run", settings(), steps=(1, 2, 3, 4))


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def damage(run: Path, step: int) -> None:
    """Gives a checkpoint the arrays of another one, in order by themselves."""
    state = layout.directory(run) / str(step) / "state"
    shutil.rmtree(state)
    shutil.copytree(layout.directory(run) / "2" / "state", state)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "blindvalm_jax.checkpoint", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_listing_says_why_each_is_kept(run: Path) -> None:
    quarantine.move(run, 3, "a reason")
    shutil.rmtree(layout.directory(run) / "2" / "digests")
    (layout.directory(run) / "5.orbax-checkpoint-tmp").mkdir()
    rows = listing.rows(run)
    assert [(row.step, row.loss, row.kept) for row in rows] == [
        (1, 2.0, ["newest", "best"]),
        (2, 3.0, ["newest"]),
        (4, 5.0, ["newest"]),
    ]
    assert all(row.saved.startswith("20") and row.size > 1000 for row in rows)
    text = listing.table(run)
    assert "yes     2.0000  newest, best" in text
    assert "BAD: its digests is missing" in text
    assert "in quarantine: 3: " in text
    assert text.endswith("a reason\nnever finished: 5.orbax-checkpoint-tmp")


def test_sound_checkpoints_are_verified(run: Path) -> None:
    found = verifying.verify(layout.directory(run) / "4")
    count = len(flatten(run_directory.load(run).params))
    assert found == verifying.Verdict([], 2 * count + 1, compared=True)


def test_every_bad_array_is_named(run: Path) -> None:
    damage(run, 4)
    found = verifying.verify(layout.directory(run) / "4")
    params = flatten(run_directory.load(run, step=1).params)
    for name in params:
        assert sum(text.startswith(f"params/{name} was saved as float32[") for text in found.bad)
    assert any(text.startswith("step ") for text in found.bad)
    assert len(found.bad) == len(params) + 1  # the moments are all zero
    with pytest.raises(UserError, match=r"checkpoints/4 is damaged: .* and \d+ more; .* verify "):
        run_directory.load(run)
    run_directory.load(run, step=3)


def test_arrays_that_cannot_be_read_are_named(run: Path) -> None:
    chunk = max((layout.directory(run) / "4").rglob("d/*"), key=lambda path: path.stat().st_size)
    chunk.write_bytes(chunk.read_bytes()[:100])
    found = verifying.verify(layout.directory(run) / "4")
    assert any(text.startswith("params/") and "cannot be read: " in text for text in found.bad)


def test_a_checkpoint_without_digests_is_read_and_said(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = layout.directory(run) / "4"
    shutil.rmtree(checkpoint / "digests")
    metadata = files.read_object(checkpoint / "_CHECKPOINT_METADATA")
    del metadata["item_handlers"]["digests"]
    files.write_json(checkpoint / "_CHECKPOINT_METADATA", metadata)
    assert not verifying.verify(checkpoint).compared
    run_directory.load(run)
    assert "4 is older than digests" in capsys.readouterr().err


def test_differences_are_measured(run: Path, tmp_path: Path) -> None:
    first, second = layout.directory(run) / "1", layout.directory(run) / "2"
    nothing = differences.compare(first, first)
    assert (nothing.settings, nothing.leaves, nothing.others, nothing.only) == (
        {},
        [],
        {},
        [[], []],
    )
    found = differences.compare(first, second)
    a, b = (flatten(run_directory.load(run, step=step).params) for step in (1, 2))
    by_name = {leaf.name: leaf for leaf in found.leaves}
    assert by_name.keys() == {"step", *(f"params/{name}" for name in a)}
    for name in a:
        leaf, apart = by_name[f"params/{name}"], np.abs(a[name].astype(np.float64) - b[name])
        assert (leaf.entries, leaf.of, leaf.not_finite) == (apart.size, apart.size, 0)
        assert leaf.largest == apart.max()
        size = np.maximum(np.abs(a[name]), np.abs(b[name])).astype(np.float64)
        assert leaf.relative == pytest.approx((apart / size).max(), rel=1e-6)
    assert found.equal == len(a)  # the moments
    other = write_run(
        tmp_path / "other",
        settings(decoder__mlp_width=24, optimizer__learning_rate=0.5),
        steps=(1,),
    )
    found = differences.compare(first, layout.directory(other) / "1")
    assert found.settings == {
        "decoder.mlp_width": [64, 24],
        "optimizer.learning_rate": [0.002, 0.5],
    }
    assert found.others["params/h/blocks_0_1/c_fc/kernel"] == [
        "float32[2, 16, 64]",
        "float32[2, 16, 24]",
    ]
    text = differences.report(found, "A", "B")
    assert "setting optimizer.learning_rate: 0.002 -> 0.5" in text


def test_values_that_are_not_finite_are_counted() -> None:
    a = np.asarray([1.0, np.nan, np.inf, np.nan, 0.0], np.float32)
    b = np.asarray([1.0, np.nan, 2.0, 1.0, 0.5], np.float32)
    leaf = differences.leaf("x", a, b)
    assert leaf == differences.Leaf(
        name="x", entries=3, of=5, largest=0.5, relative=1.0, not_finite=2
    )
    assert differences.leaf("x", a, a) is None


def test_the_average_is_the_mean_and_can_be_read(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", settings(seed=7), steps=(9,))
    names = [f"{run}@1", str(run), f"{other}@9"]
    model = averaging.average([named.checkpoint(name) for name in names])
    saving.write(tmp_path / "soup", model)
    found = weights.load(tmp_path / "soup", kind="decoder")
    parts = [run_directory.load(path, step=step) for path, step in ((run, 1), (run, 4), (other, 9))]
    for name, value in flatten(found.params).items():
        expected = np.mean([flatten(x.params)[name] for x in parts], axis=0, dtype=np.float64)
        np.testing.assert_array_equal(value, expected.astype(np.float32))
    assert found.source == f"mean of {run}@1, {run}@4, {other}@9"
    assert found.decoder == parts[0].config
    assert found.tokenizer == {"kind": "gpt2", "fingerprint": "f" * 64}


def test_a_contrastive_run_is_averaged_and_compared(tmp_path: Path) -> None:
    shape = CLIP
    parsed = settings(
        train__objective="contrastive",
        data__files="",
        data__images="photos",
        grounding__source="text",
    )
    run = write_run(tmp_path / "clip", parsed, about={"clip": dataclasses.asdict(shape)})
    model = averaging.average([named.checkpoint(f"{run}@1"), named.checkpoint(f"{run}@2")])
    saving.write(tmp_path / "soup", model)
    assert weights.load(tmp_path / "soup", kind="clip").config == shape
    assert not verifying.verify(layout.directory(run) / "2").bad


@pytest.mark.parametrize(
    ("changes", "about", "message"),
    [
        ({"decoder__mlp_width": 24}, {}, r"decoder\.mlp_width is 64 and 24$"),
        ({}, {"tokenizer": {**TOKENIZER, "fingerprint": "e"}}, "tokenizer is 'f+' and 'e'$"),
        ({}, {"tower": {"sha256": "0"}}, "sha256 of the tower is None and '0'$"),
    ],
)
def test_models_that_are_not_the_same_are_not_averaged(
    made: Path, tmp_path: Path, changes: dict[str, Any], about: dict[str, Any], message: str
) -> None:
    other = write_run(tmp_path / "other", settings(**changes), steps=(1,), about=about)
    with pytest.raises(UserError, match=f"are not of the same model: .*{message}"):
        averaging.average([named.checkpoint(str(made)), named.checkpoint(str(other))])


@pytest.mark.parametrize("names", [["{}"], ["{}", "{}@4"]])
def test_an_average_of_one_is_refused(made: Path, names: list[str]) -> None:
    with pytest.raises(UserError, match="two or more different checkpoints"):
        averaging.average([named.checkpoint(name.format(made)) for name in names])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}@7", r"has no checkpoint of step 7: it has \[1, 2, 3, 4\]"),
        ("{}/nothing", "is no run's directory"),
        ("{}/nothing@3", "is no run's directory"),
    ],
)
def test_names_of_no_checkpoint_are_refused(made: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        named.checkpoint(name.format(made))


def test_nothing_is_moved_while_the_run_is_held(run: Path) -> None:
    damage(run, 4)
    with files.held(run / runs.LOCK):
        assert command("verify", run, "--step=4").returncode == 1
        found = command("verify", run, "--step=4", "--quarantine")
    assert (found.returncode, found.stdout) == (1, "")
    assert re.fullmatch(rf"error: {run} is in use by process {os.getpid()} .*\n", found.stderr)
    assert layout.steps(run) == [1, 2, 3, 4]


@pytest.mark.parametrize("part", [layout.fault, layout.read_digests, arrays.shapes])
def test_a_checkpoint_that_is_deleted_meanwhile_is_said(
    run: Path, part: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any part of it is read."""

    def deleted(path: Path) -> Any:
        if path.name == "2":
            shutil.rmtree(path)
        return part(path)

    monkeypatch.setattr(sys.modules[part.__module__], part.__name__, deleted)
    assert verifying.verify_each(run, [1, 2, 4]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "step 2: it was deleted meanwhile"
    assert [line.partition(",")[0] for line in said[::2]] == ["step 1: sound", "step 4: sound"]


def test_a_bad_newest_checkpoint_is_set_aside_by_hand(run: Path) -> None:
    damage(run, 4)
    found = command("verify", run, "--step=4", "--quarantine")
    assert found.returncode == 1
    lines = found.stdout.splitlines()
    assert lines[0] == "step 4: BAD"
    assert lines[-1] == f"step 4: it is now {run}/quarantine/4"
    assert layout.steps(run) == [1, 2, 3]
    again = command("verify", run)
    assert again.returncode == 0
    assert [line.split(", ")[0] for line in again.stdout.splitlines()] == [
        f"step {step}: sound" for step in (1, 2, 3)
    ]


def test_the_last_checkpoint_is_never_set_aside(run: Path) -> None:
    for step in (1, 2, 3, 4):
        shutil.rmtree(layout.directory(run) / str(step) / "config")
    found = command("verify", run, "--quarantine")
    assert found.returncode == 1
    assert found.stderr == f"error: no other checkpoint of {run} is left: nothing was moved\n"
    assert layout.steps(run) == [1, 2, 3, 4]


def test_the_command_compares_and_averages(run: Path, tmp_path: Path) -> None:
    found = command("diff", f"{run}@1", run, f"--json={tmp_path}/found.json")
    assert found.returncode == 0, found.stderr
    content = files.read_object(tmp_path / "found.json")
    assert content["checkpoints"] == [f"{run}@1", f"{run}@4"]
    counts = f"{len(content['leaves'])} arrays differ, {content['equal']} arrays are equal"
    assert found.stdout.splitlines()[-1] == f"0 settings and {counts}"
    made = command("average", f"{run}@1", f"{run}@2", f"--out={tmp_path}/soup")
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith(f"{tmp_path}/soup: mean of {run}@1, {run}@2; sha256 ")
    again = command("average", f"{run}@1", f"{run}@2", f"--out={tmp_path}/soup")
    assert again.returncode == 1
    assert "holds a model already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what to do first: ls, verify, diff, average; got none"),
        (["ls"], "ls needs one RUN, got none"),
        (["diff", "a", "b", "c"], "diff needs two of RUN[@STEP], got a b c"),
        (["ls", "a", "--out=b"], "--out is not for ls"),
        (["average", "a", "b"], "average needs --out"),
    ],
)
def test_a_wrong_command_is_one_line(arguments: list[str], message: str) -> None:
    found = command(*arguments)
    assert found.returncode == 1
    assert found.stderr.startswith(f"error: {message}")
    assert found.stderr.count("\n") == 1
