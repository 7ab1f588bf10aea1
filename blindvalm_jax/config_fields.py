"""How a setting is declared and read: its meaning and range beside its default.

A section of settings is a frozen dataclass whose fields are made by `field`, or are sections.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

from blindvalm_jax.errors import UserError


def field(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field of a setting: its default, meaning, range (inclusive) or choices."""
    metadata = {"meaning": meaning, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def describe(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yields (key, default, meaning with its range) of every entry."""
    for entry in dataclasses.fields(cls):
        key = f"{prefix}{entry.name}"
        if "meaning" not in entry.metadata:
            yield from describe(_section(entry), f"{key}.")
        else:
            yield key, entry.default, f"{entry.metadata['meaning']}{_range_text(entry)}"


def _section(entry: dataclasses.Field[Any]) -> type:
    return cast(type, entry.default_factory)


def _range_text(entry: dataclasses.Field[Any]) -> str:
    meta = entry.metadata
    if meta["choices"]:
        return f" ({' | '.join(meta['choices'])})"
    if meta["low"] is not None and meta["high"] is not None:
        return f" ({meta['low']:g} ... {meta['high']:g})"
    return f" (>= {meta['low']:g})" if meta["low"] is not None else ""


def completed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with the defaults of those that are not there."""
    found = dict(values)
    for entry in dataclasses.fields(cls):
        if "meaning" in entry.metadata:
            found.setdefault(entry.name, entry.default)
        elif isinstance(section := found.get(entry.name, {}), Mapping):
            found[entry.name] = completed(_section(entry), section)
    return found


def build(cls: type, values: Any, path: str) -> Any:
    """A settings dataclass from nested dicts, every field present, known and in its range.

    Raises:
      UserError: naming the setting, what was expected and what came.
    """
    if not isinstance(values, dict):
        raise UserError(f"{path} must be a section with fields, got {values!r}")
    known = {entry.name: entry for entry in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise UserError(f"unknown setting {path}.{name}; known here: {', '.join(known)}")
    built = {}
    for name, entry in known.items():
        if name not in values:
            raise UserError(f"setting {path}.{name} is missing; start from config.default()")
        if "meaning" in entry.metadata:
            built[name] = _checked(entry, values[name], f"{path}.{name}")
        else:
            built[name] = build(_section(entry), values[name], f"{path}.{name}")
    return cls(**built)


def _checked(entry: dataclasses.Field[Any], value: Any, path: str) -> Any:
    expected = type(entry.default)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if expected is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not expected:
        raise UserError(f"{path} must be {expected.__name__}, got {value!r}")
    meta = entry.metadata
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{path} must be one of {', '.join(meta['choices'])}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path} must be a finite number, got {value!r}")
    too_low = meta["low"] is not None and value < meta["low"]
    too_high = meta["high"] is not None and value > meta["high"]
    if too_low or too_high:
        raise UserError(f"{path} is {value!r}, outside its range{_range_text(entry)}")
    return value
