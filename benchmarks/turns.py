"""Systems that take turns: one process each holds a compiled step, and only one runs at a time.

So ratios are within rounds and hold when the machine's speed drifts. A process answers one line of
JSON to each word it reads: "ready", "step", "peak", and what its benchmark adds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any

from absl import flags

from blindvalm_jax.data.workers import Progress
from blindvalm_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from blindvalm_jax.config import Config
    from blindvalm_jax.grounding.retrieval import Search
    from blindvalm_jax.models.clip import TowerConfig
    from blindvalm_jax.objectives.language_model import Batch, Model

ROWS = flags.DEFINE_integer("rows", 2, "Rows of a batch.", lower_bound=1)
LENGTH = flags.DEFINE_integer(
    "length",
    None,
    "Tokens of a row; without it step_ratio takes 512, valm_cost 256.",
    lower_bound=2,
)
ROUNDS = flags.DEFINE_integer("rounds", 15, "Counted turns of each system.", lower_bound=1)
DROPOUT = flags.DEFINE_float("dropout", 0.1, "Dropout of all systems.", 0.0, 0.9)

VOCABULARY = 49_412  # CLIP's, as the paper's language model has it
_TOWER_VOCABULARY = 49_408
_SEGMENT = 26  # mean tokens of a text of the tower, as the causal rule gives on real text


def length(default: int) -> int:
    """Tokens of a row: what the command line says, or what a benchmark takes without it."""
    return LENGTH.value or default


def whole_numbers(words: list[str], flag: str, *, least: int = 1) -> list[int]:
    """The numbers of a flag.

    Raises:
      UserError: there is none, or something else, or one below `least`.
    """
    if not words or not all(word.isdecimal() and int(word) >= least for word in words):
        raise UserError(f"--{flag} must be whole numbers, {least} or more, got {','.join(words)!r}")
    return [int(word) for word in words]


class Worker:
    """A process that holds one compiled system and answers one line to each line."""

    def __init__(self, command: list[str]) -> None:
        """Starts `python -m` with these arguments."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # several processes share a GPU: none may take it whole
            env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )

    def ask(self, question: str) -> dict[str, Any]:
        """Sends a word and waits for the JSON that answers it.

        Raises:
          UserError: the process has ended.
        """
        line = ""
        with contextlib.suppress(BrokenPipeError):
            _pipe(self._process.stdin).write(question + "\n")
            _pipe(self._process.stdin).flush()
            line = _pipe(self._process.stdout).readline()
        if not line:
            raise UserError(f"a process ended, its message is above: {self._process.args!r}")
        return json.loads(line)

    def seconds(self, question: str = "step") -> float:
        """How long what a word asks for has taken there."""
        return self.ask(question)["seconds"]

    def stop(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):  # what it was asked last is still in the pipe
            _pipe(self._process.stdin).close()
        self._process.wait()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise RuntimeError("the worker has no pipe")
    return pipe


def take(turns: Mapping[str, Callable[[], float]], *, title: str) -> dict[str, list[float]]:
    """Seconds of each turn in each counted round; the round before them warms up.

    How far it is and the time left are shown under `title`, on standard error.

    A turn is taken twice and the second time counts: a process that waited while another worked
    begins with cold caches, and perhaps with pages that the system has taken back.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    with Progress(title, total=ROUNDS.value + 1, unit="round") as progress:
        for round_number in range(ROUNDS.value + 1):
            for name, turn in turns.items():
                turn()
                spent = turn()
                if round_number:
                    seconds[name].append(spent)
            progress.advance(1)
    return seconds


def over(seconds: list[float], others: list[float]) -> dict[str, float]:
    """Ratios of one system's steps to another's, round by round: median and range."""
    ratios = [a / b for a, b in zip(seconds, others, strict=True)]
    return {
        "seconds": statistics.median(seconds),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def machine(about: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """Where and how it was measured; about: what a worker says when it is ready."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": about["device"],
        "versions": about["versions"],
        "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
        "settings": {
            "rows": ROWS.value,
            **settings,
            "dropout": DROPOUT.value,
            "rounds": ROUNDS.value,
        },
    }


