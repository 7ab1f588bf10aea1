"""The loop of a run: updates until the last step, and what is done between two of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from blindvalm_jax import agreement, config, events, metrics, step
from blindvalm_jax.checkpoints.manager import Checkpoints
from blindvalm_jax.command_line import print_error
from blindvalm_jax.console import is_first, say
from blindvalm_jax.data import pipeline
from blindvalm_jax.errors import DIVERGED, Preempted
from blindvalm_jax.goodput import Goodput, Loss
from blindvalm_jax.objectives.objective import Objective
from blindvalm_jax.reporter import Reporter
from blindvalm_jax.survival import preemption
from blindvalm_jax.survival.watchdog import Watchdog
from blindvalm_jax.tasks.training import TrainingTasks


def run(
    settings: config.Config,
    workdir: Path,
    objective: Objective,
    *,
    state: step.TrainState,
    frozen: Mapping[str, Any],
    batches: pipeline.Batches,
    compiled: Any,
    checkpoints: Checkpoints,
    tasks: TrainingTasks | None,
    notice: preemption.Notice,
    flops_per_unit: float,
    goodput: Goodput,
) -> int:
    """Updates until the last step, with metrics, evaluation, tasks and checkpoints on the way.

    Returns the exit code.

    Raises:
      Preempted: SIGTERM came; the newest state is saved.
    """
    first = int(state.step)
    reporter = Reporter(
        settings,
        workdir,
        first=first,
        unit=objective.unit,
        units_per_row=objective.units_per_row,
        flops_per_unit=flops_per_unit,
        guard=state.guard,
        goodput=goodput,
    )
    notice.begin(first)
    with (
        reporter,
        notice.kept(),
        Watchdog(settings.train.watchdog_seconds) as watchdog,
    ):
        between = _Between(
            settings, workdir, objective, frozen, checkpoints, tasks, notice, reporter, watchdog
        )
        between.catch_up(state, first)
        batch = objective.to_device(next(batches))
        last = settings.train.steps
        for done in range(first + 1, last + 1):
            reporter.trace_begins(done)
            state, scalars = compiled(state, frozen, batch)
            reporter.trace_ends(done, scalars)
            if done < last:
                batch = objective.to_device(next(batches))
            due = between.due(done)
            if fault := between.report(due, scalars, waited=batches.seconds_waited):
                reporter.diverged(done, fault)
                if is_first():
                    print_error(f"diverged at step {done}: {fault}")
                return DIVERGED
            watchdog.fed()
            between.do(due, state)
        with watchdog.paused():
            checkpoints.finish()
        say(f"done: {last} steps, {workdir}")
        return 0


@dataclasses.dataclass(frozen=True)
class _Due:
    """What follows an update."""

    step: int
    logged: bool
    evaluated: bool
    asked: bool
    saved: bool

    @property
    def kept(self) -> bool:
        """Whether its state is used for more than the next update: then it must be sound."""
        return self.evaluated or self.asked or self.saved


@dataclasses.dataclass
class _Between:
    """What is done between two updates."""

    settings: config.Config
    workdir: Path
    objective: Objective
    frozen: Mapping[str, Any]
    checkpoints: Checkpoints
    tasks: TrainingTasks | None
    notice: preemption.Notice
    reporter: Reporter
    watchdog: Watchdog

    def __post_init__(self) -> None:
        # Metrics are read one update late, so that an accelerator never waits for the host. A CPU
        # has done the next update by then, which would be counted as part of this one.
        self._late = jax.devices()[0].platform != "cpu"
        self._unread: list[tuple[int, Mapping[str, jax.Array]]] = []

    def catch_up(self, state: step.TrainState, first: int) -> None:
        """Does what SIGTERM has cut short at the step that the run goes on from.

        Raises:
          Preempted: it came again.
        """
        if lacks_evaluation(self.settings, self.workdir, first):
            say(f"held-out data was not evaluated at step {first} before the run ended: now")
            self._evaluate(state, first)
        every, last = self.settings.eval.tasks_every_steps, self.settings.train.steps
        due = first and (first == last or first % every == 0)
        if self.tasks is not None and due and self.tasks.lacks(first):
            say(f"tasks of step {first} were not answered before the run was cut off: asked now")
            self._ask(self.tasks, state, first)
        if self.notice.stopping:
            raise Preempted(preemption.NOTHING_LOST)

    def due(self, done: int) -> _Due:
        """What follows an update; all processes must ask, after each."""
        settings = self.settings
        stopping = self.notice.stops(done)

        def at(every: int) -> bool:
            return done == settings.train.steps or done % every == 0

        return _Due(
            step=done,
            logged=at(settings.log.every_steps),
            evaluated=settings.eval.every_steps > 0
            and at(settings.eval.every_steps)
            and not stopping,
            asked=self.tasks is not None and at(settings.eval.tasks_every_steps),
            saved=stopping
            or at(settings.checkpoint.every_steps)
            or done in settings.checkpoint.keep_steps,
        )

    def report(self, due: _Due, scalars: Mapping[str, jax.Array], *, waited: float) -> str | None:
        """Reports updates; why the run has diverged, if it has."""
        ready, self._unread = self._unread, []
        if due.logged:
            # what is kept must have been reported
            at_once = due.kept or not self._late
            (ready if at_once else self._unread).append((due.step, scalars))
        damaged = self.objective.damaged
        faults = [self.reporter.log(*update, waited, damaged) for update in ready]
        if due.kept:  # waits for the update: its time is not that of a pause
            faults.append(self.reporter.divergence(scalars))
        return next(filter(None, faults), None)

    def do(self, due: _Due, state: step.TrainState) -> None:
        """Evaluates, saves and asks, as far as SIGTERM lets it.

        Raises:
          Preempted: it came; the state is saved.
        """
        loss = None
        if due.evaluated and not self.notice.came():
            loss = self._evaluate(state, due.step)
        if due.saved or self.notice.stopping:  # before tasks are asked: they cost no update
            with self._pausing("checkpoint"):
                self._save(state, due.step, loss)
        self.checkpoints.settle()
        if self.tasks is not None and due.asked and not self.notice.came():
            self._ask(self.tasks, state, due.step)
        if self.notice.stopping:
            with self.watchdog.paused():
                self._save(state, due.step, loss)
                self.checkpoints.finish()
            events.record(self.workdir, "preempted", step=due.step)
            raise Preempted(
                f"step {due.step} of {self.settings.train.steps} is saved, "
                f"{preemption.NOTHING_LOST}"
            )

    def _evaluate(self, state: step.TrainState, done: int) -> float | None:
        """The loss on held-out data; None: SIGTERM has cut it short."""
        with self._pausing("evaluation"), self.notice.cutting_short():
            held_out = self.objective.evaluate(state.params, self.frozen)
            self.reporter.evaluated(done, held_out, self.objective.damaged)
            return held_out["eval/loss"]
        return None

    def _ask(self, tasks: TrainingTasks, state: step.TrainState, done: int) -> None:
        with self._pausing("tasks"), self.notice.cutting_short():
            tasks.ask(done, state.params, self.frozen, report=self.reporter.answered)

    def _save(self, state: step.TrainState, done: int, loss: float | None) -> None:
        self.checkpoints.save(state, step=done, config=self.settings, loss=loss)

    @contextlib.contextmanager
    def _pausing(self, what: Loss) -> Iterator[None]:
        """What is no update: neither timed nor watched."""
        with self.watchdog.paused(), self.reporter.pause(what):
            yield


def lacks_evaluation(settings: config.Config, workdir: Path, step: int) -> bool:
    """Whether a step was to be evaluated and has no loss: SIGTERM came before."""
    every, path = settings.eval.every_steps, workdir / "metrics.jsonl"
    due = every > 0 and step > 0 and (step == settings.train.steps or step % every == 0)
    lacks = due and path.exists() and "eval/loss" not in metrics.names_at(workdir, step)
    return agreement.first_says(lacks)
