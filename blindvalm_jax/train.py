"""Trains a language model: GPT-2, BLIND-VALM or a control, as a config file says.

    python -m blindvalm_jax.train --config=configs/text.py --workdir=runs/a [--config.a.b=value]

The same command again resumes. `--dry_run` stops after compiling, with the memory it needs. Exit
codes: 0 done, 1 error, 43 diverged.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from blindvalm_jax import (
    checkpoint,
    compilation,
    config,
    flops,
    metrics,
    optim,
    partitioning,
    runs,
    step,
    system,
)
from blindvalm_jax.data import pipeline, prepared
from blindvalm_jax.data.windows import Windows
from blindvalm_jax.errors import UserError, print_error, run_main
from blindvalm_jax.reporter import Reporter

_CONFIG = config_flags.DEFINE_config_file("config", None, "Settings of the run.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile, print the memory needed, and stop.")

DIVERGED = 43


def main(argv: Sequence[str]) -> int:
    """Reads the command line and trains; returns the exit code."""
    if len(argv) > 1:
        raise UserError(
            f"unexpected argument {argv[1]!r}; settings are --config.section.name=value"
        )
    if not flags.FLAGS["config"].present or not _WORKDIR.value:
        raise UserError("--config=FILE.py and --workdir=DIR are needed")
    file = Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0])
    if not file.is_file():
        raise UserError(f"there is no config file {file}; configs/ holds some to start from")
    if not isinstance(_CONFIG.value, ml_collections.ConfigDict):
        raise UserError(f"get_config() of {file} must return an ml_collections.ConfigDict")
    settings = config.parse(_CONFIG.value)
    return train(settings, Path(_WORKDIR.value), dry_run=_DRY_RUN.value)


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
    if saved is not None and saved >= settings.train.steps:
        say(f"nothing to do: {workdir} has {saved} of {settings.train.steps} steps")
        return 0
    if settings.log.tensorboard:
        metrics.import_tensorboard()
    if settings.optimizer.warmup_steps >= settings.train.steps:
        say(
            f"note: optimizer.warmup_steps {settings.optimizer.warmup_steps} end after "
            f"train.steps {settings.train.steps}: the learning rate never reaches its peak"
        )

    tower, windows, held_out = read_inputs(settings, workdir, mesh, resuming=resuming)
    vocabulary = windows.manifest.tokenizer
    shape = None if tower is None else tower.config

    # ---------------------------------------------------------------- model, compiled
    platform = jax.devices()[0].platform
    model = system.build(settings, vocab_size=vocabulary.vocab_size, tower=tower, platform=platform)
    optimizer = optim.make(settings.optimizer, steps=settings.train.steps)
    planned = compilation.abstract_state(model, optimizer, mesh)
    frozen = None if shape is None else compilation.abstract_tower(shape, settings, mesh)
    batch = compilation.abstract_batch(settings, windows, mesh, tower=tower is not None)
    partitioning.check_sharded({"decoder": planned.params, "tower": frozen or {}}, mesh)
    about = describe_run(
        settings,
        model=model,
        mesh=mesh,
        state=planned,
        frozen=frozen,
        tower=tower,
        windows=windows,
        batch=batch,
    )
    if resuming:
        runs.check_data(workdir, about)
    start = None
    if settings.train.init_from and not resuming:
        init_from = settings.train.init_from
        start = system.read_start(planned.params, model.decoder, init_from, vocabulary)
        say(
            f"starts from {init_from}; fresh: {', '.join(start.fresh) or 'nothing'}; "
            f"left out: {', '.join(start.dropped) or 'nothing'}"
        )
    begin = time.perf_counter()
    update = compilation.make_update(settings, model, optimizer)
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
            state = compilation.init_state(model, optimizer, seed=settings.seed, mesh=mesh)
            if start is not None:
                state = dataclasses.replace(state, params=start.into(state.params, model.decoder))
        first = int(state.step)
        if tower is not None:
            frozen = compilation.place_tower(tower, frozen)
            if not resuming:
                own = windows.directory / "tower_tokenizer" if windows.manifest.aligned else None
                system.store_tower(tower, workdir, tokenizer=own)
            del tower
        resolved = config.resolve(settings, vocab_size=vocabulary.vocab_size, mesh=mesh.shape)
        runs.write_record(workdir, about, given=settings, resolved=resolved, step=first)
        runs.write_parameters(workdir, {"decoder": state.params, "tower": frozen or {}})
        with pipeline.batches(
            windows,
            batch_size=settings.train.batch_size,
            seed=settings.seed,
            start_step=first,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            tower=shape is not None,
        ) as batches:
            return loop(
                settings,
                workdir,
                state=state,
                frozen=frozen,
                batches=batches,
                compiled=compiled,
                evaluate=make_evaluation(settings, model, held_out, mesh),
                checkpoints=checkpoints,
                mesh=mesh,
                flops_per_token=about["flops_per_token"]["total"],
            )


def read_inputs(
    settings: config.Config, workdir: Path, mesh: Mesh, *, resuming: bool
) -> tuple[system.Tower | None, Windows, Windows | None]:
    """The tower, if any, the windows to train on and those held out, checked against each other."""
    named = Path(settings.grounding.tower).expanduser().resolve()
    if not resuming and named.is_relative_to((workdir / "tower").resolve()):
        raise UserError(f"{workdir / 'tower'} is where a run keeps its tower: name it elsewhere")
    tower = system.read_tower(settings, workdir if resuming else None)
    partitioning.check_divisible(settings, mesh, None if tower is None else tower.config)
    directory = prepared.ensure_prepared(
        settings,
        workdir,
        tower_context=system.tower_context(settings, tower),
        stored_tower=workdir / "tower" if resuming else None,
    )
    windows = Windows(directory, "train")
    held_out = Windows(directory, "eval") if settings.eval.every_steps else None
    tower = system.prepare_tower(
        settings, tower, vocabulary=windows.manifest.tower_record, resuming=resuming
    )
    partitioning.check_divisible(settings, mesh, None if tower is None else tower.config)
    say(f"text: {len(windows)} windows of {settings.data.sequence_length} tokens ({directory})")
    if len(windows) < settings.train.batch_size:
        say(f"note: so few windows are repeated within a batch of {settings.train.batch_size} rows")
    if tower is not None:
        say(f"tower: {tower.source}, {describe_grounding(settings)}")
    return tower, windows, held_out


def loop(
    settings: config.Config,
    workdir: Path,
    *,
    state: step.TrainState,
    frozen: Any,
    batches: pipeline.Batches,
    compiled: Any,
    evaluate: Any,
    checkpoints: checkpoint.Checkpoints,
    mesh: Mesh,
    flops_per_token: float,
) -> int:
    """Updates until the last step, with metrics, evaluation and checkpoints on the way."""
    first, last = int(state.step), settings.train.steps
    reporter = Reporter(settings, workdir, first=first, flops_per_token=flops_per_token)
    every = settings.eval.every_steps
    # Metrics are read one update late, so that an accelerator never waits for the host. A CPU has
    # done the next update by then, which would be counted as part of this one.
    late = jax.devices()[0].platform != "cpu"
    pending = None
    batch = compilation.to_device(next(batches), mesh)
    try:
        for done in range(first + 1, last + 1):
            state, scalars = compiled(state, frozen, batch)
            finished = done == last
            if not finished:
                batch = compilation.to_device(next(batches), mesh)
            evaluating = every > 0 and (finished or done % every == 0)
            saving = finished or done % settings.checkpoint.every_steps == 0
            due = [pending] if pending else []
            pending = None
            if finished or done % settings.log.every_steps == 0:
                pending = (done, scalars)
                if evaluating or saving or not late:  # what is saved must have been reported
                    due.append(pending)
                    pending = None
            sound = all(reporter.log(*report, batches.seconds_waited) for report in due)
            if saving or evaluating:  # waits for the update: its time is not the pause's
                sound = sound and reporter.is_finite(scalars)
            if not sound:
                if jax.process_index() == 0:
                    print_error(f"diverged at step {done}: the loss or a norm is not finite")
                return DIVERGED
            begin = time.perf_counter()
            if evaluating:
                reporter.evaluated(done, evaluate(state.params, frozen))
            if saving:
                checkpoints.save(state, step=done, config=settings)
            reporter.timer.pause(time.perf_counter() - begin)
        checkpoints.wait()
        say(f"done: {last} steps, {workdir}")
        return 0
    finally:
        reporter.close()


def make_evaluation(
    settings: config.Config, model: step.Model, windows: Windows | None, mesh: Mesh
) -> Any:
    """A function (params, frozen) -> totals over the held-out windows; compiled on first use."""
    run = jax.jit(functools.partial(step.eval_step, model=model))

    def evaluate(params: Any, frozen: Any) -> step.Sums:
        if windows is None:
            raise ValueError("evaluation without held-out windows")
        rows = pipeline.eval_batches(
            windows,
            batch_size=settings.train.batch_size // settings.train.microbatches,
            limit=settings.eval.windows,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            tower=model.tower is not None,
        )
        zero = jnp.zeros(())
        total = step.Sums(zero, zero, zero)
        with partitioning.use(mesh):
            for batch in rows:
                total += run(params, frozen, compilation.to_device(batch, mesh))
        return total

    return evaluate


def describe_run(
    settings: config.Config,
    *,
    model: step.Model,
    mesh: Mesh,
    state: step.TrainState,
    frozen: Any,
    tower: system.Tower | None,
    windows: Windows,
    batch: step.Batch,
) -> dict[str, Any]:
    """What run.json says of the run; prints how large the model is."""
    sizes = {
        "decoder": count(state.params),
        "tower": 0 if frozen is None else count(frozen),
        "bytes_per_device": partitioning.bytes_per_device((state, frozen)),
    }
    say(
        f"parameters: {sizes['decoder']:,} in the decoder, {sizes['tower']:,} frozen in the "
        f"tower; {sizes['bytes_per_device'] / 2**20:,.0f} MiB a device"
    )
    manifest = windows.manifest
    cost = flops.per_token(
        settings,
        vocab_size=manifest.tokenizer.vocab_size,
        tower=None if tower is None else tower.config,
        tower_length=0 if batch.tower is None else batch.tower.tokens_BS.shape[1],
    )
    grounding = None
    if tower is not None:
        projection = tower.config.projection
        grounding = {"source": tower.source, "sha256": tower.sha256, "projection": projection}
    return {
        "mesh": dict(mesh.shape),
        "kernels": {"attention": model.decoder.kernel, "fusion": "xla", "tower": "xla"},
        "parameters": sizes,
        "flops_per_token": {**dataclasses.asdict(cost), "total": cost.total},
        "tokenizer": dataclasses.asdict(manifest.tokenizer),
        "data": {
            "key": manifest.key,
            "directory": str(windows.directory.resolve()),
            "train_windows": len(windows),
        },
        "tower": grounding,
    }


def count(params: Any) -> int:
    """Number of parameters, the padding of the vocabulary included."""
    return sum(x.size for x in jax.tree.leaves(params))


def describe_grounding(settings: config.Config) -> str:
    """The grounding in a few words."""
    grounding = settings.grounding
    control = "" if grounding.control == "none" else f", control: {grounding.control}"
    return f"read out at {grounding.readout}, {grounding.segments} segments{control}"


def describe_memory(compiled: Any) -> str:
    """Memory of the compiled step on one device, where the backend tells."""
    plan = compilation.memory_plan(compiled)
    if plan is None:
        return "memory of the step unknown on this backend"
    return f"memory: {plan.held / 2**20:,.0f} MiB held, {plan.temporary / 2**20:,.0f} MiB in a step"


def say(text: str) -> None:
    """Prints on the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    run_main(main)
