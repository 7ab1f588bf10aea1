"""From settings to the system they describe: which decoder, which tower, which grounding."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blindvalm_jax.config import Config, TextTowerConfig, fusion_layers
from blindvalm_jax.data.manifest import TokenizerRecord
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding.retrieval import Search
from blindvalm_jax.interop import clip_text, weights
from blindvalm_jax.models.clip import Readout, TextTower, TowerConfig
from blindvalm_jax.models.decoder import Decoder
from blindvalm_jax.models.transformer import split_stack
from blindvalm_jax.objectives.language_model import Model
from blindvalm_jax.stores import places
from blindvalm_jax.trees import flatten, unflatten

_TOWER_KEY = 2**31  # no update's number, whose dropout key is folded in likewise
# What the same parameters mean another function under.
_FACE = ("positions", "embedding_scale", "activation", "norm_epsilon", "heads")
DTYPES: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Tower:
    """A frozen text tower: shape, parameters on the host, where they came from, their hash.

    tokenizer: kind and fingerprint of the tokenizer it was trained with, where recorded.
    """

    config: TowerConfig
    params: Any
    source: str
    sha256: str
    tokenizer: dict[str, str] | None = None

    @property
    def shares_tokens(self) -> bool:
        """Whether it reads another BPE than CLIP's, which the language model has to share."""
        return self.tokenizer is not None and self.tokenizer["kind"] != "clip"


def check_tower_name(config: Config, workdir: Path, *, resuming: bool) -> None:
    """Refuses a tower that lies where the run keeps its own."""
    named = Path(config.grounding.tower).expanduser().resolve()
    if not resuming and named.is_relative_to((workdir / "tower").resolve()):
        raise UserError(f"{workdir / 'tower'} is where a run keeps its tower: name it elsewhere")


def read_tower(config: Config, resumed: Path | None) -> Tower | None:
    """The tower a resumed run has stored, or the one its settings name; None: none to read.

    Raises:
      UserError: the files are missing or hold no text tower.
    """
    grounding = config.grounding
    if grounding.source == "none":
        return None
    if resumed is not None:
        found = weights.load(resumed / "tower", kind="clip_text")
        return Tower(found.tower, found.params, found.source, found.sha256, found.tokenizer)
    if grounding.tower == "random":
        return None
    if not grounding.tower:
        raise UserError(
            "grounding.tower is needed: a CLIP directory or hub id, or `random` for a control "
            "without knowledge (or grounding.source=none for a plain GPT-2)"
        )
    loaded = clip_text.load_tower(grounding.tower)
    return Tower(*loaded[:2], places.as_given(loaded.source), loaded.sha256, loaded.tokenizer)


def tower_context(config: Config, tower: Tower | None) -> int:
    """Positions of the tower, start and end token included."""
    return config.grounding.random.context if tower is None else tower.config.context


def new_tower(config: Config, tower: Tower | None, *, vocabulary: TokenizerRecord) -> Tower:
    """The tower of a new run: the one that was read, or a fresh one where settings say so."""
    if tower is not None and config.grounding.control != "random_tower":
        return tower
    if tower is None:
        shape = tower_shape(config.grounding.random, vocabulary, setting="grounding.random")
        return fresh_tower(shape, seed=config.seed)
    return dataclasses.replace(
        fresh_tower(tower.config, seed=config.seed), tokenizer=tower.tokenizer
    )


def prepare_tower(
    config: Config,
    tower: Tower | None,
    *,
    vocabulary: TokenizerRecord,
    resuming: bool,
) -> Tower | None:
    """The tower that is trained with: as read, or fresh where settings say so.

    tower: from `read_tower`; vocabulary: of the tokens the tower reads.

    Raises:
      UserError: the tower has another vocabulary than the tokens it is to read.
    """
    if config.grounding.source == "none":
        return None
    if tower is None or not resuming:
        tower = new_tower(config, tower, vocabulary=vocabulary)
    known = tower.tokenizer
    if known is not None and known["fingerprint"] != vocabulary.fingerprint:
        raise UserError(
            f"the tower ({tower.source}) was trained on another {known['kind']} tokenizer than the "
            f"text was cut with: set tokenizer.kind={known['kind']} and tokenizer.path (or, where "
            "the tower has its own, grounding.tokenizer) to the tower's (data/*/tokenizer of its "
            "run)"
        )
    if tower.config.start_id >= tower.config.vocab_size or (
        vocabulary.tower_vocab_size > tower.config.vocab_size
    ):
        raise UserError(
            f"the tower ({tower.source}) knows {tower.config.vocab_size} tokens, the text was "
            f"cut into a vocabulary of {vocabulary.tower_vocab_size}: set grounding.tokenizer to "
            "the tower's own tokenizer"
        )
    return tower


