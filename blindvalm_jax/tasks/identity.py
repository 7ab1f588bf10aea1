"""Which model answered: what tells one apart from all that would answer otherwise."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blindvalm_jax.interop import weights
from blindvalm_jax.models.decoder import Decoder
from blindvalm_jax.trained import TrainedModel
from blindvalm_jax.trees import flatten

# Where something lies is no part of what it is: contents have hashes beside these.
_PLACES = ("model", "grounding/tower", "grounding/images/index")
# What tells models apart, of what results.json says.
_MODEL = (
    *("step", "dtype", "device", "weights_sha256", "tokenizer_fingerprint", "decoder", "grounding"),
)
# Settings of a decoder that change nothing in what it computes once it is trained.
_IDLE = ("dropout", "attention_dropout", "init", "vocab_multiple")
_DIGITS = 12  # of a hash that is shown
_NAMED = 8  # of the hash in a name
_SHOWN = 4  # differences


def about(place: str, model: TrainedModel) -> dict[str, Any]:
    """What results.json says of a model; place: its directory or hub id.

    weights_sha256: `weights.params_sha256` of the decoder; decoder: all that it computes by beside
    them. device: the kind, since float32 is rounded otherwise on another. grounding: None of a
    model without; tower_sha256 is of the parameters as they are computed with, in bfloat16 where
    that is the computation's; tower_config: what the tower computes by; tower_tokenizer: the
    fingerprint of its own, None where it reads the decoder's tokens; images: of a VALM, see
    `Images.describe`.
    """
    path = Path(place)
    found = {
        "model": str(path.resolve()) if path.exists() else place,
        "step": model.step,
        "dtype": model.settings.train.dtype,
        "device": model.mesh.devices.flat[0].device_kind,
        "weights_sha256": weights.params_sha256(model.params),
        "tokenizer_fingerprint": model.tokenizer.fingerprint,
        "decoder": _decoder(model.model.decoder),
        "grounding": _grounding(model),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))  # as it is read back
    return plain


def _decoder(decoder: Decoder) -> dict[str, Any]:
    config = decoder.config
    values = {
        **dataclasses.asdict(config),
        "vocab_size": decoder.vocab_size,
        "mlp_width": config.mlp_width or 4 * config.width,
        "fusion_layers": decoder.fusion_layers,
        "fusion": dataclasses.asdict(decoder.fusion) if decoder.fusion_layers else None,
    }
    idle = _IDLE if config.positions == "learned" else (*_IDLE, "max_positions")
    return {name: value for name, value in values.items() if name not in idle}


def _grounding(model: TrainedModel) -> dict[str, Any] | None:
    tower = model.model.tower
    if tower is None:
        return None
    settings, own = model.settings.grounding, model.tower_tokenizer
    images = None if model.images is None else model.images.describe()
    return {
        **{name: getattr(settings, name) for name in ("source", "readout", "segments", "control")},
        "tower": settings.tower,
        "tower_dtype": settings.dtype,
        "tower_sha256": weights.params_sha256(model.frozen["tower"]),
        "tower_config": dataclasses.asdict(tower.config),
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


def name(of: Mapping[str, Any]) -> str:
    """Of a directory for the results of a model under a protocol: both, as results.json has them.

    Such as step_2000_1a2b3c4d_corrected: the digits are those of a hash of what tells it apart.
    """
    told = flatten({key: of.get(key) for key in _MODEL})
    known = {key: value for key, value in told.items() if key not in _PLACES}
    digits = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:_NAMED]
    return re.sub(r"[^A-Za-z0-9]+", "_", f"step_{of.get('step')}_{digits}_{of['protocol']}")


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
