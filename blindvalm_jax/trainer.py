"""Training as a function: from settings and a directory to a finished run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from blindvalm_jax import (
    checkpoint,
    compilation,
    config,
    metrics,
    optim,
    partitioning,
    runs,
    step,
)
from blindvalm_jax.console import say
from blindvalm_jax.data import pipeline
from blindvalm_jax.errors import print_error
from blindvalm_jax.objectives.contrastive import Contrastive
from blindvalm_jax.objectives.language import Language
from blindvalm_jax.objectives.objective import Objective
from blindvalm_jax.reporter import Reporter
from blindvalm_jax.tasks.training import TrainingTasks, unanswered

DIVERGED = 43
_OBJECTIVES: dict[str, type[Language | Contrastive]] = {
    "language": Language,
    "contrastive": Contrastive,
}


def train(settings: config.Config, workdir: Path, *, dry_run: bool = False) -> int:
    """Runs the training that `settings` describe in `workdir`; returns the exit code.

    Raises:
      UserError: the settings, files or the run in `workdir` do not fit together.
    """
    # ---------------------------------------------------------------- where it runs
    mesh = partitioning.make_mesh(settings.mesh)
    say(f"devices: {jax.device_count()} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}")
    saved = runs.check_resume(workdir, settings)
    resuming = saved is not None
    if settings.log.tensorboard:
        metrics.import_tensorboard()
    if settings.optimizer.warmup_steps >= settings.train.steps:
        say(
            f"note: optimizer.warmup_steps {settings.optimizer.warmup_steps} end after "
            f"train.steps {settings.train.steps}: the learning rate never reaches its peak"
        )

    # ---------------------------------------------------------------- inputs, model, compiled
    read = _OBJECTIVES[settings.train.objective]
    objective: Objective = read(settings, workdir, mesh, resuming=resuming)
    optimizer = optim.make(settings.optimizer, steps=settings.train.steps)
    planned = compilation.abstract_state(objective.model, optimizer, mesh)
    frozen = objective.abstract_frozen()
    batch = objective.abstract_batch()
    partitioning.check_sharded({objective.trained: planned.params, **frozen}, mesh)
    about = describe_run(objective, mesh=mesh, state=planned, frozen=frozen, batch=batch)
    if resuming:
        runs.check_data(workdir, about)
    if saved is not None and saved >= settings.train.steps:
        if not dry_run and jax.process_index() == 0:
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
    update = compilation.make_update(settings, objective.model, optimizer)
    compiled = compilation.compile_step(update, planned, frozen, batch, mesh)
    say(f"compiled in {time.perf_counter() - begin:.1f} s; {describe_memory(compiled)}")
    if dry_run:
        return 0

    # ---------------------------------------------------------------- state, loop
    with checkpoint.Checkpoints(workdir, settings.checkpoint) as checkpoints:
        if resuming:
            state = checkpoints.restore(planned, seed=settings.seed)
            say(f"resumed at step {int(state.step)}")
        else:
            state = compilation.init_state(
                objective.model, optimizer, seed=settings.seed, mesh=mesh
            )
            if start is not None:
                state = dataclasses.replace(state, params=start.into(state.params))
        first = int(state.step)
        frozen = objective.place_frozen(frozen, resuming=resuming)
        runs.write_record(workdir, about, given=settings, resolved=objective.resolved(), step=first)
        runs.write_parameters(workdir, {objective.trained: state.params, **frozen})
        with objective.batches(first) as batches:
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
                flops_per_unit=about[f"flops_per_{objective.unit}"]["total"],
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
    checkpoints: checkpoint.Checkpoints,
    tasks: TrainingTasks | None,
    flops_per_unit: float,
) -> int:
    """Updates until the last step, with metrics, evaluation, tasks and checkpoints on the way."""
    first, last = int(state.step), settings.train.steps
    reporter = Reporter(
        settings,
        workdir,
        first=first,
        unit=objective.unit,
        units_per_row=objective.units_per_row,
        flops_per_unit=flops_per_unit,
    )
    every, tasks_every = settings.eval.every_steps, settings.eval.tasks_every_steps
    # Metrics are read one update late, so that an accelerator never waits for the host. A CPU has
    # done the next update by then, which would be counted as part of this one.
    late = jax.devices()[0].platform != "cpu"
    pending = None
    try:
        if tasks is not None and first and first % tasks_every == 0 and tasks.lacks(first):
            say(f"tasks of step {first} were not answered before the run was cut off: asked now")
            begin = time.perf_counter()
            tasks.ask(first, state.params, frozen, report=reporter.answered)
            reporter.timer.pause(time.perf_counter() - begin)
        batch = objective.to_device(next(batches))
        for done in range(first + 1, last + 1):
            state, scalars = compiled(state, frozen, batch)
            finished = done == last
            if not finished:
                batch = objective.to_device(next(batches))
            evaluating = every > 0 and (finished or done % every == 0)
            asking = tasks is not None and (finished or done % tasks_every == 0)
            saving = finished or done % settings.checkpoint.every_steps == 0
            due = [pending] if pending else []
            pending = None
            if finished or done % settings.log.every_steps == 0:
                pending = (done, scalars)
                if (
                    evaluating or asking or saving or not late
                ):  # what is saved must have been reported
                    due.append(pending)
                    pending = None
            sound = all(reporter.log(*report, batches.seconds_waited) for report in due)
            if saving or evaluating or asking:  # waits for the update: its time is not the pause's
                sound = sound and reporter.is_finite(scalars)
            if not sound:
                if jax.process_index() == 0:
                    print_error(f"diverged at step {done}: the loss or a norm is not finite")
                return DIVERGED
            begin = time.perf_counter()
            if evaluating:
                reporter.evaluated(done, objective.evaluate(state.params, frozen))
            if saving:  # before tasks are asked: nothing they meet costs an update
                checkpoints.save(state, step=done, config=settings)
            if tasks is not None and asking:
                tasks.ask(done, state.params, frozen, report=reporter.answered)
            reporter.timer.pause(time.perf_counter() - begin)
        checkpoints.wait()
        say(f"done: {last} steps, {workdir}")
        return 0
    finally:
        reporter.close()


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
    plan = compilation.memory_plan(compiled)
    if plan is None:
        return "memory of the step unknown on this backend"
    return f"memory: {plan.held / 2**20:,.0f} MiB held, {plan.temporary / 2**20:,.0f} MiB in a step"
