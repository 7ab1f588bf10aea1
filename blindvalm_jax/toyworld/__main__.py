"""The comparison of the toy world: `python -m blindvalm_jax.toyworld --workdir=runs/toyworld`.

Renders the world, trains CLIP on its images, trains every variant on its sentences, asks all of
them about objects whose attributes no sentence states, and writes results.json and report.md. The
same command again goes on where it stopped, also after SIGTERM (exit code 42). Every knob of the
world is a flag.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from blindvalm_jax.command_line import run_main
from blindvalm_jax.errors import UserError
from blindvalm_jax.toyworld import knob_flags, recipes
from blindvalm_jax.toyworld.world import WorldConfig

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the comparison")
_SEEDS = flags.DEFINE_integer("seeds", 5, "worlds, each with models of its own", lower_bound=1)
_FIRST = flags.DEFINE_integer("first_seed", 0, "seed of the first of them", lower_bound=0)
_TABLE = flags.DEFINE_enum(
    "table", "heldout", ["heldout", "dev"], "objects of the printed table; choose settings on dev"
)
_VARIANTS = flags.DEFINE_list("variants", list(recipes.VARIANTS), "what is trained, with commas")
_STATED = flags.DEFINE_list(
    "stated_heldout", [], "shares of statements about held-out objects for the bias curve"
)
_STEPS = flags.DEFINE_integer(
    "steps", 0, "updates of every language model; 0: the recipe's", lower_bound=0
)
_CLIP_STEPS = flags.DEFINE_integer(
    "clip_steps", 0, "updates of CLIP; 0: the recipe's", lower_bound=0
)
_KNOBS = knob_flags.define(leave_out=("seed", "stated_heldout"))
_JOBS = flags.DEFINE_integer(
    "jobs", 0, "processes at a time; 0: one a core, 1 beside a GPU or TPU", lower_bound=0
)


def main(argv: Sequence[str]) -> None:
    """Runs the comparison that the flags say."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: every setting is a --flag (see --help)")
    if not _WORKDIR.value:
        raise UserError("--workdir is missing: name the directory of the comparison")
    unknown = sorted(set(_VARIANTS.value) - set(recipes.VARIANTS))
    if unknown or not _VARIANTS.value:
        raise UserError(f"--variants must be among {', '.join(recipes.VARIANTS)}, got {unknown}")
    try:
        stated = sorted(float(share) for share in _STATED.value)
    except ValueError as error:
        raise UserError(f"--stated_heldout must be numbers, got {_STATED.value}") from error
    seeds = range(_FIRST.value, _FIRST.value + _SEEDS.value)
    worlds = [WorldConfig(seed=seed, **_KNOBS()) for seed in seeds]
    for share in stated:
        WorldConfig(stated_heldout=share)  # refuses what is out of range
    if 0 in stated or len(set(stated)) < len(stated):
        raise UserError(f"--stated_heldout takes shares above 0, each once, got {_STATED.value}")

    from blindvalm_jax.survival import preemption
    from blindvalm_jax.toyworld import comparison, report

    root = Path(_WORKDIR.value)
    with preemption.noticed():
        results = comparison.run(
            root,
            worlds=worlds,
            variants=[name for name in recipes.VARIANTS if name in _VARIANTS.value],
            stated=stated,
            steps=recipes.Steps(clip=_CLIP_STEPS.value, language=_STEPS.value),
            jobs=_JOBS.value or _cores(),
        )
    path = report.write(results, root)
    print(report.summary_table(results, split=_TABLE.value))
    kind = {"heldout": "held-out", "dev": "development"}[_TABLE.value]
    print(f"\n{kind} objects: no sentence states what they look like. The report: {path}")
    if set(_VARIANTS.value) != set(recipes.VARIANTS):
        command = "-m blindvalm_jax.toyworld --workdir=runs/toyworld --first_seed=5"
        print(f"all variants and controls: {_python()} {command}")


def _python() -> str:
    """This interpreter, as one would call it from here."""
    here = Path(sys.executable)
    return str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here)


def _cores() -> int:
    """One process a core on a CPU; an accelerator serves one at a time."""
    import jax

    if jax.default_backend() != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    run_main(main)
