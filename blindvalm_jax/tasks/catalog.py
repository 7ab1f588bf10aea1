"""All tasks by name, and what one gets without a model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import last_word, perplexity, texts, topics, visual, visual_world
from blindvalm_jax.tasks.last_word import LastWordTask
from blindvalm_jax.tasks.perplexity import TextTask
from blindvalm_jax.tasks.questions import Question
from blindvalm_jax.tasks.task import GROUPS, ChoiceTask
from blindvalm_jax.tasks.texts import OwnTexts

TASKS = {task.name: task for task in (*visual.TASKS, *topics.TASKS)}
OF_WORLDS = {task.name: task for task in visual_world.TASKS}  # each world has files of its own
TEXTS = {task.name: task for task in texts.TASKS}
Task = ChoiceTask | TextTask | LastWordTask | OwnTexts


def chosen(names: Sequence[str]) -> list[Task]:
    """Tasks by their names or those of groups, each once, in the order of the catalogue.

    text:GLOB and file:GLOB name texts of one's own; they come last.

    Raises:
      UserError: nothing has such a name, or two texts of one's own are called alike.
    """
    known: dict[str, Task] = {**TASKS, **TEXTS, **OF_WORLDS}
    given = {name: task for name in names if (task := texts.own(name)) is not None}
    unknown = [name for name in names if name not in (*known, *given, *GROUPS)]
    if unknown or not names:
        raise UserError(
            f"--tasks must be names or groups ({', '.join(GROUPS)}), got {', '.join(unknown)!r}; "
            f"known: {', '.join(known)}, text:PATH, file:PATH"
        )
    found = [task for task in known.values() if {task.name, task.group} & set(names)]
    return [*found, *texts.told_apart([*given.values()])]


def published_faults(name: str) -> tuple[str, ...]:
    """What is wrong with a task as it was published; none of one that was not."""
    task = TEXTS.get(name)
    if isinstance(task, LastWordTask):
        return last_word.FAULTS
    if isinstance(task, TextTask):
        return () if task.blocks is None else perplexity.FAULTS
    protocol = TASKS[name].published if name in TASKS else None
    return () if protocol is None else protocol.faults


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Accuracies without a model; label: the answer that is right most often.

    majority: of always giving that answer; random: of drawing a candidate.
    """

    label: str
    majority: float
    random: float


def baselines(questions: Sequence[Question]) -> Baselines:
    """Of what is asked.

    Where candidates differ from question to question, the answer is the place of the candidate.
    """
    if len({question.candidates for question in questions}) == 1:
        right = Counter(question.candidates[question.answer] for question in questions)
    else:
        right = Counter(f"candidate {question.answer + 1}" for question in questions)
    [(label, count)] = right.most_common(1)
    drawn = sum(1 / len(question.candidates) for question in questions) / len(questions)
    return Baselines(label, count / len(questions), drawn)
