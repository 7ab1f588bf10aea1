"""What held-out objects of a toy world look like, asked in the wordings that its text has.

The file is made with the world where `eval.tasks_data=toyworld`; only pictures show these objects.
Candidates are the values that one of them has.
"""

from __future__ import annotations

from pathlib import Path

from blindvalm_jax.tasks import readers
from blindvalm_jax.tasks.questions import Item, asking
from blindvalm_jax.tasks.task import ChoiceTask, Protocol
from blindvalm_jax.toyworld.templates import STATEMENTS

FILE = "toyworld_heldout.jsonl"


def _task(attribute: str) -> ChoiceTask:
    def read(path: Path) -> list[Item]:
        rows = readers.json_rows(path, ("name", attribute))
        return [Item(id=x["name"], words={"item": x["name"]}, answer=x[attribute]) for x in rows]

    templates = [text.format(name="[ITEM]") for text in STATEMENTS[attribute]]
    way = Protocol(files=(FILE,), read=read, ask=asking(templates))
    return ChoiceTask(
        name=f"toyworld_{attribute}", group=None, source="a toy world of its own", corrected=way
    )


TASKS = tuple(_task(attribute) for attribute in STATEMENTS)
