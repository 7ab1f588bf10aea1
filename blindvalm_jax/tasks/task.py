"""A task under its two protocols: as it was published, faults included, and as it should be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from blindvalm_jax.tasks import readers
from blindvalm_jax.tasks.questions import Ask, Item, Question
from blindvalm_jax.tasks.ties import Ties

# How the tokens c_1 ... c_n of a candidate become its score behind a prompt.
#   continuation:     sum of log p(c_i | prompt, c_1 ... c_i-1)
# The others read all tokens from the distribution of the next token alone:
#   sum, mean:        of log p(c_i | prompt)
#   sum_from_one, mean_from_one: the same, where summing began at 1
#   mean_probability: of p(c_i | prompt)
Score = Literal["continuation", "sum", "mean", "sum_from_one", "mean_from_one", "mean_probability"]
Group = Literal["vlu", "nlu", "lm"]
GROUPS: tuple[Group, ...] = ("vlu", "nlu", "lm")
ONE_DISTRIBUTION = "the tokens of a candidate are all read from the distribution of the next one"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a task is read, asked and scored.

    files: names of its file, the preferred one first. scores: the first decides, others are
    reported beside it. faults: what is wrong with it. share: what the accuracy is multiplied by,
    as the published program counts. spelled: an answer counts only if the decoded tokens of the
    candidate spell it. start: a prompt stands behind the end of a text, as in training. ties: what
    decides between candidates that score alike.
    """

    files: tuple[str, ...]
    read: readers.Read
    ask: Ask
    scores: tuple[Score, ...] = ("continuation",)
    faults: tuple[str, ...] = ()
    share: float = 1.0
    spelled: bool = False
    start: bool = True
    ties: Ties = "first"

    def items(self, data: Path) -> list[Item]:
        """The data set in a directory.

        Raises:
          UserError: its file is not there, or is not what it should be.
        """
        return self.read(readers.find(data, self.files))

    def file(self, data: Path) -> readers.File:
        """The file that `items` reads; raises as it does."""
        return readers.read_file(readers.find(data, self.files), self.files)

    def questions(self, items: list[Item]) -> list[Question]:
        """All that is asked about the items."""
        return list(self.ask(items))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceTask:
    """A task in which one of several candidates is right.

    group: None of a task that its name alone chooses. source: who made the data. published: None
    where the reference has no script for it. only_published: it is here to repeat printed figures,
    and is not asked under corrected.
    """

    name: str
    group: Group | None
    source: str
    corrected: Protocol
    published: Protocol | None = None
    only_published: bool = False

    @property
    def protocols(self) -> dict[str, Protocol]:
        """Those that it is asked under, by name."""
        found = {} if self.only_published else {"corrected": self.corrected}
        return found if self.published is None else {**found, "published": self.published}
