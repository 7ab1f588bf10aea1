"""What survival costs: a step of the training loop over the same step in a bare loop, paired.

One process holds all of it. Between two steps of the trainer's own loop the other systems do one
step each, so that what is compared is a second apart:

    bare      the compiled update without a guard, on a batch that lies on the device
    guarded   the same with the guard of the update (train.on_nonfinite, train.on_spike)
    loop      the trainer's own loop: guarded and watched, batches read and placed, metrics written
              of every step

Each step is waited for, so that nothing the loop does on the host hides behind a step of the
device: with an accelerator the loop costs less than is shown here. Ratios are those of a turn's
sums: of the time on the clock, and of the processor's time over all threads, which other processes
on the machine disturb less. Least disturbed is what the loop's own thread takes of the processor
beyond that of a guarded step: metrics and watchdog, but not the reading of batches, which has
threads of its own. Every other turn the loop saves a checkpoint in its middle, in the background.
What such a turn takes longer in all, until the checkpoint is on disk, is spread over --save_every
steps. Text is random words; the model is BLIND-VALM with a random tower, sizes by --decoder and
--tower as in valm_cost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from benchmarks import turns, valm_systems
from benchmarks.valm_systems import DECODER, DTYPE, TOWER
from blindvalm_jax.data.workers import Progress

_STEPS = flags.DEFINE_integer("turn_steps", 8, "Steps of a turn.", lower_bound=4)
_EVERY = flags.DEFINE_integer(
    "save_every", 1000, "Steps a checkpoint is spread over.", lower_bound=1
)
_WORDS = 300_000
_KINDS = 4_000  # different words
SYSTEMS = ("bare", "guarded", "loop")


class Spent(NamedTuple):
    """Seconds: on the clock, of the processor, and of the processor for this thread alone."""

    clock: float
    processor: float
    thread: float

    @classmethod
    def now(cls) -> Spent:
        """Since some time in the past."""
        return cls(time.perf_counter(), time.process_time(), time.thread_time())

    def since(self, begin: Spent) -> Spent:
        """From then to this one."""
        return Spent(*(now - before for now, before in zip(self, begin, strict=True)))


class Turn(NamedTuple):
    """What a turn took: a counted step of each system; all of it; what of that one save stops."""

    steps: dict[str, Spent]
    total: Spent
    blocked: float


def run() -> dict[str, Any]:
    """Prints the table and returns the numbers."""
    with tempfile.TemporaryDirectory() as directory:
        systems = _Systems(Path(directory))
        plain, saving = [], []
        with Progress("turns", total=turns.ROUNDS.value + 1, unit="round") as progress:
            for _ in range(turns.ROUNDS.value + 1):
                plain.append(systems.turn(saves=False))
                saving.append(systems.turn(saves=True))
                progress.advance(1)
        saved = systems.bytes_saved()
    del plain[0], saving[0]  # that round warmed up
    rows = {name: _row(name, [turn.steps for turn in plain]) for name in SYSTEMS}
    head = f"{'system':8} {'s/step':>8} {'clock':>7} {'95 %':>13} {'processor':>10} {'95 %':>13}"
    print(f"{head} {'thread, ms':>11}")
    for name, row in rows.items():
        print(
            f"{name:8} {row['seconds']:8.3f} {row['ratio']:7.3f} {_span(row['interval']):>13} "
            f"{row['processor_ratio']:10.3f} {_span(row['processor_interval']):>13} "
            f"{1e3 * row['thread_seconds']:11.1f}"
        )
    checkpoint = {"bytes": saved, **_of_a_save(plain, saving, rows["loop"], bytes_saved=saved)}
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
        "checkpoint": checkpoint,
        **machine,
    }


def _of_a_save(
    plain: list[Turn], saving: list[Turn], loop: Mapping[str, Any], *, bytes_saved: int
) -> dict[str, Any]:
    """Prints and returns what a save costs; loop: the row of the loop without one."""
    blocked = [turn.blocked for turn in saving]
    print(
        f"a checkpoint of {bytes_saved / 2**20:,.0f} MiB stops the loop for "
        f"{statistics.median(blocked):.2f} s ({min(blocked):.2f} to {max(blocked):.2f})"
    )
    found: dict[str, Any] = {"blocked": statistics.median(blocked)}
    for part, of, ratio in (
        ("clock", "on the clock", loop["ratio"]),
        ("processor", "of the processor's time", loop["processor_ratio"]),
    ):
        extra = [
            getattr(a.total, part) - getattr(b.total, part)
            for a, b in zip(saving, plain, strict=True)
        ]
        seconds, (low, high) = statistics.median(extra), _interval(extra)
        step = _EVERY.value * statistics.median(getattr(x.steps["bare"], part) for x in plain)
        total = ratio - 1 + seconds / step
        found[part] = {"seconds": seconds, "interval": (low, high), "overhead": total}
        print(
            f"it costs {seconds:.2f} s {of} (95 % {low:.2f} to {high:.2f}), {seconds / step:.2%} "
            f"({low / step:.2%} to {high / step:.2%}) of a step when saved every {_EVERY.value} "
            f"steps; loop and checkpoints: {total:.2%}"
        )
    return found


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
        with contextlib.redirect_stdout(io.StringIO()):
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

    def turn(self, *, saves: bool) -> Turn:
        """Runs the loop from the fresh state, the other systems between its steps."""
        from blindvalm_jax import loop
        from blindvalm_jax.checkpoints.manager import Checkpoints
        from blindvalm_jax.goodput import Goodput
        from blindvalm_jax.survival import preemption

        steps = _STEPS.value
        checkpoint = dataclasses.replace(
            self._settings.checkpoint, every_steps=(steps + 1) // 2 if saves else steps
        )
        settings = dataclasses.replace(self._settings, checkpoint=checkpoint)
        compiled = _Between(
            self._compiled[True],
            {
                "bare": _Alone(self._compiled[False], self._state(guarded=False), self._batch),
                "guarded": _Alone(self._compiled[True], self._state(guarded=True), self._batch),
            },
        )
        with (
            contextlib.redirect_stdout(io.StringIO()),
            tempfile.TemporaryDirectory() as directory,
            Checkpoints(Path(directory), checkpoint) as written,
            self._objective.batches(0) as batches,
        ):
            checkpoints = _Saving(written, last=steps)
            begin = Spent.now()
            loop.run(
                settings,
                Path(directory),
                self._objective,
                state=self._state(guarded=True),
                frozen=self._frozen,
                batches=batches,
                compiled=compiled,
                checkpoints=checkpoints,  # type: ignore[arg-type]
                tasks=None,
                notice=preemption.Notice(),
                flops_per_unit=1.0,
                goodput=Goodput(),
            )
            total = Spent.now().since(begin)
        return Turn(compiled.spent(), total, checkpoints.blocked)

    def _state(self, *, guarded: bool) -> Any:
        """The fresh state, on the device."""
        import jax

        placed = self._placed if guarded else dataclasses.replace(self._placed, guard=None)
        return jax.block_until_ready(jax.device_put(self._fresh[guarded], placed))

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


class _Alone:
    """A compiled step that is called by nobody else, always with the same batch."""

    def __init__(self, compiled: Any, state: Any, batch: Any) -> None:
        self._compiled, self._state, self._batch = compiled, state, batch

    def step(self, frozen: Any) -> Spent:
        """One step, waited for."""
        import jax

        begin = Spent.now()
        self._state, scalars = self._compiled(self._state, frozen, self._batch)
        jax.block_until_ready((self._state, scalars))
        return Spent.now().since(begin)


class _Between:
    """The loop's compiled step, before which the other systems do one each.

    A step of the loop lasts from its call to the next one: all that the loop does is part of it.
    """

    def __init__(self, compiled: Any, others: Mapping[str, _Alone]) -> None:
        self._compiled, self._others = compiled, others
        self._spent: dict[str, list[Spent]] = {name: [] for name in ("loop", *others)}
        self._called: Spent | None = None

    def __call__(self, state: Any, frozen: Any, batch: Any) -> Any:
        """One step of the loop, behind one of each other system."""
        import jax

        jax.block_until_ready(state)
        if self._called is not None:
            self._spent["loop"].append(Spent.now().since(self._called))
        for name, other in self._others.items():
            self._spent[name].append(other.step(frozen))
        self._called = Spent.now()
        return self._compiled(state, frozen, batch)

    def spent(self) -> dict[str, Spent]:
        """By system, a step's seconds, without the first one and the loop's last."""
        counted = {name: spent[1:] for name, spent in self._spent.items()}
        count = len(counted["loop"])
        return {
            name: Spent(*(sum(part) / count for part in zip(*spent[:count], strict=True)))
            for name, spent in counted.items()
        }


class _Saving:
    """Checkpoints of a run, without the one behind its last step, which every run has once."""

    def __init__(self, inner: Any, *, last: int) -> None:
        self._inner, self._last = inner, last
        self.blocked = 0.0  # seconds in which the loop stood still

    def save(self, state: Any, *, step: int, **more: Any) -> None:
        """Saves in the background."""
        if step == self._last:
            return
        begin = time.perf_counter()
        self._inner.save(state, step=step, **more)
        self.blocked += time.perf_counter() - begin

    def settle(self) -> None:
        """Takes note of a save that has ended."""
        self._inner.settle()

    def finish(self) -> None:
        """Waits until what was saved is on disk."""
        self._inner.finish()


def _random_text() -> str:
    """Paragraphs of words that are as frequent as words are (Zipf)."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwygpbvk"))
    words = ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(_KINDS)]
    share = 1 / np.arange(1, _KINDS + 1)
    drawn = rng.choice(_KINDS, _WORDS, p=share / share.sum())
    lines = [" ".join(words[i] for i in part) for part in np.array_split(drawn, _WORDS // 100)]
    return "\n\n".join(lines)


def _row(name: str, rounds: list[dict[str, Spent]]) -> dict[str, Any]:
    """Ratios of a system to the bare step, with 95 % intervals."""

    def of(system: str, part: str) -> list[float]:
        return [getattr(spent[system], part) for spent in rounds]

    def ratios(part: str) -> list[float]:
        return [a / b for a, b in zip(of(name, part), of("bare", part), strict=True)]

    return {
        **turns.over(of(name, "clock"), of("bare", "clock")),
        "interval": _interval(ratios("clock")),
        "processor_ratio": turns.over(of(name, "processor"), of("bare", "processor"))["ratio"],
        "processor_interval": _interval(ratios("processor")),
        "thread_seconds": statistics.median(of(name, "thread")),
    }


def _interval(rounds: list[float]) -> tuple[float, float]:
    """95 % interval of the median of the rounds: bootstrap over rounds."""
    drawn = np.random.default_rng(0).choice(rounds, (2000, len(rounds)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f}-{interval[1]:.3f}"
