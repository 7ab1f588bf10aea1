"""Which model answered: what tells one apart from all that would answer otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blindvalm_jax.interop import weights
from blindvalm_jax.trained import TrainedModel
from blindvalm_jax.trees import flatten

# Where something lies is no part of what it is: contents have hashes beside these.
_PLACES = ("model", "grounding/tower", "grounding/images/index")
_DIGITS = 12  # of a hash that is shown
_SHOWN = 4  # differences


def about(place: str, model: TrainedModel) -> dict[str, Any]:
    """What results.json says of a model; place: its directory or hub id.

    weights_sha256: `weights.params_sha256` of the decoder. grounding: None of a model without;
    tower_sha256 is of the parameters as they are computed with, in bfloat16 where that is the
    computation's; tower_tokenizer: the fingerprint of its own, None where it reads the decoder's
    tokens; images: of a VALM, see `Images.describe`.
    """
    path = Path(place)
    return {
        "model": str(path.resolve()) if path.exists() else place,
        "step": model.step,
        "dtype": model.settings.train.dtype,
        "weights_sha256": weights.params_sha256(model.params),
        "tokenizer_fingerprint": model.tokenizer.fingerprint,
        "grounding": None if model.model.tower is None else _grounding(model),
    }


def _grounding(model: TrainedModel) -> dict[str, Any]:
    settings, own = model.settings.grounding, model.tower_tokenizer
    images = None if model.images is None else model.images.describe()
    return {
        **{name: getattr(settings, name) for name in ("source", "readout", "segments", "control")},
        "tower": settings.tower,
        "tower_sha256": weights.params_sha256(model.frozen["tower"]),
        "tower_tokenizer": None if own is None else own.fingerprint,
        "images": images and {name: images[name] for name in images if name != "prepared"},
    }


def grounded(grounding: Mapping[str, Any] | None) -> str:
    """How a model is grounded, in a sentence; as results.json says it."""
    if grounding is None:
        return "It reads no tower."
    names = ("source", "readout", "segments", "control", "tower")
    known = [f"{name} {grounding[name]}" for name in names if name in grounding]
    images = grounding.get("images") or {}
    known += [f"{name} {images[name]}" for name in ("index", "neighbours") if name in images]
    return f"Grounding: {', '.join(known)}."


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what another model was described than now, in a few words; "" of the same model."""
    was, wanted = flatten({name: before.get(name) for name in now}), flatten(now)
    names = [name for name in {**was, **wanted} if name not in _PLACES]
    other = [name for name in names if was.get(name) != wanted.get(name)]
    shown = [f"{x} {_short(was.get(x))}, now {_short(wanted.get(x))}" for x in other[:_SHOWN]]
    more = len(other) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _short(value: object) -> str:
    text = repr(value)
    hashed = isinstance(value, str) and len(value) == 64 and "/" not in value
    return f"{text[1 : _DIGITS + 1]}…" if hashed else text
