"""Flags that name a trained model; see `NamedModel`."""

from __future__ import annotations

from typing import Any

from absl import flags

from blindvalm_jax import partitioning
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.named_model import DTYPES, NamedModel
from blindvalm_jax.trained import TrainedModel

_TEXTS = {
    "workdir": "run of a language model: its newest checkpoint",
    "checkpoint": "instead: RUN/checkpoints/STEP, or a directory that convert wrote",
    "hf": "instead: Hugging Face GPT-2, a directory or hub id",
    "tokenizer": "of weights without one beside them: its directory",
    "tower": "of weights with fusion layers: their text tower, of a run RUN/tower",
    "tower_tokenizer": "of that tower, if it has its own",
    "readout": "of weights with fusion layers: token or eos",
    "segments": "of weights with fusion layers: causal or reference",
    "index": "of weights of a VALM: its image index",
}
_FLAGS = [flags.DEFINE_string(name, "", meaning) for name, meaning in _TEXTS.items()] + [
    flags.DEFINE_integer("neighbours", 0, "of weights of a VALM: K", lower_bound=0),
    flags.DEFINE_enum("dtype", DTYPES[0], DTYPES, "of the computation, whatever it was trained in"),
]
# The settings that some of them stand for.
INPUTS = {
    **{"checkpoint": "train.init_from", "hf": "train.init_from", "tokenizer": "tokenizer.path"},
    **{"tower": "grounding.tower", "tower_tokenizer": "grounding.tokenizer"},
    "index": "grounding.index",
}


def named() -> NamedModel:
    """What the command line names; nothing is read.

    Raises:
      UserError: see `NamedModel.check`.
    """
    values: dict[str, Any] = {flag.name: flag.value for flag in _FLAGS}
    found = NamedModel(**values)
    found.check()
    return found


def given() -> list[str]:
    """Which of these flags the command line has."""
    return [flag.name for flag in _FLAGS if flag.present]


def load(*, rows_over_devices: bool = True) -> TrainedModel:
    """The model that the command line names.

    rows_over_devices: rows are split over all devices, the parameters copied to each; else the
    first device alone.

    Raises:
      UserError: see `NamedModel.load`.
    """
    return named().load(mesh=partitioning.make_mesh(MeshConfig()) if rows_over_devices else None)
