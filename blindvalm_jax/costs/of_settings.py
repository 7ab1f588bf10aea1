"""The account of a run: what its settings cost.

Made without compiling, and without data but what settings name: how large a vocabulary is,
`shapes.vocabulary` tells; an index may be told as `vectors:NUMBER`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from blindvalm_jax import system
from blindvalm_jax.config import Config
from blindvalm_jax.costs import clips, language, parameters, products, searching
from blindvalm_jax.costs.account import HOST_SEARCH, USEFUL, Account, Made
from blindvalm_jax.costs.products import FORWARD, Product
from blindvalm_jax.grounding import faiss_engine
from blindvalm_jax.grounding.faiss_engine import PAPER_NPROBE, FaissSettings, default_settings
from blindvalm_jax.grounding.index import ImageIndex
from blindvalm_jax.interop import clip_model
from blindvalm_jax.models.clip import TowerConfig
from blindvalm_jax.objectives import contrastive_shapes
from blindvalm_jax.objectives.shapes import (
    tower_length,
    tower_of,
    vectors_of,
    vocabulary,
    yet_to_learn,
)
from blindvalm_jax.toyworld import recipes, sizes

_GUESSED_ROWS = (
    "the tower has a tokenizer of its own, and how long its rows are is guessed without prepared "
    "text: make windows (python -m blindvalm_jax.prepare) and name them, data.windows"
)
_GUESSED_ENTRIES = (
    "the vocabulary is yet to be learned, and taken for as large as it may become: learn it first "
    "(python -m blindvalm_jax.prepare --tokenizer=train) and name it, tokenizer.path"
)


def account(settings: Config) -> Account:
    """The account of a run of either objective.

    Raises:
      UserError: a tower, index, tokenizer or windows that settings name cannot be read.
    """
    told, tokenizer = sizes.told(settings), settings.tokenizer
    if told.train.objective == "contrastive":
        made, learned = _contrastive(told), yet_to_learn(tokenizer)
    else:
        entries, windows = settings.decoder.vocab_size, settings.data.windows
        learned = yet_to_learn(tokenizer, entries=entries, windows=windows)
        made = _language(told, which=_which(settings))
        once = {**_of_clip(settings, told), **made.once_whole}
        made = dataclasses.replace(made, once_whole=once)
    if learned:
        made = dataclasses.replace(made, guessed=(*made.guessed, _GUESSED_ENTRIES))
    return made


def _of_clip(settings: Config, told: Config) -> dict[Made, float | None]:
    """FLOPs of training the CLIP that settings name, and of its images' embeddings."""
    grounding, vectors = settings.grounding, vectors_of(told.grounding)
    if recipes.OWN in (grounding.tower, grounding.index):
        return _of_world(settings, vectors)
    if grounding.source == "none":
        return {}
    found: dict[Made, float | None] = {}
    if grounding.tower in ("", "random"):
        name, tower = clips.of_openai(told.grounding.random.projection)
    else:
        name, tower = Path(grounding.tower).name, clip_model.vision_shape(grounding.tower)
        trained = Made(f"training of the CLIP {name}", _which(settings)[:1])
        found[trained] = clips.training(grounding.tower)
    if vectors:
        cost = None if tower is None else searching.encoding(vectors, tower)
        found[Made(f"images encoded with {name}", _which(settings))] = cost
    return found


def _which(settings: Config) -> tuple[str, ...]:
    """Tower and index, and the toy world whose they are, by which what is made of them differs."""
    named = settings.grounding.tower, settings.grounding.index
    world = settings.data.tfds if recipes.OWN in named else ""
    return (*(name and str(Path(name)) for name in named), world)


def _of_world(settings: Config, vectors: int) -> dict[Made, float | None]:
    """The same of a toy world."""
    clip = _contrastive(sizes.told(sizes.clip(settings)))
    found: dict[Made, float | None] = {
        Made("the toy world's CLIP", (settings.data.tfds,)): clip.budget
    }
    if settings.grounding.index == recipes.OWN:
        image = sum(one.forward for one in clip.products if one.part == "image tower")
        found[Made("its images embedded", (settings.data.tfds,))] = image * vectors
    return found


