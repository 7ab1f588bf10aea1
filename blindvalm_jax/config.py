"""Every setting of a run: default, meaning, unit and range, in one place.

A config file builds an `ml_collections.ConfigDict` with `default()`; the command line edits it;
`parse` turns it into frozen dataclasses, once, and refuses what does not fit. The rest of the
program sees only the dataclasses. `python -m blindvalm_jax.config` prints the table of fields.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import ml_collections

from blindvalm_jax.errors import UserError, run_main

LONGEST_WINDOW = 2**20  # tokens
SMALLEST_BPE = 257  # 256 bytes and the end of a text


def _field(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    metadata = {"meaning": meaning, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How text becomes the language model's tokens."""

    kind: str = _field("clip", "BPE of the language model", choices=("clip", "gpt2", "train"))
    path: str = _field("", "directory or hub id; empty with `train`: learn it from the text")
    train_vocab_size: int = _field(8192, "entries of a BPE learned from the text", low=SMALLEST_BPE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it is cut into windows."""

    files: str = _field("", "training text: comma-separated globs (.txt .jsonl, .gz .zst .xz)")
    eval_files: str = _field("", "held-out text; empty: `eval_fraction` of the documents")
    tfds: str = _field("", "TFDS text dataset instead of files, as name[/config]")
    tfds_split: str = _field("train", "split of the TFDS dataset to train on")
    tfds_eval_split: str = _field("", "split held out; empty: `eval_fraction` of the documents")
    tfds_dir: str = _field("", "data directory of TFDS; empty: its default")
    text_field: str = _field("text", "field of a .jsonl line or TFDS example that holds the text")
    windows: str = _field("", "directory that `prepare` wrote; empty: prepare into the cache")
    cache: str = _field("", "where prepared windows are kept; empty: <workdir>/data")
    sequence_length: int = _field(512, "tokens of a window (T)", low=2, high=LONGEST_WINDOW)
    eval_fraction: float = _field(0.01, "share of documents held out", low=0.0, high=0.5)
    workers: int = _field(0, "processes that tokenize; 0: one per core", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The language model: GPT-2 with either face (reference.md, section 1)."""

    layers: int = _field(12, "blocks (L)", low=1)
    width: int = _field(768, "model width (D)", low=4)
    heads: int = _field(12, "attention heads (N)", low=1)
    mlp_width: int = _field(0, "width of the MLP (F); 0: 4 x width", low=0)
    vocab_size: int = _field(0, "entries of the vocabulary (V); 0: the tokenizer's", low=0)
    vocab_multiple: int = _field(128, "the table is padded to a multiple of this many rows", low=1)
    positions: str = _field("sinusoidal", "position embedding", choices=("sinusoidal", "learned"))
    max_positions: int = _field(1024, "rows of a learned position table", low=1)
    embedding_scale: str = _field(
        "sqrt_width", "factor on token embeddings", choices=("sqrt_width", "none")
    )
    activation: str = _field(
        "gelu_erf", "MLP activation", choices=("gelu_erf", "gelu_tanh", "quick_gelu")
    )
    norm_epsilon: float = _field(1e-5, "LayerNorm epsilon", low=0.0)
    dropout: float = _field(0.1, "dropout of embeddings and residuals", low=0.0, high=0.99)
    attention_dropout: float = _field(0.1, "dropout of attention weights", low=0.0, high=0.99)
    init: str = _field("fairseq", "initialisation scheme", choices=("fairseq", "gpt2"))
    fusion_layers: tuple[int, ...] = _field(
        (-2,), "blocks that see the grounding; negative counts from the end"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How a fusion block looks at its memory (architecture.md, decision 5)."""

    query_scale: str = _field(
        "model_width", "q is divided by the root of this", choices=("model_width", "head_width")
    )
    grounding_kv: str = _field(
        "shared", "key and value matrices of the memory", choices=("shared", "own")
    )
    memory_bias: str = _field(
        "none", "per-head logit bias on the memory, from -10", choices=("none", "learned")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomTowerConfig:
    """Shape of the tower when `grounding.tower` is `random`: no pretrained knowledge in it."""

    layers: int = _field(2, "blocks", low=1)
    width: int = _field(64, "model width", low=2)
    heads: int = _field(2, "attention heads", low=1)
    projection: int = _field(64, "width of the features (E)", low=1)
    context: int = _field(77, "longest input, start and end tokens included", low=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroundingConfig:
    """Where the grounding features z come from."""

    source: str = _field("text", "none: plain GPT-2; text: BLIND-VALM", choices=("none", "text"))
    tower: str = _field("", "CLIP: directory, hub id, or `random` (a control)")
    tokenizer: str = _field("", "tokenizer of the tower; empty: its own directory's")
    readout: str = _field(
        "token", "the token's own output, or what <eos> says there", choices=("token", "eos")
    )
    segments: str = _field(
        "causal", "rule that cuts rows for the tower", choices=("causal", "reference")
    )
    control: str = _field(
        "none",
        "random_tower: the tower's shape with fresh weights; shuffled: features of another row",
        choices=("none", "random_tower", "shuffled"),
    )
    dtype: str = _field("bfloat16", "computation of the tower", choices=("bfloat16", "float32"))
    neighbours: int = _field(1, "grounding vectors a token (K); 1 for text", low=1)
    random: RandomTowerConfig = dataclasses.field(default_factory=RandomTowerConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int = _field(1000, "optimizer updates", low=1)
    batch_size: int = _field(8, "rows an update, over all devices", low=1)
    microbatches: int = _field(1, "parts a batch is computed in, one after the other", low=1)
    dtype: str = _field("bfloat16", "computation of the decoder", choices=("bfloat16", "float32"))
    attention: str = _field(
        "auto", "attention kernel of plain blocks", choices=("auto", "xla", "cudnn")
    )
    remat: str = _field(
        "none", "what the backward pass recomputes", choices=("none", "dots", "full")
    )
    scan_unroll: int = _field(1, "blocks compiled in line per scan iteration", low=1)
    loss_chunk: int = _field(0, "positions of a row with live logits; 0: all of them", low=0)
    init_from: str = _field("", "weights directory (see convert) the decoder starts from")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule; the defaults are the paper's (reference.md, section 2)."""

    learning_rate: float = _field(2e-3, "peak learning rate", low=0.0)
    schedule: str = _field(
        "inverse_sqrt", "shape", choices=("inverse_sqrt", "cosine", "constant_cooldown")
    )
    warmup_steps: int = _field(4000, "updates of linear warm-up", low=0)
    warmup_init: float = _field(1e-7, "learning rate of the first update", low=0.0)
    final_fraction: float = _field(0.1, "end of the cosine, of the peak", low=0.0, high=1.0)
    cooldown_fraction: float = _field(0.2, "share of steps that cool down", low=0.0, high=1.0)
    beta1: float = _field(0.9, "Adam", low=0.0, high=0.99999)
    beta2: float = _field(0.98, "Adam", low=0.0, high=0.99999)
    epsilon: float = _field(1e-8, "Adam", low=0.0)
    epsilon_beside: str = _field(
        "uncorrected",
        "root of the second moment that epsilon is added to: fairseq's, or the usual",
        choices=("uncorrected", "corrected"),
    )
    weight_decay: float = _field(0.01, "decoupled, times the learning rate", low=0.0)
    decay: str = _field("all", "what is decayed", choices=("all", "matrices"))
    clip_norm: float = _field(2.0, "largest global gradient norm; 0: no clipping", low=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one may be -1: what is left."""

    data: int = _field(-1, "replicas with their own rows", low=-1)
    fsdp: int = _field(1, "shards of parameters and rows", low=-1)
    tensor: int = _field(1, "shards of heads, MLP and vocabulary", low=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved."""

    every_steps: int = _field(1000, "updates between checkpoints", low=1)
    keep: int = _field(3, "latest checkpoints kept", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Loss on held-out windows."""

    every_steps: int = _field(500, "updates between evaluations; 0: never", low=0)
    windows: int = _field(256, "held-out windows used; 0: all", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training."""

    every_steps: int = _field(10, "updates between metrics", low=1)
    tensorboard: bool = _field(False, "also write TensorBoard events")
    peak_tflops: float = _field(0.0, "dense TFLOP/s of a device; 0: by its kind", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    seed: int = _field(0, "of initialisation, dropout and data order", low=0, high=2**31 - 1)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    fusion: FusionConfig = dataclasses.field(default_factory=FusionConfig)
    grounding: GroundingConfig = dataclasses.field(default_factory=GroundingConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)


def default() -> ml_collections.ConfigDict:
    """A config with every field at its default, for a config file to edit."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def parse(config: ml_collections.ConfigDict) -> Config:
    """Reads a ConfigDict into dataclasses and checks each field and the fields together.

    Raises:
      UserError: a key is unknown or missing, or a value is of the wrong type or out of range.
    """
    parsed = _build(Config, config.to_dict(), "config")
    _check_together(parsed)
    return parsed


def from_dict(values: dict[str, Any]) -> Config:
    """Reads a config back from the `config.json` of a run."""
    return parse(ml_collections.ConfigDict(values))


def resolve(config: Config, *, vocab_size: int, mesh: Mapping[str, int]) -> Config:
    """The settings with every "0: take it from elsewhere" and -1 filled in, for the record."""
    decoder = dataclasses.replace(
        config.decoder,
        vocab_size=vocab_size,
        mlp_width=config.decoder.mlp_width or 4 * config.decoder.width,
        fusion_layers=fusion_layers(config),
    )
    return dataclasses.replace(config, decoder=decoder, mesh=MeshConfig(**mesh))


def fusion_layers(config: Config) -> tuple[int, ...]:
    """Indices of the fusion blocks, sorted; none when there is no grounding."""
    if config.grounding.source == "none":
        return ()
    layers = config.decoder.layers
    return tuple(sorted(i + layers if i < 0 else i for i in config.decoder.fusion_layers))


def describe(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yields (key, default, meaning with its range) of every field."""
    for field in dataclasses.fields(cls):
        key = f"{prefix}{field.name}"
        if "meaning" not in field.metadata:
            yield from describe(_section(field), f"{key}.")
        else:
            yield key, field.default, f"{field.metadata['meaning']}{_range_text(field)}"


def _section(field: dataclasses.Field[Any]) -> type:
    return cast(type, field.default_factory)


def _range_text(field: dataclasses.Field[Any]) -> str:
    meta = field.metadata
    if meta["choices"]:
        return f" ({' | '.join(meta['choices'])})"
    if meta["low"] is not None and meta["high"] is not None:
        return f" ({meta['low']:g} ... {meta['high']:g})"
    return f" (>= {meta['low']:g})" if meta["low"] is not None else ""


def _build(cls: type, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{path} must be a section with fields, got {values!r}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise UserError(f"unknown setting {path}.{name}; known here: {', '.join(known)}")
    built = {}
    for name, field in known.items():
        if name not in values:
            raise UserError(f"setting {path}.{name} is missing; start from config.default()")
        if "meaning" in field.metadata:
            built[name] = _checked(field, values[name], f"{path}.{name}")
        else:
            built[name] = _build(_section(field), values[name], f"{path}.{name}")
    return cls(**built)


def _checked(field: dataclasses.Field[Any], value: Any, path: str) -> Any:
    expected = type(field.default)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if expected is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not expected:
        raise UserError(f"{path} must be {expected.__name__}, got {value!r}")
    meta = field.metadata
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{path} must be one of {', '.join(meta['choices'])}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path} must be a finite number, got {value!r}")
    too_low = meta["low"] is not None and value < meta["low"]
    too_high = meta["high"] is not None and value > meta["high"]
    if too_low or too_high:
        raise UserError(f"{path} is {value!r}, outside its range{_range_text(field)}")
    return value


def _check_together(config: Config) -> None:
    decoder, grounding, train = config.decoder, config.grounding, config.train
    if decoder.width % decoder.heads:
        raise UserError(
            f"decoder.width {decoder.width} is not a multiple of decoder.heads {decoder.heads}"
        )
    if decoder.positions == "sinusoidal" and decoder.width % 2:
        raise UserError(f"sinusoidal positions need an even decoder.width, got {decoder.width}")
    if decoder.positions == "learned" and config.data.sequence_length > decoder.max_positions:
        raise UserError(
            f"data.sequence_length {config.data.sequence_length} exceeds the learned position "
            f"table, decoder.max_positions {decoder.max_positions}"
        )
    for index in decoder.fusion_layers:
        if type(index) is not int or not -decoder.layers <= index < decoder.layers:
            raise UserError(
                f"decoder.fusion_layers holds {index!r}; the decoder has layers 0 to "
                f"{decoder.layers - 1} (or -1 to -{decoder.layers} from the end)"
            )
    layers = fusion_layers(config)
    if grounding.source != "none" and not layers:
        raise UserError(
            "decoder.fusion_layers is empty: name a layer, or set grounding.source=none"
        )
    if len(set(layers)) != len(layers):
        raise UserError(f"decoder.fusion_layers names a layer twice: {decoder.fusion_layers}")
    if grounding.source == "none" and grounding.tower not in ("", "random"):
        raise UserError(
            f"grounding.tower is {grounding.tower}, but grounding.source=none reads none: set "
            "grounding.source=text, or leave the tower out"
        )
    if grounding.source == "text" and grounding.neighbours != 1:
        raise UserError(f"grounding.neighbours must be 1 for text, got {grounding.neighbours}")
    if train.batch_size % train.microbatches:
        raise UserError(
            f"train.batch_size {train.batch_size} is not a multiple of train.microbatches "
            f"{train.microbatches}"
        )
    if train.loss_chunk and config.data.sequence_length % train.loss_chunk:
        raise UserError(
            f"train.loss_chunk {train.loss_chunk} does not divide data.sequence_length "
            f"{config.data.sequence_length}"
        )
    if grounding.control == "shuffled" and train.batch_size // train.microbatches < 2:
        raise UserError("grounding.control=shuffled needs at least 2 rows in a microbatch")
    sources = [name for name in ("files", "tfds", "windows") if getattr(config.data, name)]
    if len(sources) > 1:
        raise UserError(f"give one source of text, got data.{' and data.'.join(sources)}")
    if config.data.tfds_eval_split and (config.data.eval_files or not config.data.tfds):
        raise UserError("data.tfds_eval_split goes with data.tfds and without data.eval_files")
    unknown = [size for size in dataclasses.astuple(config.mesh) if size == -1]
    if len(unknown) > 1 or 0 in dataclasses.astuple(config.mesh):
        raise UserError(f"mesh sizes must be positive, at most one -1, got {config.mesh}")


def _main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: this only prints the settings")
    for key, value, meaning in describe():
        print(f"{key:32} {value!s:14} {meaning}")


if __name__ == "__main__":
    run_main(_main)
