"""The memory plan of a compiled step."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device: what a step takes, needs besides, makes anew, and its instructions."""

    held: int
    temporary: int
    output: int
    code: int

    @property
    def total(self) -> int:
        """All of it at once: what must fit."""
        return self.held + self.temporary + self.output + self.code


def plan(compiled: Any) -> Memory | None:
    """The plan of a compiled step, None where the backend does not tell.

    What is donated and comes back in its place counts as held alone.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    return Memory(
        held=stats.argument_size_in_bytes,
        temporary=stats.temp_size_in_bytes,
        output=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
