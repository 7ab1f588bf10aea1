"""What the training loop asks of an objective: a language model, or CLIP's two towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from blindvalm_jax import step
from blindvalm_jax.config import Config
from blindvalm_jax.data.pipeline import Batches

Scalars = dict[str, float]


class Start(Protocol):
    """Parameters from elsewhere that a run begins with."""

    def into(self, params: Any) -> Any:
        """Fresh parameters with these in their place, placed as they were."""


class Objective(Protocol):
    """The inputs of a run, read and checked, and the model that is trained on them.

    unit: what the speed is counted in ("token" or "pair"); units_per_row: of a batch's row;
    trained: name of what is trained in tables of parameters; start: what it begins with, if named;
    damaged: what was found damaged in its data so far, and replaced.
    """

    unit: str
    units_per_row: int
    trained: str
    damaged: list[str]

    @property
    def model(self) -> step.Model:
        """What is trained, as pure functions."""

    def abstract_frozen(self) -> dict[str, Any]:
        """Shapes and shardings of the parameters that do not learn, by name."""

    def abstract_batch(self) -> Any:
        """Shapes and shardings of a batch."""

    def read_start(self, shapes: Any) -> Start | None:
        """What `train.init_from` names, checked against the shapes of the parameters."""

    def place_frozen(self, like: Mapping[str, Any], *, resuming: bool) -> dict[str, Any]:
        """The parameters that do not learn on the devices; a new run keeps a copy of them."""

    def batches(self, start_step: int) -> Batches:
        """Rows of this process from a step on."""

    def to_device(self, rows: Mapping[str, Any]) -> Any:
        """Rows of this process as a batch of the global one."""

    def evaluate(self, params: Any, frozen: Mapping[str, Any]) -> Scalars:
        """Metrics on held-out data, "eval/loss" among them."""

    def describe(self, batch: Any) -> dict[str, Any]:
        """What run.json says of data, models and cost; flops_per_<unit> has a "total"."""

    def settle(self, settings: Config) -> None:
        """Takes over the remat and microbatches that were chosen."""

    def resolved(self) -> Config:
        """The settings with everything filled in that was left to data and devices."""
