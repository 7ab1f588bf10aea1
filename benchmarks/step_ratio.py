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
from typing import Any

from absl import flags

from benchmarks import turns
from blindvalm_jax.command_line import run_main

VARIANTS = ("gpt2", "blind", "eos")
_LENGTH = 512


def run() -> dict[str, Any]:
    """Prints the table and returns the numbers."""
    length = turns.length(_LENGTH)
    command = ["benchmarks.step_ratio", f"--rows={turns.ROWS.value}"]
    command += [f"--length={length}", f"--dropout={turns.DROPOUT.value}"]
    workers = {name: turns.Worker([*command, f"--variant={name}"]) for name in VARIANTS}
    try:
        about = {name: worker.ask("ready") for name, worker in workers.items()}
        seconds = turns.take(
            {name: worker.seconds for name, worker in workers.items()}, title="steps"
        )
        peak = {name: worker.ask("peak")["peak_mib"] for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.stop()
    rows = {}
    for name in VARIANTS:
        rows[name] = {
            **turns.over(seconds[name], seconds["gpt2"]),
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
    machine = turns.machine(about["gpt2"], length=length, dtype="float32")
    print(json.dumps(machine))
    return {
        "blind_over_gpt2": rows["blind"]["ratio"],
        "eos_over_gpt2": rows["eos"]["ratio"],
        "systems": rows,
        **machine,
    }


def worker(variant: str) -> None:
    """Compiles the step of a variant and runs it once per "step" on standard input."""
    from blindvalm_jax import presets
    from blindvalm_jax.config import default, parse

    settings = presets.variant(presets.paper(default(), "small"), variant)
    settings.train.batch_size = turns.ROWS.value
    settings.train.dtype = settings.grounding.dtype = "float32"
    settings.data.sequence_length = turns.length(_LENGTH)
    settings.decoder.dropout = settings.decoder.attention_dropout = turns.DROPOUT.value
    shape = None if variant == "gpt2" else turns.tower_shape(12, 768, 12, projection=768)
    turns.serve(turns.compile_system(parse(settings), shape), {})


if __name__ == "__main__":
    _VARIANT = flags.DEFINE_enum("variant", "gpt2", VARIANTS, "System of this process.")
    run_main(lambda _: worker(_VARIANT.value))
