"""Looks at the checkpoints of runs.

  python -m blindvalm_jax.checkpoint ls RUN
  python -m blindvalm_jax.checkpoint verify RUN [--step=N] [--quarantine]
  python -m blindvalm_jax.checkpoint diff RUN[@STEP] RUN[@STEP] [--json=FILE]
  python -m blindvalm_jax.checkpoint average RUN@STEP RUN@STEP ... --out=DIR

ls: when each was saved, its size, its loss on held-out data, why it is kept; and what is in
quarantine.
verify: reads every array and compares it with the digest saved beside it; names each that differs,
and exits with 1. --quarantine moves bad checkpoints aside, where a sound one is left: the run goes
on there. Refused while it trains.
diff: settings and arrays that differ, and by how much.
average: the mean of the parameters of checkpoints of the same model, written as weights that
generate, evaluate, convert and train.init_from read.

RUN alone is its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from blindvalm_jax import files, runs
from blindvalm_jax.checkpoints import (
    averaging,
    differences,
    listing,
    named,
    verifying,
)
from blindvalm_jax.command_line import run_main
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import saving

_STEP = flags.DEFINE_integer("step", None, "verify: of this checkpoint; without it, of all")
_QUARANTINE = flags.DEFINE_bool("quarantine", False, "verify: move bad checkpoints aside")
_JSON = flags.DEFINE_string("json", "", "diff: also write what was found to this file")
_OUT = flags.DEFINE_string("out", "", "average: new directory that is written")

# What each subcommand takes of these.
_TAKES = {"ls": (), "verify": ("step", "quarantine"), "diff": ("json",), "average": ("out",)}
_ARGUMENTS = {
    "ls": (1, "one RUN"),
    "verify": (1, "one RUN"),
    "diff": (2, "two of RUN[@STEP]"),
    "average": (2, "two or more of RUN[@STEP]"),
}


def main(argv: Sequence[str]) -> int:
    """Runs the subcommand that the command line names; returns the exit code."""
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "ls": _ls,
        "verify": _verify,
        "diff": _diff,
        "average": _average,
    }
    if len(argv) < 2 or argv[1] not in commands:
        got = f"got {argv[1]!r}" if len(argv) > 1 else "got none"
        raise UserError(f"name what to do first: {', '.join(commands)}; {got} (see --help)")
    command, names = argv[1], argv[2:]
    for name in sorted({flag for taken in _TAKES.values() for flag in taken}):
        if flags.FLAGS[name].present and name not in _TAKES[command]:
            raise UserError(f"--{name} is not for {command} (see --help)")
    least, wanted = _ARGUMENTS[command]
    if len(names) < least or (len(names) > least and command != "average"):
        raise UserError(f"{command} needs {wanted}, got {' '.join(names) or 'none'} (see --help)")
    return commands[command](names)


def _ls(names: Sequence[str]) -> int:
    run, _ = named.run(names[0])
    print(listing.table(run))
    return 0


def _verify(names: Sequence[str]) -> int:
    run, steps = named.run(names[0])
    if _STEP.value is not None:
        steps = [named.checkpoint(f"{run}@{_STEP.value}").step]
    if not steps:
        raise UserError(f"{run} has no checkpoint")
    # A run that trains deletes checkpoints, and must not lose those that it counts on.
    with files.held(run / runs.LOCK) if _QUARANTINE.value else contextlib.nullcontext():
        return verifying.verify_each(run, steps, quarantined=_QUARANTINE.value)


def _diff(names: Sequence[str]) -> int:
    out = Path(_JSON.value).expanduser()
    if _JSON.value and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"--json={_JSON.value} must be a file in a directory that is there")
    first, second = (named.checkpoint(name) for name in names)
    found = differences.compare(first.path, second.path)
    print(differences.report(found, str(first), str(second)))
    if _JSON.value:
        content = {"checkpoints": [str(first), str(second)], **dataclasses.asdict(found)}
        files.write_json(out, content)
    return 0


def _average(names: Sequence[str]) -> int:
    if not _OUT.value:
        raise UserError("average needs --out, a new directory (see --help)")
    out = Path(_OUT.value).expanduser()
    saving.check_free(out)
    model = averaging.average([named.checkpoint(name) for name in names])
    sha256 = saving.write(out, model)
    print(f"{out}: {model.source}; sha256 {sha256}")
    return 0


if __name__ == "__main__":
    run_main(main, interrupted="nothing was changed")
