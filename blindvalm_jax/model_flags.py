"""Flags that name a trained model: a run, one of its checkpoints, weights, or a GPT-2 of others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from absl import flags

from blindvalm_jax import partitioning, trained
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.errors import UserError
from blindvalm_jax.trained import TrainedModel

_WORKDIR = flags.DEFINE_string("workdir", "", "run of a language model: its newest checkpoint")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "instead: RUN/checkpoints/STEP of a run, or a directory that convert wrote"
)
_HF = flags.DEFINE_string("hf", "", "instead: Hugging Face GPT-2, a directory or hub id")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "of weights without one beside them: directory")
_TOWER = flags.DEFINE_string("tower", "", "of weights with fusion layers: text tower, as RUN/tower")
_TOWER_TOKENIZER = flags.DEFINE_string("tower_tokenizer", "", "of that tower, if it has its own")
_READOUT = flags.DEFINE_string("readout", "", "of weights with fusion layers: token or eos")
_SEGMENTS = flags.DEFINE_string("segments", "", "of weights with fusion layers: causal, reference")
_INDEX = flags.DEFINE_string("index", "", "of weights of a VALM: its image index")
_NEIGHBOURS = flags.DEFINE_integer("neighbours", 0, "of weights of a VALM: K", lower_bound=0)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of weights: computation")

_ONLY_WEIGHTS = (
    *(_TOKENIZER, _TOWER, _TOWER_TOKENIZER, _READOUT, _SEGMENTS, _INDEX, _NEIGHBOURS),
    _DTYPE,
)


@dataclasses.dataclass(frozen=True)
class Named:
    """A model by name.

    flag: which names it. path: a directory, or a hub id. run, step: of a run's checkpoint; step
    None: the newest.
    """

    flag: str
    path: str
    run: Path | None = None
    step: int | None = None


def named() -> Named:
    """What --workdir, --checkpoint or --hf names; nothing is read.

    Raises:
      UserError: none of them does, or several do; or a flag is given that only weights need.
    """
    given = [flag for flag in (_WORKDIR, _CHECKPOINT, _HF) if flag.value]
    if len(given) != 1:
        raise UserError(
            "name one model: --workdir=RUN, --checkpoint=DIR or --hf=DIR, got "
            + (" and ".join(f"--{flag.name}" for flag in given) or "none")
        )
    found = _named(given[0].name, given[0].value)
    for flag in _ONLY_WEIGHTS:
        if found.run is not None and flag.present:
            raise UserError(f"--{flag.name} is for weights without a run: {found.run} records it")
    return found


def load(*, rows_over_devices: bool = True) -> TrainedModel:
    """The model that the command line names.

    rows_over_devices: rows are split over all devices, the parameters copied to each; else the
    first device alone.

    Raises:
      UserError: see `named`, `trained.load` and `trained.from_weights`.
    """
    found = named()
    mesh = partitioning.make_mesh(MeshConfig()) if rows_over_devices else None
    if found.run is not None:
        return trained.load(found.run, step=found.step, mesh=mesh)
    grounding = {
        "readout": _READOUT.value,
        "segments": _SEGMENTS.value,
        "index": _INDEX.value,
        "neighbours": _NEIGHBOURS.value,
        "source": "images" if _INDEX.value else "",
    }
    return trained.from_weights(
        found.path,
        tower=_TOWER.value,
        tower_tokenizer=_TOWER_TOKENIZER.value,
        tokenizer=_TOKENIZER.value,
        grounding={name: value for name, value in grounding.items() if value},
        dtype=_DTYPE.value,
        mesh=mesh,
    )


def _named(flag: str, value: str) -> Named:
    if flag == "hf":
        return Named(flag, value)
    path = Path(value).expanduser()
    if flag == "workdir":
        return Named(flag, str(path), run=path)
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return Named(flag, str(path), run=path.parent.parent, step=int(path.name))
    return Named(flag, str(path))
