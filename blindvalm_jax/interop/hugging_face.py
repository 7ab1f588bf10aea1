"""What the `config.json` of every Hugging Face model has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blindvalm_jax.errors import UserError

# gelu_new and gelu_pytorch_tanh are one function; the first is the name that is written.
_ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


def our_activation(theirs: str, where: str) -> str:
    """Our name of an activation.

    Raises:
      UserError: our blocks do not have it.
    """
    if theirs not in _ACTIVATIONS:
        raise UserError(f"{where} must be one of {', '.join(_ACTIVATIONS)}, got {theirs!r}")
    return _ACTIVATIONS[theirs]


def their_activation(ours: str) -> str:
    """The name of one of our activations in a `config.json`."""
    return next(theirs for theirs, name in _ACTIVATIONS.items() if name == ours)


def check_types(
    values: Mapping[str, Any], defaults: Mapping[str, Any], where: str, *, nullable: tuple[str, ...]
) -> None:
    """Checks that each value has the type of its default; those in `nullable` may be null.

    Raises:
      UserError: naming the field, its type and what came.
    """
    for name, default in defaults.items():
        value, expected = values[name], type(default)
        if isinstance(value, expected) and isinstance(value, bool) == isinstance(default, bool):
            continue
        if expected is float and type(value) is int or value is None and name in nullable:
            continue
        raise UserError(f"{where}: {name} must be {expected.__name__}, got {value!r}")
