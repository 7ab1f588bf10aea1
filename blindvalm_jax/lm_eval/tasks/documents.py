"""The questions of our tasks as documents of the harness, which finds this file by its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import catalog


def questions(*, task: str, data: str = "", **_: Any) -> datasets.DatasetDict:
    """A task's questions under the corrected protocol, as the split "test".

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
    rows = [
        {
            "prompt": question.prompt.rstrip(),
            "candidates": list(question.candidates),
            "answer": question.answer,
            "item": question.item,
            "template": question.template,
        }
        for question in protocol.questions(protocol.items(Path(data).expanduser()))
    ]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
