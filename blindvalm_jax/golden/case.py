"""A golden case of the reference: how it is read and how its numbers are compared."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from flax.errors import FlaxError

from blindvalm_jax.errors import UserError

# Largest difference allowed. Features are unit vectors; the reference's own fp32 noise against
# fp64 is 2e-6 to 5e-6 in logits. Gradients: relative to the largest entry of the expected tensor.
FEATURE, OUTPUT, GRADIENT, RATE = 1e-5, 1e-4, 1e-3, 1e-9

# What json and numpy raise for files that are missing, cut short, damaged, or of another make.
_BROKEN = (
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


# What Python, numpy and flax raise for values that do not fit together.
_UNFIT = (ArithmeticError, LookupError, TypeError, ValueError, FlaxError)


class Entries(dict[str, Any]):
    """A table of a case; what it lacks is the case's fault, wherever it is asked for."""

    def __init__(self, case: str, entries: Mapping[str, Any]) -> None:
        """Copies the entries; case: its name."""
        super().__init__(entries)
        self._case = case

    def __missing__(self, key: str) -> NoReturn:
        """A `UserError` that names the case."""
        raise UserError(f"{self._case}: incomplete: {key!r} is missing")


@dataclasses.dataclass(frozen=True)
class Check:
    """One quantity of one case: its largest difference from the reference and what is allowed."""

    case: str
    quantity: str
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """A difference that is not a number does not hold."""
        return bool(self.difference <= self.tolerance)


@dataclasses.dataclass(frozen=True)
class Case:
    """A case as read: its name, the .json, the arrays."""

    name: str
    meta: Entries
    arrays: Entries

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Around what makes models and inputs of a case: what goes wrong there is its fault.

        Outside, where numbers are computed, it is ours.

        Raises:
          UserError: instead of what was raised.
        """
        try:
            yield
        except UserError:
            raise
        except _UNFIT as error:
            reason = " ".join(repr(error).split())
            raise UserError(f"{self.name}: incomplete or wrong for its kind: {reason}") from error

    def sizes(self, table: Mapping[str, Any], *names: str) -> tuple[int, ...]:
        """Entries of a table that count something.

        Raises:
          UserError: one of them is no positive integer.
        """
        for name in names:
            if type(table[name]) is not int or table[name] < 1:
                raise UserError(
                    f"{self.name}: {name} must be a positive integer, got {table[name]!r}"
                )
        return tuple(table[name] for name in names)

    def weights(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays whose names begin with `prefix`, without it."""
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def check(self, quantity: str, got: Any, expected: Any, tolerance: float) -> Check:
        """Largest absolute difference; infinite where shapes differ."""
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        same = got.shape == expected.shape
        difference = float(np.max(np.abs(got - expected))) if same else float("inf")
        return Check(self.name, quantity, difference, tolerance)

    def check_names(self, quantity: str, got: set[str], expected: set[str]) -> Check:
        """How many names are on one side only."""
        return Check(self.name, quantity, float(len(got ^ expected)), 0.0)

    def check_relative(self, quantity: str, got: Any, expected: Any, floor: float = 0.0) -> Check:
        """Largest difference over the largest expected entry (at least `floor`)."""
        scale = float(np.max([np.max(np.abs(expected)), floor, 1e-30]))
        check = self.check(quantity, got, expected, GRADIENT)
        return dataclasses.replace(check, difference=check.difference / scale)


def find(directory: Path) -> list[Path]:
    """The .json files of a directory, and its .npz files that have none beside them, sorted.

    Raises:
      UserError: the directory is missing or holds neither.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory; give one that holds golden cases")
    lone = [path for path in directory.glob("*.npz") if not path.with_suffix(".json").exists()]
    paths = sorted([*directory.glob("*.json"), *lone])
    if not paths:
        raise UserError(f"{directory} holds no golden case (a .json, and a .npz of the same name)")
    return paths


def is_other(path: Path) -> bool:
    """Whether a file is sound JSON, but of something else: no kind in it, no .npz beside it."""
    if path.suffix != ".json" or path.with_suffix(".npz").exists():
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return not isinstance(content, dict) or "kind" not in content


def read(path: Path) -> Case:
    """Reads one case.

    Raises:
      UserError: the file is not JSON, the .npz is missing, broken, or not what the .json says.
    """
    if path.suffix == ".npz":
        raise UserError(
            f"{path.name}: cannot be read as a golden case: {path.stem}.json is missing"
        )
    entries = functools.partial(Entries, path.stem)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"), object_hook=entries)
        arrays: dict[str, np.ndarray] = {}
        if meta["kind"] != "segmentation":
            # opened here, because numpy leaves a file open that it cannot read
            npz = path.with_suffix(".npz")
            with npz.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        shapes = {name: about["shape"] for name, about in meta.get("arrays", {}).items()}
    except _BROKEN as error:
        raise UserError(f"{path.name}: cannot be read as a golden case: {error}") from error
    for name, shape in shapes.items():
        if name not in arrays or list(arrays[name].shape) != shape:
            got = list(arrays[name].shape) if name in arrays else "nothing"
            raise UserError(f"{path.name}: array {name} should be {shape}, got {got}")
    return Case(path.stem, meta, entries(arrays))
