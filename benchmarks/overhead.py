"""What survival costs: a step of the training loop over the same step in a bare loop, paired.

One process holds all of it. The systems take turns of some steps each; the first and the last step
of a turn do not count:

    bare      the compiled update without a guard, on a batch that lies on the device
    guarded   the same with the guard of the update (train.on_nonfinite, train.on_spike)
    loop      the trainer's own loop: guarded, batches read and placed, metrics of every step
    saving    the same, with one checkpoint in the middle of the turn, written in the background

Ratios are to bare, round by round: of the time on the clock, and of the processor's time over all
threads, which other processes on the machine disturb less. A checkpoint's cost is the time that a
saving turn takes beyond one of the loop, spread over --save_every steps. Text is random words; the
model is BLIND-VALM with a random tower, sizes by --decoder and --tower as in valm_cost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from benchmarks import turns, valm_systems
from benchmarks.valm_systems import DECODER, DTYPE, TOWER

_STEPS = flags.DEFINE_integer("turn_steps", 8, "Steps of a turn.", lower_bound=4)
_EVERY = flags.DEFINE_integer(
    "save_every", 1000, "Steps a checkpoint is spread over.", lower_bound=1
)
_WORDS = 300_000
_KINDS = 4_000  # different words
SYSTEMS = ("bare", "guarded", "loop", "saving")


class Spent(NamedTuple):
    """Seconds of the counted steps: on the clock, and of the processor."""

    clock: float
    processor: float


def run() -> dict[str, Any]:
    """Prints the table and returns the numbers."""
    with tempfile.TemporaryDirectory() as directory:
        systems = _Systems(Path(directory))
        processor: dict[str, list[float]] = {name: [] for name in SYSTEMS}

        def turn(name: str) -> Callable[[], float]:
            def taken() -> float:
                spent = systems.turn(name)
                processor[name].append(spent.processor)
                return spent.clock

            return taken

        clock = turns.take({name: turn(name) for name in SYSTEMS}, title="turns")
        saved = systems.bytes_saved()
    # each turn is taken twice and the second counts; the round before them warms up
    counted = {name: seconds[3::2] for name, seconds in processor.items()}
    rows: dict[str, dict[str, Any]] = {
        name: {
            **turns.over(clock[name], clock["bare"]),
            "interval": _interval(clock[name], clock["bare"]),
            "processor_ratio": turns.over(counted[name], counted["bare"])["ratio"],
            "processor_interval": _interval(counted[name], counted["bare"]),
        }
        for name in SYSTEMS
    }
    print(f"{'system':8} {'s/step':>8} {'clock':>7} {'95 %':>13} {'processor':>10} {'95 %':>13}")
    for name, row in rows.items():
        print(
            f"{name:8} {row['seconds']:8.3f} {row['ratio']:7.3f} {_span(row['interval']):>13} "
            f"{row['processor_ratio']:10.3f} {_span(row['processor_interval']):>13}"
        )
    steps = _STEPS.value - 2
    extra = [steps * (a - b) for a, b in zip(clock["saving"], clock["loop"], strict=True)]
    save = statistics.median(extra)
    spread = save / _EVERY.value / rows["bare"]["seconds"]
    total = rows["loop"]["ratio"] - 1 + spread
    print(
        f"a checkpoint of {saved / 2**20:,.0f} MiB: {save:.2f} s beyond the loop "
        f"({min(extra):.2f} to {max(extra):.2f}), {spread:.2%} of a step when saved every "
        f"{_EVERY.value} steps; loop and checkpoints: {total:.2%}"
    )
    about = systems.about()
    machine = turns.machine(
        about,
        length=valm_systems.length(),
        dtype=DTYPE.value,
        decoder=DECODER.value,
        tower=TOWER.value,
        turn_steps=_STEPS.value,
        save_every=_EVERY.value,
    )
    print(json.dumps(machine))
    return {
        "systems": rows,
        "memory_mib": about["memory_mib"],
        "checkpoint": {"bytes": saved, "seconds": save, "low": min(extra), "high": max(extra)},
        "overhead": total,
        **machine,
    }


class _Systems:
    """The run that all systems are a part of, prepared and compiled."""

    def __init__(self, directory: Path) -> None:
        """Writes text, prepares it, and compiles the step without and with a guard."""
        import jax

        from blindvalm_jax import compilation, config, optim, partitioning
        from blindvalm_jax.objectives.language import Language

        text = directory / "text.txt"
        text.write_text(_random_text(), encoding="utf-8")
        values = config.default()
        values.data.files = str(text)
        values.data.sequence_length = valm_systems.length()
        values.tokenizer.kind, values.tokenizer.train_vocab_size = "train", 8192
        decoder, random = values.decoder, values.grounding.random
        decoder.layers, decoder.width, decoder.heads = valm_systems.shape(DECODER.value, "decoder")
        random.layers, random.width, random.heads = valm_systems.shape(TOWER.value, "tower")
        random.projection = random.width
        decoder.dropout = decoder.attention_dropout = turns.DROPOUT.value
        values.grounding.tower = "random"
        values.train.dtype = values.grounding.dtype = DTYPE.value
        values.train.batch_size = turns.ROWS.value
        values.train.on_spike = "clip"
        values.train.steps = _STEPS.value
        values.log.every_steps = 1
        values.eval.every_steps = 0
        self._settings = config.parse(values)
        self._workdir = directory / "run"
        (self._workdir / "checkpoints").mkdir(parents=True)
        self._mesh = partitioning.make_mesh(self._settings.mesh)
        with _quiet():
            self._objective = Language(self._settings, self._workdir, self._mesh, resuming=False)
        optimizer = optim.make(self._settings.optimizer, steps=_STEPS.value)
        model = self._objective.model
        batch = self._objective.abstract_batch()
        self._frozen = self._objective.place_frozen(
            self._objective.abstract_frozen(), resuming=False
        )
        self._compiled, self._fresh = {}, {}
        for guarded in (False, True):
            state = compilation.init_state(
                model, optimizer, seed=0, mesh=self._mesh, guarded=guarded
            )
            update = compilation.make_update(self._settings, model, optimizer)
            self._fresh[guarded] = jax.device_get(state)
            self._compiled[guarded] = compilation.compile_step(
                update, state, self._frozen, batch, self._mesh
            )
        self._placed = jax.tree.map(lambda x: x.sharding, state)
        with self._objective.batches(0) as batches:
            self._batch = self._objective.to_device(next(batches))

    def turn(self, name: str) -> Spent:
        """Seconds a step of a system's turn, from the same fresh state each time."""
        import jax

        guarded = name != "bare"
        placed = self._placed if guarded else dataclasses.replace(self._placed, guard=None)
        state = jax.block_until_ready(jax.device_put(self._fresh[guarded], placed))
        compiled = _Timed(self._compiled[guarded])
        if name in ("bare", "guarded"):
            for _ in range(_STEPS.value - 1):
                state, scalars = compiled(state, self._frozen, self._batch)
            jax.block_until_ready((state, scalars))
            compiled.mark()
            return compiled.spent()
        return self._loop(state, compiled, saves=name == "saving")

    def _loop(self, state: Any, compiled: _Timed, *, saves: bool) -> Spent:
        from blindvalm_jax import trainer
        from blindvalm_jax.checkpoints.manager import Checkpoints
        from blindvalm_jax.goodput import Goodput
        from blindvalm_jax.survival import preemption

        middle = dataclasses.replace(
            self._settings.checkpoint, every_steps=_STEPS.value // 2 if saves else _STEPS.value
        )
        settings = dataclasses.replace(self._settings, checkpoint=middle)
        with (
            _quiet(),
            tempfile.TemporaryDirectory() as directory,
            Checkpoints(Path(directory), middle) as written,
            self._objective.batches(0) as batches,
        ):
            trainer.loop(
                settings,
                Path(directory),
                self._objective,
                state=state,
                frozen=self._frozen,
                batches=batches,
                compiled=compiled,
                checkpoints=_Saving(written, last=_STEPS.value),  # type: ignore[arg-type]
                tasks=None,
                notice=preemption.Notice(),
                flops_per_unit=1.0,
                goodput=Goodput(),
            )
        return compiled.spent()

    def bytes_saved(self) -> int:
        """Bytes of the arrays of a state."""
        import jax

        return sum(x.nbytes for x in jax.tree.leaves(self._fresh[True]))

    def about(self) -> dict[str, Any]:
        """Device, versions, and the memory the compiled steps need, without and with a guard."""
        import jax

        from blindvalm_jax import memory, runs

        plans = [memory.plan(self._compiled[guarded]) for guarded in (False, True)]
        return {
            "device": jax.devices()[0].device_kind,
            "versions": runs.versions(),
            "memory_mib": [None if x is None else (x.held + x.temporary) / 2**20 for x in plans],
        }


