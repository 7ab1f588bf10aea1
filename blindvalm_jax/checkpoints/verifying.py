"""Whether a checkpoint is as it was saved, every array read on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from blindvalm_jax import digests
from blindvalm_jax.checkpoints import arrays, layout, quarantine
from blindvalm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found of a checkpoint: all that is bad of it; compared: with digests."""

    bad: list[str]
    arrays: int
    compared: bool


def verify(checkpoint: Path) -> Verdict:
    """Reads all of a checkpoint and compares it with its digests, where it has them."""
    try:
        return _verified(checkpoint)
    except UserError as error:
        return Verdict([str(error)], 0, compared=False)
    except OSError as error:  # it may be deleted meanwhile
        return Verdict([f"cannot be read: {error}"], 0, compared=False)


def verify_each(run: Path, steps: Sequence[int], *, quarantined: bool = False) -> int:
    """Says what is found of each checkpoint, and moves bad ones aside if asked; the exit code.

    Raises:
      UserError: no sound one would be left, or one cannot be moved.
    """
    bad: dict[int, str] = {}
    for step in steps:
        checkpoint = layout.directory(run) / str(step)
        found = verify(checkpoint)
        if not checkpoint.exists():
            print(f"step {step}: it was deleted meanwhile")
        elif found.bad:
            bad[step] = "; ".join(found.bad)
            print("\n".join([f"step {step}: BAD", *(f"  {reason}" for reason in found.bad)]))
        elif found.compared:
            print(f"step {step}: sound, {found.arrays} arrays as they were saved")
        else:
            print(f"step {step}: readable, {found.arrays} arrays; it is older than digests")
    if bad and quarantined:
        if not set(layout.steps(run)) - bad.keys():
            raise UserError(f"no other checkpoint of {run} is left: nothing was moved")
        for step, reason in bad.items():
            print(f"step {step}: it is now {quarantine.move(run, step, reason)}")
    return 1 if bad else 0


def _verified(checkpoint: Path) -> Verdict:
    if fault := layout.fault(checkpoint):
        return Verdict([fault], 0, compared=False)
    bad: dict[str, str] = {}
    got: dict[str, str] = {}
    expected = layout.read_digests(checkpoint)
    if expected is not None:
        bad |= layout.wrong_items(checkpoint, expected)
    names = sorted(arrays.shapes(checkpoint))
    step = None
    for name, found in _each(checkpoint, names):
        if isinstance(found, UserError):
            bad[name] = str(found).removeprefix(f"{checkpoint} ")
            continue
        got[name] = digests.of_host(found)
        if name == "step":
            step = int(found)
    if expected is not None:
        wanted = {name: text for name, text in expected.leaves.items() if name not in bad}
        bad |= digests.differing(wanted, got)
    place = layout.read_json(checkpoint, layout.DATA).get("next_step")
    if step is not None and not step == place == int(checkpoint.name):
        bad["step"] = f"is {step}, its data position {place}, its directory {checkpoint.name}"
    return Verdict(
        [f"{name} {reason}" for name, reason in bad.items()],
        len(names),
        compared=expected is not None,
    )


def _each(checkpoint: Path, names: list[str]) -> Iterator[tuple[str, np.ndarray | UserError]]:
    """Every array, or why it cannot be read; read together as long as all can."""
    done = set()
    try:
        for name, value in arrays.read(checkpoint, names):
            done.add(name)
            yield name, value
    except UserError:
        for name in names:
            if name in done:
                continue
            try:
                yield from arrays.read(checkpoint, [name])
            except UserError as error:
                yield name, error
