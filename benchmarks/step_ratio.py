"""Time of a training step of BLIND-VALM over that of the GPT-2 it extends, paired.

One process per system holds its compiled step; they take turns, one step each, and only the one
whose turn it is runs. Sizes are the paper's (768 x 12, CLIP text tower 768 x 12, vocabulary
49,412), rows of real lengths: segments of about 26 tokens, as the causal rule gives on real text.
The recipe's dropout is on. Peak memory is the process's, initialisation and compilation included;
step memory is XLA's plan: arguments and temporaries of the compiled step. The reference's ratio:
19 on A100s by its authors' logs, 1.6 on one CPU thread.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import IO, Any

from absl import flags

_ROWS = flags.DEFINE_integer("rows", 2, "Rows of a batch.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 512, "Tokens of a row.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Counted steps of each system.", lower_bound=1)
_DROPOUT = flags.DEFINE_float("dropout", 0.1, "Dropout of both systems.", 0.0, 0.9)

VARIANTS = ("gpt2", "blind", "eos")
_SEGMENT = 26


def run() -> dict[str, Any]:
    """Prints the table and returns the numbers."""
    command = [sys.executable, "-m", "benchmarks.step_ratio", f"--rows={_ROWS.value}"]
    command += [f"--length={_LENGTH.value}", f"--dropout={_DROPOUT.value}"]
    workers = {name: _Worker([*command, f"--variant={name}"]) for name in VARIANTS}
    try:
        about = {name: worker.ask("ready") for name, worker in workers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for round_number in range(_ROUNDS.value + 1):
            for name, worker in workers.items():
                spent = worker.ask("step")["seconds"]
                if round_number:  # the first round warms up
                    seconds[name].append(spent)
        peak = {name: worker.ask("peak")["peak_mib"] for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.stop()
    rows = {}
    for name in VARIANTS:
        ratios = [a / b for a, b in zip(seconds[name], seconds["gpt2"], strict=True)]
        rows[name] = {
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "peak_mib": peak[name],
            "plan_mib": about[name]["plan_mib"],
            "mflops_per_token": about[name]["mflops_per_token"],
            "flop_ratio": about[name]["mflops_per_token"] / about["gpt2"]["mflops_per_token"],
        }
    print(
        f"{'system':8} {'s/step':>8} {'ratio':>7} {'range':>13} {'FLOP ratio':>11} "
        f"{'peak MiB':>9} {'step MiB':>9}"
    )
    for name, row in rows.items():
        spread = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
        print(
            f"{name:8} {row['seconds']:8.2f} {row['ratio']:7.3f} {spread:>13} "
            f"{row['flop_ratio']:11.3f} {row['peak_mib']:9,.0f} {row['plan_mib']:9,.0f}"
        )
    machine = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": about["gpt2"]["device"],
        "versions": about["gpt2"]["versions"],
        "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
        "settings": {
            "rows": _ROWS.value,
            "length": _LENGTH.value,
            "dropout": _DROPOUT.value,
            "rounds": _ROUNDS.value,
            "dtype": "float32",
        },
    }
    print(json.dumps(machine))
    return {
        "blind_over_gpt2": rows["blind"]["ratio"],
        "eos_over_gpt2": rows["eos"]["ratio"],
        "systems": rows,
        **machine,
    }


class _Worker:
    """A process that holds one compiled system and answers one line to each line."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # three processes share a GPU: none may take it whole
            env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )

    def ask(self, question: str) -> dict[str, Any]:
        """Sends a word and waits for the JSON that answers it."""
        _pipe(self._process.stdin).write(question + "\n")
        _pipe(self._process.stdin).flush()
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise RuntimeError(f"the process of {self._process.args!r} died")
        return json.loads(line)

    def stop(self) -> None:
        """Ends the process."""
        _pipe(self._process.stdin).close()
        self._process.wait()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise RuntimeError("the worker has no pipe")
    return pipe


def worker(variant: str) -> None:
    """Compiles the step of a variant and runs it once per "step" on standard input."""
    import jax
    import numpy as np

    from blindvalm_jax import compilation, flops, optim, partitioning, presets, runs, system
    from blindvalm_jax.config import default, parse
    from blindvalm_jax.models.clip import TowerConfig
    from blindvalm_jax.objectives import language

    settings_dict = presets.variant(presets.paper(default(), "small"), variant)
    settings_dict.train.batch_size = _ROWS.value
    settings_dict.train.dtype = settings_dict.grounding.dtype = "float32"
    settings_dict.data.sequence_length = _LENGTH.value
    settings_dict.decoder.dropout = settings_dict.decoder.attention_dropout = _DROPOUT.value
    settings = parse(settings_dict)
    vocab_size = 49_412
    shape = TowerConfig(
        layers=12, width=768, heads=12, mlp_width=3072, projection=768, vocab_size=49_408
    )
    tower = None if variant == "gpt2" else system.fresh_tower(shape, seed=0)
    mesh = partitioning.make_mesh(settings.mesh)
    platform_name = jax.devices()[0].platform
    model = system.build(settings, vocab_size=vocab_size, tower=tower, platform=platform_name)
    optimizer = optim.make(settings.optimizer, steps=settings.train.steps)
    state = compilation.init_state(model, optimizer, seed=0, mesh=mesh)
    frozen = {}
    if tower is not None:
        like = language.abstract_tower(shape, settings, mesh)
        frozen = {"tower": language.place_tower(tower, like)}
    rng = np.random.default_rng(0)
    size = (_ROWS.value, _LENGTH.value)
    tokens = rng.integers(4, vocab_size, size, dtype=np.int32)
    rows: dict[str, np.ndarray] = {
        "tokens": tokens,
        "targets": rng.integers(4, vocab_size, size, dtype=np.int32),
        "weights": np.ones(size, np.float32),
    }
    if tower is not None:
        rows["tower_tokens"] = tokens - 4
        starts = rng.random(size) < 1 / _SEGMENT
        starts[:, :: _SEGMENT * 2] = True  # none longer than the tower reads
        rows["tower_starts"] = starts
    batch = language.to_device(rows, mesh)
    update = compilation.make_update(settings, model, optimizer)
    compiled = compilation.compile_step(update, state, frozen, batch, mesh)
    cost = flops.per_token(
        settings,
        vocab_size=vocab_size,
        tower=None if tower is None else shape,
        tower_length=_LENGTH.value,
    )
    del tower
    for line in sys.stdin:
        answer: dict[str, Any] = {}
        if line.strip() == "ready":
            answer = {
                "mflops_per_token": cost.total / 1e6,
                "plan_mib": sum(compilation.memory_plan(compiled) or ()) / 2**20,
                "device": jax.devices()[0].device_kind,
                "versions": runs.versions(),
            }
        elif line.strip() == "step":
            begin = time.perf_counter()
            state, scalars = compiled(state, frozen, batch)
            jax.block_until_ready((state, scalars))
            answer = {"seconds": time.perf_counter() - begin}
        else:
            peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            answer = {"peak_mib": peak_kib / 1024}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    from absl import app

    _VARIANT = flags.DEFINE_enum("variant", "gpt2", VARIANTS, "System of this process.")
    app.run(lambda _: worker(_VARIANT.value))
