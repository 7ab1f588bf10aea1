"""Checkpoints of a small state: what is kept, what is found to be bad, what a full disk does."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import struct

from blindvalm_jax import config, guard, partitioning, runs
from blindvalm_jax.checkpoints import layout, quarantine, retention, verifying
from blindvalm_jax.checkpoints.manager import Checkpoints
from blindvalm_jax.config import CheckpointConfig
from blindvalm_jax.errors import UserError
from blindvalm_jax.step import TrainState
from blindvalm_jax.survival import preemption


@struct.dataclass
class StateWithoutGuard:
    """What was saved before a state had a guard."""

    step: Any
    params: Any
    opt_state: Any


SETTINGS = config.Config()
KEEP = CheckpointConfig(keep=3, failures=2)


def state(step: int) -> TrainState:
    """A state that differs from that of any other step in every array but the moments."""
    rng = np.random.default_rng(step)
    params = {
        "dense": {"kernel": jnp.asarray(rng.standard_normal((200, 250)), jnp.float32)},
        "half": jnp.asarray(rng.standard_normal((8,)), jnp.bfloat16),
    }
    return TrainState(jnp.asarray(step, jnp.int32), params, optax.adam(1e-3).init(params))


def save(run: Path, *steps: int, kept: CheckpointConfig = KEEP) -> None:
    with Checkpoints(run, kept) as checkpoints:
        for step in steps:
            checkpoints.save(state(step), step=step, config=SETTINGS, loss=10.0 - step)
        checkpoints.finish()


def restore(run: Path, like: TrainState | None = None) -> TrainState:
    with Checkpoints(run, KEEP) as checkpoints:
        return checkpoints.restore(like or state(0), seed=0)


def assert_equal(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints 1, 2 and 3."""
    run = tmp_path_factory.mktemp("saved")
    save(run, 1, 2, 3)
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def files_of(run: Path, step: int) -> list[Path]:
    return sorted(p for p in layout.directory(run).joinpath(str(step)).rglob("*") if p.is_file())


def chunk(run: Path, step: int) -> Path:
    """The file with the values of most arrays."""
    there = (path for path in files_of(run, step) if path.parent.name == "d")
    return max(there, key=lambda path: path.stat().st_size)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(bytes(content))


def test_the_newest_is_restored_also_on_another_mesh(run: Path) -> None:
    assert_equal(restore(run), state(3))
    mesh = partitioning.make_mesh(config.MeshConfig(data=2, fsdp=2, tensor=2))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("fsdp", "tensor")))
    everywhere = partitioning.replicated(mesh)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows if x.ndim else everywhere),
        state(0),
    )
    found = restore(run, like)
    assert found.params["dense"]["kernel"].sharding == rows
    assert_equal(found, state(3))


def test_a_guard_comes_back_and_may_be_new_or_gone(tmp_path: Path) -> None:
    guarded = dataclasses.replace(state(1), guard=guard.fresh())
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(guarded, step=1, config=SETTINGS)
        checkpoints.finish()
        assert_equal(checkpoints.restore(guarded, seed=0), guarded)
        checkpoint = layout.directory(tmp_path) / "1"
        arrays = len(jax.tree.leaves(guarded))
        assert verifying.verify(checkpoint) == verifying.Verdict([], arrays, compared=True)
        assert checkpoints.restore(state(0), seed=0).guard is None
        checkpoints.save(state(2), step=2, config=SETTINGS)
        checkpoints.finish()
        assert checkpoints.restore(guarded, seed=0).guard is None


def _truncate(run: Path) -> None:
    path = chunk(run, 3)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(run: Path) -> None:
    shutil.rmtree(layout.directory(run) / "3")
    (layout.directory(run) / "3").mkdir()


def _without(*names: str) -> Any:
    def damage(run: Path) -> None:
        path = layout.directory(run).joinpath("3", *names)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return damage