def store_tower(tower: Tower, workdir: Path, *, tokenizer: Path | None) -> None:
    """Keeps the tower of a new run, once, with its source and hash; replaces a dead run's.

    `workdir` must be a run's: whatever is in its `tower` is deleted. tokenizer: directory of the
    tower's own tokenizer; None: it reads the language model's tokens.
    """
    directory = workdir / "tower"
    shutil.rmtree(directory, ignore_errors=True)
    weights.save(
        directory,
        tower.params,
        config=tower.config,
        source=tower.source,
        tokenizer=tower.tokenizer,
        tokenizer_files=tokenizer,
    )


def fresh_tower(shape: TowerConfig, *, seed: int) -> Tower:
    """A tower of random weights: the control that carries no knowledge."""
    key = jax.random.fold_in(jax.random.key(seed), _TOWER_KEY)
    tokens_BS = jnp.zeros((1, 1), jnp.int32)

    def init(key: jax.Array) -> Any:
        return nn.unbox(TextTower(shape).init(key, tokens_BS, tokens_BS == 0, readout="token"))

    params = jax.tree.map(np.asarray, jax.jit(init)(key)["params"])
    return Tower(
        shape,
        params,
        f"random weights (seed {seed}), no pretrained knowledge",
        weights.params_sha256(params),
    )


def tower_shape(
    shape: TextTowerConfig, vocabulary: TokenizerRecord, *, setting: str
) -> TowerConfig:
    """A text tower of this shape that reads these tokens; setting: the section the shape is from.

    Raises:
      UserError: the heads do not divide the width.
    """
    if shape.width % shape.heads:
        raise UserError(
            f"{setting}.width {shape.width} is not a multiple of {setting}.heads {shape.heads}"
        )
    entries = vocabulary.tower_vocab_size
    clip = vocabulary.kind == "clip"  # others have no start token: it gets a row of its own
    return TowerConfig(
        layers=shape.layers,
        width=shape.width,
        heads=shape.heads,
        mlp_width=4 * shape.width,
        projection=shape.projection,
        context=shape.context,
        vocab_size=entries if clip else entries + 1,
        start_id=entries - 2 if clip else entries,
        end_id=vocabulary.tower_end_id,
    )


def build(
    config: Config,
    *,
    vocab_size: int,
    tower: Tower | None,
    platform: str,
    search: Search | None = None,
) -> Model:
    """The model of a run.

    vocab_size: of the tokenizer; platform: "cpu", "gpu" or "tpu", for the choice of kernel; search:
    how images are found, None where z is the text feature itself or comes with the batch.

    Raises:
      UserError: decoder.vocab_size is set and differs.
    """
    decoder, train = config.decoder, config.train
    if decoder.vocab_size and decoder.vocab_size != vocab_size:
        raise UserError(
            f"decoder.vocab_size is {decoder.vocab_size}, the tokenizer has {vocab_size} entries: "
            "set it to that, or to 0 to take the tokenizer's"
        )
    readout: Readout = "eos" if config.grounding.readout == "eos" else "token"
    return Model(
        decoder=Decoder(
            decoder,
            config.fusion,
            vocab_size=vocab_size,
            fusion_layers=fusion_layers(config),
            memory_width=0 if tower is None else tower.config.projection,
            dtype=DTYPES[train.dtype],
            kernel=resolve_kernel(
                train.attention,
                platform=platform,
                dtype=train.dtype,
                head_width=decoder.width // decoder.heads,
                dropout=decoder.attention_dropout,
            ),
            remat=train.remat,
            scan_unroll=train.scan_unroll,
        ),
        tower=None
        if tower is None or config.grounding.search == "prepared"
        else TextTower(tower.config, DTYPES[config.grounding.dtype]),
        readout=readout,
        search=search,
        shuffled=config.grounding.control == "shuffled",
        loss_chunk=train.loss_chunk,
        microbatches=train.microbatches,
    )


def cudnn_attends() -> bool:
    """Whether cuDNN's flash attention compiles on the first device."""
    x_BTNH = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)

    def attend(x_BTNH: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            x_BTNH, x_BTNH, x_BTNH, is_causal=True, implementation="cudnn"
        )

    try:
        jax.jit(attend).lower(x_BTNH).compile()
    except Exception:  # no cuDNN, an old one, or a GPU of another make: each says it in its own way
        return False
    return True


def resolve_kernel(
    setting: str,
    *,
    platform: str,
    dtype: str,
    head_width: int,
    dropout: float,
    has_cudnn: Callable[[], bool] = cudnn_attends,
) -> str:
    """The kernel of plain attention that a setting means on this platform: "xla" or "cudnn".

    cuDNN's flash attention takes a GPU that has it, half precision, head widths up to 128 in
    multiples of 8, and no dropout of weights; `auto` takes it where it can.

    Raises:
      UserError: cudnn is asked for where it cannot run.
    """
    needs = {
        "a GPU": platform == "gpu",
        "train.dtype=bfloat16": dtype == "bfloat16",
        "a head width of at most 128, a multiple of 8": head_width <= 128 and head_width % 8 == 0,
        "decoder.attention_dropout=0": dropout == 0,
    }
    lacking = [need for need, met in needs.items() if not met]
    if setting != "xla" and not lacking and not has_cudnn():
        lacking.append("cuDNN with flash attention for this GPU")
    if setting == "cudnn" and lacking:
        raise UserError(f"train.attention=cudnn needs {', '.join(lacking)}; or set auto or xla")
    return "xla" if setting == "xla" or lacking else "cudnn"


