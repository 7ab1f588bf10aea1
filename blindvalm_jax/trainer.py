"""Training as a function: from settings and a directory to a finished run."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from blindvalm_jax import (
    agreement,
    compilation,
    compiler_messages,
    config,
    distributed,
    events,
    fitting,
    guard,
    incidents,
    memory,
    metrics,
    optim,
    partitioning,
    planning,
    process_log,
    runs,
    sinks,
    step,
)
from blindvalm_jax.checkpoints.manager import Checkpoints
from blindvalm_jax.console import is_first, say
from blindvalm_jax.data import pipeline
from blindvalm_jax.errors import Preempted, print_error
from blindvalm_jax.goodput import Goodput, Loss
from blindvalm_jax.objectives.contrastive import Contrastive
from blindvalm_jax.objectives.language import Language
from blindvalm_jax.objectives.objective import Objective
from blindvalm_jax.objectives.shapes import Shapes, without_data
from blindvalm_jax.reporter import Reporter
from blindvalm_jax.survival import preemption
from blindvalm_jax.survival.watchdog import Watchdog
from blindvalm_jax.tasks.training import TrainingTasks, unanswered

DIVERGED = 43
_OBJECTIVES: dict[str, type[Language | Contrastive | Shapes]] = {
    "language": Language,
    "contrastive": Contrastive,
}


def train(
    settings: config.Config,
    workdir: Path,
    *,
    dry_run: bool = False,
    allow_changed: Sequence[str] = (),
) -> int:
    """Runs the training that `settings` describe in `workdir`; returns the exit code.

    allow_changed: settings of the run there that may differ, see `runs.check_resume`.

    Raises:
      UserError: the settings, files or the run in `workdir` do not fit together.
      Preempted: SIGTERM ended it, and what was done is saved.
    """
    with preemption.noticed() as notice, runs.held(workdir):
        return _train(settings, workdir, notice, dry_run=dry_run, allow_changed=allow_changed)


def _train(
    settings: config.Config,
    workdir: Path,
    notice: preemption.Notice,
    *,
    dry_run: bool,
    allow_changed: Sequence[str],
) -> int:
    # ---------------------------------------------------------------- where it runs
    if not is_first():
        process_log.begin(workdir, process=jax.process_index(), processes=jax.process_count())
    goodput = Goodput()
    mesh = partitioning.make_mesh(settings.mesh)
    of = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = jax.devices()[0].device_kind
    say(f"devices: {jax.device_count()} x {kind}{of}, mesh {dict(mesh.shape)}")
    distributed.check_rows(mesh)
    settings = fitting.kept(settings, workdir)
    saved = runs.check_resume(workdir, settings, allowed=allow_changed)
    resuming = saved is not None
    if not dry_run:
        distributed.first_then_others(lambda: sinks.check(settings.log, workdir))
    if settings.optimizer.warmup_steps >= settings.train.steps:
        say(
            f"note: optimizer.warmup_steps {settings.optimizer.warmup_steps} end after "
            f"train.steps {settings.train.steps}: the learning rate never reaches its peak"
        )

    # ---------------------------------------------------------------- inputs, model, compiled
    read = _OBJECTIVES[settings.train.objective]
    if dry_run and without_data(settings):
        read = Shapes
    given = fitting.provisional(settings)
    objective: Objective = distributed.first_then_others(
        lambda: read(given, workdir, mesh, resuming=resuming)
    )
    optimizer = optim.make(settings.optimizer, steps=settings.train.steps)
    guarded = guard.make(settings.train) is not None
    planned = compilation.abstract_state(objective.model, optimizer, mesh, guarded=guarded)
    frozen = objective.abstract_frozen()
    batch = objective.abstract_batch()
    partitioning.check_sharded({objective.trained: planned.params, **frozen}, mesh)
    about = describe_run(objective, mesh=mesh, state=planned, frozen=frozen, batch=batch)
    if resuming:
        runs.check_data(workdir, about)
    if (
        saved is not None
        and saved >= settings.train.steps
        and not lacks_evaluation(settings, workdir, saved)
    ):
        if not dry_run and is_first():
            runs.keep_places(workdir, about, resolved=objective.resolved())
        say(f"nothing to do: {workdir} has {saved} of {settings.train.steps} steps")
        if settings.eval.tasks and (command := unanswered(settings, workdir, step=saved)):
            say(f"its tasks were not asked at step {saved}: {command}")
        return 0
    if resuming:
        runs.say_other_code(workdir)
    tasks = None
    if settings.eval.tasks and isinstance(objective, Language):
        tasks = TrainingTasks(settings.eval, workdir, objective)
    start = None if resuming else objective.read_start(planned.params)
    begin = time.perf_counter()

    said: dict[config.TrainConfig, list[str]] = {}

    def compile_for(tried: config.Config) -> Any:
        update = compilation.make_update(
            tried, fitting.settled(objective.model, tried.train), optimizer
        )
        if not dry_run:
            return compilation.compile_step(update, planned, frozen, batch, mesh)
        with compiler_messages.heard() as said[tried.train]:
            return compilation.compile_step(update, planned, frozen, batch, mesh)

    with goodput.lost_to("compile"):
        if fitting.wanted(settings):
            settings, compiled = fitting.choose(settings, mesh, compile_for)
            objective.settle(settings)
        else:
            compiled = compile_for(settings)
    say(f"compiled in {time.perf_counter() - begin:.1f} s; {describe_memory(compiled)}")
    if dry_run:
        plan = planning.describe(
            compiled,
            mesh=mesh,
            state=planned,
            frozen=frozen,
            batch=batch,
            trained=objective.trained,
            said=said[settings.train],
        )
        planning.report(plan, workdir)
        return 0

    # ---------------------------------------------------------------- state, loop
    with Checkpoints(workdir, settings.checkpoint) as checkpoints:
        if resuming:
            state = checkpoints.restore(planned, seed=settings.seed)
            if guarded:
                state = compilation.with_guard(state, mesh)
            say(f"resumed at step {int(state.step)}")
            incidents.say_ended_before(workdir, step=int(state.step))
        else:
            state = compilation.init_state(
                objective.model, optimizer, seed=settings.seed, mesh=mesh, guarded=guarded
            )
            if start is not None:
                state = dataclasses.replace(state, params=start.into(state.params))
        first = int(state.step)
        frozen = objective.place_frozen(frozen, resuming=resuming)
        if is_first():
            runs.write_record(
                workdir, about, given=settings, resolved=objective.resolved(), step=first
            )
            runs.write_parameters(workdir, {objective.trained: state.params, **frozen})
            events.record(workdir, "resume" if resuming else "start", step=first)
        with distributed.together(), objective.batches(first) as batches:
            return loop(
                settings,
                workdir,
                objective,
                state=state,
                frozen=frozen,
                batches=batches,
                compiled=compiled,
                checkpoints=checkpoints,
                tasks=tasks,
                notice=notice,
                flops_per_unit=about[f"flops_per_{objective.unit}"]["total"],
                goodput=goodput,
            )


def loop(
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

    Raises:
      Preempted: SIGTERM came; the newest state is saved.
    """
    first, last = int(state.step), settings.train.steps
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
    every, tasks_every = settings.eval.every_steps, settings.eval.tasks_every_steps
    # Metrics are read one update late, so that an accelerator never waits for the host. A CPU has
    # done the next update by then, which would be counted as part of this one.
    late = jax.devices()[0].platform != "cpu"
    pending, damaged = None, objective.damaged
    notice.begin(first)
    with (
        reporter,
        notice.kept(),
        Watchdog(settings.train.watchdog_seconds) as watchdog,
    ):
        if lacks_evaluation(settings, workdir, first):
            say(f"held-out data was not evaluated at step {first} before the run ended: now")
            with pausing(reporter, watchdog, "evaluation"), notice.cutting_short():
                reporter.evaluated(first, objective.evaluate(state.params, frozen), damaged)
        if tasks is not None and first and first % tasks_every == 0 and tasks.lacks(first):
            say(f"tasks of step {first} were not answered before the run was cut off: asked now")
            with pausing(reporter, watchdog, "tasks"), notice.cutting_short():
                tasks.ask(first, state.params, frozen, report=reporter.answered)
        if notice.stopping:
            raise Preempted(preemption.NOTHING_LOST)
        batch = objective.to_device(next(batches))
        for done in range(first + 1, last + 1):
            reporter.trace_begins(done)
            state, scalars = compiled(state, frozen, batch)
            reporter.trace_ends(done, scalars)
            finished = done == last
            if not finished:
                batch = objective.to_device(next(batches))
            stopping = notice.stops(done)
            evaluating = every > 0 and (finished or done % every == 0) and not stopping
            asking = tasks is not None and (finished or done % tasks_every == 0)
            saving = finished or stopping or done % settings.checkpoint.every_steps == 0
            due = [pending] if pending else []
            pending = None
            if finished or done % settings.log.every_steps == 0:
                pending = (done, scalars)
                if (
                    evaluating or asking or saving or not late
                ):  # what is saved must have been reported
                    due.append(pending)
                    pending = None
            faults = [reporter.log(*report, batches.seconds_waited, damaged) for report in due]
            if saving or evaluating or asking:  # waits for the update: its time is not the pause's
                faults.append(reporter.divergence(scalars))
            if fault := next(filter(None, faults), None):
                reporter.diverged(done, fault)
                if is_first():
                    print_error(f"diverged at step {done}: {fault}")
                return DIVERGED
            watchdog.fed()
            loss = None
            if evaluating and not notice.came():
                with pausing(reporter, watchdog, "evaluation"), notice.cutting_short():
                    held_out = objective.evaluate(state.params, frozen)
                    reporter.evaluated(done, held_out, damaged)
                    loss = held_out["eval/loss"]
            if saving or notice.stopping:  # before tasks are asked: they cost no update
                with pausing(reporter, watchdog, "checkpoint"):
                    checkpoints.save(state, step=done, config=settings, loss=loss)
            checkpoints.settle()
            if tasks is not None and asking and not notice.came():
                with pausing(reporter, watchdog, "tasks"), notice.cutting_short():
                    tasks.ask(done, state.params, frozen, report=reporter.answered)
            if notice.stopping:
                with watchdog.paused():
                    checkpoints.save(state, step=done, config=settings, loss=loss)
                    checkpoints.finish()
                events.record(workdir, "preempted", step=done)
                raise Preempted(f"step {done} of {last} is saved, {preemption.NOTHING_LOST}")
        with watchdog.paused():
            checkpoints.finish()
        say(f"done: {last} steps, {workdir}")
        return 0