def _contrastive(settings: Config) -> Account:
    text = system.tower_shape(
        settings.clip.text, vocabulary(settings.tokenizer), setting="clip.text"
    )
    shape = contrastive_shapes.clip_shape(settings, text)
    found = products.pair(shape)
    if settings.train.microbatches > 1:  # both towers once more, see `contrastive_model`
        found = tuple(dataclasses.replace(one, again=1.0) for one in found)
    return Account(
        unit="pair",
        vocabulary=text.vocab_size,
        products=found,
        trained=parameters.pair(shape),
        frozen={},
        frozen_bytes={},
        once_whole={},
        units=settings.train.steps * settings.train.batch_size,
    )


def _language(settings: Config, *, which: tuple[str, ...]) -> Account:
    entries = vocabulary(
        settings.tokenizer, entries=settings.decoder.vocab_size, windows=settings.data.windows
    )
    tower, aligned = tower_of(settings, entries)
    vectors, length = vectors_of(settings.grounding), settings.data.sequence_length
    exact = settings.grounding.search == "exact"
    positions, guessed = tower_length(settings.data, aligned=aligned)
    found = language.token(
        settings,
        vocab_size=entries.vocab_size,
        tower=tower,
        tower_length=positions,
        vectors=vectors if exact else 0,
    )
    units = settings.train.steps * settings.train.batch_size * length
    trained = parameters.decoder(
        settings,
        vocab_size=entries.vocab_size,
        feature_width=0 if tower is None else tower.projection,
    )
    made = Account(
        unit="token",
        vocabulary=entries.vocab_size,
        products=found,
        trained={name: count for name, count in trained.items() if count},
        frozen={},
        frozen_bytes={},
        once_whole={},
        units=units,
        guessed=(_GUESSED_ROWS,) if guessed else (),
    )
    if tower is not None:
        made = _with_tower(made, settings, tower)
    if tower is None or not vectors:
        return made
    return _with_images(made, settings, tower, vectors, which=which)


def _with_tower(made: Account, settings: Config, tower: TowerConfig) -> Account:
    """With what is frozen, unless features were found ahead of time and it is not there."""
    if settings.grounding.search == "prepared":
        return made
    eos = settings.grounding.readout == "eos"
    size = parameters.text_tower_bytes(tower, value_bytes=_value_bytes(settings))
    return dataclasses.replace(
        made,
        frozen={"tower": parameters.text_tower(tower)},
        frozen_bytes={"tower": size},
        padded_tower=products.padded_tower(tower, useful=USEFUL, eos=eos),
    )


def _with_images(
    made: Account, settings: Config, tower: TowerConfig, vectors: int, *, which: tuple[str, ...]
) -> Account:
    """With the search, what it reads, and what is done once for it."""
    grounding, width = settings.grounding, tower.projection
    value = _value_bytes(settings)
    found, once = made.products, made.once_whole
    query, part = searching.exact(vectors, width, value_bytes=value), "search"
    if grounding.search == "faiss":
        asked = {"lists": grounding.lists, "code_bytes": grounding.code_bytes}
        index = _made_index(grounding.index) or default_settings(vectors, width, **asked)
        visited = {"nprobe": grounding.nprobe or PAPER_NPROBE, "candidates": grounding.rerank}
        query, part = searching.ivf_pq(vectors, width, index, **visited), HOST_SEARCH
        building = searching.building(vectors, width, index)
        built = f"{index.lists} lists", f"codes of {index.code_bytes} bytes"
        once = {**once, Made("lists and codes of the index", (*which, *built)): building}
        found = (*found, Product(part=part, flops=query.flops, times=FORWARD))
        value = 4  # on disk
    read = searching.gathered(grounding.neighbours, width, value_bytes=value)
    if grounding.search == "prepared":
        length, eos = settings.data.sequence_length, grounding.readout == "eos"
        row = products.packed_tower(tower, length=length, eos=eos)
        token = sum(one.forward for one in row) / length + query.flops
        what = "neighbours by exact search, each token seen once"
        ahead = {Made(what, (*which, f"readout {grounding.readout}")): token}
        return dataclasses.replace(made, once_a_unit=ahead, gathered=read)
    return dataclasses.replace(
        made,
        products=found,
        frozen_bytes={**made.frozen_bytes, part: query.held},
        once_whole=once,
        read=query.read,
        gathered=read,
    )


def _made_index(directory: str) -> FaissSettings | None:
    """Of the FAISS index beside an image index, if it is there: a run takes that."""
    place = Path(directory).expanduser()
    if not (place / faiss_engine.RECORD_FILE).exists():
        return None
    return faiss_engine.settings_of(ImageIndex.open(place))


def _value_bytes(settings: Config) -> int:
    """Bytes of a frozen value."""
    return 2 if settings.grounding.dtype == "bfloat16" else 4
