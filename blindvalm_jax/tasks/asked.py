"""What every kind of task comes to once its files are read: it can be put to a model."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.tasks.scoring import Scorer


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a task has given: its entry of results.json, a line for each question, and notes."""

    entry: dict[str, Any]
    lines: list[dict[str, Any]]
    notes: tuple[str, ...] = ()


class Asked(Protocol):
    """A task under one protocol, its files read."""

    @property
    def name(self) -> str:
        """Of the task."""

    def run(self, scorer: Scorer, tokenizer: Tokenizer) -> Outcome:
        """Asks the model."""


@dataclasses.dataclass(frozen=True)
class Windows:
    """How texts are cut, by `windows.cut`; 0: as the model was trained, and half the window."""

    window: int = 0
    stride: int = 0