@contextlib.contextmanager
def pausing(reporter: Reporter, watchdog: Watchdog, what: Loss) -> Iterator[None]:
    """What is no update: neither timed nor watched."""
    with watchdog.paused(), reporter.pause(what):
        yield


def lacks_evaluation(settings: config.Config, workdir: Path, step: int) -> bool:
    """Whether a step was to be evaluated and has no loss: SIGTERM came before."""
    every, path = settings.eval.every_steps, workdir / "metrics.jsonl"
    due = every > 0 and step > 0 and (step == settings.train.steps or step % every == 0)
    lacks = due and path.exists() and "eval/loss" not in metrics.names_at(workdir, step)
    return agreement.first_says(lacks)


def describe_run(
    objective: Objective,
    *,
    mesh: Mesh,
    state: step.TrainState,
    frozen: Mapping[str, Any],
    batch: Any,
) -> dict[str, Any]:
    """What run.json says of the run; prints how large the model is."""
    sizes = {objective.trained: count(state.params), **{k: count(v) for k, v in frozen.items()}}
    held = partitioning.bytes_per_device((state, frozen))
    frozen_text = "".join(f", {sizes[name]:,} frozen in the {name}" for name in frozen)
    say(
        f"parameters: {sizes[objective.trained]:,} in the {objective.trained}{frozen_text}; "
        f"{held / 2**20:,.0f} MiB a device"
    )
    return {
        "mesh": dict(mesh.shape),
        "parameters": {**sizes, "bytes_per_device": held},
        **objective.describe(batch),
    }


def count(params: Any) -> int:
    """Number of parameters, the padding of the vocabulary included."""
    return sum(x.size for x in jax.tree.leaves(params))


def describe_memory(compiled: Any) -> str:
    """Memory of the compiled step on one device, where the backend tells."""
    plan = memory.plan(compiled)
    if plan is None:
        return "memory of the step unknown on this backend"
    return f"memory: {plan.held / 2**20:,.0f} MiB held, {plan.temporary / 2**20:,.0f} MiB in a step"
