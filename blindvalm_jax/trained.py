"""Reading a trained model, with tower, index and tokenizers, from a run or weights alone."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from blindvalm_jax import addresses, config, files, hub, partitioning, runs, system
from blindvalm_jax.data import packing, prepared, tokenizer_files, tokenizers
from blindvalm_jax.data.clip_bpe import ClipTokenizer
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding.images import Images
from blindvalm_jax.interop import formats, run_directory, weights
from blindvalm_jax.objectives import language
from blindvalm_jax.stores.settings import INPUTS, brought
from blindvalm_jax.trained_model import TrainedModel

__all__ = ["TrainedModel", "from_weights", "in_training", "load"]


def load(
    workdir: str | Path, *, step: int | None = None, dtype: str = "", mesh: Mesh | None = None
) -> TrainedModel:
    """A checkpoint of a language model's run.

    step: which, None: the newest. dtype: of decoder and tower, "": as in training.

    Raises:
      UserError: it is no such run or lacks something, such as that checkpoint; its tokenizer,
        tower or image index, or FAISS's of it, is another than it was trained with.
    """
    if wrong := addresses.refusal({"workdir": str(workdir)}):
        raise UserError(wrong)
    workdir = Path(workdir).expanduser()
    run = run_directory.load(workdir, step=step)
    if not isinstance(run.config, weights.DecoderSpec):
        raise UserError(f"{workdir} is a run of a {weights.kind_of(run.config)}, not of a decoder")
    settings = config.from_dict(files.read_object(workdir / "config.json"))
    read = {"grounding.index"}  # what else is named was read to train, or is kept in the run
    settings = brought(settings, but=set(INPUTS) - read)
    if dtype:
        settings = dataclasses.replace(
            settings,
            train=dataclasses.replace(settings.train, dtype=dtype),
            grounding=dataclasses.replace(settings.grounding, dtype=dtype),
        )
    if run.tokenizer_directory is None:
        raise UserError(f"the tokenizer of {workdir} is gone: its windows are where it was kept")
    tokenizer = _read_tokenizer(run.tokenizer_directory, run.tokenizer, source=str(workdir))
    kept = workdir / "tower"
    tower_tokenizer = _own(prepared.tower_tokenizer(settings, kept), tokenizer)
    aligned = (run.tokenizer_directory.parent / "tower_tokenizer").exists()
    if aligned and tower_tokenizer is None and settings.grounding.source != "none":
        raise UserError(f"the tokenizer of the tower of {workdir} is gone: it was kept in {kept}")
    model = _joined(
        settings,
        run.config,
        run.params,
        tower=system.read_tower(settings, workdir),
        tokenizer=tokenizer,
        tower_tokenizer=tower_tokenizer,
        step=run.step,
        mesh=mesh,
    )
    if model.images is not None:
        runs.check_images(workdir, model.images.describe())
    return model


def from_weights(
    directory: str | Path,
    *,
    tower: str | Path = "",
    tower_tokenizer: str | Path = "",
    tokenizer: str | Path = "",
    tokenizer_kind: str = "",
    grounding: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    mesh: Mesh | None = None,
) -> TrainedModel:
    """A decoder that `convert` wrote, or a Hugging Face GPT-2, with its tokenizer beside it.

    tower, tower_tokenizer: as `grounding.tower` and `grounding.tokenizer`; of a run it is
    RUN/tower. tokenizer: where the language model's lies, if not beside the weights;
    tokenizer_kind: where the weights do not record it, "": gpt2. grounding: other settings of that
    section, since weights do not record how z is made: readout and segments, of a VALM also
    source, index and neighbours. dtype: of decoder and tower.

    A GPT-2 may have more entries than its tokenizer: they stay in its softmax, as in transformers,
    and are never written; a note says so.

    Raises:
      UserError: it is no such model, lacks something, or its parts do not go together.
    """
    layout, found = _read_decoder(directory)
    spec = found.config
    if not isinstance(spec, weights.DecoderSpec):
        raise UserError(f"{directory} is a {weights.kind_of(spec)}, not a decoder")
    if not spec.fusion_layers and (tower or tower_tokenizer or grounding):
        raise UserError(f"{directory} has no fusion layers, so it reads no tower: name none")
    if spec.fusion_layers and tower in ("", "random"):
        raise UserError(
            f"{directory} has fusion layers {spec.fusion_layers}: name the text tower it was "
            "trained with (of a run: RUN/tower)"
        )
    place = str(tokenizer or found.tokenizer_directory or "")
    if not place:
        raise UserError(f"{directory} has no tokenizer beside it: name the directory of its own")
    record = found.tokenizer or {"kind": tokenizer_kind or "gpt2"}
    vocabulary = _read_tokenizer(place, record, source=str(directory))
    _check_sizes(
        spec.vocab_size,
        vocabulary.vocab_size,
        may_be_padded=layout == "hf_gpt2" or found.tokenizer is not None,
        source=str(directory),
        place=place,
    )
    named = {"tower": str(tower), "tokenizer": str(tower_tokenizer), "dtype": dtype}
    settings = _settings_of(
        spec,
        tokenizer=config.TokenizerConfig(kind=vocabulary.kind, path=place),
        grounding={**(grounding or {}), **named} if spec.fusion_layers else {"source": "none"},
        dtype=dtype,
    )
    read = system.read_tower(settings, None)
    own = None if read is None else _tower_tokenizer(settings, read, vocabulary)
    return _joined(
        settings,
        spec,
        found.params,
        tower=read,
        tokenizer=vocabulary,
        tower_tokenizer=own,
        step=0,
        mesh=mesh,
    )


def in_training(objective: language.Language) -> TrainedModel:
    """The model of a run that is being trained, on the run's mesh.

    Its parameters and those of the tower stay where the trainer has them: they are left out here.
    """
    tokenizer, tower_tokenizer = objective.read_tokenizers()
    return TrainedModel(
        model=objective.model,
        params=None,
        frozen={},
        tokenizer=tokenizer,
        tower_tokenizer=_own(tower_tokenizer, tokenizer),
        settings=objective.resolved(),
        step=0,
        mesh=objective.mesh,
        images=objective.images,
    )


def _read_decoder(directory: str | Path) -> tuple[str, formats.Converted]:
    """Layout and weights: ours, or of a Hugging Face GPT-2."""
    path = hub.local_path(directory)
    found = formats.open_model(path)
    if found.layout == "weights":
        return found.layout, formats.load_weights(path)
    if found.layout == "hf_gpt2":
        return found.layout, formats.load(found)
    if found.layout == "run":
        raise UserError(
            f"{path} is a run, which is read whole (--workdir): weights without a run were expected"
        )
    raise UserError(
        f"{path} is of the layout {found.layout}: make weights of it first, with python -m "
        f"blindvalm_jax.convert --input={path} --out=DIR"
    )


def _read_tokenizer(place: str | Path, record: Mapping[str, str], *, source: str) -> Tokenizer:
    """The tokenizer of a record: its kind and, where known, its fingerprint."""
    found = tokenizers.load(record["kind"], str(place))
    if "fingerprint" in record and found.fingerprint != record["fingerprint"]:
        raise UserError(
            f"{source} was trained with another tokenizer than lies in {place}: bring its own back"
        )
    return found


def _check_sizes(
    entries: int, pieces: int, *, may_be_padded: bool, source: str, place: str
) -> None:
    """Refuses a model of `entries` with a tokenizer of `pieces` that cannot be its own.

    may_be_padded: entries that no text gives are known to be possible, and noted on stderr.
    """
    if pieces > entries or (pieces < entries and not may_be_padded):
        raise UserError(
            f"{source} knows {entries} tokens, the tokenizer in {place} has {pieces}: name the "
            "tokenizer that it was trained with"
        )
    if pieces < entries:
        print(
            f"note: {source} knows {entries} tokens, the tokenizer in {place} has {pieces}: the "
            f"other {entries - pieces} keep their share of the probability and are never written",
            file=sys.stderr,
            flush=True,
        )


def _settings_of(
    spec: weights.DecoderSpec,
    *,
    tokenizer: config.TokenizerConfig,
    grounding: Mapping[str, Any],
    dtype: str,
) -> config.Config:
    """The settings of a run that would have made these weights, as far as the weights tell."""
    default = config.Config()
    decoder = dataclasses.replace(
        spec.decoder, vocab_size=spec.vocab_size, fusion_layers=spec.fusion_layers
    )
    length = default.data.sequence_length
    if decoder.positions == "learned":
        length = min(length, decoder.max_positions)
    values = dataclasses.asdict(
        dataclasses.replace(
            default,
            tokenizer=tokenizer,
            data=dataclasses.replace(default.data, sequence_length=length),
            decoder=decoder,
            fusion=spec.fusion,
            train=dataclasses.replace(default.train, dtype=dtype),
        )
    )
    return config.from_dict({**values, "grounding": {**values["grounding"], **grounding}})


def _tower_tokenizer(
    settings: config.Config, tower: system.Tower, tokenizer: Tokenizer
) -> ClipTokenizer | None:
    """The tokenizer of a tower that was read from files, None where it reads the LM's tokens.

    Where none is named, it does if it says so, or if none lies beside it and its start and end
    tokens are those of a tower that was made for the language model's vocabulary.
    """
    named, vocabulary = settings.grounding, packing.record(tokenizer)
    made_for = (vocabulary.tower_vocab_size, vocabulary.tower_end_id)
    fits = (tower.config.start_id, tower.config.end_id) == made_for
    bare = not tokenizer_files.holds_tokenizer(named.tower)
    if not named.tokenizer and (tower.shares_tokens or (bare and fits)):
        return None
    return _own(prepared.tower_tokenizer(settings, None), tokenizer)


def _own(found: Tokenizer | None, tokenizer: Tokenizer) -> ClipTokenizer | None:
    """A tower's tokenizer, None if it is the language model's."""
    same = found is None or found.fingerprint == tokenizer.fingerprint
    return found if isinstance(found, ClipTokenizer) and not same else None


def _joined(
    settings: config.Config,
    spec: weights.DecoderSpec,
    params: Any,
    *,
    tower: system.Tower | None,
    tokenizer: Tokenizer,
    tower_tokenizer: ClipTokenizer | None,
    step: int,
    mesh: Mesh | None,
) -> TrainedModel:
    """The parts as one model, checked against each other and placed."""
    mesh = mesh or partitioning.make_mesh(config.MeshConfig(), jax.devices()[:1])
    grounding = settings.grounding
    if grounding.search == "prepared":  # there are no neighbours of new texts
        grounding = dataclasses.replace(grounding, search="exact", prepared="")
        settings = dataclasses.replace(settings, grounding=grounding)
    tower = system.prepare_tower(
        settings, tower, vocabulary=packing.record(tower_tokenizer or tokenizer), resuming=True
    )
    images = None
    if tower is not None and tower.config.projection != spec.memory_width:
        raise UserError(
            f"the tower ({tower.source}) gives features of width {tower.config.projection}, the "
            f"decoder was trained on {spec.memory_width}: name the tower it was trained with"
        )
    if grounding.source == "images" and tower is not None:
        images = Images(grounding, mesh, text_sha256=tower.sha256)
    model = system.build(
        settings,
        vocab_size=spec.vocab_size,
        tower=tower,
        platform=jax.devices()[0].platform,
        search=None if images is None else images.search,
    )
    frozen: dict[str, Any] = {} if images is None else images.place_keys()
    if tower is not None:
        like = language.abstract_tower(tower.config, settings, mesh)
        frozen["tower"] = language.place_tower(tower, like)
    return TrainedModel(
        model=model,
        params=jax.device_put(params, partitioning.replicated(mesh)),
        frozen=frozen,
        tokenizer=tokenizer,
        tower_tokenizer=tower_tokenizer,
        settings=settings,
        step=step,
        mesh=mesh,
        images=images,
    )
