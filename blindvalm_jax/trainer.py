"""Training as a function: from settings and a directory to a finished run."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from blindvalm_jax import (
    compilation,
    compiler_messages,
    config,
    distributed,
    events,
    fitting,
    guard,
    incidents,
    lifetime,
    loop,
    memory,
    optim,
    ownership,
    partitioning,
    placement,
    planning,
    process_layout,
    process_log,
    runs,
    sinks,
    step,
)
from blindvalm_jax.checkpoints.manager import Checkpoints
from blindvalm_jax.console import is_first, say
from blindvalm_jax.goodput import Goodput
from blindvalm_jax.objectives.contrastive import Contrastive
from blindvalm_jax.objectives.language import Language
from blindvalm_jax.objectives.objective import Objective, Start
from blindvalm_jax.objectives.shapes import check_index, without_data
from blindvalm_jax.survival import preemption
from blindvalm_jax.tasks.training import TrainingTasks, cut_off, unanswered

_OBJECTIVES: dict[str, type[Language | Contrastive]] = {
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
    if not is_first():
        process_log.begin(workdir, process=jax.process_index(), processes=jax.process_count())
    goodput = Goodput()
    mesh = _mesh(settings)
    settings = fitting.kept(settings, workdir)
    saved = runs.check_resume(workdir, settings, allowed=allow_changed)
    resuming = saved is not None
    if not dry_run:
        distributed.first_then_others(lambda: sinks.check(settings.log, workdir))
    _say_of_warmup(settings)
    objective = _read(settings, workdir, mesh, resuming=resuming, dry_run=dry_run)
    planned = _plan(settings, objective, mesh)
    about = describe_run(objective, mesh=mesh, planned=planned)
    ownership.check_alike(about)
    if saved is not None:
        runs.check_data(workdir, about)
        lacking = saved < settings.train.steps or loop.lacks_evaluation(settings, workdir, saved)
        lacking |= cut_off(settings, workdir, step=saved)
        if not lacking and not dry_run:
            if is_first():
                runs.keep_places(workdir, about, resolved=objective.resolved())
            _say_nothing_to_do(settings, workdir, saved)
            return 0
        runs.say_other_code(workdir)
    tasks = None
    if settings.eval.tasks and isinstance(objective, Language):
        tasks = TrainingTasks(settings.eval, workdir, objective)
    start = None if resuming else objective.read_start(planned.state.params)
    with goodput.lost_to("compile"):
        settings, compiled, said = _compile(settings, objective, planned, mesh, dry_run=dry_run)
    plan = planning.describe(
        compiled,
        mesh=mesh,
        state=planned.state,
        frozen=planned.frozen,
        batch=planned.batch,
        trained=objective.trained,
        said=said if dry_run else None,
    )
    planning.report(plan, workdir, dry_run=dry_run)
    if dry_run:
        return 0
    with Checkpoints(workdir, settings.checkpoint) as checkpoints:
        if resuming:
            state = _resume(settings, workdir, planned, checkpoints, mesh)
        else:
            state = _begin(settings, objective, planned, start, mesh)
        first = int(state.step)
        frozen = objective.place_frozen(planned.frozen, resuming=resuming)
        with goodput.lost_to("compile"):
            checkpoints.prepare(state)
        if is_first():
            runs.write_record(
                workdir,
                about,
                given=settings,
                resolved=objective.resolved(),
                step=first,
                began=goodput.began,
            )
            goodput.before = lifetime.before(workdir, step=first)
            placement.write_parameters(workdir, {objective.trained: state.params, **frozen})
            events.record(workdir, "resume" if resuming else "start", step=first)
        with distributed.together(), objective.batches(first) as batches:
            return loop.run(
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


@dataclasses.dataclass(frozen=True)
class _Planned:
    """Shapes and shardings of all that a run computes with, before there is any of it."""

    optimizer: optax.GradientTransformation
    state: step.TrainState
    frozen: Mapping[str, Any]
    batch: Any

    @property
    def guarded(self) -> bool:
        """Whether updates are judged."""
        return self.state.guard is not None


def _mesh(settings: config.Config) -> Mesh:
    """The mesh, which is printed."""
    mesh = partitioning.make_mesh(settings.mesh)
    say(f"devices: {planning.described(mesh)}")
    process_layout.check_rows(mesh)
    return mesh


def _say_of_warmup(settings: config.Config) -> None:
    if settings.optimizer.warmup_steps >= settings.train.steps:
        say(
            f"note: optimizer.warmup_steps {settings.optimizer.warmup_steps} end after "
            f"train.steps {settings.train.steps}: the learning rate never reaches its peak"
        )


def _read(
    settings: config.Config, workdir: Path, mesh: Mesh, *, resuming: bool, dry_run: bool
) -> Objective:
    """The objective with its inputs, or their shapes where a dry run has none."""
    shapes_alone = dry_run and without_data(settings)
    if not shapes_alone:
        check_index(settings)
    by_objective = planning.WITHOUT_DATA if shapes_alone else _OBJECTIVES
    read = by_objective[settings.train.objective]
    given = fitting.provisional(settings)
    at_once = ownership.apart() and not settings.data.cache
    prepare = distributed.all_or_none if at_once else distributed.first_then_others
    return prepare(lambda: read(given, workdir, mesh, resuming=resuming))


def _plan(settings: config.Config, objective: Objective, mesh: Mesh) -> _Planned:
    optimizer = optim.make(settings.optimizer, steps=settings.train.steps)
    guarded = guard.make(settings.train) is not None
    state = compilation.abstract_state(objective.model, optimizer, mesh, guarded=guarded)
    frozen = objective.abstract_frozen()
    partitioning.check_sharded({objective.trained: state.params, **frozen}, mesh)
    return _Planned(optimizer, state, frozen, objective.abstract_batch())


def _say_nothing_to_do(settings: config.Config, workdir: Path, saved: int) -> None:
    say(f"nothing to do: {workdir} has {saved} of {settings.train.steps} steps")
    if settings.eval.tasks and (command := unanswered(settings, workdir, step=saved)):
        say(f"its tasks were not asked at step {saved}: {command}")


def _compile(
    settings: config.Config, objective: Objective, planned: _Planned, mesh: Mesh, *, dry_run: bool
) -> tuple[config.Config, Any, list[str]]:
    """The settings with what they leave open, their compiled step, and what XLA said of it.

    XLA is heard in a dry run alone.
    """
    begin = time.perf_counter()
    said: dict[config.TrainConfig, list[str]] = {}

    def compile_for(tried: config.Config) -> Any:
        model = fitting.settled(objective.model, tried.train)
        update = compilation.make_update(tried, model, planned.optimizer)
        heard: contextlib.AbstractContextManager[list[str]] = contextlib.nullcontext([])
        if dry_run:
            heard = compiler_messages.heard()
        with heard as said[tried.train]:
            return compilation.compile_step(
                update, planned.state, planned.frozen, planned.batch, mesh
            )

    if fitting.wanted(settings):
        settings, compiled = fitting.choose(settings, mesh, compile_for)
        objective.settle(settings)
    else:
        compiled = compile_for(settings)
    say(f"compiled in {time.perf_counter() - begin:.1f} s; {describe_memory(compiled)}")
    return settings, compiled, said[settings.train]


def _begin(
    settings: config.Config,
    objective: Objective,
    planned: _Planned,
    start: Start | None,
    mesh: Mesh,
) -> step.TrainState:
    """The state of a run that begins; start: weights that it begins with, if settings name some."""
    state = compilation.init_state(
        objective.model,
        planned.optimizer,
        seed=settings.seed,
        mesh=mesh,
        guarded=planned.guarded,
    )
    return state if start is None else dataclasses.replace(state, params=start.into(state.params))


def _resume(
    settings: config.Config,
    workdir: Path,
    planned: _Planned,
    checkpoints: Checkpoints,
    mesh: Mesh,
) -> step.TrainState:
    """The state of the newest sound checkpoint."""
    state = checkpoints.restore(planned.state, seed=settings.seed)
    if planned.guarded:
        state = compilation.with_guard(state, mesh)
    say(f"resumed at step {int(state.step)}")
    incidents.say_ended_before(workdir, step=int(state.step))
    return state


def describe_run(objective: Objective, *, mesh: Mesh, planned: _Planned) -> dict[str, Any]:
    """What run.json says of the run; prints how large the model is."""
    frozen = planned.frozen
    sizes = {
        objective.trained: count(planned.state.params),
        **{name: count(params) for name, params in frozen.items()},
    }
    held = partitioning.bytes_per_device((planned.state, frozen))
    frozen_text = "".join(f", {sizes[name]:,} frozen in the {name}" for name in frozen)
    say(
        f"parameters: {sizes[objective.trained]:,} in the {objective.trained}{frozen_text}; "
        f"{held / 2**20:,.0f} MiB a device"
    )
    return {
        "mesh": dict(mesh.shape),
        "parameters": {**sizes, "bytes_per_device": held},
        **objective.describe(planned.batch),
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
