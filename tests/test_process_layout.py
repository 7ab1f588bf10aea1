"""Plans for several processes: what those refuse is refused, by simulated devices as by a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from blindvalm_jax import config, partitioning, process_layout, starting, trainer
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.errors import UserError
from tests import small_models, test_contrastive_training
from tests.test_planning import settings

DEVICES = 8


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_a_process_plans_for_those_that_will_have_its_devices(processes: int, tensor: int) -> None:
    """Rows stay within a process exactly where tensor does."""
    with process_layout.simulated(processes, devices=DEVICES):
        assert process_layout.count() == processes
        mesh = partitioning.make_mesh(MeshConfig(fsdp=DEVICES // tensor, tensor=tensor))
        owners = [process_layout.of(device) for device in mesh.devices.flat]
        assert owners == sorted(list(range(processes)) * (DEVICES // processes))
        if tensor <= DEVICES // processes:
            process_layout.check_rows(mesh)
        else:
            with pytest.raises(
                UserError, match=rf"processes \({processes}\): mesh.tensor must stay"
            ):
                process_layout.check_rows(mesh)
    assert not process_layout.simulates()
    assert process_layout.count() == jax.process_count() == 1


def test_processes_that_do_not_divide_the_devices_are_refused() -> None:
    with (
        pytest.raises(UserError, match="=3 does not divide --simulated_devices=8"),
        process_layout.simulated(3, devices=DEVICES),
    ):
        pass


@pytest.mark.parametrize(
    ("processes", "wanted", "message"),
    [
        (1, -1, "mesh.slices=-1 takes .* simulated ones do not: .* mesh.slices=1 for one"),
        (4, -1, "mesh.slices=-1 takes .* simulated ones do not: .* mesh.slices=1 for one"),
        (2, 4, "mesh.slices is 4, which does not divide the 2 processes"),
        (4, 2, ""),
        (4, 4, ""),
        (1, 4, ""),
    ],
)
def test_slices_of_a_plan_are_given_and_hold_whole_processes(
    processes: int, wanted: int, message: str
) -> None:
    mesh = MeshConfig(data=8, slices=wanted)
    with process_layout.simulated(processes, devices=DEVICES):
        if message:
            with pytest.raises(UserError, match=message):
                partitioning.make_mesh(mesh)
        else:
            found = partitioning.make_mesh(mesh)
            process_layout.check_rows(found)
            assert [device.id for device in found.devices.flat] == list(range(DEVICES))


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        (
            "blind",
            {"eval__tasks": "text:a.txt"},
            "eval.tasks=text:a.txt: tasks are asked by runs of one process: leave them out",
        ),
        ("blind", {"grounding__tower": "toyworld"}, "what `toyworld` names is made by a run of"),
        ("valm", {"grounding__search": "faiss"}, "grounding.search=faiss searches on one host"),
        ("blind", {"mesh__data": 1, "mesh__tensor": 4}, "mesh.tensor must stay within the 2 dev"),
        ("blind", {"train__batch_size": 12}, "is 12, not a multiple of mesh.data x mesh.fsdp = 8"),
    ],
    ids=["tasks", "toyworld", "faiss", "mesh", "batch"],
)
def test_what_several_processes_refuse_their_plan_refuses(
    tmp_path: Path, variant: str, changes: dict[str, Any], message: str
) -> None:
    sizes = (4, 2, 1)
    with (
        process_layout.simulated(4, devices=DEVICES),
        pytest.raises(UserError, match=message) as error,
    ):
        starting.start(settings(sizes, variant, **changes), tmp_path, dry_run=True)
    assert "\n" not in str(error.value)


def test_settings_of_another_objective_are_not_refused(tmp_path: Path) -> None:
    values = test_contrastive_training.settings(Path(), grounding__search="faiss")
    values.data.images = ""
    with process_layout.simulated(4, devices=DEVICES), small_models.quick_compilation():
        assert starting.start(config.parse(values), tmp_path, dry_run=True) == 0


def test_a_plan_says_how_many_processes_it_is_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is that of one process otherwise: they compute the same program."""
    given = settings((2, 2, 2), "gpt2", decoder__layers=2)
    with small_models.quick_compilation():
        assert trainer.train(given, tmp_path / "one", dry_run=True) == 0
        with process_layout.simulated(4, devices=DEVICES):
            assert starting.start(given, tmp_path / "four", dry_run=True) == 0
    of = "8 x cpu of 4 processes, mesh {'data': 2, 'fsdp': 2, 'tensor': 2}"
    assert f"devices: {of}\n" in capsys.readouterr().out
    one, four = ((tmp_path / name / "placement.md").read_text() for name in ("one", "four"))
    assert f"On {of}:\n" in four
    assert "note: planned for one process" not in one + four
    tables = [[x for x in text.splitlines() if x.startswith("|")] for text in (one, four)]
    assert tables[0] == tables[1]