@dataclasses.dataclass
class System:
    """A compiled step with all that it takes.

    load: makes the batch of a step, which is then part of its time; None: all take the same one.
    """

    model: Model
    compiled: Any
    state: Any
    frozen: dict[str, Any]
    batch: Batch
    mflops_per_token: float
    load: Callable[[], Batch] | None = None

    def step(self) -> float:
        """Runs one update and says how long it took."""
        import jax

        begin = time.perf_counter()
        if self.load is not None:
            self.batch = self.load()
        self.state, scalars = self.compiled(self.state, self.frozen, self.batch)
        jax.block_until_ready((self.state, scalars))
        return time.perf_counter() - begin


def compile_system(
    settings: Config,
    shape: TowerConfig | None,
    *,
    index: Any = None,
    search: Search | None = None,
    rows: Mapping[str, Any] | None = None,
) -> System:
    """The system of some settings.

    shape: of its text tower; index: vectors on the devices; search: as `system.build` takes it;
    rows: of its batch, random ones without.
    """
    from blindvalm_jax import compilation, flops, optim, partitioning
    from blindvalm_jax.objectives import language

    mesh = partitioning.make_mesh(settings.mesh)
    model, frozen = build(settings, shape, mesh, search=search)
    optimizer = optim.make(settings.optimizer, steps=settings.train.steps)
    state = compilation.init_state(model, optimizer, seed=0, mesh=mesh)
    if index is not None:
        frozen["index"] = index
    if rows is None:
        rows = random_rows(settings, tower=model.tower is not None)
    batch = language.to_device(rows, mesh)
    update = compilation.make_update(settings, model, optimizer)
    compiled = compilation.compile_step(update, state, frozen, batch, mesh)
    cost = flops.per_token(
        settings,
        vocab_size=VOCABULARY,
        tower=shape,
        tower_length=settings.data.sequence_length,
        vectors=0 if index is None else len(index),
    )
    return System(model, compiled, state, frozen, batch, cost.total / 1e6)


def build(
    settings: Config, shape: TowerConfig | None, mesh: Mesh, *, search: Search | None = None
) -> tuple[Model, dict[str, Any]]:
    """The model of some settings, and its tower with fresh weights on the devices."""
    import jax

    from blindvalm_jax import system
    from blindvalm_jax.objectives import language

    tower = None if shape is None else system.fresh_tower(shape, seed=0)
    model = system.build(
        settings,
        vocab_size=VOCABULARY,
        tower=tower,
        platform=jax.devices()[0].platform,
        search=search,
    )
    frozen = {}
    if tower is not None and model.tower is not None:
        like = language.abstract_tower(tower.config, settings, mesh)
        frozen["tower"] = language.place_tower(tower, like)
    return model, frozen


def tower_shape(layers: int, width: int, heads: int, projection: int) -> TowerConfig:
    """A text tower with CLIP's vocabulary."""
    from blindvalm_jax.models.clip import TowerConfig

    return TowerConfig(
        layers=layers,
        width=width,
        heads=heads,
        mlp_width=4 * width,
        projection=projection,
        vocab_size=_TOWER_VOCABULARY,
    )


def random_rows(settings: Config, *, tower: bool, seed: int = 0) -> dict[str, Any]:
    """Random rows, cut into texts of real lengths for the tower."""
    import numpy as np

    rng = np.random.default_rng(seed)
    size = (settings.train.batch_size, settings.data.sequence_length)
    offset = VOCABULARY - _TOWER_VOCABULARY
    tokens = rng.integers(offset, VOCABULARY, size, dtype=np.int32)
    rows: dict[str, np.ndarray] = {
        "tokens": tokens,
        "targets": rng.integers(offset, VOCABULARY, size, dtype=np.int32),
        "weights": np.ones(size, np.float32),
    }
    if tower:
        rows["tower_tokens"] = tokens - offset
        starts = rng.random(size) < 1 / _SEGMENT
        starts[:, :: _SEGMENT * 2] = True  # none longer than the tower reads
        rows["tower_starts"] = starts
    return rows


def serve(system: System, more: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """Answers the words on standard input until it ends; more: words of the benchmark's own."""
    import jax

    from blindvalm_jax import memory, runs

    plan = memory.plan(system.compiled)

    def peak() -> dict[str, Any]:
        return {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}

    def ready() -> dict[str, Any]:
        return {
            "mflops_per_token": system.mflops_per_token,
            "plan_mib": 0.0 if plan is None else (plan.held + plan.temporary) / 2**20,
            "device": jax.devices()[0].device_kind,
            "versions": runs.versions(),
        }

    answers: dict[str, Callable[[], dict[str, Any]]] = {
        "ready": ready,
        "step": lambda: {"seconds": system.step()},
        "peak": peak,
        **more,
    }
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)
