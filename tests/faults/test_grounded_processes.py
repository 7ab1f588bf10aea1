"""Several processes train what is grounded: tower and index lie over the devices of all of them."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests import small_models, test_valm
from tests.faults.small_run import Runs, check_equal, computed, steps

pytestmark = pytest.mark.faults


TEXT = {"grounding__source": "text", "grounding__index": "", "grounding__neighbours": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip/, images/, index/, windows/ and prepared/, the neighbours of the windows."""
    with small_models.quick_compilation():
        directory = test_valm.write_inputs(tmp_path_factory.mktemp("inputs"))
        test_valm.find_neighbours(directory, directory / "prepared")
    return directory


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        pytest.param(
            {**TEXT, "mesh__fsdp": 4},
            2,
            id="blind_valm_sharded",
        ),
        pytest.param(
            {
                **TEXT,
                "grounding__readout": "eos",
                "grounding__control": "shuffled",
                "mesh__data": 2,
            },
            1,
            id="texts_of_other_rows",
        ),
        pytest.param({"mesh__data": 2, "mesh__tensor": 2}, 2, id="valm_exact"),
        pytest.param({"grounding__search": "prepared", "mesh__data": 2}, 1, id="valm_prepared"),
    ],
)
def test_processes_train_as_one_does(
    changes: dict[str, Any], devices: int, inputs: Path, tmp_path: Path, runs: Runs
) -> None:
    """And one goes on with what two have saved."""
    changes = {"mesh__data": 1, "eval__every_steps": 2, "checkpoint__every_steps": 2, **changes}
    if changes.get("grounding__search") == "prepared":
        changes["grounding__prepared"] = str(inputs / "prepared")
    values = test_valm.settings(inputs, **changes)
    runs.start(values, tmp_path / "one", devices=2 * devices).ends()
    for process in runs.several(2, values, tmp_path / "two", devices=devices):
        process.ends()
    check_equal(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "4")
    runs.start(values, tmp_path / "two", devices=2 * devices).ends()
    assert steps(tmp_path / "two") == [2, 4]
    check_equal(tmp_path / "one", tmp_path / "two")


def test_a_killed_run_ends_bit_identical(inputs: Path, tmp_path: Path, runs: Runs) -> None:
    """SIGKILL in the middle, the same command again: every metric equal to the last bit."""
    saved = {"train__steps": 80, "checkpoint__every_steps": 10, "eval__every_steps": 40}
    values = test_valm.settings(inputs, mesh__data=1, **TEXT, **saved)
    runs.start(values, tmp_path / "whole").ends()
    killed = runs.start(values, tmp_path / "killed")
    killed.until("^step 35/")
    killed.send(signal.SIGKILL)
    killed.ends(-signal.SIGKILL)
    said = runs.start(values, tmp_path / "killed").ends()
    assert re.search(r"(?m)^resumed at step [1-7]0$", said), said
    assert computed(tmp_path / "killed") == computed(tmp_path / "whole")
