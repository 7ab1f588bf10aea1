"""What stands in a directory before an evaluation: it is put aside, taken back, or left alone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import identity, report, results, standing
from tests import small_tasks, test_evaluation_report

HEAD = {"model": "a", "step": 3, "weights_sha256": "0" * 64}
OTHER = {**HEAD, "step": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tasks.write(tmp_path_factory.mktemp("standing") / "tasks")


def settle(out: Path, head: dict[str, Any], protocol: str = "corrected", **more: Any) -> list[str]:
    """Names of the tasks that a directory then has of a model and protocol."""
    given = {"names": ["memory_colors"], "in_training": False, **more}
    return [*standing.settle(out, head, protocol=protocol, **given)]


def evaluated(out: Path, data: Path, task: str, way: str = "corrected", **more: Any) -> Path:
    """Results of `HEAD` with their page; more: of the head."""
    test_evaluation_report.constant(out, data, task, way)
    tasks = json.loads((out / "results.json").read_text())["tasks"]
    whole = {"tasks": tasks, "tokenizer": "clip", "commit": "0", **HEAD, **more}
    (out / "results.json").write_text(json.dumps(whole))
    report.write(*results.read(out))
    return out


def files_in(out: Path) -> dict[Path, bytes]:
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def name_of(head: dict[str, Any], protocol: str = "corrected") -> str:
    return identity.name({**head, "protocol": protocol})


def test_results_of_others_are_put_aside_and_come_back(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another protocol as of another model: nothing is lost, nor anything else touched."""
    out = evaluated(tmp_path / "eval", data, "tnwit_height", "published")
    mine = [out / "notes.jsonl", out / "figures" / "compare.png", out / "before" / "mine.txt"]
    (out / "before").mkdir()
    for path in mine:
        path.write_text("mine")
    kept = files_in(out)
    assert settle(out, {**HEAD, "model": "moved"}, "published") == ["tnwit_height"]
    assert not capsys.readouterr().err
    assert files_in(out) == kept
    turns = [(HEAD, "corrected", "protocol 'published', now 'corrected'"), (OTHER, "published", "")]
    for number, (head, protocol, differs) in enumerate(turns):
        assert settle(out, head, protocol) == []
        aside = out / "before" / name_of(HEAD, "published")
        assert f"held tnwit_height of {differs or 'step 3, now 4'}: they are in {aside} now" in (
            capsys.readouterr().err
        )
        assert {path for path in files_in(out) if "before" not in path.parts} == {
            path.relative_to(out) for path in mine[:2]
        }
        assert [*results.read(aside)[0]["tasks"]] == ["tnwit_height"]
        evaluated(out, data, "memory_colors", protocol, **head)
        assert settle(out, HEAD, "published") == ["tnwit_height"]
        assert f"what was asked in {aside} before is in {out} again" in capsys.readouterr().err
        there = {path for path in files_in(out) if path not in kept}
        assert {path.parts[0] for path in there} == {"before"}
        assert {path.parts[1] for path in there} == {
            name_of(*turn[:2]) for turn in turns[: number + 1]
        }
        assert {path: content for path, content in files_in(out).items() if path in kept} == kept


def test_nothing_is_put_aside_over_what_is_there(data: Path, tmp_path: Path) -> None:
    """Such as an older copy, or files of the user's."""
    out = evaluated(tmp_path / "eval", data, "memory_colors")
    for name in ("results.json", "memory_colors.jsonl"):
        aside = out / "before" / name_of(HEAD)
        aside.mkdir(parents=True, exist_ok=True)
        (aside / name).write_text("mine")
        assert settle(out, OTHER) == []
        assert (aside / name).read_text() == "mine"
        number = 2 + (name != "results.json")
        assert results.read(out / "before" / f"{name_of(HEAD)}_{number}")[0]["step"] == 3
        evaluated(out, data, "memory_colors")


