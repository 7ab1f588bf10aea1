"""Names of activations in the `config.json` of Hugging Face models."""

from __future__ import annotations

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