def _json(item: str, old: str, new: str) -> Any:
    def damage(run: Path) -> None:
        path = layout.directory(run) / "3" / item / "metadata"
        path.write_text(path.read_text().replace(old, new, 1))

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate, "cannot be read"),
        (_empty, "it is empty"),
        (lambda run: chunk(run, 3).unlink(), "cannot be read"),
        (_without("state"), "its state is missing"),
        (_without("state", "manifest.ocdbt"), "its state/manifest.ocdbt is missing"),
        (_without("digests"), "its digests is missing"),
        (_without("_CHECKPOINT_METADATA"), "_CHECKPOINT_METADATA is missing"),
        (_without("data", "metadata"), "data/metadata is missing"),
        (_json("data", "7.0", "6.5"), "damaged: data was saved as"),
        (_json("data", "}", ""), "cannot be read as JSON"),
        (_json("config", "false", "true"), "damaged: config was saved as"),
        (_json("digests", "params/half", "params/hall"), "has no digest"),
    ],
)
def test_a_bad_checkpoint_is_left_for_the_one_before(
    run: Path, damage: Any, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(run)
    assert_equal(restore(run), state(2))
    place = run / "quarantine" / "3"
    assert layout.steps(run) == [1, 2]
    warnings = [x for x in capfd.readouterr().err.splitlines() if x.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: the checkpoint of step 3 is bad: ")
    assert reason in warnings[0]
    assert warnings[0].endswith(f"; it is now {place}")
    assert reason in quarantine.moved(run)["3"]
    save(run, 3)  # the place is free
    assert_equal(restore(run), state(3))


@pytest.mark.parametrize("part", range(5))
def test_a_flipped_byte_of_the_values_is_never_restored(run: Path, part: int) -> None:
    path = chunk(run, 3)
    flip(path, part * (path.stat().st_size - 1) // 4)
    found = restore(run)
    assert_equal(found, state(int(found.step)))


def test_values_that_are_not_those_saved_are_found_by_their_digest(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever the format lets pass: here a whole other state, in order by itself."""
    for step in (3, 2):
        shutil.rmtree(layout.directory(run) / str(step) / "state")
        shutil.copytree(
            layout.directory(run) / "1" / "state", layout.directory(run) / str(step) / "state"
        )
    assert_equal(restore(run), state(1))
    assert "it holds step 1; expected 3" in capfd.readouterr().err
    other = dataclasses.replace(state(4), step=jnp.asarray(5, jnp.int32))
    save(run, 5)
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = {"step": other.step, "params": other.params, "opt_state": other.opt_state}
        checkpointer.save(layout.directory(run).absolute() / "5" / "state", arrays, force=True)
    assert_equal(restore(run), state(1))
    warned = capfd.readouterr().err
    assert "step 5 is bad: damaged: params/dense/kernel was saved as float32[200,250] " in warned
    assert "params/half was saved as bfloat16[8] " in warned


def test_other_dtypes_than_saved_are_not_cast(run: Path) -> None:
    like = state(0)
    like.params["half"] = like.params["half"].astype(jnp.float32)
    with pytest.raises(UserError, match=r"half was saved as bfloat16\[8\] \w+, is float32\[8\]"):
        restore(run, like)
    assert layout.steps(run) == [1, 2, 3]


def test_a_bad_checkpoint_that_cannot_be_moved_is_one_line(run: Path) -> None:
    _empty(run)
    (run / "quarantine").touch()
    with pytest.raises(UserError, match=r"checkpoints/3 cannot be moved to .*quarantine: "):
        restore(run)
    assert layout.steps(run) == [1, 2, 3]


def test_without_a_sound_one_every_reason_is_listed_and_nothing_moved(run: Path) -> None:
    _empty(run)
    flip(chunk(run, 2), chunk(run, 2).stat().st_size // 2)
    layout.directory(run).joinpath("1", "data", "metadata").write_text("[]")
    with pytest.raises(UserError) as caught:
        restore(run)
    message = str(caught.value)
    assert "step 3: it is empty; step 2: " in message
    assert "must hold a JSON object, got list" in message
    assert layout.steps(run) == [1, 2, 3]
    assert not (run / "quarantine").exists()


@pytest.mark.parametrize("sign", ["saved.json", "quarantine", "run.json"])
def test_a_run_whose_checkpoints_are_gone_is_not_started_afresh(run: Path, sign: str) -> None:
    (run / runs.MARKER).touch()
    assert quarantine.move(run, 3, "by hand") == run / "quarantine" / "3"
    shutil.rmtree(layout.directory(run))
    if sign != "saved.json":
        (run / "saved.json").unlink()
    if sign == "run.json":
        shutil.rmtree(run / "quarantine")
        (run / "run.json").write_text('{"starts": [{"step": 0}, {"step": 2}]}')
    with pytest.raises(UserError, match=r"has no checkpoint any more, but had .*step|by hand"):
        runs.check_resume(run, SETTINGS)


def test_a_run_that_never_saved_starts_afresh(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"starts": [{"step": 0}]}')
    (tmp_path / runs.MARKER).touch()
    assert runs.check_resume(tmp_path, SETTINGS) is None


def test_quarantine_keeps_what_is_there(run: Path) -> None:
    quarantine.move(run, 3, "first")
    save(run, 3)
    assert quarantine.move(run, 3, "second").name == "3.2"
    assert [text.split()[1] for text in quarantine.moved(run).values()] == ["first", "second"]


def test_a_checkpoint_of_before_digests_is_read_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its layout, written with Orbax alone."""
    old = state(2)
    manager = ocp.CheckpointManager(
        layout.directory(tmp_path).absolute(), item_names=("state", "data", "config")
    )
    manager.save(
        2,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(StateWithoutGuard(old.step, old.params, old.opt_state)),
            data=ocp.args.JsonSave({"next_step": 2, "seed": 0}),
            config=ocp.args.JsonSave(dataclasses.asdict(SETTINGS)),
        ),
    )
    manager.close()
    assert_equal(restore(tmp_path), state(2))
    assert "2 is older than digests: its arrays are read unchecked" in capsys.readouterr().out
    save(tmp_path, 3)
    assert_equal(restore(tmp_path), state(3))
    assert "older" not in capsys.readouterr().out


def test_what_is_kept_and_why() -> None:
    kept = CheckpointConfig(keep=2, keep_every=4, keep_best=2)
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 5: 2.0, 7: 4.0}
    assert retention.reasons([1, 2, 3, 4, 5, 6, 7, 8], losses, kept) == {
        1: [],
        2: ["best"],
        3: [],
        4: ["every 4"],
        5: ["best"],
        6: [],
        7: ["newest"],
        8: ["newest", "every 4"],
    }


@pytest.mark.parametrize(
    "sessions",
    [[((1, 2, 3), [2, 3]), ((4, 5), [2, 4, 5])], [((1, 2), [2]), ((3, 4, 5), [2, 4, 5])]],
)
def test_the_best_are_kept_over_a_restart(
    tmp_path: Path, sessions: list[tuple[tuple[int, ...], list[int]]]
) -> None:
    kept = CheckpointConfig(keep=1, keep_best=1, keep_every=4)
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0, 5: 6.0}
    for steps, left in sessions:
        with Checkpoints(tmp_path, kept) as checkpoints:
            for step in steps:
                checkpoints.save(state(step), step=step, config=SETTINGS, loss=losses[step])
            checkpoints.finish()
            assert checkpoints.latest_step == steps[-1]
        assert layout.steps(tmp_path) == left


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow as large as the arrays of a checkpoint."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def settled(checkpoints: Checkpoints, capfd: pytest.CaptureFixture[str]) -> str:
    """What the loop's own looks at a background save lead to, within a minute."""
    deadline = time.monotonic() + 60
    said = ""
    while "warning" not in said and time.monotonic() < deadline:
        checkpoints.settle()
        said += capfd.readouterr().err
    return said


def test_a_full_disk_is_warned_of_and_ends_the_run_after_some(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Noticed without another save; older checkpoints stay, leftovers go, a success forgives."""
    run = Path(shutil.copytree(saved, tmp_path / ("a long way down " * 6) / "run"))
    with Checkpoints(run, KEEP) as checkpoints:
        with full_disk():
            checkpoints.save(state(4), step=4, config=SETTINGS)
            said = settled(checkpoints, capfd)
        assert "warning: the checkpoint of step 4 cannot be written to " in said
        assert "File too large" in said
        assert "the newest is that of step 3, training goes on" in said
        assert layout.steps(run) == [1, 2, 3]
        checkpoints.save(state(5), step=5, config=SETTINGS)
        checkpoints.finish()
        assert [p.name for p in sorted(layout.directory(run).iterdir())] == ["2", "3", "5"]
        with full_disk():
            checkpoints.save(state(6), step=6, config=SETTINGS)
            with pytest.raises(UserError, match="state of step 6 could not be saved, .* step 5: "):
                checkpoints.finish()
            checkpoints.save(state(7), step=7, config=SETTINGS)
            with pytest.raises(UserError, match=r"step 7 cannot.*2 in a row failed"):
                checkpoints.settle(wait=True)
    assert_equal(restore(run), state(5))


def test_training_goes_on_while_a_save_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes nothing before the next update is done, in place of the state saved."""
    updated = threading.Event()
    real = os.mkdir

    def late(path: Any, *args: Any, **more: Any) -> None:
        if "orbax-checkpoint-tmp" in str(path) and not updated.wait(60):
            raise OSError("nobody went on")
        real(path, *args, **more)

    monkeypatch.setattr(os, "mkdir", late)
    expected = jax.device_get(state(1))
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        given = state(1)
        checkpoints.save(given, step=1, config=SETTINGS)
        assert layout.steps(tmp_path) == []
        jax.tree.map(lambda x: x.delete(), given)  # as an update does, which takes its memory
        updated.set()
        checkpoints.finish()
    assert_equal(restore(tmp_path), expected)


def test_what_a_save_computes_is_compiled_before_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new = dataclasses.replace(state(1), params={"of a shape of its own": jnp.ones((7, 13))})
    with Checkpoints(tmp_path, KEEP) as checkpoints, jax.log_compiles():
        checkpoints.prepare(new)
        assert "XLA compilation" in caplog.text
        caplog.clear()
        checkpoints.save(new, step=1, config=SETTINGS)
        checkpoints.finish()
    assert "XLA compilation" not in caplog.text


def test_sigterm_does_not_cut_off_the_save_that_an_error_waits_for(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ocp.CheckpointManager.wait_until_finished

    def interrupted(manager: ocp.CheckpointManager) -> None:
        signal.raise_signal(signal.SIGTERM)
        real(manager)

    def fail_while_saving() -> None:
        with Checkpoints(run, KEEP) as checkpoints:
            checkpoints.save(state(4), step=4, config=SETTINGS)
            monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", interrupted)
            raise UserError("an error of its own")

    with preemption.noticed(), pytest.raises(UserError, match="of its own"):
        fail_while_saving()
    monkeypatch.undo()
    assert_equal(restore(run), state(4))


def test_what_a_killed_save_left_is_removed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = layout.directory(run) / "4.orbax-checkpoint-tmp" / "state"
    left.mkdir(parents=True)
    assert_equal(restore(run), state(3))
    assert f"removed {left.parent}, a checkpoint that was never finished" in capsys.readouterr().out
    assert not left.parent.exists()


def test_saving_what_was_just_restored_does_nothing(run: Path) -> None:
    with Checkpoints(run, KEEP) as checkpoints:
        found = checkpoints.restore(state(0), seed=0)
        checkpoints.finish()
        checkpoints.save(found, step=3, config=SETTINGS)
        checkpoints.finish()
    assert layout.steps(run) == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint.keep_every": 1500}, "keep_every 1500 is no multiple of .*every_steps 1000"),
        ({"checkpoint.keep_best": 1, "eval.every_steps": 0}, "keep_best needs an eval/loss"),
        ({"checkpoint.keep_best": 1, "eval.every_steps": 300}, "300 must divide"),
    ],
)
def test_settings_that_would_keep_nothing_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    values = config.default()
    values.update_from_flattened_dict({"data.files": "a.txt", **changes})
    with pytest.raises(UserError, match=message):
        config.parse(values)
