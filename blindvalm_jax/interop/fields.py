"""Fields of the configurations of others: what each may hold, and what it means to leave it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from blindvalm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Field:
    """A field: the value taken when it is absent, its type, its range with both ends, null or not.

    A field of type float takes whole numbers too.
    """

    default: Any
    kind: type
    low: float | None = None
    high: float | None = None
    nullable: bool = False

    def describe(self) -> str:
        """What the field may hold, in words."""
        text = self.kind.__name__
        if self.low is not None and self.high is not None:
            text += f" from {self.low:g} to {self.high:g}"
        elif self.low is not None:
            text += f" of at least {self.low:g}"
        return f"{text} or null" if self.nullable else text

    def holds(self, value: Any) -> bool:
        """Whether a value may stand here."""
        if value is None:
            return self.nullable
        kinds = {self.kind, int} if self.kind is float else {self.kind}
        if type(value) not in kinds:
            return False
        # Written so that what is not a number does not pass.
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


def size(default: int | None) -> Field:
    """A count of something there must be; a null default means that it may be left open."""
    return Field(default, int, low=1, nullable=default is None)


def token(default: int | None) -> Field:
    """A token's id, or none."""
    return Field(default, int, nullable=True)


def rate(default: float) -> Field:
    """A rate of dropout."""
    return Field(default, float, low=0.0, high=0.99)


def epsilon(default: float) -> Field:
    """What is added under a root."""
    return Field(default, float, low=0.0, high=1.0)


def name(default: str | None) -> Field:
    """A word."""
    return Field(default, str, nullable=default is None)


def switch(default: bool) -> Field:
    """True or false."""
    return Field(default, bool)


def read(content: Mapping[str, Any], fields: Mapping[str, Field], where: str) -> dict[str, Any]:
    """The fields that are known, each of its type and in its range; all others are left aside.

    Raises:
      UserError: naming `where`, the field, what it may hold and what came.
    """
    values = {}
    for key, field in fields.items():
        value = content.get(key, field.default)
        if not field.holds(value):
            raise UserError(f"{where}: {key} must be {field.describe()}, got {value!r}")
        values[key] = float(value) if field.kind is float and value is not None else value
    return values


def table(content: Mapping[str, Any], key: str, where: str) -> dict[str, Any] | None:
    """A table inside a configuration; None where it is absent or null.

    Raises:
      UserError: something else is there.
    """
    value = content.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{where}: {key} must be a table of fields, got {value!r}")
    return value
