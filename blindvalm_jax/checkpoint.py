"""Checkpoints of a run: parameters, optimizer, the data position; Orbax does the writing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from blindvalm_jax.config import CheckpointConfig, Config
from blindvalm_jax.errors import UserError, first_line
from blindvalm_jax.step import TrainState


class Checkpoints:
    """Saves in the background and restores; a step directory appears only when it is whole."""

    def __init__(self, workdir: Path, config: CheckpointConfig) -> None:
        """Opens <workdir>/checkpoints."""
        self._directory = (workdir / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_names=("state", "data", "config"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.LatestN(config.keep),
                enable_async_checkpointing=True,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """Updates done in the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, *, step: int, config: Config) -> None:
        """Saves in the background.

        The data position is one integer: batches are a pure function of (seed, step).
        """
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave({"next_step": step, "seed": config.seed}),
                    config=ocp.args.JsonSave(dataclasses.asdict(config)),
                ),
                force=True,
            )

    def restore(self, like: TrainState, *, seed: int) -> TrainState:
        """The newest state, placed as `like` is: on this mesh, whatever mesh it was saved on.

        Raises:
          UserError: the checkpoint cannot be read, or its data position is not that of its state.
        """
        step = self.latest_step
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # the storage below Orbax raises nothing more special
            raise UserError(
                f"checkpoint {self._directory / str(step)} cannot be restored: "
                f"{first_line(error)}; delete it to go on from the one before"
            ) from error
        if restored.data != {"next_step": step, "seed": seed} or int(restored.state.step) != step:
            raise UserError(
                f"checkpoint {self._directory / str(step)} holds step {int(restored.state.step)} "
                f"and data position {restored.data}; expected {step} and seed {seed}: delete it"
            )
        return restored.state

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          UserError: it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what the storage says of a save, this one or the one before, into one line."""
        try:
            yield
        except Exception as error:  # the storage below Orbax raises nothing more special
            raise UserError(
                f"a checkpoint cannot be written to {self._directory}: {first_line(error)}"
            ) from error

    def close(self) -> None:
        """Waits for saves under way and closes."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes."""
        self.close()
