"""The questions of our tasks as documents of the harness, which finds this file by its path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.samplers import ContextSampler

from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import catalog


def questions(*, task: str, data: str = "", **_: Any) -> datasets.DatasetDict:
    """A task's questions under the corrected protocol, as the split "test".

    They stand item by item, each with all its templates, so that --limit asks whole items; `about`
    is what one asks about: its item, or the two things that it compares.

    data: directory of the tasks' files, or one above it (--metadata '{"data": "DIR"}').

    Raises:
      UserError: no directory is named, or the task's file is not there or not what it should be.
    """
    if not data:
        raise UserError(
            f"""the files of {task} are needed: add --metadata '{{"data": "DIR"}}', """
            "the directory that holds them"
        )
    protocol = catalog.TASKS[task].protocols["corrected"]
    asked = protocol.questions(protocol.items(Path(data).expanduser()))
    places: dict[str, int] = {}
    for question in asked:
        places.setdefault(question.item, len(places))
    rows = [
        {
            "prompt": question.prompt.rstrip(),
            "candidates": list(question.candidates),
            "answer": question.answer,
            "item": question.item,
            "template": question.template,
            "about": list(question.objects or (question.item,)),
        }
        for question in sorted(asked, key=lambda question: places[question.item])
    ]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})


class OtherItems(ContextSampler):
    """Examples (--num_fewshot) about other things than the question, whose answer they would tell.

    The harness's own sampler leaves out the question alone: not its other templates, nor the pair
    turned round.
    """

    def __init__(self, df: Sequence[dict[str, Any]] | None = None, **given: Any) -> None:
        """Counts what the documents are about; the rest as the harness's."""
        super().__init__(df, **given)
        self._counts = Counter(thing for document in self.df for thing in document["about"])

    def sample(
        self,
        n: int,
        eval_doc: dict[str, Any] | None = None,
        df: Sequence[dict[str, Any]] | None = None,
        **_: Any,
    ) -> list[dict[str, Any]]:
        """Draws n documents for a question, of its own documents.

        Raises:
          UserError: there are not so many about other things.
        """
        own = set() if eval_doc is None else {*eval_doc["about"]}
        # So many drawn documents at most are left out again.
        alike = sum(self._counts[thing] for thing in own)
        drawn = self.rnd.sample(self.df, min(n + alike, len(self.df)))
        found = [document for document in drawn if own.isdisjoint(document["about"])][:n]
        if len(found) < n:
            raise UserError(
                f"--num_fewshot={n}: {len(found)} questions are about other things than "
                f"{', '.join(sorted(own))}: ask for fewer"
            )
        return found