@pytest.mark.parametrize("in_training", [False, True])
def test_files_that_no_results_account_for_are_left_alone(
    data: Path, tmp_path: Path, in_training: bool
) -> None:
    out = tmp_path / "eval"
    ours = ["memory_colors.jsonl"]
    ours += [] if in_training else ["report.md", "figures/scores.png", "figures/memory_colors.png"]
    for name in ours:
        (out / "figures").mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name} would be written over, and no results.json"):
            settle(out, HEAD, in_training=in_training)
        assert files_in(out) == {Path(name): b"mine"}
        shutil.rmtree(out)
    evaluated(out, data, "tnwit_height")
    (out / "memory_colors.jsonl").mkdir()
    with pytest.raises(UserError, match=r"memory_colors.jsonl would be written over"):
        settle(out, HEAD, in_training=in_training)
    (out / "memory_colors.jsonl").rmdir()
    settle(out, OTHER)
    (out / "tnwit_height.jsonl").write_text("mine")  # in the way of what would come back
    with pytest.raises(UserError, match=r"tnwit_height.jsonl would be written over"):
        settle(out, HEAD)
    if not in_training:
        (out / "figures").write_text("mine")
        with pytest.raises(UserError, match=r"eval/figures would be written over"):
            settle(out, OTHER)


def test_training_replaces_its_own_results_alone(data: Path, tmp_path: Path) -> None:
    out = evaluated(tmp_path / "eval", data, "memory_colors")
    path, page = out / "results.json", out / "report.md"
    found = json.loads(path.read_text())
    settle(out, OTHER, in_training=True)
    assert results.read(out / "before" / name_of(HEAD))[0]["step"] == 3
    found["tasks"]["memory_colors"]["in_training"] = True
    for own in (True, False):
        path.write_text(json.dumps(found))
        page.unlink(missing_ok=True) if own else page.write_text("the command's")
        assert settle(out, OTHER, in_training=True) == []
        assert not path.exists()
        assert (out / "before" / f"{name_of(HEAD)}_2").exists() != own
    assert not page.exists()
    path.write_text(json.dumps({**found, **OTHER}))
    assert settle(out, OTHER, in_training=True) == ["memory_colors"]


def test_entries_that_cannot_be_used_are_put_aside_with_their_lines(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = evaluated(tmp_path / "eval", data, "tnwit_height")
    evaluated(out, data, "memory_colors")
    found = json.loads((out / "results.json").read_text())
    found["tasks"]["memory_colors"]["bytes"] = math.nan  # a field that is not read
    text = json.dumps(found)
    for number in ("", "_2"):
        (out / "results.json").write_text(text)
        (out / "memory_colors.jsonl").write_text(number)
        assert settle(out, HEAD) == ["tnwit_height"]
        aside = out / "before" / f"damaged{number}"
        [line] = capsys.readouterr().err.splitlines()
        assert line.endswith(
            f"has a number in memory_colors that is not finite: the entry is left out, and is in "
            f"{aside} now"
        )
        assert (aside / "results.json").read_text() == text
        assert (aside / "memory_colors.jsonl").read_text() == number
        assert [*results.read(out)[0]["tasks"]] == ["tnwit_height"]
        assert settle(out, HEAD) == ["tnwit_height"]
        assert not capsys.readouterr().err
    for place, damaged in enumerate(
        ('{"tasks": {"a"', "[5]", '{"tasks": 5}', '{"tasks":{},"a":NaN}')
    ):
        (out / "results.json").write_text(damaged)
        (out / "memory_colors.jsonl").write_text("old")
        assert settle(out, HEAD) == []
        aside = out / "before" / f"damaged_{place + 3}"
        assert f"it is in {aside} now" in capsys.readouterr().err
        assert (aside / "results.json").read_text() == damaged
        assert (aside / "memory_colors.jsonl").read_text() == "old"
        assert not (out / "report.md").exists()


def test_two_evaluations_cannot_write_to_one_directory(tmp_path: Path) -> None:
    out = tmp_path / "eval"
    with (
        standing.held(out),
        pytest.raises(UserError, match=f"another evaluation is writing to {out}: wait"),
        standing.held(out),
    ):
        pass
    assert not [*out.iterdir()]
    with standing.held(out):
        pass


def test_a_full_disk_is_one_line(data: Path, tmp_path: Path) -> None:
    """Of the page as of the lines; here a directory is in the way."""
    out = evaluated(tmp_path / "eval", data, "memory_colors")
    (out / "report.md").unlink()
    (out / "report.md").mkdir()
    with pytest.raises(UserError, match=f"results cannot be written to {out}: Is a directory"):
        report.write(*results.read(out))
    with pytest.raises(UserError, match="No space left"), standing.writing(out):
        Path("/dev/full").write_text("x")
