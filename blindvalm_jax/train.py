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
from absl import flags
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import config_flags

from blindvalm_jax import (
    checkpoint,
    config,
    flops,
    optim,
    partitioning,
    runs,
    step,
    system,
)
from blindvalm_jax.data import pipeline, prepared
from blindvalm_jax.data.windows import Windows
from blindvalm_jax.errors import UserError, run_main
from blindvalm_jax.grounding.text import TowerInput
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

    # ---------------------------------------------------------------- text and tower
    resuming = runs.open_run(workdir, settings)
    tower = system.read_tower(settings, workdir if resuming else None)
    partitioning.check_divisible(settings, mesh, None if tower is None else tower.config)
    context = system.tower_context(settings, tower)
    directory = prepared.ensure_prepared(settings, workdir, tower_context=context)
    windows = Windows(directory, "train")
    held_out = Windows(directory, "eval") if settings.eval.every_steps else None
    tower = system.prepare_tower(
        settings,
        tower,
        vocabulary=windows.manifest.tower_record,
        workdir=workdir,
        resuming=resuming,
    )
    shape = None if tower is None else tower.config
    partitioning.check_divisible(settings, mesh, shape)
    say(f"text: {len(windows)} windows of {settings.data.sequence_length} tokens ({directory})")
    if tower is not None:
        say(f"tower: {tower.source}, {describe_grounding(settings)}")

    # ---------------------------------------------------------------- model and state
    platform = jax.devices()[0].platform
    vocab_size = windows.manifest.tokenizer.vocab_size
    model = system.build(settings, vocab_size=vocab_size, tower=tower, platform=platform)
    optimizer = optim.make(settings.optimizer, steps=settings.train.steps)
    state = init_state(model, optimizer, seed=settings.seed, mesh=mesh)
    frozen = None if tower is None else place_tower(tower, mesh)
    partitioning.check_sharded(state.params, mesh)
    checkpoints = checkpoint.Checkpoints(workdir, settings.checkpoint)
    if checkpoints.latest_step is not None:
        state = checkpoints.restore(state)
        say(f"resumed at step {int(state.step)}")
    elif settings.train.init_from:
        state, fresh = start_from(state, model, settings.train.init_from)
        say(f"started from {settings.train.init_from}; fresh: {', '.join(fresh) or 'nothing'}")
    first = int(state.step)
    if first >= settings.train.steps:
        say(f"nothing to do: {workdir} has {first} of {settings.train.steps} steps")
        checkpoints.close()
        return 0

    # ---------------------------------------------------------------- compilation, loop
    batches = pipeline.batches(
        windows,
        batch_size=settings.train.batch_size,
        seed=settings.seed,
        start_step=first,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        tower=tower is not None,
    )
    with checkpoints, batches:
        batch = to_device(next(batches), mesh)
        cost = flops.per_token(
            settings,
            vocab_size=vocab_size,
            tower=shape,
            tower_length=0 if batch.tower is None else batch.tower.tokens_BS.shape[1],
        )
        if jax.process_index() == 0:
            write_records(workdir, state, frozen, model, mesh, windows, tower, cost)
        begin = time.perf_counter()
        compiled = compile_step(make_update(settings, model, optimizer), state, frozen, batch, mesh)
        say(f"compiled in {time.perf_counter() - begin:.1f} s; {describe_memory(compiled)}")
        if dry_run:
            return 0
        return loop(
            settings,
            workdir,
            state=state,
            frozen=frozen,
            batch=batch,
            batches=batches,
            compiled=compiled,
            evaluate=make_evaluation(settings, model, held_out, mesh),
            checkpoints=checkpoints,
            mesh=mesh,
            flops_per_token=cost.total,
        )


def loop(
    settings: config.Config,
    workdir: Path,
    *,
    state: step.TrainState,
    frozen: Any,
    batch: step.Batch,
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
    pending = None  # metrics are read one update late, so that the device never waits for the host
    try:
        for done in range(first + 1, last + 1):
            state, scalars = compiled(state, frozen, batch)
            finished = done == last
            if not finished:
                batch = to_device(next(batches), mesh)
            evaluating = every > 0 and (finished or done % every == 0)
            saving = finished or done % settings.checkpoint.every_steps == 0
            due = [pending] if pending else []
            pending = None
            if finished or done % settings.log.every_steps == 0:
                pending = (done, scalars)
                if evaluating or saving:  # what is saved must have been reported
                    due.append(pending)
                    pending = None
            for at, values in due:
                if not reporter.log(at, values, batches.seconds_waited):
                    print(f"error: the loss is not finite at step {at}: diverged", flush=True)
                    return DIVERGED
            if evaluating or saving:
                jax.block_until_ready(scalars)  # the update's own time is not the pause's
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


def init_state(model: step.Model, optimizer: Any, *, seed: int, mesh: Mesh) -> step.TrainState:
    """A fresh state, every array born on the devices that keep it."""

    def init(key: jax.Array) -> step.TrainState:
        params = model.init(key)
        return step.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return partitioning.init_sharded(init, jax.random.key(seed), mesh)


def start_from(
    state: step.TrainState, model: step.Model, directory: str
) -> tuple[step.TrainState, list[str]]:
    """Puts the weights of a directory in the place of the fresh ones, sharded alike."""
    params, fresh = system.start_from(state.params, model, directory)
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, state.params)
    return dataclasses.replace(state, params=placed), fresh


