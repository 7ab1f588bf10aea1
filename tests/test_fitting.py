"""Remat and microbatches that are chosen to fit: the first that does, and the same on resuming."""

from __future__ import annotations

import concurrent.futures
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from blindvalm_jax import compilation, config, fitting, memory, partitioning, runs, trainer
from blindvalm_jax.config import Config, MeshConfig
from blindvalm_jax.errors import UserError
from tests import dying, small_models, small_text

GIB = 2**30


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


class Compiled:
    """Stands for a program whose plan is known: of a device that is not here."""

    def __init__(self, size: int) -> None:
        self.argument_size_in_bytes, self.temp_size_in_bytes = 0, size
        self.output_size_in_bytes = self.alias_size_in_bytes = 0
        self.generated_code_size_in_bytes = 0

    def memory_analysis(self) -> Compiled:
        return self


def settings(gib: float, **changes: Any) -> Config:
    values = config.default()
    values.train.remat, values.train.microbatches, values.train.batch_size = "auto", 0, 64
    values.grounding.tower = "random"
    values.mesh.device_memory_gib = gib
    values.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config.parse(values)


def choose(given: Config) -> tuple[str, int, list[tuple[str, int]]]:
    """What is chosen, and what was compiled for it, where memory is activations plus 1 GiB."""
    tried = []

    def compile_for(candidate: Config) -> Compiled:
        train = candidate.train
        tried.append((train.remat, train.microbatches))
        kept = {"none": 32, "dots": 16, "full": 4}[train.remat]
        return Compiled(GIB + kept * GIB // train.microbatches)

    mesh = partitioning.make_mesh(MeshConfig(data=2), jax.devices()[:2])
    chosen, compiled = fitting.choose(given, mesh, compile_for)
    plan = memory.plan(compiled)
    assert plan is not None
    assert plan.total <= 0.9 * given.mesh.device_memory_gib * GIB
    return chosen.train.remat, chosen.train.microbatches, tried


@pytest.mark.parametrize(
    ("gib", "remat", "count", "compiled"),
    [
        (40, "none", 1, 1),  # 33 of 36
        (20, "none", 2, 4),  # 17 of 18
        (4, "none", 16, 5),  # 3 of 3.6
        (2.2, "dots", 32, 7),  # 1.5 of 1.98, where none takes 2
    ],
)
def test_the_first_that_fits_is_chosen(gib: float, remat: str, count: int, compiled: int) -> None:
    found = choose(settings(gib))
    assert found[:2] == (remat, count)
    assert len(found[2]) == len(set(found[2])) == compiled


def test_what_settings_say_is_not_chosen() -> None:
    assert choose(settings(20, train__remat="full"))[:2] == ("full", 1)
    assert choose(settings(20, train__microbatches=4))[:2] == ("none", 4)
    assert {count for _, count in choose(settings(6, train__microbatches=4))[2]} == {4}
    assert not fitting.wanted(settings(1, train__microbatches=4, train__remat="none"))


def test_every_plan_that_was_tried_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, tried = choose(settings(20))
    printed = capsys.readouterr().out
    for remat, count in tried:
        assert f"remat {remat}, {count} microbatches: " in printed
    assert "remat none, 1 microbatches: 33,792 MiB, does not fit" in printed
    assert "chosen: train.remat=none, train.microbatches=2" in printed


def test_a_mesh_where_nothing_fits_is_one_line_with_the_smallest_plan() -> None:
    with pytest.raises(UserError, match="full with 32 microbatches, takes 1,152 MiB") as error:
        choose(settings(1))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"set mesh\.device_memory_gib"):
        choose(settings(0))


_ASKS = """
import sys, types
from blindvalm_jax import config, distributed, fitting
where, process, limit = sys.argv[1:]
with distributed.joined(
    where, processes=2, process=int(process), heartbeat_seconds=10, wait_seconds=60
):
    known = {"bytes_limit": int(limit)} if limit else None
    device = types.SimpleNamespace(memory_stats=lambda: known)
    mesh = types.SimpleNamespace(local_devices=[device])
    print("found", fitting.device_memory(config.parse(config.default()), mesh))
"""


