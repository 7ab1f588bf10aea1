"""Arrays in .npy files, mapped into memory when they are first asked for."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blindvalm_jax.errors import UserError

_MOST_OPEN = 256  # each takes a descriptor


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """A .npy file, and the shape and dtype that it is to have."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class MemoryMaps:
    """`maps[i]` is the i-th array, read-only; those not used for longest are closed again."""

    def __init__(self, arrays: Sequence[StoredArray], *, remedy: str) -> None:
        """Maps nothing yet; remedy: what to do about a damaged file, for its message."""
        self._arrays, self._remedy = arrays, remedy
        self._open: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()

    def __getitem__(self, number: int) -> np.ndarray:
        """An array.

        Raises:
          UserError: its file is missing, damaged, or of another shape or dtype.
        """
        found = self._open.pop(number, None)
        found = self._open[number] = self._map(number) if found is None else found
        if len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the maps, which would be copied whole to another process."""
        return {**self.__dict__, "_open": collections.OrderedDict()}

    def _map(self, number: int) -> np.ndarray:
        wanted = self._arrays[number]
        try:
            found = np.load(wanted.path, mmap_mode="r")
            if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(
                    f"{found.dtype} {found.shape}, expected {wanted.dtype} {wanted.shape}"
                )
        except (OSError, ValueError) as error:
            raise UserError(f"{wanted.path} is damaged ({error}): {self._remedy}") from error
        return found