@dataclasses.dataclass(frozen=True)
class Start:
    """Parameters from elsewhere for a decoder.

    fresh: names that it lacks; dropped: names that find no place here.
    """

    params: Mapping[str, np.ndarray]
    decoder: Decoder
    fresh: list[str]
    dropped: list[str]

    def into(self, params: Any) -> Any:
        """Fresh parameters of the decoder with these in their place, placed as they were."""
        layers, fused = self.decoder.config.layers, self.decoder.fusion_layers
        ours = by_layer(jax.tree.map(np.asarray, params), layers, fused)
        merged = {name: self.params.get(name, value) for name, value in ours.items()}
        placed = jax.tree.map(lambda x: x.sharding, params)
        return jax.device_put(stacked(merged, layers, fused), placed)


def read_start(shapes: Any, decoder: Decoder, directory: str, vocabulary: TokenizerRecord) -> Start:
    """Reads a weights directory that a decoder starts from, block by block.

    The weights may come from a decoder with other fusion layers, or none: memory parameters that
    they lack stay fresh, those that this decoder lacks are dropped, and both are named. shapes: of
    this decoder's parameters.

    Raises:
      UserError: naming each parameter that is missing, left over or of another shape, or the
        setting or tokenizer that differs.
    """
    if (Path(directory) / "run.json").exists():
        raise UserError(
            f"train.init_from={directory} is a run: make weights of it first, with python -m "
            f"blindvalm_jax.convert --input={directory} --out=DIR"
        )
    found = weights.load(directory, kind="decoder")
    spec = found.decoder
    known = (found.tokenizer or {}).get("fingerprint", vocabulary.fingerprint)
    differing = [
        f"decoder.{name} is {getattr(decoder.config, name)!r}, was {getattr(spec.decoder, name)!r}"
        for name in _FACE
        if getattr(decoder.config, name) != getattr(spec.decoder, name)
    ]
    if known != vocabulary.fingerprint:
        differing.append("the tokenizer is another one")
    if spec.vocab_size != decoder.vocab_size:
        differing.append(f"the vocabulary has {decoder.vocab_size} entries, had {spec.vocab_size}")
    ours_by, theirs_by = decoder.fusion.query_scale, spec.fusion.query_scale
    if decoder.fusion_layers and spec.fusion_layers and ours_by != theirs_by:
        differing.append(f"fusion.query_scale is {ours_by!r}, was {theirs_by!r}")
    if differing:
        raise UserError(f"{directory} does not fit the decoder of this run: {'; '.join(differing)}")
    empty = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)
    ours = by_layer(empty, decoder.config.layers, decoder.fusion_layers)
    theirs = by_layer(found.params, spec.decoder.layers, spec.fusion_layers)
    kept = sorted(name for name in ours if name not in theirs)
    dropped = sorted(name for name in theirs if name not in ours)
    wrong = [name for name in [*kept, *dropped] if "/memory/" not in name]
    wrong += [
        f"{name} {theirs[name].shape} instead of {ours[name].shape}"
        for name in theirs
        if name in ours and theirs[name].shape != ours[name].shape
    ]
    if wrong:
        raise UserError(f"{directory} does not fit the decoder of this run: {', '.join(wrong)}")
    return Start(theirs, decoder, kept, dropped)


def by_layer(params: Any, layers: int, fused: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Flat parameters with one name per block, "h/3/attn/...", wherever the stack is cut."""
    flat = {k: v for k, v in flatten(params).items() if not k.startswith("h/")}
    for segment in split_stack(layers, fused):
        for name, value in flatten(params["h"][segment.name]).items():
            for index in range(segment.start, segment.stop):
                flat[f"h/{index}/{name}"] = value if segment.fused else value[index - segment.start]
    return flat


def stacked(flat: Mapping[str, np.ndarray], layers: int, fused: tuple[int, ...]) -> Any:
    """The inverse of `by_layer`."""
    tree = {k: v for k, v in flat.items() if not k.startswith("h/")}
    for segment in split_stack(layers, fused):
        first = f"h/{segment.start}/"
        for name in [k.removeprefix(first) for k in flat if k.startswith(first)]:
            run = [flat[f"h/{i}/{name}"] for i in range(segment.start, segment.stop)]
            tree[f"h/{segment.name}/{name}"] = run[0] if segment.fused else np.stack(run)
    return unflatten(tree)
