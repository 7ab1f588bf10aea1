"""Tasks that a run is asked while it trains, with the parameters where they are.

`eval/results.json` of the run has the newest answers, as the command would write them;
metrics.jsonl has the score of each task under eval/tasks/NAME.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from blindvalm_jax import trained
from blindvalm_jax.config import EvalConfig
from blindvalm_jax.errors import UserError
from blindvalm_jax.objectives.language import Language
from blindvalm_jax.tasks import evaluation
from blindvalm_jax.tasks.scoring import Scorer


class TrainingTasks:
    """Tasks whose files are read, and the model that is trained, to ask it now and then."""

    def __init__(self, settings: EvalConfig, workdir: Path, objective: Language) -> None:
        """Reads the files and the tokenizer; compiles nothing yet.

        Raises:
          UserError: a task or its file is not there or not what it should be, or the model cannot
            be asked.
        """
        self._workdir, self._protocol = workdir, settings.tasks_protocol
        self._model = trained.in_training(objective)
        names = [name.strip() for name in settings.tasks.split(",")]
        try:
            if jax.process_count() > 1:
                raise UserError("tasks are asked by runs of one process: leave them out")
            self._scorer = Scorer(self._model)
            data = Path(settings.tasks_data).expanduser()
            self._asked = evaluation.read(names, self._protocol, data)
            evaluation.rehearse(self._asked, self._model)
        except UserError as error:
            told = str(error).replace("--tasks", "eval.tasks").replace("--data", "eval.tasks_data")
            told = told.replace("--protocol", "eval.tasks_protocol")
            raise UserError(f"eval.tasks={settings.tasks}: {told}") from error

    def ask(self, step: int, params: Any, frozen: Mapping[str, Any]) -> dict[str, float]:
        """What metrics.jsonl says of each task at a step, see `scores`."""
        self._scorer.ask(params, frozen)
        found = evaluation.run(
            self._asked,
            self._scorer,
            self._model.tokenizer,
            protocol=self._protocol,
            out=self._workdir / "eval",
            about=evaluation.about(
                str(self._workdir), step=step, dtype=self._model.settings.train.dtype
            ),
            quiet=True,
        )
        return scores({one.name: found["tasks"][one.name] for one in self._asked})


def scores(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """By task an accuracy as a share, or a perplexity, inf where it is no float."""
    return {
        f"eval/tasks/{name}": math.inf if entry["score"] is None else entry["score"]
        for name, entry in tasks.items()
    }