@pytest.mark.parametrize(
    ("limits", "found"),
    [((80 * GIB, 40 * GIB), f"found {float(40 * GIB)}"), ((80 * GIB, ""), "do not report")],
)
def test_processes_take_the_least_memory_of_all(limits: tuple[object, object], found: str) -> None:
    """Else each would choose for itself, and compile another program."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        where = f"localhost:{probe.getsockname()[1]}"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        both = pool.map(lambda i: dying.run_python(_ASKS, where, i, limits[i]), (0, 1))
    for done in both:
        assert found in done.stdout + done.stderr


def test_microbatches_leave_every_device_a_row() -> None:
    mesh = partitioning.make_mesh(MeshConfig(data=4, fsdp=2))
    assert fitting.microbatches(settings(1), mesh) == [1, 2, 4, 8]
    shuffled = settings(1, grounding__control="shuffled", train__batch_size=8)
    one = partitioning.make_mesh(MeshConfig(), jax.devices()[:1])
    assert fitting.microbatches(shuffled, one) == [1, 2, 4]
    with pytest.raises(UserError, match="train.batch_size is 12, not a multiple"):
        fitting.microbatches(settings(1, train__batch_size=12), mesh)


@pytest.mark.slow
def test_a_run_records_what_was_chosen_and_resumes_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    small_text.write_text(text, small_text.documents(60))
    values = config.default()
    values.data.files, values.data.sequence_length = str(text), 64
    values.data.eval_fraction, values.eval.every_steps = 0.2, 0
    values.tokenizer.kind, values.tokenizer.train_vocab_size = "train", 300
    values.decoder.layers, values.decoder.width, values.decoder.heads = 2, 16, 2
    values.grounding.source = "none"
    values.optimizer.schedule = "inverse_sqrt"  # of which the length is no part
    values.train.steps, values.train.batch_size, values.train.microbatches = 1, 32, 0
    values.log.every_steps = 1
    values.mesh.data = 8
    values.mesh.device_memory_gib = 100.0
    run = tmp_path / "run"

    sizes: list[int] = []
    says = False
    compile_step = compilation.compile_step

    def compiled(*args: Any) -> Any:
        if says:
            os.write(2, f"Involuntary full remat of program {len(sizes)}\n".encode())
        found = compile_step(*args)
        plan = memory.plan(found)
        assert plan is not None
        sizes.append(plan.total)
        return found

    monkeypatch.setattr(compilation, "compile_step", compiled)
    assert trainer.train(config.parse(values), tmp_path / "roomy", dry_run=True) == 0
    assert "chosen: train.remat=none, train.microbatches=1" in capsys.readouterr().out
    values.mesh.device_memory_gib = sizes[0] / GIB  # 90 % of which is less than it needs
    sizes.clear()
    says = True
    assert trainer.train(config.parse(values), tmp_path / "tight", dry_run=True) == 0
    says = False
    taken = sizes.index(max(size for size in sizes if size <= 0.9 * sizes[0]))
    warnings = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: XLA")]
    assert warnings == [f"warning: XLA: Involuntary full remat of program {taken}"]
    assert trainer.train(config.parse(values), run) == 0
    resolved = json.loads((run / "config.json").read_text())["train"]
    assert resolved["remat"] == "none"
    assert resolved["microbatches"] in (2, 4)

    values.train.steps, values.mesh.device_memory_gib = 2, 100.0
    sizes.clear()
    assert trainer.train(config.parse(values), run) == 0  # where one would fit as well
    assert len(sizes) == 1
    count = resolved["microbatches"]
    assert f"as the run began: train.remat=none, train.microbatches={count}" in (
        capsys.readouterr().out
    )
    values.train.steps, values.train.microbatches = 3, count  # the same, said in full
    assert runs.check_resume(run, config.parse(values)) == 2
    values.train.microbatches = 8 // count
    with pytest.raises(UserError, match=rf"train\.microbatches: {count} -> {8 // count}"):
        runs.check_resume(run, config.parse(values))
