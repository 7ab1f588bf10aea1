"""The directory of a run: whose it is, what is written there, what a resumed run reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blindvalm_jax import files, runs, sinks, system
from blindvalm_jax.config import Config, GroundingConfig, LogConfig
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import weights
from blindvalm_jax.sinks import MetricsFile
from tests import small_models

PLAIN = Config(grounding=GroundingConfig(source="none"))


@pytest.mark.parametrize("name", ["config.json", "tower/x", "data/mine.txt", "logs/x", "wandb/x"])
def test_a_directory_of_something_else_is_left_alone(tmp_path: Path, name: str) -> None:
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_bytes(b"mine")
    message = rf"is not marked as a run's .* and holds {name.partition('/')[0]}, which"
    with pytest.raises(UserError, match=message):
        runs.check_resume(tmp_path, PLAIN)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    assert mine.read_bytes() == b"mine"


def test_files_beside_those_of_a_run_are_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("of the shell")
    assert runs.check_resume(tmp_path, PLAIN) is None
    (tmp_path / "config.json").write_text("{}")  # a start that was cut off
    assert runs.check_resume(tmp_path, PLAIN) is None


def test_a_workdir_that_is_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--workdir=.*/file cannot be used"):
        runs.check_resume(tmp_path / "file", PLAIN)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "run.json is missing: .* has checkpoints, but no record"),
        ("{", "run.json cannot be read as JSON"),
        ("[]", "run.json must hold a JSON object, got list"),
        ('{"tokenizer": {}, "data": {}}', "run.json lacks config_as_given, starts"),
    ],
)
def test_a_damaged_record_is_one_clear_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    assert runs.check_resume(tmp_path, PLAIN) is None
    (tmp_path / "checkpoints" / "5").mkdir()
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=message):
        runs.check_resume(tmp_path, PLAIN)


OLD, HERE = {"commit": "a"}, {"commit": "b"}


@pytest.mark.parametrize(
    ("code", "run_by"),
    [
        ({**OLD, "code_sha256": runs.CODE_SHA256}, None),  # the commit changed other files
        ({**HERE, "code_sha256": "0"}, "b"),
        ({**OLD, "code_sha256": "0"}, "a"),
        ({"commit": None, "code_sha256": "0"}, "unknown"),
        (OLD, "a"),
        (HERE, None),
        ({}, None),
    ],
)
def test_other_code_is_announced(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: dict[str, str | None],
    run_by: str | None,
) -> None:
    """By the sources where the record has their hash, else by commits; it is never refused."""
    record: dict[str, Any] = {
        "config_as_given": {},
        "tokenizer": {},
        "data": {},
        "starts": [],
        **code,
    }
    files.write_json(tmp_path / "run.json", record)
    monkeypatch.setattr(runs, "commit", lambda: "b")  # whether this is a checkout or not
    runs.say_other_code(tmp_path)
    said = f"note: last run by other code (commit {run_by}), resumed by commit b: what it computes"
    assert capsys.readouterr().out == (f"{said} may differ\n" if run_by else "")


def test_a_finished_run_that_moved_keeps_what_trained_it(tmp_path: Path) -> None:
    """Only where data, index and neighbours lie is written; an older record gets no new entries."""
    faiss = {"lists": 2, "searched_by": "1.8.0"}
    images = {"key": "i", "index": "/old/index", "faiss": faiss, "prepared": None}
    data = {"key": "d", "directory": "/old/data"}
    found = {"key": "p", "directory": "/old/found"}
    files.write_json(tmp_path / "config.json", {"seed": 0, "grounding": {}})
    for before in (
        images,
        {**images, "prepared": found},
        {"key": "i", "index": "/old/index"},
        None,
    ):
        files.write_json(tmp_path / "run.json", {"data": data, "images": before, "commit": "a"})
        now = {
            "key": "i",
            "index": "/new/index",
            "faiss": {**faiss, "searched_by": "1.9.0"},
            "prepared": {"key": "p", "directory": "/new/found"},
        }
        about = {"data": {**data, "directory": "/new/data", "train_windows": 5}, "images": now}
        runs.keep_places(tmp_path, about, resolved=PLAIN)
        expected: dict[str, object] | None = None
        if before is not None:
            expected = {**before, "index": "/new/index"}
            if expected.get("prepared"):
                expected["prepared"] = {**found, "directory": "/new/found"}
        moved = {**data, "directory": "/new/data"}
        record = files.read_object(tmp_path / "run.json")
        assert record == {"data": moved, "images": expected, "commit": "a"}
    assert files.read_object(tmp_path / "config.json")["grounding"]["source"] == "none"


def test_a_half_written_tower_is_replaced(tmp_path: Path) -> None:
    """As a run that was killed at its start leaves it."""
    tower = system.fresh_tower(small_models.TOWER, seed=0)
    for name in ("vocab.json", "params.safetensors.77.partial"):
        (tmp_path / "tower").mkdir(exist_ok=True)
        (tmp_path / "tower" / name).write_bytes(b"half")
        system.store_tower(tower, tmp_path, tokenizer=None)
        assert weights.load(tmp_path / "tower").sha256 == tower.sha256
        assert not (tmp_path / "tower" / name).exists()


def test_metrics_that_cannot_be_written_are_one_clear_line(tmp_path: Path) -> None:
    sinks.check(LogConfig(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: Is a directory; move"):
        sinks.check(LogConfig(), tmp_path)


def test_a_resumed_run_drops_later_and_torn_lines_of_its_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = [json.dumps({"step": step, "train/loss": 1.0}) for step in (1, 2)]
    torn = [b"5", b'{"no": 1}', b'{"step": 3}', b'{"step": "x"}', b'{"step": 2, "a\xff']
    path.write_bytes(b"\n".join([*(line.encode() for line in kept), *torn]))
    writer = MetricsFile(tmp_path / "metrics.jsonl", resume_step=2)
    writer.write(3, {"train/loss": float("nan")})
    writer.close()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found == [*map(json.loads, kept), {"step": 3, "train/loss": None}]
