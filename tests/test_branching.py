"""Branches: runs that go on from a checkpoint of a trunk end as runs of their length do."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindvalm_jax import branching, starting
from blindvalm_jax.checkpoints import arrays, layout
from blindvalm_jax.config import Config
from blindvalm_jax.errors import UserError
from tests import small_models, small_text, test_train
from tests.test_guard import small
from tests.test_train import computed, read_metrics

DONE = (2, 4, 6, 8, 10)


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    small_text.write_text(path, small_text.documents(60))
    return path


def settings(text: Path, steps: int, **changes: Any) -> Config:
    """A run whose last fifth cools down, with dropout, which tells updates apart."""
    shape: dict[str, Any] = {"optimizer__schedule": "constant_cooldown", "decoder__dropout": 0.1}
    shape |= {"optimizer__warmup_steps": 2, "checkpoint__every_steps": 2, "checkpoint__keep": 9}
    return small(text, **{"train__steps": steps, **shape, **changes})


@pytest.fixture(scope="module")
def trunk(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trunk")
    assert starting.start(settings(text, 10), directory) == 0
    assert tuple(layout.steps(directory)) == DONE
    return directory


def test_a_branch_ends_as_a_run_of_its_length_does(
    text: Path, trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for rounding: eight devices add up in the order in which they come."""
    branch = settings(text, 5, train__branch_from=f"{trunk}@4")
    assert starting.start(branch, tmp_path / "branch") == 0
    said = capsys.readouterr().out
    assert f"branches from {trunk} at step 4; train.steps: 10 -> 5" in said
    assert "resumed at step 4" in said
    assert starting.start(settings(text, 5), tmp_path / "whole") == 0
    found, expected = (computed(read_metrics(tmp_path / x)) for x in ("branch", "whole"))
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values == pytest.approx({5: expected[name][5]}, rel=1e-5), name
    starts = json.loads((tmp_path / "branch" / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [4]
    assert tuple(layout.steps(trunk)) == DONE
    assert starting.start(branch, tmp_path / "branch") == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_a_branch_on_one_device_ends_bit_identical(text: Path, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"optimizer__schedule": "constant_cooldown", "checkpoint__keep": 9}
    lengths: dict[str, dict[str, Any]] = {
        "trunk": {"train__steps": 10},
        "branch": {"train__steps": 5, "train__branch_from": f"{tmp_path / 'trunk'}@4"},
        "whole": {"train__steps": 5},
    }
    for name, length in lengths.items():
        values = test_train.settings(text, **shape, **length)
        start = [*test_train.command(values, tmp_path), f"--workdir={tmp_path / name}"]
        done = subprocess.run(start, cwd=test_train.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    branch, whole = (
        dict(arrays.read(layout.directory(tmp_path / x) / "5")) for x in ("branch", "whole")
    )
    assert branch.keys() == whole.keys()
    for name, array in branch.items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)


@pytest.mark.parametrize(
    ("place", "changes", "message"),
    [
        ("{}@10", {}, r"settings: train\.steps: 10 -> 12"),  # it has cooled down
        ("{}@4", {"seed": 1}, "settings: seed: 0 -> 1"),
        ("{}@4", {"optimizer__learning_rate": 1e-5}, r"settings: optimizer\.learning_rate"),
        ("{}@3", {}, "it is no directory; checkpoints there: 2, 4, 6, 8, 10"),
        ("nowhere@3", {}, "it is no directory; checkpoints there: none"),
        ("{}", {}, r"expected RUN@STEP, the directory"),
        ("gs://bucket/run@3", {}, "train.branch_from: gs://bucket/run@3 is an address, and here"),
        ("{}@4", {"train__steps": 4}, "has done 4 updates; train.steps is 4: nothing is left"),
    ],
)
def test_what_is_no_branch_is_one_line_and_leaves_nothing(
    text: Path, trunk: Path, tmp_path: Path, place: str, changes: dict[str, Any], message: str
) -> None:
    named = {"train__branch_from": place.format(trunk)}
    with pytest.raises(UserError, match=message) as error:
        starting.start(settings(text, 12, **changes, **named), tmp_path / "branch")
    assert "\n" not in str(error.value)
    assert layout.steps(tmp_path / "branch") == []
    assert not (tmp_path / "branch" / "run.json").exists()


def test_a_branch_that_was_cut_off_while_it_was_made_is_made(
    text: Path, trunk: Path, tmp_path: Path
) -> None:
    values = settings(text, 5, train__branch_from=f"{trunk}@4")
    branching.begin(values, tmp_path)
    whole = layout.directory(tmp_path) / "4"
    shutil.move(whole, layout.directory(tmp_path) / "4.orbax-checkpoint-tmp-branch")
    (layout.directory(tmp_path) / "4.orbax-checkpoint-tmp-branch" / "state" / "half").touch()
    branching.begin(values, tmp_path)
    names = {path.relative_to(whole).as_posix() for path in whole.rglob("*")}
    trunks = layout.directory(trunk) / "4"
    assert names == {path.relative_to(trunks).as_posix() for path in trunks.rglob("*")}
    assert [path.name for path in layout.directory(tmp_path).iterdir()] == ["4"]


def test_a_branch_whose_checkpoints_are_gone_is_not_begun_again(
    text: Path, trunk: Path, tmp_path: Path
) -> None:
    values = settings(text, 5, train__branch_from=f"{trunk}@4")
    assert starting.start(values, tmp_path) == 0
    shutil.rmtree(layout.directory(tmp_path) / "5")
    shutil.rmtree(layout.directory(tmp_path) / "4")
    with pytest.raises(UserError, match="has no checkpoint any more, but had"):
        starting.start(values, tmp_path)


def test_a_dry_run_of_a_branch_checks_and_writes_none(
    text: Path, trunk: Path, tmp_path: Path
) -> None:
    values = settings(text, 5, train__branch_from=f"{trunk}@4")
    branching.begin(values, tmp_path, dry_run=True)
    assert list(tmp_path.iterdir()) == []
