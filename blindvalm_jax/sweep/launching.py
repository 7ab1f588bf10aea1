"""The commands that train a sweep with a scheduler, by the scripts of launch/; printed, never run.

All but SLURM start workers, each of which takes one run after the other. An array of SLURM has a
task for each run; runs that branch are arrays of their own, which wait for those of their trunks.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence

from blindvalm_jax.config import Config
from blindvalm_jax.errors import UserError
from blindvalm_jax.sweep import trunks

SCHEDULERS = ("slurm", "gke", "tpu_vm", "sky", "local")


def commands(
    runs: Mapping[str, Config],
    *,
    scheduler: str,
    workers: int | None,
    worker: Sequence[str],
    given: Sequence[str],
) -> list[str]:
    """Lines of a shell that train the runs, to be run at the top of the checkout.

    Args:
      runs: of the sweep, in the order of `--index`.
      scheduler: one of `SCHEDULERS`.
      workers: how many at once; None: on SLURM as many as there are runs, elsewhere 1.
      worker: flags of `sweep run`.
      given: flags of the script, such as those that name machines; of SLURM those of sbatch.

    Raises:
      UserError: the script could not do what is asked for.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}")
    run = ["sweep", "run", *worker]
    if scheduler == "slurm":
        return _arrays(runs, workers, run, given)
    count = min(workers or 1, len(runs))
    if scheduler == "local":
        start = [sys.executable, "launch/local.py", f"--processes={count}"]
        return [shlex.join([*start, *given, "--", *run])]
    if scheduler == "sky" and count > 1:
        raise UserError(
            "--scheduler=sky starts one worker: a bucket, which is what SkyPilot mounts at /runs, "
            "has no locks for several to share it; leave --workers out"
        )
    each = [_named(given, number if count > 1 else None) for number in range(count)]
    if scheduler == "tpu_vm":  # goes on until its worker has ended
        lines = [shlex.join(["launch/tpu_vm.sh", "babysit", *own, "--", *run]) for own in each]
        return lines if count == 1 else [*(f"{line} &" for line in lines), "wait"]
    verb = {"gke": "create", "sky": "launch"}[scheduler]
    return [shlex.join([f"launch/{scheduler}.sh", verb, *own, "--", *run]) for own in each]


def _arrays(
    runs: Mapping[str, Config], workers: int | None, run: Sequence[str], given: Sequence[str]
) -> list[str]:
    """An array of the runs that branch from none, one of those that branch from these, ..."""
    if array := [word for word in given if re.match(r"--array\b|-a", word)]:
        raise UserError(
            f"{array[0]}: which tasks there are follows from the sweep; --workers=N "
            "says how many at once"
        )
    levels = trunks.levels(runs)
    last = max(levels.values())
    most = "" if workers is None else f"%{workers}"
    lines = []
    for level in range(last + 1):
        indexes = [index for index, name in enumerate(runs) if levels[name] == level]
        words = ["sbatch", *given, f"--array={_ranges(indexes)}{most}"]
        script = shlex.join(["launch/slurm.sbatch", *run])
        # of a federation of clusters the job's number is followed by a name
        after = f' --dependency="afterany:${{level{level - 1}%%;*}}"' if level else ""
        parsable = "" if level == last else " --parsable"
        line = f"{shlex.join(words)}{parsable}{after} {script}"
        lines.append(line if level == last else f"level{level}=$({line}) &&")
    return lines


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers, ascending, as SLURM lists them: 0-3,7."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][-1] == number - 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ",".join(str(x[0]) if len(x) == 1 else f"{x[0]}-{x[-1]}" for x in found)


def _named(given: Sequence[str], number: int | None) -> list[str]:
    """Flags of a script with the name of one worker: NAME-K of several."""
    name = next((x.partition("=")[2] for x in given if x.startswith("--name=")), "sweep")
    others = [word for word in given if not word.startswith("--name=")]
    return [f"--name={name}" if number is None else f"--name={name}-{number}", *others]


def flags_of_worker(words: Sequence[str], *, without: Sequence[str]) -> list[str]:
    """The words of a command line, `launch` among them, that are flags of a worker too.

    without: flags that are not, each of which has a value.
    """
    found, skips = [], False
    for word in words:
        name = word.lstrip("-").partition("=")[0]
        if word == "--":
            break
        if skips:
            skips = False
        elif word.startswith("-") and name in without:
            skips = "=" not in word
        else:
            found.append(word)
    found.remove("launch")
    return found