def place_tower(tower: system.Tower, mesh: Mesh) -> Any:
    """The tower's parameters on the devices, sharded by the same rules as the decoder's."""
    module = system.TextTower(tower.config)
    tokens_BS = jnp.zeros((1, 1), jnp.int32)

    def init(key: jax.Array) -> Any:
        return module.init(key, tokens_BS, tokens_BS == 0, readout="token")["params"]

    placed = partitioning.shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    return jax.tree.map(jax.device_put, tower.params, placed)


def to_device(batch: pipeline.Batch, mesh: Mesh) -> step.Batch:
    """This process's rows as arrays of the global batch."""
    put = functools.partial(partitioning.put_rows, mesh=mesh)
    tower = None
    if "tower_tokens" in batch:
        index = put(batch["tower_index"]) if "tower_index" in batch else None
        tower = TowerInput(put(batch["tower_tokens"]), put(batch["tower_starts"]), index)
    return step.Batch(put(batch["tokens"]), put(batch["targets"]), put(batch["weights"]), tower)


def make_update(settings: config.Config, model: step.Model, optimizer: Any) -> Any:
    """The update (state, frozen, batch) -> (state, metrics) of a run."""
    return functools.partial(
        step.train_step,
        model=model,
        optimizer=optimizer,
        rate=optim.schedule(settings.optimizer, steps=settings.train.steps),
        seed=settings.seed,
        microbatches=settings.train.microbatches,
    )


def compile_step(
    update: Any, state: step.TrainState, frozen: Any, batch: step.Batch, mesh: Mesh
) -> Any:
    """Compiles an update ahead of time; the state's memory is reused for the next state."""
    placed = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(
        update, donate_argnums=0, out_shardings=(placed, partitioning.replicated(mesh))
    )
    with partitioning.use(mesh):
        return jitted.lower(state, frozen, batch).compile()


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
        with partitioning.use(mesh):
            parts = [run(params, frozen, to_device(batch, mesh)) for batch in rows]
        return functools.reduce(lambda a, b: a + b, parts)

    return evaluate


def write_records(
    workdir: Path,
    state: step.TrainState,
    frozen: Any,
    model: step.Model,
    mesh: Mesh,
    windows: Windows,
    tower: system.Tower | None,
    cost: flops.FlopsPerToken,
) -> None:
    """Writes run.json and parameters.txt, and says how large the model is."""
    sizes = {
        "decoder": int(parameter_overview.count_parameters(state.params)),
        "tower": 0 if frozen is None else int(parameter_overview.count_parameters(frozen)),
        "bytes_per_device": partitioning.bytes_per_device((state, frozen)),
    }
    table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    (workdir / "parameters.txt").write_text(table + "\n", encoding="utf-8")
    say(
        f"parameters: {sizes['decoder']:,} in the decoder (parameters.txt), {sizes['tower']:,} "
        f"frozen in the tower; {sizes['bytes_per_device'] / 2**20:,.0f} MiB a device"
    )
    about = {
        "mesh": dict(mesh.shape),
        "kernels": {"attention": model.decoder.kernel},
        "parameters": sizes,
        "flops_per_token": {**dataclasses.asdict(cost), "total": cost.total},
        "data": {
            "key": windows.manifest.key,
            "tokenizer": windows.manifest.tokenizer.fingerprint,
            "train_windows": len(windows),
        },
        "tower": None if tower is None else {"source": tower.source, "sha256": tower.sha256},
    }
    runs.write_record(workdir, about, step=int(state.step))


def describe_grounding(settings: config.Config) -> str:
    """The grounding in a few words."""
    grounding = settings.grounding
    control = "" if grounding.control == "none" else f", control: {grounding.control}"
    return f"read out at {grounding.readout}, {grounding.segments} segments{control}"


def describe_memory(compiled: Any) -> str:
    """Memory of the compiled step on one device, where the backend tells."""
    stats = compiled.memory_analysis()
    if stats is None:
        return "memory of the step unknown on this backend"
    held = stats.argument_size_in_bytes / 2**20
    return f"memory: {held:,.0f} MiB held, {stats.temp_size_in_bytes / 2**20:,.0f} MiB in a step"


def say(text: str) -> None:
    """Prints on the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    run_main(main)