class _Timed:
    """A compiled step that notes when it is called, on the clock and by the processor."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._calls: list[Spent] = []

    def __call__(self, state: Any, frozen: Any, batch: Any) -> Any:
        """One step, behind the one before."""
        import jax

        if len(self._calls) == 1:
            jax.block_until_ready(state)
        self.mark()
        return self._compiled(state, frozen, batch)

    def mark(self) -> None:
        """Notes the time."""
        self._calls.append(Spent(time.perf_counter(), time.process_time()))

    def spent(self) -> Spent:
        """A step's seconds between the second and the last call."""
        first, last, count = self._calls[1], self._calls[-1], len(self._calls) - 2
        return Spent((last.clock - first.clock) / count, (last.processor - first.processor) / count)


class _Saving:
    """Checkpoints of a run, without the one behind its last step, which is not timed."""

    def __init__(self, inner: Any, *, last: int) -> None:
        self._inner, self._last = inner, last

    def save(self, state: Any, *, step: int, **more: Any) -> None:
        """Saves in the background."""
        if step != self._last:
            self._inner.save(state, step=step, **more)

    def settle(self) -> None:
        """Takes note of a save that has ended."""
        self._inner.settle()

    def finish(self) -> None:
        """Waits until what was saved is on disk."""
        self._inner.finish()


@contextlib.contextmanager
def _quiet() -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _random_text() -> str:
    """Paragraphs of words that are as frequent as words are (Zipf)."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwygpbvk"))
    words = ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(_KINDS)]
    share = 1 / np.arange(1, _KINDS + 1)
    drawn = rng.choice(_KINDS, _WORDS, p=share / share.sum())
    lines = [" ".join(words[i] for i in part) for part in np.array_split(drawn, _WORDS // 100)]
    return "\n\n".join(lines)


def _interval(seconds: list[float], others: list[float]) -> tuple[float, float]:
    """95 % interval of the median of the rounds' ratios: bootstrap over rounds."""
    ratios = np.array(seconds) / np.array(others)
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f}-{interval[1]:.3f}"
