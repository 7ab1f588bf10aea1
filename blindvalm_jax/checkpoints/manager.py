"""Checkpoints of a run that trains: saved in the background, restored as far as they are sound.

With several processes every one calls every method; where they share the directory the first alone
renames and deletes. A save counts as failed where it failed in any process, and all fall back to
the same step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from blindvalm_jax import agreement, digests, events, ownership, process_log
from blindvalm_jax.checkpoints import layout, quarantine, writing
from blindvalm_jax.checkpoints.orbax_log import quiet
from blindvalm_jax.checkpoints.retention import Retention
from blindvalm_jax.config import CheckpointConfig, Config
from blindvalm_jax.console import is_first, say, warn
from blindvalm_jax.errors import UserError, first_line
from blindvalm_jax.step import TrainState
from blindvalm_jax.stores import places
from blindvalm_jax.survival import preemption

_LONG_WAIT = 1.0  # seconds


class Checkpoints:
    """Saves in the background and restores; a step directory appears only when it is whole."""

    def __init__(self, workdir: Path, config: CheckpointConfig) -> None:
        """Opens <workdir>/checkpoints and removes what saves that never ended have left there."""
        quiet()
        self._run = workdir
        self._directory = layout.directory(workdir).absolute()
        self._allowed = config.failures
        self._failures = 0
        self._asked: int | None = None  # the step last given to save
        self._saved: int | None = None  # the step last known to be on disk
        self._writing: int | None = None  # the step being written
        self._error: str | None = None  # why that failed in this process
        self._clear()
        self._retention = Retention(workdir, config)
        self._manager = writing.manager(
            self._directory, self._retention, seconds=config.timeout_seconds
        )

    @property
    def latest_step(self) -> int | None:
        """Updates done in the newest checkpoint."""
        return self._manager.latest_step()

    def prepare(self, state: TrainState) -> None:
        """Compiles what a save computes, so that the first one stops the loop no longer."""
        digests.of_tree(_everything(state))

    def save(
        self, state: TrainState, *, step: int, config: Config, loss: float | None = None
    ) -> None:
        """Saves in the background, after the save before; loss: on held-out data, if measured.

        The data position is one integer: batches are a pure function of (seed, step). A storage
        that fails is warned of, and training goes on.

        Raises:
          UserError: `checkpoint.failures` saves in a row have failed.
        """
        begin = time.perf_counter()
        self.settle(wait=True)
        if (waited := time.perf_counter() - begin) > _LONG_WAIT:
            say(f"note: waited {waited:.0f} s for the checkpoint before to be written")
        self._asked = step
        if step in self._manager.all_steps():  # what was restored, and nothing has been done since
            self._saved = step
            return
        self._clear()  # of a save that failed, whose parts may have ended only now
        items = _items(state, step, config, loss)
        self._writing = step
        if loss is not None:
            self._retention.losses[step] = loss
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:  # the storage below Orbax raises nothing more special
            self._error = _reason(error)
        if jax.process_count() == 1 and self._error is not None:
            self.settle()

    def settle(self, *, wait: bool = False) -> None:
        """Takes note of a save that has ended, and warns if it failed; wait: until it has ended.

        Without `wait` it costs nothing, and with several processes, which would have to agree each
        time, it does nothing.

        Raises:
          UserError: `checkpoint.failures` saves in a row have failed.
        """
        if self._writing is None:
            return
        under_way = self._error is None and self._manager.is_saving_in_progress()
        if not wait and (under_way or jax.process_count() > 1):
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # the storage below Orbax raises nothing more special
            self._error = self._error or _reason(error)
        step, reason, self._writing, self._error = self._writing, self._error, None, None
        if agreement.any_of(reason is not None):
            self._failed(step, reason or "another process could not write its part")
            return
        self._failures, self._saved = 0, step
        self._record(step)

    def _failed(self, step: int, reason: str) -> None:
        self._retention.losses.pop(step, None)
        if ownership.apart() and agreement.any_of(step not in layout.steps(self._run)):
            # This process may have written its part to the end.
            shutil.rmtree(self._directory / str(step), ignore_errors=True)
        self._clear()
        self._manager.reload()
        self._failures += 1
        there = self.latest_step
        newest = (
            "there is none before it" if there is None else f"the newest is that of step {there}"
        )
        events.record(self._run, "save_failed", step=step, reason=reason)
        message = f"the checkpoint of step {step} cannot be written to {self._directory}: {reason}"
        if self._failures >= self._allowed:
            raise UserError(
                f"{message}; {self._failures} in a row failed (checkpoint.failures), {newest}. "
                "Free some space and give the same command again"
            )
        warn(f"{message}; {newest}, training goes on")

    def _record(self, step: int) -> None:
        if is_first():
            try:
                quarantine.record(self._run, step)
            except OSError as error:
                warn(f"{self._run / quarantine.RECORD} cannot be written: {error.strerror}")

    def _clear(self) -> None:
        """Removes what saves that never ended have left."""
        if ownership.keeps():
            for path in layout.unfinished(self._run):
                shutil.rmtree(path, ignore_errors=True)
                if not path.exists():
                    say(f"removed {path}, a checkpoint that was never finished")
        agreement.barrier("unfinished checkpoints removed")

    def restore(self, like: TrainState, *, seed: int) -> TrainState:
        """The newest sound state, placed as `like` is: on this mesh, whatever it was saved on.

        Each bad checkpoint is named, and moved to RUN/quarantine once a sound one is found. The
        result has no guard where none was saved.

        Raises:
          UserError: none is sound; with each reason. Then nothing is moved.
        """
        bad: dict[int, str] = {}
        for step in agreement.of_first(layout.steps(self._run)[::-1]):
            state, reason = self._attempt(step, like, seed)
            if not agreement.any_of(reason is not None):
                self._set_aside(bad)
                self._asked = self._saved = step
                self._record(step)
                return state
            bad[step] = reason or "another process cannot read it"
        raise UserError(
            f"no checkpoint of {self._run} is sound: "
            f"{'; '.join(f'step {step}: {reason}' for step, reason in bad.items())}. Nothing was "
            "moved or started afresh: bring one back, or take another --workdir"
        )

    def _attempt(self, step: int, like: TrainState, seed: int) -> tuple[Any, str | None]:
        """The state of a checkpoint, or what is wrong with it."""
        path = self._directory / str(step)
        found, expected, reason = None, None, layout.fault(path)
        if reason is None:
            try:
                expected = _expected(path, step, seed)
                found = _read(path, like)
            except UserError as error:
                reason = str(error)
            except Exception as error:  # the storage below Orbax raises nothing more special
                if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                    raise
                reason = f"it cannot be read: {first_line(error)}"
        # Digests are computed by all together: none may begin where another has nothing to add.
        if agreement.any_of(reason is not None) or found is None:
            return None, reason
        return found, _difference(found, step, expected)

    def _set_aside(self, bad: dict[int, str]) -> None:
        failure = None
        for step, reason in bad.items():
            text = f"the checkpoint of step {step} is bad: {reason}"
            events.record(self._run, "quarantined", step=step, reason=reason)
            missing = ownership.apart() and step not in layout.steps(self._run)
            if ownership.keeps() and not missing:
                try:
                    text += f"; it is now {quarantine.move(self._run, step, reason)}"
                except UserError as error:
                    failure = error
            warn(text)
        if not bad:
            return
        if agreement.any_of(failure is not None):  # here all wait for the first one
            raise failure or UserError("another process cannot move a bad checkpoint aside")
        self._manager.reload()

    def finish(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          UserError: the state last given to `save` is not.
        """
        self.settle(wait=True)
        if self._saved != self._asked:
            newest = "none" if self._saved is None else f"step {self._saved}"
            raise UserError(
                f"the state of step {self._asked} could not be saved, the newest checkpoint is "
                f"{newest}: free some space and give the same command again, which goes on there"
            )

    def close(self) -> None:
        """Waits for a save under way, also on SIGTERM, and closes; what fails then is a warning."""
        with preemption.kept():
            try:
                self.settle(wait=True)
                self._manager.close()
            except Exception as error:  # the storage below Orbax raises nothing more special
                warn(first_line(error))

    def _leave(self) -> None:
        """Waits for a save under way, and asks no other process: they may not be ending."""
        with preemption.kept(), contextlib.suppress(Exception):
            self._manager.wait_until_finished()

    def __enter__(self) -> Checkpoints:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes; one of several processes that fails leaves alone."""
        if error is None or jax.process_count() == 1:
            self.close()
        else:
            self._leave()


def _reason(error: Exception) -> str:
    """Why a save failed, as this process knows it."""
    late = isinstance(error, TimeoutError) or "DEADLINE_EXCEEDED" in str(error)
    if not late or jax.process_count() == 1:
        return first_line(error)
    before = error.__cause__ or error.__context__
    if isinstance(before, Exception):  # what failed here, and kept others waiting
        return _reason(before)
    return (
        "another process did not write its part in time (checkpoint.timeout_seconds): see its log "
        f"in {process_log.DIRECTORY}/"
    )


def _items(state: TrainState, step: int, config: Config, loss: float | None) -> Any:
    """What Orbax is given to write."""
    everything = _everything(state)
    arrays = {name: x for name, x in everything.items() if name != layout.GUARD}
    data: dict[str, Any] = {"next_step": step, "seed": config.seed}
    if loss is not None:
        data["eval_loss"] = float(loss)
    settings = places.as_given(dataclasses.asdict(config))
    sums = layout.Digests(
        leaves=digests.of_tree(everything),
        items={
            layout.DATA: layout.json_sha256(data),
            layout.CONFIG: layout.json_sha256(settings),
        },
    )
    items = {
        layout.STATE: writing.arrays(arrays),
        layout.DATA: ocp.args.JsonSave(data),
        layout.CONFIG: ocp.args.JsonSave(settings),
        layout.DIGESTS: ocp.args.JsonSave(sums.as_json()),
    }
    if state.guard is not None:
        items[layout.GUARD] = writing.arrays(state.guard)
    return ocp.args.Composite(**items)


def _expected(path: Path, step: int, seed: int) -> layout.Digests | None:
    """The digests of a checkpoint, None: it is older; its JSON items are compared with them.

    Raises:
      UserError: one differs, or it is of another step or seed.
    """
    expected = layout.read_digests(path)
    if expected is None:
        say(f"note: {path} is older than digests: its arrays are read unchecked")
    elif wrong := layout.wrong_items(path, expected):
        raise UserError(f"damaged: {digests.listed(wrong)}")
    data = layout.read_json(path, layout.DATA)
    place = {"next_step": data.get("next_step"), "seed": data.get("seed")}
    if place != {"next_step": step, "seed": seed}:
        raise UserError(f"it holds data position {place}; expected {step} and seed {seed}")
    return expected


def _read(path: Path, like: TrainState) -> TrainState:
    """The state of a checkpoint, as far as it lies on this process; waits for no other one."""
    wanted: dict[str, Any] = {"step": like.step, "params": like.params, "opt_state": like.opt_state}
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )

    def read(item: str, tree: Any) -> Any:
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            return checkpointer.restore(path / item, args=ocp.args.StandardRestore(_abstract(tree)))

    found = dict(read(layout.STATE, wanted))
    if like.guard is not None and layout.has(path, layout.GUARD):
        found[layout.GUARD] = read(layout.GUARD, like.guard)
    return TrainState(**found)


def _difference(found: TrainState, step: int, expected: layout.Digests | None) -> str | None:
    """In what a state differs from the one that was saved; all processes must ask."""
    if int(found.step) != step:
        return f"it holds step {int(found.step)}; expected {step}"
    if expected is None:
        return None
    compared = {
        name: text
        for name, text in expected.leaves.items()
        if found.guard is not None or name.partition("/")[0] != layout.GUARD
    }
    wrong = digests.differing(compared, digests.of_tree(_everything(found)))
    return f"damaged: {digests.listed(wrong)}" if wrong else None


def _everything(state: TrainState) -> dict[str, Any]:
    """All arrays of a state, by the names that digests have."""
    arrays = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    return arrays if state.guard is None else {**arrays, layout.GUARD: state.guard}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
