"""Tasks that a run is asked while it trains, with the parameters where they are.

`eval/results.json` of the run has the newest answers, as the command would write them;
metrics.jsonl has the score of each task under eval/tasks/NAME.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blindvalm_jax import events, metrics, runs, trained
from blindvalm_jax.command_line import print_error
from blindvalm_jax.config import Config, EvalConfig
from blindvalm_jax.errors import UserError
from blindvalm_jax.objectives.language import Language
from blindvalm_jax.tasks import catalog, evaluation, identity, results, standing
from blindvalm_jax.tasks.scoring import Scorer
from blindvalm_jax.tasks.task import ChoiceTask

_UNANSWERED = "unanswered"  # of events.jsonl


class TrainingTasks:
    """Tasks whose files are read, and the model that is trained, to ask it now and then."""

    def __init__(self, settings: EvalConfig, workdir: Path, objective: Language) -> None:
        """Reads the files and the tokenizer; compiles nothing yet.

        Raises:
          UserError: a task or its file is not there or not what it should be, or the model cannot
            be asked.
        """
        self._workdir, self._protocol = workdir, settings.tasks_protocol
        self._out = workdir / "eval"
        self._model = trained.in_training(objective)
        try:
            self._scorer = Scorer(self._model)
            data = Path(settings.tasks_data).expanduser() if settings.tasks_data else None
            self._asked = evaluation.read(_names(settings), self._protocol, data)
            evaluation.rehearse(self._asked, self._model)
        except UserError as error:
            raise _of_settings(error, settings) from error

    def ask(
        self,
        step: int,
        params: Any,
        frozen: Mapping[str, Any],
        *,
        report: Callable[[int, Mapping[str, float]], None],
    ) -> None:
        """Asks at a step, and reports each task's score: an accuracy as a share, or a perplexity.

        If they cannot be asked or written, that is said on stderr and ends no training.
        """
        model = dataclasses.replace(self._model, params=params, frozen=frozen, step=step)
        self._scorer.ask(params, frozen)
        try:
            with standing.held(self._out):
                found = evaluation.run(
                    self._asked,
                    self._scorer,
                    model.tokenizer,
                    protocol=self._protocol,
                    out=self._out,
                    about=identity.about(str(self._workdir), model),
                    in_training=True,
                )
        except (UserError, OSError) as error:
            print_error(f"tasks of step {step} are not answered: {error}; training goes on")
            events.record(self._workdir, _UNANSWERED, step=step, reason=str(error))
            return
        report(step, scores({one.name: found["tasks"][one.name] for one in self._asked}))

    def lacks(self, step: int) -> bool:
        """Whether a step has no scores of these tasks, as that of a run cut off while it asked."""
        known = metrics.names_at(self._workdir, step)
        return not ({_metric(one.name) for one in self._asked} <= known)


def scores(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """By task an accuracy as a share, or a perplexity, inf where it is no float."""
    return {
        _metric(name): math.inf if entry["score"] is None else entry["score"]
        for name, entry in tasks.items()
    }


def _metric(task: str) -> str:
    return f"eval/tasks/{task}"


def cut_off(settings: Config, workdir: Path, *, step: int) -> bool:
    """Whether a run with all its updates done was ended before their tasks were answered.

    False where they could not be answered, or settings named others then.

    Raises:
      UserError: there is no such task.
    """
    ended = step == settings.train.steps and (workdir / "metrics.jsonl").exists()
    if not settings.eval.tasks or not ended:
        return False
    if runs.given_before(workdir)["eval"].get("tasks") != settings.eval.tasks:
        return False
    if {_metric(name) for name in _wanted(settings)} <= metrics.names_at(workdir, step):
        return False
    tried = (entry for entry in events.read(workdir) if entry["event"] == _UNANSWERED)
    return not any(entry["step"] == step for entry in tried)


def unanswered(settings: Config, workdir: Path, *, step: int) -> str:
    """The command that asks a run what it was not asked at its last step; "" if nothing is left.

    Raises:
      UserError: there is no such task.
    """
    tasks, protocol = settings.eval, settings.eval.tasks_protocol
    if _wanted(settings) <= _answered(workdir / "eval", step=step, protocol=protocol):
        return ""
    given = {
        **{"workdir": workdir, "tasks": ",".join(_names(tasks)), "data": tasks.tasks_data},
        **{"protocol": protocol, "dtype": settings.train.dtype},
    }
    flags = " ".join(
        f"--{name}={shlex.quote(str(value))}" for name, value in given.items() if value
    )
    return f"python -m blindvalm_jax.evaluate {flags}"


def _wanted(settings: Config) -> set[str]:
    """The tasks that settings name and their protocol has.

    Raises:
      UserError: there is no such task.
    """
    try:
        chosen = catalog.chosen(_names(settings.eval))
    except UserError as error:
        raise _of_settings(error, settings.eval) from error
    protocol = settings.eval.tasks_protocol
    return {
        task.name
        for task in chosen
        if not isinstance(task, ChoiceTask) or protocol in task.protocols
    }


def _answered(directory: Path, *, step: int, protocol: str) -> set[str]:
    """Tasks of which there are answers at a step, wherever they were put."""
    found = set()
    for place in standing.everywhere(directory):
        there = standing.read(place)
        if there is not None and not there.damaged and there.head.get("step") == step:
            found |= {
                name
                for name, entry in there.sound.items()
                if entry["protocol"] == protocol and results.holds_lines(place, name, entry)
            }
    return found


def _names(settings: EvalConfig) -> list[str]:
    return [name.strip() for name in settings.tasks.split(",")]


def _of_settings(error: UserError, settings: EvalConfig) -> UserError:
    """What the command would say, of the settings."""
    told = str(error).replace("--tasks", "eval.tasks").replace("--data", "eval.tasks_data")
    told = told.replace("--protocol", "eval.tasks_protocol")
    return UserError(f"eval.tasks={settings.tasks}: {told}")
