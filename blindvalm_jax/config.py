"""Every setting of a run: default, meaning, unit and range, in one place.

A config file builds an `ml_collections.ConfigDict` with `default()`; the command line edits it;
`parse` turns it into frozen dataclasses, once, and refuses what does not fit. The rest of the
program sees only the dataclasses. `python -m blindvalm_jax.config` prints the table of fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from blindvalm_jax import config_checks, config_fields
from blindvalm_jax.command_line import run_main
from blindvalm_jax.config_checks import fusion_layers as fusion_layers
from blindvalm_jax.config_fields import field
from blindvalm_jax.errors import UserError

LONGEST_WINDOW = 2**20  # tokens
SMALLEST_BPE = 257  # 256 bytes and the end of a text
_TOWERS = ("vit", "conv")
_CORRUPT = ("fail", "skip")
_NONFINITE = ("skip", "stop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How text becomes the language model's tokens."""

    kind: str = field("clip", "BPE of the language model", choices=("clip", "gpt2", "train"))
    path: str = field("", "directory or hub id; empty with `train`: learn it from the text")
    train_vocab_size: int = field(8192, "entries of a BPE learned from the text", low=SMALLEST_BPE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text, or images with captions, come from; how text is cut into windows."""

    files: str = field("", "training text: comma-separated globs (.txt .jsonl, .gz .zst .xz)")
    eval_files: str = field("", "held-out text; empty: `eval_fraction` of the documents")
    tfds: str = field("", "TFDS dataset instead of files or images, as name[/config]")
    tfds_split: str = field("train", "split of the TFDS dataset to train on")
    tfds_eval_split: str = field("", "split held out; empty: `eval_fraction` of the documents")
    tfds_dir: str = field("", "data directory of TFDS; empty: its default")
    text_field: str = field("text", "field of a .jsonl line or TFDS example that holds the text")
    images: str = field("", "folder with images and captions.jsonl (contrastive objective)")
    eval_images: str = field("", "such a folder, held out; empty: `eval_fraction` of the images")
    image_field: str = field("image", "field of a TFDS example that holds the image")
    caption_field: str = field("captions", "field with the caption or captions: a, or a/b inside a")
    windows: str = field("", "directory that `prepare` wrote; empty: prepare into the cache")
    cache: str = field("", "where prepared windows are kept; empty: <workdir>/data")
    sequence_length: int = field(512, "tokens of a window (T)", low=2, high=LONGEST_WINDOW)
    eval_fraction: float = field(0.01, "share of documents or images held out", low=0.0, high=0.5)
    workers: int = field(0, "processes that tokenize; 0: one per core", low=0)
    on_corrupt: str = field(
        "fail", "a damaged or missing record: end, or another in its place", choices=_CORRUPT
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The language model: GPT-2 with either face (reference.md, section 1)."""

    layers: int = field(12, "blocks (L)", low=1)
    width: int = field(768, "model width (D)", low=4)
    heads: int = field(12, "attention heads (N)", low=1)
    mlp_width: int = field(0, "width of the MLP (F); 0: 4 x width", low=0)
    vocab_size: int = field(0, "entries of the vocabulary (V); 0: the tokenizer's", low=0)
    vocab_multiple: int = field(128, "the table is padded to a multiple of this many rows", low=1)
    positions: str = field("sinusoidal", "position embedding", choices=("sinusoidal", "learned"))
    max_positions: int = field(1024, "rows of a learned position table", low=1)
    embedding_scale: str = field(
        "sqrt_width", "factor on token embeddings", choices=("sqrt_width", "none")
    )
    activation: str = field(
        "gelu_erf", "MLP activation", choices=("gelu_erf", "gelu_tanh", "quick_gelu")
    )
    norm_epsilon: float = field(1e-5, "LayerNorm epsilon", low=0.0)
    dropout: float = field(0.1, "dropout of embeddings and residuals", low=0.0, high=0.99)
    attention_dropout: float = field(0.1, "dropout of attention weights", low=0.0, high=0.99)
    init: str = field("fairseq", "initialisation scheme", choices=("fairseq", "gpt2"))
    fusion_layers: tuple[int, ...] = field(
        (-2,), "blocks that see the grounding; negative counts from the end"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How a fusion block looks at its memory (docs/architecture.md, decision 1)."""

    query_scale: str = field(
        "model_width", "q is divided by the root of this", choices=("model_width", "head_width")
    )
    grounding_kv: str = field(
        "shared", "key and value matrices of the memory", choices=("shared", "own")
    )
    memory_bias: str = field(
        "none", "per-head logit bias on the memory, from -10", choices=("none", "learned")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """Shape of a text tower that is not read from files."""

    layers: int = field(2, "blocks", low=1)
    width: int = field(64, "model width", low=2)
    heads: int = field(2, "attention heads", low=1)
    projection: int = field(64, "width of the features (E)", low=1)
    context: int = field(77, "longest input, start and end tokens included", low=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTowerConfig:
    """Shape of the image tower that a contrastive run trains."""

    kind: str = field("vit", "vision transformer, or convolutions of stride 2", choices=_TOWERS)
    size: int = field(224, "height and width of the images, pixels", low=4)
    patch: int = field(32, "vit: height and width of a patch, pixels", low=1)
    layers: int = field(12, "vit: blocks", low=1)
    width: int = field(768, "vit: model width; conv: width of the hidden layer", low=2)
    heads: int = field(12, "vit: attention heads", low=1)
    channels: tuple[int, ...] = field((16, 32, 64), "conv: channels after each convolution")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The two towers of a contrastive run (Radford et al. 2021); `text.projection` is E of both."""

    text: TextTowerConfig = dataclasses.field(default_factory=TextTowerConfig)
    image: ImageTowerConfig = dataclasses.field(default_factory=ImageTowerConfig)
    temperature_start: float = field(1 / 0.07, "first factor on the cosines", low=1.0)
    temperature_cap: float = field(100.0, "largest factor on the cosines", low=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroundingConfig:
    """Where the grounding features z come from."""

    source: str = field(
        "text",
        "none: plain GPT-2; text: BLIND-VALM; images: VALM",
        choices=("none", "text", "images"),
    )
    tower: str = field("", "CLIP: directory, run, hub id, `random` (a control), or `toyworld`")
    tokenizer: str = field("", "tokenizer of the tower; empty: its own directory's")
    readout: str = field(
        "token", "the token's own output, or what <eos> says there", choices=("token", "eos")
    )
    segments: str = field(
        "causal", "rule that cuts rows for the tower", choices=("causal", "reference")
    )
    control: str = field(
        "none",
        "random_tower: the tower's shape with fresh weights; shuffled: features of another row",
        choices=("none", "random_tower", "shuffled"),
    )
    dtype: str = field("bfloat16", "computation of the tower", choices=("bfloat16", "float32"))
    neighbours: int = field(1, "grounding vectors a token (K); 1 for text", low=1)
    index: str = field(
        "",
        "images: index directory (python -m blindvalm_jax.index build); dry run: or vectors:NUMBER",
    )
    search: str = field(
        "exact",
        "images: on the devices; FAISS on the host; or looked up where `prepared` says",
        choices=("exact", "faiss", "prepared"),
    )
    prepared: str = field("", "directory of neighbours (python -m blindvalm_jax.index neighbours)")
    nprobe: int = field(0, "faiss: lists visited a query; 0: the paper's 32", low=0)
    rerank: int = field(0, "faiss: candidates ranked again exactly; 0: none", low=0)
    lists: int = field(0, "faiss: lists of its index; 0: those there are, or by its size", low=0)
    code_bytes: int = field(0, "faiss: bytes of a code; 0: those there are, or by width", low=0)
    random: TextTowerConfig = dataclasses.field(default_factory=TextTowerConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    objective: str = field(
        "language",
        "a language model on text; or CLIP's two towers on images with captions",
        choices=("language", "contrastive"),
    )
    steps: int = field(1000, "optimizer updates", low=1)
    batch_size: int = field(8, "rows (contrastive: pairs) an update, over all devices", low=1)
    microbatches: int = field(
        1, "parts a batch is computed in, one after the other; 0: as few as fit", low=0
    )
    dtype: str = field(
        "bfloat16", "computation of the model that is trained", choices=("bfloat16", "float32")
    )
    attention: str = field(
        "auto", "attention kernel of plain blocks", choices=("auto", "xla", "cudnn")
    )
    remat: str = field(
        "none",
        "what the backward pass recomputes; auto: as little as fits",
        choices=("none", "dots", "full", "auto"),
    )
    scan_unroll: int = field(1, "blocks compiled in line per scan iteration", low=1)
    loss_chunk: int = field(0, "positions of a row with live logits; 0: all of them", low=0)
    init_from: str = field("", "weights directory (see convert) the decoder starts from")
    branch_from: str = field("", "RUN@STEP: a run's checkpoint that this one goes on from")
    watchdog_seconds: float = field(
        1800.0, "a run without a finished update for so long ends, saying why; 0: never", low=0.0
    )
    on_nonfinite: str = field(
        "skip", "a loss or gradient that is not finite: that update, or the run", choices=_NONFINITE
    )
    nonfinite_limit: int = field(10, "such updates in a row that end the run (exit 43)", low=1)
    on_spike: str = field(
        "none", "a gradient norm far above the usual: update", choices=("none", "skip", "clip")
    )
    spike_factor: float = field(4.0, "times the running mean of the norms: a spike", low=1.01)
    spike_warmup: int = field(100, "updates before anything is a spike", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule; the defaults are the paper's (reference.md, section 2)."""

    learning_rate: float = field(2e-3, "peak learning rate", low=0.0)
    schedule: str = field(
        "inverse_sqrt", "shape", choices=("inverse_sqrt", "cosine", "constant_cooldown")
    )
    warmup_steps: int = field(4000, "updates of linear warm-up", low=0)
    warmup_init: float = field(1e-7, "learning rate of the first update", low=0.0)
    final_fraction: float = field(0.1, "end of the cosine, of the peak", low=0.0, high=1.0)
    cooldown_fraction: float = field(0.2, "share of steps that cool down", low=0.0, high=1.0)
    beta1: float = field(0.9, "Adam", low=0.0, high=0.99999)
    beta2: float = field(0.98, "Adam", low=0.0, high=0.99999)
    epsilon: float = field(1e-8, "Adam", low=0.0)
    epsilon_beside: str = field(
        "uncorrected",
        "root of the second moment that epsilon is added to: fairseq's, or the usual",
        choices=("uncorrected", "corrected"),
    )
    weight_decay: float = field(0.01, "decoupled, times the learning rate", low=0.0)
    decay: str = field(
        "all",
        "what is decayed: matrices and embeddings, or gains and biases too; no temperature",
        choices=("all", "matrices"),
    )
    clip_norm: float = field(2.0, "largest global gradient norm; 0: no clipping", low=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one may be -1: what is left."""

    data: int = field(-1, "replicas with their own rows", low=-1)
    fsdp: int = field(1, "shards of parameters and rows", low=-1)
    tensor: int = field(1, "shards of heads, MLP and vocabulary", low=-1)
    slices: int = field(
        1, "slices the data axis spans, over the slower network; -1: as devices report", low=-1
    )
    device_memory_gib: float = field(
        0.0, "memory of a device for what is chosen to fit; 0: as it reports", low=0.0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved."""

    every_steps: int = field(1000, "updates between checkpoints", low=1)
    keep: int = field(3, "latest checkpoints kept", low=1)
    keep_every: int = field(0, "checkpoints at multiples of it are kept for ever; 0: none", low=0)
    keep_best: int = field(0, "checkpoints kept for the lowest eval/loss; 0: none", low=0)
    keep_steps: tuple[int, ...] = field((), "steps also saved, and kept for ever")
    failures: int = field(3, "saves in a row that fail and end the run", low=1)
    timeout_seconds: int = field(1200, "a save that takes longer has failed", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Loss on held-out windows or pairs, and tasks put to a language model while it trains."""

    every_steps: int = field(500, "updates between evaluations; 0: never", low=0)
    windows: int = field(256, "held-out windows or pairs used; 0: all", low=0)
    tasks: str = field("", "tasks or groups, comma-separated (docs/evaluation.md); empty: none")
    tasks_every_steps: int = field(1000, "updates between tasks; the last one always asks", low=1)
    tasks_data: str = field("", "directory of the tasks' files, or above; text:, file: need none")
    tasks_protocol: str = field(
        "corrected", "how tasks are asked", choices=("corrected", "published")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training."""

    every_steps: int = field(10, "updates between metrics", low=1)
    tensorboard: bool = field(False, "also write TensorBoard events")
    wandb: str = field("", "also a run at Weights & Biases: PROJECT or ENTITY/PROJECT; empty: none")
    peak_tflops: float = field(0.0, "dense TFLOP/s of a device; 0: by its kind", low=0)
    layer_norms: bool = field(False, "also norms of each layer: gradient, update, parameters")
    profile_steps: tuple[int, ...] = field(
        (), "first and last step of a profiler trace in <workdir>/profile; empty: none"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    seed: int = field(0, "of initialisation, dropout and data order", low=0, high=2**31 - 1)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    fusion: FusionConfig = dataclasses.field(default_factory=FusionConfig)
    clip: ClipConfig = dataclasses.field(default_factory=ClipConfig)
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
    parsed: Config = config_fields.build(Config, config.to_dict(), "config")
    config_checks.check(parsed)
    return parsed


def from_dict(values: dict[str, Any]) -> Config:
    """Reads a config back from the `config.json` of a run, as `completed`."""
    return parse(ml_collections.ConfigDict(completed(values)))


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run with those that are newer than it.

    The default of a setting that is added later is what the program did before.
    """
    return config_fields.completed(Config, values)


def resolve(config: Config, *, vocab_size: int, mesh: Mapping[str, int]) -> Config:
    """The settings with every "0: take it from elsewhere" and -1 filled in, for the record."""
    decoder = dataclasses.replace(
        config.decoder,
        vocab_size=vocab_size,
        mlp_width=config.decoder.mlp_width or 4 * config.decoder.width,
        fusion_layers=fusion_layers(config),
    )
    sizes = dataclasses.replace(config.mesh, **mesh)
    return dataclasses.replace(config, decoder=decoder, mesh=sizes)


def describe() -> Iterator[tuple[str, Any, str]]:
    """Yields (key, default, meaning with its range) of every setting."""
    return config_fields.describe(Config)


def _main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: this only prints the settings")
    for key, value, meaning in describe():
        print(f"{key:32} {value!s:14} {meaning}")


if __name__ == "__main__":
    run_main(_main)
